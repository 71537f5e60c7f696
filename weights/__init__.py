"""Parameters at rest: checkpoints, run folders, sources of trained parts, and other projects' formats."""
