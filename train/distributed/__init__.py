"""One run on many devices and processes: mesh, sharding, who is first, and being told to stop."""
