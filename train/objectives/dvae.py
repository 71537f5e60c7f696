"""The discrete VAE of DALL-E (Ramesh et al. 2021, section 2.1 and App. A): Gumbel-softmax relaxation of the ELBO.

    loss = mean over pixel-channels of -log p(x | soft code) + beta * KL(q(z | x) || uniform) / (H W C)

The KL is summed over the token grid and taken of the untempered logits, not of the Gumbel sample. With 256 x 256 x 3
pixels and 32 x 32 tokens the second term is beta / 192 times the mean KL of a position. beta and the temperature follow
cosine schedules.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict

from cli.errors import UserError
from cli.ranges import check_ranges
from models.dvae import DiscreteVAE, map_pixels, unmap_pixels
from models.layers.quantizer import straight_through
from sample.samplers.dvae import ReconstructionSampler, from_uint8
from sample.samplers.from_config import build_network
from train.objectives.contract import Aux, Batch, Metrics, Preview, Tree, example_keys
from train.objectives.preview import to_host

RECONSTRUCTIONS = ("logit_laplace", "l2")


def logit_laplace_log_density(
    x: Float[Array, "*s"], mu: Float[Array, "*s"], ln_b: Float[Array, "*s"]
) -> Float[Array, "*s"]:
    """Log density on (0, 1) of sigmoid(mu + b * Laplace noise), nats (Ramesh et al. 2021, App. A.3, eq. 2).

    f(x) = exp(-|logit(x) - mu| / b) / (2 b x (1 - x)). x must stay off 0 and 1: see `models.dvae.map_pixels`.
    """
    ln_x, ln_not_x = jnp.log(x), jnp.log1p(-x)
    return -jnp.abs(ln_x - ln_not_x - mu) * jnp.exp(-ln_b) - math.log(2) - ln_b - ln_x - ln_not_x


def cosine_schedule(step: Int[Array, ""] | int, start: float, end: float, steps: int) -> Float[Array, ""]:
    """Half a cosine from `start` at step 0 to `end` at `steps`, constant after it."""
    progress = jnp.minimum(jnp.asarray(step, jnp.float32) / steps, 1) if steps else jnp.ones(())
    return end + (start - end) * 0.5 * (1 + jnp.cos(jnp.pi * progress))


def kl_to_uniform(logits: Float[Array, "b h w v"]) -> Float[Array, "b"]:
    """KL(softmax(logits) || uniform), nats, summed over the token grid: 0 if uniform, h w ln v if deterministic."""
    log_q = jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(log_q) * (log_q + math.log(logits.shape[-1])), axis=(1, 2, 3))


def gumbel_softmax(
    logits: Float[Array, "b h w v"], temperature: Float[Array, ""] | float, keys: Key[Array, "b"]
) -> Float[Array, "b h w v"]:
    """A relaxed sample of the categorical distribution of each position (Jang et al. 2017, eq. 2)."""
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    return jax.nn.softmax((logits + noise) / temperature)


def reconstruction_loss(
    kind: str, images: Float[Array, "b H W c"], stats: Float[Array, "b H W s"]
) -> Float[Array, "b"]:
    """Reconstruction term of images in [-1, 1], mean over pixel-channels.

    Args:
      kind: "logit_laplace", nats; or "l2", squared error on the scale of 0..1 of sigmoid(mu) mapped back, not clipped.
      images: what was encoded.
      stats: the decoder's mu, then ln b (s = 2 c).
    """
    mu, ln_b = jnp.split(stats, 2, axis=-1)
    if kind == "logit_laplace":
        values = -logit_laplace_log_density(map_pixels(images), mu, ln_b)
    else:
        values = jnp.square((unmap_pixels(jax.nn.sigmoid(mu)) - images) / 2)
    return jnp.mean(values, axis=(1, 2, 3))


def mse255(images: Float[Array, "b H W c"], others: Float[Array, "b H W c"]) -> Float[Array, "b"]:
    """Mean squared error of images in [-1, 1], on the scale of bytes (0..255, squared)."""
    return jnp.mean(jnp.square((images - others) * 127.5), axis=(1, 2, 3))


def code_statistics(tokens: Int[Array, "b h w"], vocab_size: int) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Of the tokens of a batch: the fraction of the vocabulary in use, and the perplexity exp(entropy) in 1..v."""
    counts = jnp.zeros(vocab_size).at[tokens.ravel()].add(1)
    p = counts / tokens.size
    return jnp.mean(counts > 0), jnp.exp(-jnp.sum(jax.scipy.special.xlogy(p, p)))


