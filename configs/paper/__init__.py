"""The papers' own sizes and hyper-parameters, one per system."""
