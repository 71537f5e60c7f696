"""Pictures and captions in the joint embedding of a trained CLIP."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from cli.errors import UserError
from cli.locations import Location
from data.bounded_cache import BoundedCache
from data.preprocess import transform_pair
from sample.trained import TrainedSampler

BLOCK = 256  # pictures to have in memory at once where there are many


@dataclasses.dataclass(frozen=True)
class ClipEmbedder:
    """Embeds with a trained CLIP; features are of unit length.

    Attributes:
      trained: the run.
    """

    trained: TrainedSampler
    _known: BoundedCache[Float[np.ndarray, " e"]] = dataclasses.field(
        default_factory=lambda: BoundedCache(2**26, 2**12, lambda feature: feature.nbytes), init=False, repr=False
    )

    @classmethod
    def open(cls, folder: str | Location) -> "ClipEmbedder":
        """Loads a run, or a pretrained folder.

        Raises:
          UserError: if there is none, or it is not of a CLIP.
        """
        trained = TrainedSampler.open(folder)
        if "features" not in trained.sampler.makes:
            raise UserError(f"{folder} is a run of {trained.config.objective}, not of clip; name a trained CLIP")
        return cls(trained)

    @property
    def transform(self) -> str:
        """The name of what brings pictures to the network's size, in `data.preprocess`."""
        return transform_pair(self.trained.config.data.transform).evaluation.__name__

    def images(self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]] | UInt8[np.ndarray, "n h w 3"]) -> np.ndarray:
        """Features [n e] of pictures of any size, as the run's own transform brings them to the network's.

        Pictures of that size already are left as they are.
        """
        data = self.trained.config.data
        transform = transform_pair(data.transform).evaluation
        seen = np.stack([transform(image, data.image_size, None) for image in images])
        return self.trained({"image": seen}, seed=0, indices=range(len(seen)))["image_features"]

    def texts(self, texts: Sequence[str]) -> Float[np.ndarray, "n e"]:
        """Features of texts, in their order; each is embedded once, and again only after many others."""
        known = ((text, self._known.get(text)) for text in dict.fromkeys(texts))
        features = {text: feature for text, feature in known if feature is not None}
        new = [text for text in dict.fromkeys(texts) if text not in features]
        if new:
            made = self.trained(self.trained.encode(new), seed=0, indices=range(len(new)))["text_features"]
            for text, feature in zip(new, made, strict=True):
                features[text] = feature.copy()  # a view would keep all of them
                self._known.put(text, features[text])
        return np.stack([features[text] for text in texts])

    def cosines(self, images: UInt8[np.ndarray, "n h w 3"], captions: Sequence[str]) -> Float[np.ndarray, " n"]:
        """Cosine of each picture with its own caption."""
        return np.sum(self.images(images) * self.texts(captions), axis=1)
