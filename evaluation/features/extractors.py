"""From pictures to the features that metrics compare: networks that others trained, by name.

`create_extractor("inception:FILE", "clean")` is the only door. An extractor names the metrics that are defined on its
features, and an identity that changes whenever its features would.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from cli.errors import UserError
from cli.locations import local
from models import create_model
from models.inception import Inception
from sample.embedding import ClipEmbedder
from weights.files.origin import WeightsFile, read_weights
from weights.formats.inception import from_torch
from weights.sources import RANDOM

Pictures = UInt8[np.ndarray, "n h w 3"]


@runtime_checkable
class FeatureExtractor(Protocol):
    """A network with weights and everything that is done to a picture before it.

    Attributes:
      identity: kind, resize and a hash of the weights; goes into records and into the provenance of stored features.
      resize: how pictures come to the network's size.
      metrics: names of the metrics that are defined on its features.
    """

    @property
    def identity(self) -> str: ...

    @property
    def resize(self) -> str: ...

    @property
    def metrics(self) -> tuple[str, ...]: ...

    def features(self, images: Pictures) -> Float[np.ndarray, "n d"]:
        """Measures pictures, each alone: the others of the call change nothing."""
        ...


@runtime_checkable
class Classifier(FeatureExtractor, Protocol):
    """An extractor that classifies too, as the Inception score needs."""

    def features_and_logits(self, images: Pictures) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "n v"]]:
        """Features, and logits by the convention of the Inception score."""
        ...


def create_extractor(spec: str, resize: str = "") -> FeatureExtractor:
    """Builds an extractor.

    Args:
      spec: `name:FILE`, such as `inception:weights.pth`; `inception:random` has random weights, for tests.
      resize: one of the extractor's; "" for its default.

    Raises:
      UserError: if there is no such extractor or resize, or the file does not hold its weights.
    """
    name, _, source = spec.partition(":")
    if name not in EXTRACTORS or not source:
        raise UserError(
            f"--features={spec} names no extractor; give --features=NAME:FILE, NAME {', '.join(EXTRACTORS)}"
        )
    return EXTRACTORS[name](source, resize)


@dataclasses.dataclass(frozen=True)
class InceptionExtractor:
    """Inception-v3 of the Frechet distance; features are its last pooling layer, float32 [n 2048].

    Two ways to bring a picture to 299 x 299 are in use, and tables made with them do not compare: `clean`, of clean-fid
    (Parmar et al. 2022): Pillow's bicubic filter with antialiasing, on channels in float32, clipped to 0..255; and
    `tf1`, of the original code and torch-fidelity: bilinear without antialiasing, inside the network.

    Attributes:
      model: the network.
      variables: its parameters and statistics.
      resize: `clean` or `tf1`.
      identity: see `FeatureExtractor`.
      chunk: pictures in one call of the network. Calls are padded to it, so that a picture's features come out of the
        same program whatever their number.
    """

    RESIZES: ClassVar[tuple[str, ...]] = ("clean", "tf1")

    model: Inception
    variables: Mapping[str, Any]
    resize: str
    identity: str
    chunk: int = 32

    @classmethod
    def load(cls, source: str, resize: str = "") -> "InceptionExtractor":
        """Reads the published weights, or draws random ones if `source` is "random".

        Raises:
          UserError: if the resize is unknown, or the file does not hold these weights.
        """
        resize = resize or cls.RESIZES[0]
        if resize not in cls.RESIZES:
            raise UserError(f"--resize={resize} is unknown to inception; choose {' or '.join(cls.RESIZES)}")
        model = create_model("inception")
        variables = (
            random_variables(model)
            if source == RANDOM
            else from_torch(model, read_weights(WeightsFile(local(source, "the file of --features")), ()))
        )
        kind = "inception-random" if source == RANDOM else "inception"
        return cls(model, variables, resize, f"{kind}/{resize}/{hash_tree(variables)}")

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that papers compute of these features."""
        return ("fid", "kid", "inception_score", "precision_recall")

    def features(self, images: Pictures) -> Float[np.ndarray, "n d"]:
        """Measures pictures."""
        return self.features_and_logits(images)[0]

    def features_and_logits(self, images: Pictures) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "n v"]]:
        """Features, and the logits without the bias of their layer, as torch-fidelity takes them for its score."""
        results = []
        for start in range(0, len(images), self.chunk):
            part = np.take(images, np.arange(start, start + self.chunk), axis=0, mode="clip")
            prepared = resize_clean(part, self.model.image_size) if self.resize == "clean" else part.astype(np.float32)
            results.append(jax.device_get(_measure(self.model, self.variables, prepared)))
        features, logits = (np.concatenate(arrays) for arrays in zip(*results, strict=True))
        return features[: len(images)], logits[: len(images)]


