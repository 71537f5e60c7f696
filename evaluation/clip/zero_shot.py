"""Zero-shot classification: the class whose description lies nearest (Radford et al. 2021, section 3.1)."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from cli.errors import UserError

Embed = Callable[[Sequence[str]], Float[np.ndarray, "n e"]]

DEFAULT_TEMPLATES = ("a photo of a {}.",)  # section 3.1.4; a user's own usually do better


def fill_templates(names: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """The prompts of each class: every template with `{}` replaced by its name.

    Raises:
      UserError: if a template has no `{}`.
    """
    for template in templates:
        if "{}" not in template:
            raise UserError(f"the template {template!r} has no {{}} for the name of a class")
    return [[template.replace("{}", name) for template in templates] for name in names]


def class_embeddings(embed: Embed, prompts: Sequence[Sequence[str]]) -> Float[np.ndarray, "k e"]:
    """One embedding a class: the mean of its prompts' features, scaled to unit length (section 3.1.4).

    Args:
      embed: texts -> features of unit length.
      prompts: of each class; not all need as many.
    """
    features = embed([text for texts in prompts for text in texts])
    bounds = np.cumsum([len(texts) for texts in prompts])[:-1]
    means = np.stack([part.mean(axis=0) for part in np.split(np.asarray(features, np.float64), bounds)])
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def top_accuracy(
    image_features: Float[np.ndarray, "n e"],
    classes: Float[np.ndarray, "k e"],
    labels: Int[np.ndarray, " n"],
    top: Sequence[int] = (1, 5),
) -> dict[str, float]:
    """Shares of pictures whose class is among the nearest `top`; a class as near as the right one counts against it.

    With fewer classes than that a share would be 1 whatever the features say, so it is left out.
    """
    similarity = np.asarray(image_features, np.float64) @ np.asarray(classes, np.float64).T
    right = np.take_along_axis(similarity, labels[:, None], axis=1)
    rank = np.sum(~(similarity < right), axis=1)  # 1 for the nearest; a feature that is no number is never right
    return {f"top_{k}": float(np.mean(rank <= k)) for k in top if k < len(classes)}
