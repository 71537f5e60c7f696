"""UniDiffuser: one noise prediction for a picture and its caption, each at a time of its own (Bao et al. 2023, eq. 5).

    loss = mean of |eps_theta(x_t, y_s; t, s) - [eps_x, eps_y]|^2,  t and s drawn independently

over all entries of picture, CLIP embedding and caption together; at the published shapes these are 75, 2 and 23 % of
them. Public fine-tunings average each part by itself: `reduction="parts"`. The paper drops nothing for guidance, as
time T of a side already says nothing of it. First stage, CLIP and captioner are frozen.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict

from cli.errors import UserError
from cli.ranges import check_range
from models.unidiffuser import PictureAndText, UniDiffuser
from sample.first_stage import FirstStage
from sample.samplers.captioner import check_squares
from sample.samplers.dvae import from_uint8
from sample.samplers.unidiffuser import UniDiffuserSampler
from sample.samplers.unidiffuser_modes import PICTURE, TEXT, Latents, normal_latents
from sample.samplers.unidiffuser_settings import kinds_of, learned_kind, scaled
from train.objectives.contract import Aux, Batch, Preview, Tree, example_keys
from train.objectives.preview import gather, to_host
from weights.run import TOKENIZER

REDUCTIONS = ("elements", "parts")
_PREVIEWED = ("text_to_image", "image_to_text")


@dataclasses.dataclass(frozen=True)
class UniDiffuserObjective:
    """Trains part `unidiffuser`, a `models.unidiffuser.UniDiffuser`.

    Attributes:
      sampler: holds the networks and the process, and draws the previews.
      reduction: "elements", all entries count alike; "parts", the means of the three parts do.
      image_weight: what errors of a picture's latents count beside that.
      clip_weight: of its CLIP embedding.
      text_weight: of the caption's latents.
      data_type: the kind of data of every example, of a network that tells kinds apart; -1 of any other one.
    """

    sampler: UniDiffuserSampler
    reduction: str = "elements"
    image_weight: float = 1.0
    clip_weight: float = 1.0
    text_weight: float = 1.0
    data_type: int = -1

    @classmethod
    def from_config(cls, config: ConfigDict) -> "UniDiffuserObjective":
        """Reads `config.models`, `frozen`, `process`, `scales`, `sample`, `loss` and `data.data_type`.

        Raises:
          UserError: if a setting is impossible, pictures have several shapes, or there are no captions.
        """
        check_squares(config)
        sampler = UniDiffuserSampler.from_config(config)
        objective = cls(sampler, **config.loss, data_type=learned_kind(config, sampler.model))
        if objective.reduction not in REDUCTIONS:
            raise UserError(f"config.loss.reduction={objective.reduction!r} is unknown; choose elements or parts")
        for name in (*PICTURE, *TEXT):
            check_range(f"config.loss.{name}_weight", getattr(objective, f"{name}_weight"), "[0, inf)")
        stored = [name for name in ("latent_moments", "image_features") if config.data.get(name, "")]
        if len(stored) == 1:
            raise UserError(
                f"config.data.{stored[0]} alone is stored, and then there are no pictures to make the other one of: "
                "latent_moments and image_features go together"
            )
        if not 0 < config.data.text_length <= objective.sampler.clip.text_length:
            raise UserError(
                f"config.data.text_length={config.data.text_length} is not what CLIP reads, 1 to "
                f"{objective.sampler.clip.text_length} tokens"
            )
        return objective

    @property
    def model(self) -> UniDiffuser:
        """The network that is trained."""
        return self.sampler.model

    def init(self, rng: Key[Array, ""], batch: Batch) -> tuple[Tree, Tree]:
        """Returns ({"unidiffuser": parameters}, what is measured of latents)."""
        del batch
        inputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.model.example_inputs(1))
        statistics = self.sampler.statistics
        variables = {"unidiffuser": {"statistics": {**statistics, "count": jnp.zeros(())}}} if statistics else {}
        return {"unidiffuser": self.model.init(rng, *inputs)["params"]}, variables

    @property
    def measured_first(self) -> int:
        """How many examples `measure` is to see before the first update."""
        scales = self.sampler.scales
        return scales.examples if scales.measured else 0

    def measure(
        self, params: Tree, variables: Tree, frozen: Tree, batch: Batch, rng: Key[Array, ""], number: Int[Array, ""]
    ) -> Tree:
        """The variables with mean squares of a batch's latents, beside those of the batches before."""
        del params, rng
        statistics = variables["unidiffuser"]["statistics"]
        latents = self._read(frozen, batch)
        share = 1 / (jnp.asarray(number, jnp.float32) + 1)
        moved: Tree = {"count": jnp.asarray(number, jnp.float32) + 1}
        for name, value in latents.items():
            moved[name] = statistics[name] + share * (jnp.mean(jnp.square(value)) - statistics[name])
        return {**variables, "unidiffuser": {**variables["unidiffuser"], "statistics": moved}}

    def has_measured(self, variables: Tree) -> bool:
        """Whether there are statistics, such as those of the run that this one starts from."""
        return float(jax.device_get(variables["unidiffuser"]["statistics"]["count"])) > 0

    def loss(
        self, params: Tree, variables: Tree, frozen: Tree, batch: Batch, rng: Key[Array, ""], step: Array, train: bool
    ) -> tuple[Float[Array, ""], Aux]:
        """The loss of a batch.

        Metrics: loss; mse_image, mse_clip and mse_text, of each part by itself; power_image, power_clip and power_text,
        the mean square of what is diffused, which should be near 1 (`config.scales`).

        `batch` holds image uint8 [b H W 3] and text int32 [b l], framed, 0 behind; or what was stored of them:
        latent_moments and image_features in place of image, caption_latents beside text.
        """
        del step, train
        sampler, process = self.sampler, self.sampler.process
        keys = jax.vmap(lambda key: jax.random.split(key, 4))(example_keys(rng, batch))
        x_0 = {"image": self._image(frozen, batch, keys[:, 0]), **self._read(frozen, batch)}
        x_0 = scaled(x_0, sampler.factors(variables))
        eps = normal_latents(keys[:, 1], {name: value.shape[1:] for name, value in x_0.items()})
        t_image, t_text = (process.draw_time(jax.vmap(jax.random.uniform)(keys[:, use])) for use in (2, 3))
        times = {**dict.fromkeys(PICTURE, t_image), **dict.fromkeys(TEXT, t_text)}
        x_t = PictureAndText(**{name: process.noised(x_0[name], eps[name], times[name]) for name in x_0})
        seen = process.network_time(t_image), process.network_time(t_text)
        kinds = kinds_of(self.model, self.data_type, len(t_image))
        outputs = self.model.apply({"params": params["unidiffuser"]}, x_t, *seen, kinds)
        ones = jnp.ones_like(t_image)
        metrics, loss, entries = {}, jnp.zeros_like(t_image), 0
        for name, value in x_0.items():
            axes, size = tuple(range(1, value.ndim)), int(np.prod(value.shape[1:]))
            target = process.target(value, eps[name], times[name])
            mse = jnp.mean(jnp.square(getattr(outputs, name) - target), axis=axes)
            power = jnp.mean(jnp.square(value), axis=axes)
            share = size if self.reduction == "elements" else 1
            entries += share
            loss += share * getattr(self, f"{name}_weight") * process.weight(times[name]) * mse
            metrics |= {f"mse_{name}": (jnp.sum(mse), jnp.sum(ones)), f"power_{name}": (jnp.sum(power), jnp.sum(ones))}
        loss = loss / entries
        metrics["loss"] = jnp.sum(loss), jnp.sum(ones)
        return jnp.mean(loss), Aux(metrics=metrics, variables=variables)

    def preview(
        self, params: Tree, variables: Tree, frozen: Tree, batch: Batch, rng: Key[Array, ""]
    ) -> dict[str, Preview]:
        """Pictures of the batch's captions, and its pictures with captions that are written for them."""
        keys = example_keys(rng, batch)
        if "image" in batch:
            images = np.asarray(batch["image"])
        else:
            images = to_host(_decode_stored(self.sampler.first_stage, frozen, batch["latent_moments"], keys))
        rows = {"text": np.asarray(batch["text"]), "image": images}
        request = self.sampler.request(**rows, mode="")
        outputs = self.sampler(params, variables, frozen, request, keys)
        columns = min(len(images), 8)
        drawn = Preview(images=to_host(outputs["image"]), columns=columns, labels=gather(batch["text"]))
        written = self.sampler.writes_with != TOKENIZER
        read = Preview(images, columns=columns, labels=gather(outputs["text"]), written=written)
        return dict(zip(_PREVIEWED, (drawn, read), strict=True))

    def _image(self, frozen: Tree, batch: Batch, keys: Key[Array, "b"]) -> Float[Array, "b h w z"]:
        """Latents of a batch's pictures, drawn anew of what was stored of them."""
        stage = self.sampler.first_stage
        if "latent_moments" in batch:
            return stage.draw(frozen, batch["latent_moments"], keys)
        return stage.encode(frozen, from_uint8(batch["image"]), keys)

    def _read(self, frozen: Tree, batch: Batch) -> Latents:
        """What CLIP and the captioner make of a batch, or made; not scaled."""
        sampler = self.sampler
        clip = batch["image_features"] if "image_features" in batch else sampler.embed(frozen, batch["image"])
        stored = "caption_latents" in batch
        text = {"text": batch["caption_latents"]} if stored else sampler.encode_text(frozen, batch["text"])
        return {"clip": clip, **text}


@functools.partial(jax.jit, static_argnums=0)
def _decode_stored(
    stage: FirstStage, frozen: Tree, moments: Float[Array, "b h w m"], keys: Key[Array, "b"]
) -> Float[Array, "b H W 3"]:
    """Pictures of what was stored of them, in one program."""
    return stage.decode(frozen, stage.draw(frozen, moments, keys))
