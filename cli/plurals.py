"""Nouns beside numbers, as people read them."""


def spell_count(number: int, noun: str, plural: str = "") -> str:
    """Such as "1 picture", "2 pictures" and "12,000 pictures".

    Args:
      number: of things.
      noun: of one thing.
      plural: of several, where that is more than the noun with an s.
    """
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"
