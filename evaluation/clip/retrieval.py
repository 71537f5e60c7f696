"""Retrieval: how far down the list of nearest captions a picture's own stands, and the other way round."""

import numpy as np
from jaxtyping import Float, Int

CHUNK = 1024  # queries at once: 1024 x 100,000 similarities are 0.4 GB


def retrieval_ranks(
    queries: Float[np.ndarray, "q e"],
    items: Float[np.ndarray, "i e"],
    query_owner: Int[np.ndarray, " q"],
    item_owner: Int[np.ndarray, " i"],
) -> Int[np.ndarray, " q"]:
    """The rank of the nearest item that belongs to each query, 1 for the best.

    Only items of other owners stand before it: with several captions a picture, the nearest of its own counts (the
    protocol of COCO and Flickr30k). An item as near as it counts against it, so that equal features retrieve nothing,
    nor do features that are no numbers.

    Args:
      queries: features of unit length.
      items: features of unit length.
      query_owner: which pair each query is of; each must own an item.
      item_owner: which pair each item is of.
    """
    queries, items = np.asarray(queries, np.float32), np.asarray(items, np.float32)
    ranks = np.empty(len(queries), np.int64)
    for start in range(0, len(queries), CHUNK):
        part = slice(start, start + CHUNK)
        similarity = queries[part] @ items.T
        own = query_owner[part, None] == item_owner[None, :]
        best = np.max(np.where(own, similarity, -np.inf), axis=1, keepdims=True)
        ranks[part] = 1 + np.sum(~(similarity < best) & ~own, axis=1)
    return ranks


def retrieval_metrics(
    image_features: Float[np.ndarray, "n e"], text_features: Float[np.ndarray, "m e"], owner: Int[np.ndarray, " m"]
) -> dict[str, float]:
    """Recall at 1, 5 and 10 and the median rank, both ways.

    Args:
      image_features: of n pictures.
      text_features: of their captions, one or several a picture.
      owner: the picture of each caption, 0 .. n - 1; every picture has one.
    """
    pictures = np.arange(len(image_features))
    ranks = {
        "text_to_image": retrieval_ranks(text_features, image_features, owner, pictures),
        "image_to_text": retrieval_ranks(image_features, text_features, pictures, owner),
    }
    values = {}
    for direction, rank in ranks.items():
        values |= {f"{direction}_r{k}": float(np.mean(rank <= k)) for k in (1, 5, 10)}
        values[f"{direction}_median_rank"] = float(np.median(rank))
    return values
