"""From trained weights to pictures, captions and tokens. `python -m sample` runs it."""
