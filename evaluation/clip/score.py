"""CLIP score: how near pictures are to their captions, in one of the conventions that are in use.

Numbers of different conventions or networks cannot be compared, so the record names both.
"""

import numpy as np
from jaxtyping import Float

PREFIX = "A photo depicts "  # before every caption, in "hessel"


def clip_score(cosine: Float[np.ndarray, " n"], convention: str) -> float:
    """Averages cosines.

    Args:
      cosine: of each picture with its caption.
      convention: "cosine", their mean, as in the tables of DALL-E's successors; "hessel", mean of 2.5 max(cosine, 0)
        (Hessel et al. 2021, equation 1), whose captions begin with `PREFIX`; "torchmetrics", 100 max(mean, 0).
    """
    if convention == "hessel":
        return float(np.mean(2.5 * np.maximum(cosine, 0)))
    mean = float(np.mean(cosine))
    return 100 * max(mean, 0.0) if convention == "torchmetrics" else mean


CONVENTIONS = ("cosine", "hessel", "torchmetrics")