def mean_metrics(batch_size: int, values: dict[str, Float[Array, "b"] | Float[Array, ""]]) -> Metrics:
    """(sum, count) metrics that are all counted in examples.

    A value per example is summed. A value of the whole batch (temperature, perplexity) stands for each of its examples,
    so what is logged is the mean over microbatches of the value of each; for `code_usage` and `perplexity` that is
    below the value of the pooled tokens, by more the smaller the microbatch.
    """
    count = jnp.asarray(batch_size, jnp.float32)
    return {name: (jnp.sum(value) if value.ndim else value * count, count) for name, value in values.items()}


def check_reconstruction(kind: str) -> None:
    """Raises UserError if there is no such reconstruction term."""
    if kind not in RECONSTRUCTIONS:
        raise UserError(f"config.loss.reconstruction={kind!r} is unknown; choose one of {', '.join(RECONSTRUCTIONS)}")


_NUMBERS = {
    **dict.fromkeys(("kl_weight_start", "kl_weight"), "[0, inf)"),
    **dict.fromkeys(("temperature_start", "temperature"), "(0, inf)"),
    **dict.fromkeys(("kl_weight_steps", "temperature_steps"), "[0, inf)"),
}


@dataclasses.dataclass(frozen=True)
class DiscreteVAEObjective:
    """Trains part `dvae`, a `models.dvae.DiscreteVAE`.

    Attributes:
      model: the network.
      reconstruction: "logit_laplace" (as published) or "l2".
      kl_weight_start, kl_weight, kl_weight_steps: cosine schedule of beta; published 0, 6.6, 5000.
      temperature_start, temperature, temperature_steps: of the Gumbel-softmax; published 1, 1/16, 150000.
      straight_through: decode the one-hot of the sample, with the gradient of the soft sample; published False.
    """

    model: DiscreteVAE
    reconstruction: str = "logit_laplace"
    kl_weight_start: float = 0.0
    kl_weight: float = 6.6
    kl_weight_steps: int = 5000
    temperature_start: float = 1.0
    temperature: float = 1 / 16
    temperature_steps: int = 150_000
    straight_through: bool = False

    @classmethod
    def from_config(cls, config: ConfigDict) -> "DiscreteVAEObjective":
        """Reads `config.models.dvae` and `config.loss`.

        Raises:
          UserError: if the network cannot be built, the reconstruction term is unknown or a number is impossible.
        """
        objective = cls(model=build_network(config, "models.dvae"), **config.loss)
        check_reconstruction(objective.reconstruction)
        check_ranges("config.loss", config.loss.to_dict(), _NUMBERS)
        return objective

    def init(self, rng: Key[Array, ""], batch: Batch) -> tuple[Tree, Tree]:
        """Returns ({"dvae": parameters}, {}); a discrete VAE has no other variables."""
        return {"dvae": self.model.init(rng, from_uint8(batch["image"][:1]))["params"]}, {}

    def loss(
        self, params: Tree, variables: Tree, frozen: Tree, batch: Batch, rng: Key[Array, ""], step: Array, train: bool
    ) -> tuple[Float[Array, ""], Aux]:
        """Negative ELBO per pixel-channel, mean over examples.

        In training the code is a Gumbel-softmax sample. Otherwise there is no noise and the code is the argmax, as
        stage 2 will see it, and both reconstructions are measured: hard, and soft (the decoder on the expected code).

        Metrics: loss, reconstruction (the first term), kl (nats per position), kl_per_pixel (nats per pixel-channel,
        without beta), and for logit-Laplace reconstruction_bits and kl_bits (bits per pixel-channel: the two parts of
        the ELBO of the mapped pixels, a density); mse255_soft, and mse255_hard if not training; code_usage, perplexity;
        temperature, kl_weight. `mean_metrics` says how they add up.
        """
        images = from_uint8(batch["image"])
        tree = {"params": params["dvae"]}
        logits = self.model.apply(tree, images, method="encode")
        tokens = jnp.argmax(logits, axis=-1)
        temperature = cosine_schedule(step, self.temperature_start, self.temperature, self.temperature_steps)
        kl_weight = cosine_schedule(step, self.kl_weight_start, self.kl_weight, self.kl_weight_steps)

        if train:
            codes = gumbel_softmax(logits, temperature, example_keys(rng, batch))
            if self.straight_through:
                codes = straight_through(codes, jax.nn.one_hot(jnp.argmax(codes, axis=-1), codes.shape[-1]))
            stats = self.model.apply(tree, codes, method="decode")
            errors = {"mse255_soft": mse255(images, self._images(stats))}
        else:
            stats = self.model.apply(tree, tokens, method="decode")
            soft = self.model.apply(tree, jax.nn.softmax(logits), method="decode")
            errors = {
                "mse255_hard": mse255(images, self._images(stats)),
                "mse255_soft": mse255(images, self._images(soft)),
            }

        reconstruction = reconstruction_loss(self.reconstruction, images, stats)
        kl = kl_to_uniform(logits)
        kl_per_pixel = kl / math.prod(images.shape[1:])
        loss = reconstruction + kl_weight * kl_per_pixel
        usage, perplexity = code_statistics(tokens, self.model.vocab_size)
        values = {
            "loss": loss,
            "reconstruction": reconstruction,
            "kl": kl / math.prod(self.model.token_grid),
            "kl_per_pixel": kl_per_pixel,
            "code_usage": usage,
            "perplexity": perplexity,
            "temperature": temperature,
            "kl_weight": kl_weight,
            **errors,
        }
        if self.reconstruction == "logit_laplace":
            values["reconstruction_bits"] = reconstruction / math.log(2)
            values["kl_bits"] = kl_per_pixel / math.log(2)
        return jnp.mean(loss), Aux(metrics=mean_metrics(len(images), values), variables=variables)

    def preview(
        self, params: Tree, variables: Tree, frozen: Tree, batch: Batch, rng: Key[Array, ""]
    ) -> dict[str, Preview]:
        """Three rows: originals, soft reconstructions (of the expected code), hard reconstructions (of the tokens)."""
        soft, hard = _reconstruct(self, params, variables, frozen, batch, rng)
        original = to_host(from_uint8(batch["image"]))
        rows = np.concatenate([original, to_host(soft), to_host(hard)])
        return {"reconstruction": Preview(images=rows, columns=len(original))}

    def _images(self, stats: Float[Array, "b H W s"]) -> Float[Array, "b H W c"]:
        return self.model.apply({}, stats, method="reconstruction")


@functools.partial(jax.jit, static_argnums=0)
def _reconstruct(
    objective: DiscreteVAEObjective, params: Tree, variables: Tree, frozen: Tree, batch: Batch, rng: Key[Array, ""]
) -> tuple[Any, Any]:
    """Soft and hard reconstructions, compiled once per objective."""
    sampler = ReconstructionSampler(objective.model)
    hard = sampler(params, variables, frozen, {"image": batch["image"]}, example_keys(rng, batch))
    stats = objective.model.apply({"params": params["dvae"]}, from_uint8(batch["image"]))
    return objective._images(stats), hard["image"]
