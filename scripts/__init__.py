"""Commands beside train, sample and evaluation. Nothing imports them."""
