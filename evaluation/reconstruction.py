"""How much of a picture an image tokenizer keeps."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8


def reconstruction_errors(
    images: UInt8[np.ndarray, "n h w c"], reconstructions: UInt8[np.ndarray, "n h w c"]
) -> dict[str, float]:
    """Mean squared error on the 0..1 scale, and peak signal-to-noise ratio in dB of that mean."""
    error = float(np.mean(((images.astype(np.float64) - reconstructions) / 255) ** 2))
    return {"mse": error, "psnr_db": float(-10 * np.log10(max(error, 1e-12)))}


def code_usage(tokens: Int[np.ndarray, "..."], vocab_size: int) -> dict[str, Any]:
    """Codes that occur, and the perplexity exp(entropy) of their distribution over all positions."""
    counts = np.bincount(np.asarray(tokens).ravel(), minlength=vocab_size)
    share: Float[np.ndarray, " v"] = counts[counts > 0] / counts.sum()
    return {"codes_used": int((counts > 0).sum()), "code_perplexity": float(np.exp(-(share * np.log(share)).sum()))}
