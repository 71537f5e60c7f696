"""Captioners on a frozen CLIP: next-token prediction behind a prefix of features (Mokady et al. 2021, equation 3).

    loss = mean over captions of the mean over a caption's tokens, its end among them, of -ln p

The prefix and the start token are read and not predicted, pads neither. With `config.trainable` GPT-2 may stay as it
is, so that the mapper alone learns (section 3.2).
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key
from ml_collections import ConfigDict

from cli.errors import UserError
from models.captioner import Captioner
from sample.samplers.captioner import CaptionerSampler, check_squares
from train.objectives.contract import Aux, Batch, Preview, Tree, example_keys
from train.objectives.llama import token_loss
from train.objectives.packing import Row
from train.objectives.preview import gather
from weights.run import TOKENIZER


def caption_targets(
    text: Int[Array, "b t"], end_id: int, framed: bool = True
) -> tuple[Int[Array, "b s"], Bool[Array, "b s"]]:
    """Tokens of captions, behind their start if they are framed, and which count: up to the first end, with it."""
    tokens = text[:, 1:] if framed else text
    ends = jnp.cumsum(tokens == end_id, axis=1)
    return tokens, (ends - (tokens == end_id)) == 0


@dataclasses.dataclass(frozen=True)
class CaptionerObjective:
    """Trains part `captioner`, a `models.captioner.Captioner`.

    Attributes:
      sampler: holds the networks, and writes the previews.
    """

    sampler: CaptionerSampler

    @classmethod
    def from_config(cls, config: ConfigDict) -> "CaptionerObjective":
        """Reads `config.models.captioner`, `config.frozen.clip` and `config.sample`.

        Raises:
          UserError: if captions have no ends, or are longer than CLIP or GPT-2 reads, or pictures that are read have
            several shapes.
        """
        objective = cls(CaptionerSampler.from_config(config))
        if "image" in objective.sampler.reads:  # pictures that are only shown beside captions may have any
            check_squares(config)
        sampler, length = objective.sampler, config.data.text_length
        model, clip = sampler.model, sampler.clip
        if not length or not (config.data.text_ends or config.data.tokenizer):
            raise UserError("captions are framed and have a length; set config.data.text_ends and text_length")
        apart, most = bool(config.data.get("writes_with", "")), model.length - model.prefix_length + 1
        if apart and not 0 < config.data.written_length <= most:
            raise UserError(
                f"config.data.written_length={config.data.written_length} is not what the captioner writes; use 1 to "
                f"{most}"
            )
        most = clip.text_length if apart else min(clip.text_length, most + 1)  # which has a start
        if length > most:
            raise UserError(f"config.data.text_length={length} is more than CLIP and the captioner read; use {most}")
        if not apart and (clip.text_vocab_size, clip.text_end_id) != (model.text_vocab_size, sampler.end_id):
            raise UserError(
                f"captions are read by CLIP, of {clip.text_vocab_size} ids with the end {clip.text_end_id}, and "
                f"written by a captioner of {model.text_vocab_size} with the end {sampler.end_id}; set "
                "config.models.captioner.text_vocab_size and text_end_id to CLIP's, or config.data.writes_with to the "
                "captioner's own tokenizer"
            )
        return objective

    @property
    def model(self) -> Captioner:
        """The network that is trained."""
        return self.sampler.model

    def init(self, rng: Key[Array, ""], batch: Batch) -> tuple[Tree, Tree]:
        """Returns ({"captioner": parameters}, {})."""
        del batch
        inputs = [jnp.zeros(x.shape, x.dtype) for x in self.model.example_inputs(1)]
        return {"captioner": self.model.init(rng, *inputs)["params"]}, {}

    def loss(
        self, params: Tree, variables: Tree, frozen: Tree, batch: Batch, rng: Key[Array, ""], step: Array, train: bool
    ) -> tuple[Float[Array, ""], Aux]:
        """The cross-entropy of captions, mean over examples of the mean over their tokens.

        An example's loss does not depend on the others, so it adds up over any split of the batch.

        Metrics: as of `train.objectives.llama.token_loss`. `batch` holds text int32 [b t], framed, 0 behind, and image
        uint8 [b H W 3]; if the captioner has a vocabulary of its own, also written int32 [b m], ended, 0 behind. Where
        features were stored, image_features stand in the place of image, or token_features beside text.
        """
        del step
        keys = example_keys(rng, batch) if train and self.model.dropout else None
        apart = "written" in batch
        targets, counted = caption_targets(batch["written" if apart else "text"], self.sampler.end_id, not apart)
        features = self.sampler.features(frozen, batch)
        logits = self.model.apply({"params": params["captioner"]}, targets[:, :-1], features, keys)
        whole = jnp.any(targets == self.sampler.end_id, axis=1)
        loss, metrics = token_loss(logits, Row(targets, targets, counted, whole))  # the prefix scores the first token
        return loss, Aux(metrics=metrics, variables=variables)

    def preview(
        self, params: Tree, variables: Tree, frozen: Tree, batch: Batch, rng: Key[Array, ""]
    ) -> dict[str, Preview]:
        """Pictures of the batch, each with the caption that is written for it, or for its caption."""
        if "image" not in batch:  # what was stored of pictures shows none
            return {}
        rows = {name: np.asarray(batch[name]) for name in self.sampler.reads}
        captions = self.sampler(params, variables, frozen, self.sampler.request(**rows), example_keys(rng, batch))
        images, written = gather(batch["image"]), self.sampler.writes_with != TOKENIZER
        return {
            "captions": Preview(
                images=images, columns=min(len(images), 8), labels=gather(captions["text"]), written=written
            )
        }
