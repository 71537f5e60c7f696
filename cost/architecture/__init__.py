"""What networks are made of: their modules with parameters, FLOPs and roles, as a tree and as a figure."""
