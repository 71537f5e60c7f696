"""What to run: one experiment a file, each with `get_config(argument)`."""
