"""Reranking: a CLIP chooses among the pictures drawn for a caption (Ramesh et al. 2021, section 2.6)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8

from cli.errors import UserError
from data.preprocess import transform_pair
from sample.trained import TrainedSampler


def open_clip_run(folder: str) -> TrainedSampler:
    """Loads a run that scores pictures.

    Raises:
      UserError: if there is none, or it is not of the objective "clip".
    """
    trained = TrainedSampler.open(folder)
    if trained.config.objective != "clip":
        raise UserError(f"{folder} is a run of {trained.config.objective}, not of clip; name a trained CLIP")
    return trained


def clip_cosines(
    clip: TrainedSampler, images: UInt8[np.ndarray, "n h w 3"], captions: Sequence[str]
) -> Float[np.ndarray, " n"]:
    """Cosine of each picture with its own caption.

    Args:
      clip: the run that scores.
      images: of any size; CLIP's own transform brings them to its size.
      captions: as many as pictures.
    """
    data = clip.config.data
    transform = transform_pair(data.transform).evaluation
    seen = np.stack([transform(image, data.image_size, None) for image in images])
    distinct = list(dict.fromkeys(captions))
    pictures = clip({"image": seen}, seed=0, indices=range(len(seen)))["image_features"]
    texts = clip(clip.encode(distinct), seed=0, indices=range(len(distinct)))["text_features"]
    places = [distinct.index(caption) for caption in captions]
    return np.sum(pictures * texts[places], axis=1)


def best_first(cosines: Float[np.ndarray, "p n"], keep: int) -> Int[np.ndarray, "p {keep}"]:
    """The `keep` highest of each row, best first; of equals, the one drawn first."""
    return np.argsort(-cosines, axis=1, kind="stable")[:, :keep]
