"""What every command shares: errors, exit codes, flags, environment. Standard library, absl, ml_collections."""
