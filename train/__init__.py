"""The one training loop. `python -m train` runs it."""
