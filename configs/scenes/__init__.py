"""CPU-sized recipes on the embedded dataset `scenes`, one per system."""
