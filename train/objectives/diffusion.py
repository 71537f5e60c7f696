"""Denoising diffusion (Ho et al. 2020, eq. 14), on points, pixels or latents, free or told a caption or a class.

    loss = mean of weight(t) |output - target|^2 over dimensions,  t and the noise drawn for each example

plus, with learned variances, T / 1000 times the variational bound of the chain's step, which trains the variances alone
(Nichol and Dhariwal 2021, section 3.1 and eq. 16). Conditions are dropped at random, for guidance. With
`config.frozen.first_stage` x_0 is what that makes of a picture, drawn anew in each step (Rombach et al. 2022, eq. 2);
pictures' moments and captions' features may be precomputed (`train.precomputed`).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from ml_collections import ConfigDict

from cli.errors import UserError
from cli.ranges import check_range
from diffusion.posterior import bound_terms
from diffusion.schedule import DiscreteSchedule
from sample.samplers.diffusion import DiffusionSampler
from sample.sheets.points import draw_points
from train.objectives.contract import Aux, Batch, Preview, Tree, example_keys
from train.objectives.preview import gather, to_host

QUARTERS = 4  # of the process, whose losses are logged apart


@dataclasses.dataclass(frozen=True)
class DiffusionObjective:
    """Trains part `denoiser`, a diffusion backbone, and part `text`, if captions are read by a network of their own.

    Attributes:
      sampler: holds the networks and the process, and draws the previews.
      dropout: probability that an example is told nothing: the blank caption, the class for none. Published 0.1 to 0.2.
    """

    sampler: DiffusionSampler
    dropout: float = 0.0

    @classmethod
    def from_config(cls, config: ConfigDict) -> "DiffusionObjective":
        """Reads `config.models`, `config.frozen`, `config.process`, `config.sample` and `config.loss`.

        Raises:
          UserError: if the process is impossible, or dropout has nothing to drop.
        """
        objective = cls(DiffusionSampler.from_config(config), **config.loss)
        check_range("config.loss.dropout", objective.dropout, "[0, 1)")
        if objective.dropout and not objective.sampler.conditional:
            raise UserError("config.loss.dropout has nothing to drop: the denoiser is told nothing; set it to 0")
        if objective.sampler.text is not None and not config.data.text_length:
            raise UserError("the denoiser reads captions, and config.data.text_length is 0; set it to their length")
        if objective.sampler.classes and not config.data.label_field:
            raise UserError(
                f"the denoiser is told one of {config.models.denoiser.num_classes} classes, and "
                "config.data.label_field is empty; set it to the dataset's field of class numbers, or num_classes to 0"
            )
        if not objective.sampler.classes and config.data.label_field:
            raise UserError(
                f"config.data.label_field={config.data.label_field!r} has no use: the denoiser has no classes; empty "
                "it, or set config.models.denoiser.num_classes"
            )
        return objective

    def init(self, rng: Key[Array, ""], batch: Batch) -> tuple[Tree, Tree]:
        """Returns ({"denoiser": parameters, "text": parameters where there is one}, {})."""
        del batch
        sampler = self.sampler
        params = {}
        if sampler.text is not None and not sampler.text.frozen:
            inputs = [jnp.zeros(x.shape, x.dtype) for x in sampler.text.model.example_inputs(1)]
            params["text"] = sampler.text.model.init(jax.random.fold_in(rng, 1), *inputs)["params"]
        inputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sampler.model.example_inputs(1))
        params["denoiser"] = sampler.model.init(rng, *inputs)["params"]
        return params, {}

    def loss(
        self, params: Tree, variables: Tree, frozen: Tree, batch: Batch, rng: Key[Array, ""], step: Array, train: bool
    ) -> tuple[Float[Array, ""], Aux]:
        """The loss of a batch.

        Metrics: loss, weighted; mse, not; mse_q1 to mse_q4, of the quarters of the process, the first nearest to data;
        and with learned variances bound, the bound's terms, bits per dimension and step, but of latents, which are no
        multiples of 2 / 255 that the last of its steps could have a probability of.

        `batch` holds point float [b d], image uint8 [b h w 3] or latent_moments float [b h w m]; and text int32 [b l],
        perhaps with text_features float [b l d] of it, or label int32 [b].
        """
        del step
        sampler, process = self.sampler, self.sampler.process
        # One key for each use, of each example.
        own = example_keys(rng, batch)
        keys = jax.vmap(lambda key: jax.random.split(key, 4))(own)
        latent_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(own, 4)
        x_0 = batch["point"] if "point" in batch else sampler.data(frozen, batch, latent_keys)
        t = process.draw_time(jax.vmap(jax.random.uniform)(keys[:, 0]))
        eps = jax.vmap(lambda key: jax.random.normal(key, x_0.shape[1:]))(keys[:, 1])
        x_t = process.noised(x_0, eps, t)
        rows = {name: batch[name] for name in ("text", "label") if name in batch and sampler.conditional}
        if "text_features" in batch:
            rows["text_features"] = batch["text_features"]
        if train and self.dropout:
            dropped = jax.vmap(jax.random.uniform)(keys[:, 2]) < self.dropout
            blank = sampler.blank({}, len(t))
            if "text_features" in rows:
                blank["text_features"] = sampler.blank_features(params, frozen)
            rows = {
                name: jnp.where(dropped.reshape(-1, *(1,) * (row.ndim - 1)), blank[name], row)
                for name, row in rows.items()
                if name in blank
            }
        told = sampler.conditioning(params, frozen, sampler.blank(rows, len(t)))
        noise = {"dropout_keys": keys[:, 3]} if train and getattr(sampler.model, "dropout", 0) else {}
        tree = {"params": params["denoiser"]}
        seen = process.network_input(x_t, t)
        output = sampler.model.apply(tree, seen, process.network_time(t), told, train, **noise)
        sampler.check_output(output, x_0)
        prediction, bound = output, None
        if process.variance == "learned":
            prediction, values = jnp.split(output, 2, axis=-1)
            fixed = jnp.concatenate([jax.lax.stop_gradient(prediction), values], axis=-1)
            bound = bound_terms(process, fixed, x_0, x_t, t)
        axes = tuple(range(1, x_0.ndim))
        mse = jnp.mean(jnp.square(prediction - process.target(x_0, eps, t)), axis=axes)
        loss = process.weight(t) * mse
        if bound is not None and isinstance(process.schedule, DiscreteSchedule):
            loss = loss + process.schedule.steps / 1000 * bound
        values = {"loss": loss, "mse": mse}
        if bound is not None and sampler.first_stage is None:
            values["bound"] = bound
        ones = jnp.ones_like(t)
        metrics = {name: (jnp.sum(value), jnp.sum(ones)) for name, value in values.items()}
        quarter = jnp.clip(jnp.floor(process.progress(t) * QUARTERS), 0, QUARTERS - 1)
        for number in range(QUARTERS):
            inside = (quarter == number).astype(jnp.float32)
            metrics[f"mse_q{number + 1}"] = (jnp.sum(inside * mse), jnp.sum(inside))
        return jnp.mean(loss), Aux(metrics=metrics, variables=variables)

    def preview(
        self, params: Tree, variables: Tree, frozen: Tree, batch: Batch, rng: Key[Array, ""]
    ) -> dict[str, Preview]:
        """Samples for the batch's captions or classes; of points, a picture of 64 samples for each of the batch."""
        sampler = self.sampler
        keys = example_keys(rng, batch)
        if "point" in sampler.makes:
            keys = jax.vmap(lambda key: jax.random.split(key, 64))(keys).reshape(-1)
            points = sampler(params, variables, frozen, sampler.request(), keys)["point"]
            return {"samples": Preview(images=draw_points(gather(points))[None], columns=1)}
        rows = {name: batch[name] for name in sampler.reads if name in batch}
        request = sampler.request(**{name: np.asarray(row) for name, row in rows.items()})
        images = to_host(sampler(params, variables, frozen, request, keys)["image"])
        labels = gather(rows["text"]) if "text" in rows else None
        if labels is None and "label" in rows:
            labels = tuple(str(label) for label in gather(rows["label"]))
        return {"samples": Preview(images=images, columns=min(len(images), 8), labels=labels)}
