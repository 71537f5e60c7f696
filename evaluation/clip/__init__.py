"""What a CLIP knows of a dataset, and what it makes of the pictures that a run draws."""