@dataclasses.dataclass(frozen=True)
class ClipExtractor:
    """The image tower of a CLIP; features are its embeddings, of unit length.

    Attributes:
      clip: the run.
      identity: see `FeatureExtractor`.
      resize: what evaluation does in place of the run's transform; CLIP's own is Pillow's antialiased bicubic filter on
        bytes, and a central square.
    """

    clip: ClipEmbedder
    identity: str
    resize: str

    @classmethod
    def load(cls, source: str, resize: str = "") -> "ClipExtractor":
        """Opens a run.

        Raises:
          UserError: if it is missing or no CLIP, or another resize is asked for.
        """
        clip = ClipEmbedder.open(source)
        if resize not in ("", clip.transform):
            raise UserError(f"--resize={resize} is unknown to clip; this run has only {clip.transform}")
        run = clip.trained
        weights = {"params": run.weights.params, "variables": run.weights.variables}
        network = json.dumps(run.config.models.clip.to_dict(), sort_keys=True).encode()
        hashes = f"{hash_tree(weights)}-{hashlib.sha256(network).hexdigest()[:8]}"
        return cls(clip, f"clip/{clip.transform}/{hashes}", clip.transform)

    @property
    def metrics(self) -> tuple[str, ...]:
        """All that need no classes."""
        return ("cmmd", "fid", "kid", "precision_recall")

    def features(self, images: Pictures) -> Float[np.ndarray, "n d"]:
        """Embeds pictures."""
        return self.clip.images(images)


EXTRACTORS: dict[str, Callable[[str, str], FeatureExtractor]] = {
    "clip": ClipExtractor.load,
    "inception": InceptionExtractor.load,
}


def random_variables(model: Inception) -> Any:
    """Random weights whose features neither vanish nor grow, always the same; drawn without compiling `init`."""
    rng = np.random.default_rng(0)

    def draw(path: tuple[Any, ...], leaf: Any) -> Float[np.ndarray, "..."]:
        if leaf.ndim > 1:
            return rng.normal(0, np.sqrt(2 / np.prod(leaf.shape[:-1])), leaf.shape).astype(leaf.dtype)
        return np.full(leaf.shape, path[-1].key in ("scale", "var"), leaf.dtype)

    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs(1))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def resize_clean(images: Pictures, size: int) -> Float[np.ndarray, "n {size} {size} 3"]:
    """Resizes as clean-fid does: each channel by Pillow's antialiased bicubic filter in float32, clipped to 0..255."""
    resized = np.empty((len(images), size, size, 3), np.float32)
    for picture, target in zip(images, resized, strict=True):
        for channel in range(3):
            plane = Image.fromarray(picture[:, :, channel].astype(np.float32))
            target[:, :, channel] = np.asarray(plane.resize((size, size), Image.Resampling.BICUBIC))
    return resized.clip(0, 255)


def hash_tree(tree: Any) -> str:
    """A hash of a tree of arrays: paths, shapes, dtypes and values, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


@functools.partial(jax.jit, static_argnums=0)
def _measure(model: Inception, variables: Any, images: Any) -> tuple[jax.Array, jax.Array]:
    outputs: Any = model.apply(variables, jnp.asarray(images))
    return outputs["features"], outputs["logits_unbiased"]
