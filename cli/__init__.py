"""What every command shares: errors and exit codes, flags, and the process environment. Standard library and absl only."""
