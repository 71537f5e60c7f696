"""DALL-E stage 2 (Ramesh et al. 2021, section 2.2 and appendix B): next-token prediction over caption and image tokens.

    loss = text_weight * mean over caption tokens of -ln p + image_weight * mean over image tokens of -ln p

with published weights 1/8 and 7/8; each mean is by its own count. Pads are tokens like others: each position has its
own, and by default predicting them is part of the loss, as published (`mask_pads` leaves them out).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict

from cli.errors import UserError
from cli.ranges import check_ranges
from models.dalle import Dalle, DalleLogits
from sample.image_tokens import ImageTokens
from sample.samplers.dalle import DalleSampler
from sample.samplers.dvae import from_uint8
from train.objectives.contract import Aux, Batch, Preview, Tree, example_keys
from train.objectives.preview import to_host

_NUMBERS = {"text_weight": "[0, inf)", "image_weight": "[0, inf)", "caption_dropout": "[0, 1)"}


@dataclasses.dataclass(frozen=True)
class DalleObjective:
    """Trains part `dalle`, a `models.dalle.Dalle`, over the tokens of the frozen part `dvae`.

    Attributes:
      sampler: holds the transformer and the image tokenizer, and draws the previews.
      text_weight: published 1/8.
      image_weight: published 7/8.
      mask_pads: leave pads out of the caption's loss; published False.
      caption_dropout: probability that an example's caption is replaced by the blank one (all pads) in training, which
        is the unconditional caption of guidance; published 0. What a blanked caption would say of the text is not
        counted: its text loss is 0, so the text model learns from real captions only.
    """

    sampler: DalleSampler
    text_weight: float = 1 / 8
    image_weight: float = 7 / 8
    mask_pads: bool = False
    caption_dropout: float = 0.0

    @classmethod
    def from_config(cls, config: ConfigDict) -> "DalleObjective":
        """Reads `config.models.dalle`, `config.frozen.dvae`, `config.sample` and `config.loss`.

        Raises:
          UserError: if the image tokenizer does not fit the transformer, or a value is impossible.
        """
        objective = cls(sampler=DalleSampler.from_config(config), **config.loss)
        check_ranges("config.loss", config.loss.to_dict(), _NUMBERS)
        if objective.text_weight == objective.image_weight == 0:
            raise UserError("config.loss.text_weight and config.loss.image_weight are both 0; nothing would be trained")
        return objective

    @property
    def model(self) -> Dalle:
        """The network that is trained."""
        return self.sampler.model

    @property
    def image_tokens(self) -> ImageTokens:
        """The frozen image tokenizer."""
        return self.sampler.image_tokens

    def init(self, rng: Key[Array, ""], batch: Batch) -> tuple[Tree, Tree]:
        """Returns ({"dalle": parameters}, {})."""
        del batch
        inputs = [jnp.zeros(x.shape, x.dtype) for x in self.model.example_inputs(1)]
        return {"dalle": self.model.init(rng, *inputs)["params"]}, {}

    def loss(
        self, params: Tree, variables: Tree, frozen: Tree, batch: Batch, rng: Key[Array, ""], step: Array, train: bool
    ) -> tuple[Float[Array, ""], Aux]:
        """The weighted cross-entropy, mean over examples.

        An example's loss does not depend on the others, so it adds up over any split of the batch.

        Metrics: loss; text_loss and image_loss, nats per counted token, before the weights; image_accuracy, the share
        of image tokens whose most likely prediction is right. The loss of no learning is ln(vocabulary).

        `batch` holds text int32 [b t], 0 where there is no token; and image_tokens int32 [b n] (or [b h w]), or else
        image uint8 [b h w c], which the frozen tokenizer turns into tokens.
        """
        del step
        text = batch["text"]
        tokens = self._tokens_of(frozen, batch).reshape(len(text), -1)
        counted = jnp.ones(text.shape, bool)
        if self.mask_pads:
            counted = text != 0
        if train and self.caption_dropout:
            blank = jax.vmap(lambda key: jax.random.bernoulli(key, self.caption_dropout))(example_keys(rng, batch))
            text = jnp.where(blank[:, None], 0, text)
            counted &= ~blank[:, None]

        logits: DalleLogits = self.model.apply({"params": params["dalle"]}, text, tokens)
        targets = self.model.text_targets(text)
        text_nats, text_count = _sum_of(
            optax.softmax_cross_entropy_with_integer_labels(logits.text, targets),
            counted[:, text.shape[1] - targets.shape[1] :],
        )
        image_nats, image_count = _sum_of(
            optax.softmax_cross_entropy_with_integer_labels(logits.image, tokens), jnp.ones(tokens.shape, bool)
        )
        loss = self.text_weight * text_nats / jnp.maximum(text_count, 1) + self.image_weight * image_nats / image_count
        correct = jnp.sum(jnp.argmax(logits.image, axis=-1) == tokens, axis=1, dtype=jnp.float32)
        metrics = {
            "loss": (jnp.sum(loss), jnp.asarray(len(text), jnp.float32)),
            "text_loss": (jnp.sum(text_nats), jnp.sum(text_count)),
            "image_loss": (jnp.sum(image_nats), jnp.sum(image_count)),
            "image_accuracy": (jnp.sum(correct), jnp.sum(image_count)),
        }
        return jnp.mean(loss), Aux(metrics=metrics, variables=variables)

    def preview(
        self, params: Tree, variables: Tree, frozen: Tree, batch: Batch, rng: Key[Array, ""]
    ) -> dict[str, Preview]:
        """Two rows: what the image tokenizer makes of the true pictures, and samples for their captions."""
        text = np.asarray(batch["text"])
        truth = to_host(_reconstruct(self, frozen, batch))
        drawn = self.sampler(params, variables, frozen, self.sampler.request(text), example_keys(rng, batch))
        rows = np.concatenate([truth, to_host(drawn["image"])])
        rows = np.repeat(rows, 3 // rows.shape[-1], axis=-1)  # gray pictures are logged as color
        return {"samples": Preview(images=rows, columns=len(text), labels=np.concatenate([text, text]))}

    def _tokens_of(self, frozen: Tree, batch: Batch) -> Int[Array, "b *n"]:
        """The batch's image tokens: precomputed, or from its pictures.

        Raises:
          ValueError: if these have another grid of tokens.
        """
        if "image_tokens" in batch:
            return batch["image_tokens"]
        tokens = self.image_tokens.encode(frozen, from_uint8(batch["image"]))
        if tokens.shape[1:] != self.model.image_grid:
            raise ValueError(
                f"pictures of {' x '.join(map(str, batch['image'].shape[1:3]))} have {tokens.shape[1:]} tokens, and "
                f"the transformer's image_grid is {self.model.image_grid}"
            )
        return tokens


def _sum_of(nats: Float[Array, "b l"], counted: Array) -> tuple[Float[Array, "b"], Float[Array, "b"]]:
    """Each example's sum over its counted tokens, and their number."""
    return jnp.sum(nats * counted, axis=1), jnp.sum(counted, axis=1, dtype=jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _reconstruct(objective: DalleObjective, frozen: Tree, batch: Batch) -> Float[Array, "b h w c"]:
    """The pictures of the batch's image tokens, compiled once per objective."""
    tokens = objective._tokens_of(frozen, batch).reshape(-1, *objective.model.image_grid)
    return objective.image_tokens.decode(frozen, tokens)
