"""Retrieval: how far down the list of nearest captions a picture's own stands, and the other way round."""

from collections.abc import Sequence

import numpy as np
import scipy.sparse
from jaxtyping import Float, Int

CHUNK = 1024  # queries at once: 1024 x 100,000 similarities are 0.4 GB


def match_captions(captions: Sequence[Sequence[str]]) -> tuple[list[str], scipy.sparse.csr_array]:
    """All captions of some pictures, one after the other, and which picture each is true of.

    A caption is true of every picture that has the same one, whoever it stands with: none of them is a wrong answer.

    Args:
      captions: of each of n pictures.

    Returns:
      The m captions, and bool [n m], sparse.
    """
    texts = [text for own in captions for text in own]
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    number = np.array([numbers[text] for text in texts], np.int64)
    pictures = np.repeat(np.arange(len(captions)), [len(own) for own in captions])
    has = scipy.sparse.csr_array((np.ones(len(texts), bool), (pictures, number)), (len(captions), len(numbers)))
    return texts, has[:, number]


def retrieval_ranks(
    queries: Float[np.ndarray, "q e"], items: Float[np.ndarray, "i e"], own: scipy.sparse.csr_array
) -> Int[np.ndarray, " q"]:
    """The rank of the nearest item that belongs to each query, 1 for the best.

    Only items that do not belong to it stand before it: with several captions a picture, the nearest of its own counts
    (the protocol of COCO and Flickr30k). An item as near as it counts against it, so that equal features retrieve
    nothing, nor do features that are no numbers.

    Args:
      queries: features of unit length.
      items: features of unit length.
      own: bool [q i], which items belong to each query; at least one to each.
    """
    queries, items = np.asarray(queries, np.float32), np.asarray(items, np.float32)
    ranks = np.empty(len(queries), np.int64)
    for start in range(0, len(queries), CHUNK):
        part = slice(start, start + CHUNK)
        similarity = queries[part] @ items.T
        belongs = own[part].toarray()
        best = np.max(np.where(belongs, similarity, -np.inf), axis=1, keepdims=True)
        ranks[part] = 1 + np.sum(~(similarity < best) & ~belongs, axis=1)
    return ranks


def retrieval_metrics(
    image_features: Float[np.ndarray, "n e"], text_features: Float[np.ndarray, "m e"], own: scipy.sparse.csr_array
) -> dict[str, float]:
    """Recall at 1, 5 and 10 and the median rank, both ways.

    Args:
      image_features: of n pictures.
      text_features: of their captions, one or several a picture.
      own: bool [n m], see `match_captions`.
    """
    ranks = {
        "text_to_image": retrieval_ranks(text_features, image_features, own.T.tocsr()),
        "image_to_text": retrieval_ranks(image_features, text_features, own),
    }
    values = {}
    for direction, rank in ranks.items():
        values |= {f"{direction}_r{k}": float(np.mean(rank <= k)) for k in (1, 5, 10)}
        values[f"{direction}_median_rank"] = float(np.median(rank))
    return values
