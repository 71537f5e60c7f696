"""Named tensors in files: where the files are, how they are read and written, and tables of names."""
