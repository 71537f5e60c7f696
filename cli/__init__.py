"""What every command shares: errors, exit codes, flags, environment. Standard library and ml_collections."""
