"""CLIP's loss (Radford et al. 2021, figure 3), and SigLIP's as the alternative (Zhai et al. 2023, section 3).

    contrastive = (mean_i -ln softmax_j(s <x_i, y_j>)[i] + mean_j -ln softmax_i(s <x_i, y_j>)[j]) / 2
    sigmoid     = mean_i sum_j -ln sigmoid(z_ij (s <x_i, y_j> + b)),  z_ij = 1 where i = j, else -1

over all B pictures x and captions y of the global batch, s = exp(logit_scale). On a mesh each device compares its own
pictures with the captions of all devices, and its own captions with all pictures; gradients come back the same way. A
pair's loss depends on the others of its batch, so that losses of microbatches would not add up to it. Microbatches are
therefore parts of the batch that are embedded in turn, for the loss of the whole batch, and embedded again in turn in
the backward pass: the same gradient for another forward pass, with the activations of one part in memory (Gao et al.
2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"). Recomputed layers (`remat`) cost one
forward pass more.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, UInt8
from ml_collections import ConfigDict

from cli.errors import UserError
from models.clip import Clip, ClipOutput
from models.layers.partitioning import join_rows, shard_rows, split_rows
from sample.samplers.clip import ClipSampler
from sample.samplers.dvae import from_uint8
from train.objectives.contract import Aux, Batch, Preview, Tree, example_keys
from train.objectives.preview import gather, to_host

KINDS = ("contrastive", "sigmoid")


def contrastive_logits(out: ClipOutput) -> tuple[Float[Array, "b b"], Float[Array, "b b"]]:
    """Scaled cosines of every picture with every caption, and of every caption with every picture."""
    image, text = shard_rows(out.image), shard_rows(out.text)
    per_image = shard_rows(out.logit_scale * image @ text.T + out.logit_bias)
    per_text = shard_rows(out.logit_scale * text @ image.T + out.logit_bias)
    return per_image, per_text


def contrastive_loss(per_image: Float[Array, "b b"], per_text: Float[Array, "b b"]) -> Float[Array, "b"]:
    """Cross-entropy of each picture's caption among all, and of each caption's picture, nats; their mean."""
    labels = jnp.arange(len(per_image))
    image, text = (optax.softmax_cross_entropy_with_integer_labels(x, labels) for x in (per_image, per_text))
    return (image + text) / 2


def sigmoid_loss(per_image: Float[Array, "b b"]) -> Float[Array, "b"]:
    """Binary cross-entropy of each picture with every caption, nats, summed over captions."""
    signs = 2 * jnp.eye(len(per_image)) - 1
    return -jnp.sum(jax.nn.log_sigmoid(signs * per_image), axis=1)


@dataclasses.dataclass(frozen=True)
class ClipObjective:
    """Trains part `clip`, a `models.clip.Clip`.

    Attributes:
      sampler: holds the network, and embeds for the previews.
      kind: "contrastive" or "sigmoid".
      parts: of a batch that are embedded in turn.
    """

    TAKES_PARTS: ClassVar[bool] = True

    sampler: ClipSampler
    kind: str = KINDS[0]
    parts: int = 1

    @classmethod
    def from_config(cls, config: ConfigDict) -> "ClipObjective":
        """Reads `config.models.clip`, `config.loss` and `config.mesh.microbatches`.

        Raises:
          UserError: if the network cannot be built, the loss is unknown, or the sigmoid loss has no bias, or a ResNet's
            batch, whose statistics are of all of it, is to be taken in parts.
        """
        sampler = ClipSampler.from_config(config)
        objective = cls(sampler=sampler, parts=config.mesh.microbatches, **config.loss)
        if objective.kind not in KINDS:
            raise UserError(f"config.loss.kind={objective.kind!r} is unknown; choose one of {', '.join(KINDS)}")
        if objective.kind == "sigmoid" and objective.model.logit_bias_init is None:
            raise UserError(
                "config.loss.kind=sigmoid starts far from its minimum without a bias; set "
                "config.models.clip.logit_bias_init=-10.0 and logit_scale_init=2.3026 (ln 10)"
            )
        if objective.parts > 1 and objective.model.image_tower == "resnet":
            raise UserError(
                f"config.mesh.microbatches={objective.parts} would train another network, as each part of a batch has "
                "its own batch statistics; set it to 1, or choose image_tower=vit"
            )
        return objective

    @property
    def model(self) -> Clip:
        """The network that is trained."""
        return self.sampler.model

    def init(self, rng: Key[Array, ""], batch: Batch) -> tuple[Tree, Tree]:
        """Returns ({"clip": parameters}, {"clip": {"batch_stats": ...}}); a ViT has no variables."""
        del batch
        inputs = [jnp.zeros(x.shape, x.dtype) for x in self.model.example_inputs(1)]
        variables = dict(self.model.init(rng, *inputs))
        params = {"clip": variables.pop("params")}
        return params, {"clip": variables} if variables else {}

    def loss(
        self, params: Tree, variables: Tree, frozen: Tree, batch: Batch, rng: Key[Array, ""], step: Array, train: bool
    ) -> tuple[Float[Array, ""], Aux]:
        """The loss of a batch; in training `Aux.variables` holds the moved batch statistics.

        Metrics: loss, nats; image_to_text and text_to_image, the shares of pictures and captions whose own partner is
        the likeliest of the batch; logit_scale, the factor of the cosines; and for the contrastive loss no_learning,
        ln B, the loss of features that tell nothing.

        `batch` holds image uint8 [b h w 3] and text int32 [b l] with an end token in each row.
        """
        del frozen, rng, step
        out, collections = self._embed(params["clip"], variables.get("clip", {}), batch, train)
        variables = {**variables, "clip": collections} if collections else variables
        per_image, per_text = contrastive_logits(out)
        loss = contrastive_loss(per_image, per_text) if self.kind == "contrastive" else sigmoid_loss(per_image)
        labels = jnp.arange(len(loss))
        values = {
            "loss": loss,
            "image_to_text": jnp.argmax(per_image, axis=1) == labels,
            "text_to_image": jnp.argmax(per_text, axis=1) == labels,
            "logit_scale": jnp.broadcast_to(out.logit_scale, loss.shape),
        }
        if self.kind == "contrastive":
            values["no_learning"] = jnp.full(loss.shape, math.log(len(loss)))
        count = jnp.asarray(len(loss), jnp.float32)
        metrics = {name: (jnp.sum(value, dtype=jnp.float32), count) for name, value in values.items()}
        return jnp.mean(loss), Aux(metrics=metrics, variables=variables)

    def _embed(self, params: Tree, collections: Tree, batch: Batch, train: bool) -> tuple[ClipOutput, Tree]:
        """Features of the batch, and what it made of the network's collections."""
        tree = {"params": params, **collections}
        if self.parts == 1:
            inputs = from_uint8(batch["image"]), batch["text"]
            if train and collections:
                return self.model.apply(tree, *inputs, train=True, mutable=list(collections))
            return self.model.apply(tree, *inputs), collections

        def embed(part: tuple[Array, Array]) -> tuple[Array, ...]:
            images, text = part
            out: ClipOutput = self.model.apply(tree, from_uint8(images), text)
            return out.image, out.text, out.logit_scale, out.logit_bias

        parts = tuple(split_rows(batch[name], self.parts) for name in ("image", "text"))
        image, text, scale, bias = jax.lax.map(jax.checkpoint(embed, prevent_cse=False), parts)
        return ClipOutput(join_rows(image), join_rows(text), scale[0], bias[0]), collections

    def preview(
        self, params: Tree, variables: Tree, frozen: Tree, batch: Batch, rng: Key[Array, ""]
    ) -> dict[str, Preview]:
        """Cosines of the batch's pictures (columns) with its captions (rows, each marked by its own picture)."""
        request = {"image": batch["image"], "text": batch["text"]}
        features = self.sampler(params, variables, frozen, request, example_keys(rng, batch))
        cosines = gather(features["text_features"]) @ gather(features["image_features"]).T
        return {
            "similarity": Preview(images=similarity_matrix(to_host(from_uint8(batch["image"])), cosines), columns=1)
        }


def similarity_matrix(
    images: UInt8[np.ndarray, "b h w 3"], cosines: Float[np.ndarray, "b b"]
) -> UInt8[np.ndarray, "1 H W 3"]:
    """One picture of a matrix: pictures along its top and left, the highest cosine black, the lowest white."""
    count, height, width, _ = images.shape
    low, high = cosines.min(), cosines.max()
    shade = 255 - np.round(255 * (cosines - low) / max(high - low, 1e-12)).astype(np.uint8)
    cells = np.broadcast_to(shade[:, None, :, None, None], (count, height, count, width, 3)).copy()
    cells[:, :1], cells[:, :, :, :1] = 128, 128
    top = images.transpose(1, 0, 2, 3).reshape(height, count * width, 3)
    left = images.reshape(count * height, width, 3)
    body = np.concatenate([left, cells.reshape(count * height, count * width, 3)], axis=1)
    corner = np.full((height, width, 3), 255, np.uint8)
    return np.concatenate([np.concatenate([corner, top], axis=1), body])[None]
