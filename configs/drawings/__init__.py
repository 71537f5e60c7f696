"""Systems sized for a laptop CPU, on drawings with names that nobody drew for this project."""
