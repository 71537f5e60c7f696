"""Formats of other projects: one file each, with both directions."""
