"""First stages of latent diffusion: reconstruction against a discriminator (Rombach et al. 2022, appendix G, eq. 25).

    of encoder and decoder    nll + kl_weight KL + w g     or     nll + codebook_weight Q + w g
    of the discriminator      (mean relu(1 - D(x)) + mean relu(1 + D(x'))) / 2

x' is the reconstruction, nll is (|x - x'| + LPIPS(x, x')) / exp(s) + s, with a learned number s and LPIPS beside every
pixel, and g is -mean D(x'). Esser et al. 2021, eq. 6 and 7, are what makes both terms about equal at the decoder's last
layer: w = discriminator_weight |d nll| / (|d g| + 1e-4), of gradients there, at most 10,000, and a constant to the
optimizer. The adversarial terms have the factor 0 until `discriminator_start`.

One loss is the sum of both, with a gradient for each side from its own line alone: the discriminator is a constant in
g, and x' in the discriminator's line. Both sides take their step at once, so that one pass over x' serves both. The
published loop takes them in turn: its discriminator is shown, in a pass of its own, what the moved decoder makes of new
draws from the latents' Gaussians.

What the examples of a batch decide together: w, and the discriminator's batch normalization, which takes the statistics
of pictures and of reconstructions apart, as published. The running ones, which evaluation uses, move once a step,
towards the mean of the two. In the published loop each of three passes moves them, and reconstructions count twice. In
microbatches (`config.mesh.microbatches`) all of this is of a microbatch, as in gradient accumulation of the published
loop, and each microbatch moves the running statistics once. `reduction` "sum" and "mean" alike are means over examples,
which microbatches leave as they are.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict

from cli.errors import UserError
from cli.ranges import check_ranges
from models.autoencoder import KLAutoencoder, VQAutoencoder, draw_posterior, measure_latents, posterior
from models.discriminator import PatchDiscriminator
from models.layers.quantizer import straight_through
from models.lpips import LPIPS
from sample.samplers.autoencoder import AutoencoderSampler
from sample.samplers.dvae import from_uint8
from sample.samplers.from_config import build_network
from train.objectives.contract import Aux, Batch, Preview, Tree, example_keys
from train.objectives.dvae import code_statistics, mean_metrics, mse255
from train.objectives.preview import to_host

REDUCTIONS = ("sum", "mean")

_MAX_WEIGHT = 1e4
_GRADIENT_FLOOR = 1e-4  # added to the norm that the weight is divided by

_NUMBERS = {
    **dict.fromkeys(("perceptual_weight", "kl_weight", "codebook_weight", "commitment"), "[0, inf)"),
    **dict.fromkeys(("discriminator_weight", "discriminator_start"), "[0, inf)"),
    "measured_examples": "[1, inf)",
}
# Keys of `config.loss` that one of the two bottlenecks reads.
_OF_KL = ("kl_weight",)
_OF_VQ = ("codebook_weight", "commitment", "legacy_commitment")


def kl_to_standard_normal(mean: Float[Array, "b h w c"], log_variance: Float[Array, "b h w c"]) -> Float[Array, "b"]:
    """KL(N(mean, variance) || N(0, 1)), nats, summed over the latents of each example."""
    values = jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance
    return 0.5 * jnp.sum(values, axis=(1, 2, 3))


def codebook_loss(
    z: Float[Array, "b *s"], codes: Float[Array, "b *s"], commitment: float, legacy: bool
) -> Float[Array, "b"]:
    """What draws codes to encoder outputs and these to codes (van den Oord et al. 2017, eq. 3); mean over an example.

    Args:
      z: encoder outputs.
      codes: the nearest code of each.
      commitment: beta.
      legacy: beta is the weight of the codes' term, as in latent diffusion's checkpoints; else of the encoder's, as in
        the paper. The other term has weight 1.
    """
    to_codes, to_outputs = (commitment, 1.0) if legacy else (1.0, commitment)
    stop = jax.lax.stop_gradient
    values = to_outputs * jnp.square(stop(codes) - z) + to_codes * jnp.square(codes - stop(z))
    return jnp.mean(values, axis=tuple(range(1, z.ndim)))


def hinge_loss(real: Float[Array, "*n"], fake: Float[Array, "*n"]) -> Float[Array, ""]:
    """The discriminator's loss of its logits (Lim & Ye 2017, "Geometric GAN")."""
    return 0.5 * (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake)))


def adaptive_weight(nll_norm: Float[Array, ""], generator_norm: Float[Array, ""]) -> Float[Array, ""]:
    """How much larger one gradient is than the other (Esser et al. 2021, eq. 7), 0 to 10,000; without a gradient."""
    ratio = nll_norm / (generator_norm + _GRADIENT_FLOOR)
    return jax.lax.stop_gradient(jnp.clip(ratio, 0, _MAX_WEIGHT))


def with_gradients(value: Float[Array, ""], *pairs: tuple[Array, Array]) -> Float[Array, ""]:
    """A value whose gradients are known already, so that nothing is differentiated twice.

    Args:
      value: the value.
      *pairs: what it depends on, and its gradient with respect to that.
    """
    stop = jax.lax.stop_gradient
    value = stop(value)
    for x, gradient in pairs:
        product = jnp.sum(stop(gradient) * x)
        value = value + (product - stop(product))  # 0, with the gradient
    return value


@dataclasses.dataclass(frozen=True)
class AutoencoderObjective:
    """Trains part `autoencoder`, a `models.autoencoder`, and `discriminator` if `config.models` has one.

    The learned number s is part `output`, `output/log_variance`. The published code declares it and leaves it out of
    its optimizers, so that it stays 0: hold it by `config.trainable` for the same. `config.frozen.lpips` is the
    distance; without one there is none.

    Attributes:
      model: the first stage.
      discriminator: None for an autoencoder that is trained on reconstruction alone.
      perceptual: None for none.
      reduction: of nll over pixels: "sum" in the published KL models, "mean" in the vector-quantized ones. With "mean"
        a kl_weight of 1e-6 means another thing.
      output_variance: whether there is the number s; published in KL models.
      perceptual_weight: of LPIPS beside the absolute error; published 1.
      kl_weight: of the KL of each example's latents, summed; published 1e-6.
      codebook_weight: of Q, see `codebook_loss`; published 1.
      commitment: beta of Q; published 0.25.
      legacy_commitment: see `codebook_loss`; published True.
      discriminator_weight: published 0.5 (KL), 0.75 (VQ; f8 0.6).
      discriminator_start: the step with which the adversarial terms begin; published 50,001 (KL), for VQ 0 (f4), 1 (f8)
        or 250,001 (f16).
      measured_examples: pictures of the training set whose latents are measured whenever the run saves, of the
        autoencoder's own `latent_scale` None; as many as there are if these are fewer. Published: the first batch.
    """

    model: KLAutoencoder | VQAutoencoder
    discriminator: PatchDiscriminator | None = None
    perceptual: LPIPS | None = None
    reduction: str = "sum"
    output_variance: bool = True
    perceptual_weight: float = 1.0
    kl_weight: float = 1e-6
    codebook_weight: float = 1.0
    commitment: float = 0.25
    legacy_commitment: bool = True
    discriminator_weight: float = 0.5
    discriminator_start: int = 50_001
    measured_examples: int = 10_000

    @classmethod
    def from_config(cls, config: ConfigDict) -> "AutoencoderObjective":
        """Reads `config.models`, `config.frozen` and `config.loss`.

        Raises:
          UserError: if a network cannot be built, a choice is unknown, a number is impossible, or a key has no use.
        """
        discriminator = "discriminator" in config.models
        objective = cls(
            model=build_network(config, "models.autoencoder"),
            discriminator=build_network(config, "models.discriminator") if discriminator else None,
            perceptual=build_network(config, "frozen.lpips") if "lpips" in config.frozen else None,
            **config.loss,
        )
        check_ranges("config.loss", config.loss.to_dict(), _NUMBERS)
        if objective.reduction not in REDUCTIONS:
            raise UserError(
                f"config.loss.reduction={objective.reduction!r} is unknown; choose one of {', '.join(REDUCTIONS)}"
            )
        if type(objective.model) not in (KLAutoencoder, VQAutoencoder):
            raise UserError(
                f"config.models.autoencoder is a {config.models.autoencoder.name!r}, and this objective trains an "
                "autoencoder_kl or an autoencoder_vq"
            )
        quantized = isinstance(objective.model, VQAutoencoder)
        if useless := [key for key in (_OF_KL if quantized else _OF_VQ) if key in config.loss]:
            name = config.models.autoencoder.name
            raise UserError(f"config.loss.{useless[0]} has no use beside an {name!r}; leave it out")
        if objective.perceptual is None and objective.perceptual_weight:
            raise UserError(
                f"config.loss.perceptual_weight is {objective.perceptual_weight}, and config.frozen.lpips names no "
                "network; set it to 0, or take a config that has one"
            )
        size, factor = objective.model.image_size, objective.model.downsampling
        if size % factor:
            raise UserError(
                f"config.models.autoencoder.image_size is {size}, and reconstructions are of {size // factor * factor} "
                f"pixels; take a multiple of {factor}"
            )
        return objective

    def init(self, rng: Key[Array, ""], batch: Batch) -> tuple[Tree, Tree]:
        """Returns parameters of "autoencoder", "discriminator" and "output", and the variables of the first two."""
        images = from_uint8(batch["image"][:1])
        trees = {"autoencoder": dict(self.model.init(rng, images))}
        if self.discriminator is not None:
            trees["discriminator"] = dict(self.discriminator.init(jax.random.fold_in(rng, 1), images))
        params = {part: tree.pop("params") for part, tree in trees.items()}
        if self.output_variance:
            params["output"] = {"log_variance": jnp.zeros(())}
        return params, {part: tree for part, tree in trees.items() if tree}

    def loss(
        self, params: Tree, variables: Tree, frozen: Tree, batch: Batch, rng: Key[Array, ""], step: Array, train: bool
    ) -> tuple[Float[Array, ""], Aux]:
        """The sum of both sides' losses; see the module.

        In training latents are drawn from their Gaussians, and `Aux.variables` has the moved statistics of batches.
        Otherwise latents are the means, the discriminator normalizes by its running statistics, and the
        first line has no g, whose weight is a matter of gradients.

        Metrics: loss; nll; reconstruction, the absolute error on the scale of [-1, 1]; mse255; perceptual;
        log_variance; kl (nats of an example), or codebook (Q), code_usage and perplexity; latent_mean and latent_std;
        discriminator (its line, without the factor), logits_real and logits_fake; and in training generator (g),
        nll_gradient_norm and generator_gradient_norm at the decoder's last layer, and adaptive_weight (w; before the
        start too). `mean_metrics` says how they add up.
        """
        images = from_uint8(batch["image"])
        tree = {"params": params["autoencoder"], **variables.get("autoencoder", {})}
        latents, penalty, values = self._encode(tree, images, example_keys(rng, batch), train)
        features: Array = self.model.apply(tree, latents, method="features")
        outputs: Array = self.model.apply(tree, features, method="pixels")
        if outputs.shape != images.shape:
            (height, width), factor = images.shape[1:3], self.model.downsampling
            raise ValueError(f"pictures are {height} x {width}, and both must be multiples of {factor}")
        log_variance = params["output"]["log_variance"] if self.output_variance else jnp.zeros(())
        factor = jnp.asarray(step >= self.discriminator_start, jnp.float32)
        verdict: _Verdict | None = None

        likelihood = functools.partial(self._likelihood, frozen, images)
        if train:
            # Differentiated here up to the outputs, since the weight takes these gradients; then not a second time.
            stopped = jax.lax.stop_gradient((outputs, log_variance))
            differentiate = jax.value_and_grad(likelihood, argnums=(0, 1), has_aux=True)
            (loss, terms), (to_outputs, to_variance) = differentiate(*stopped)
            if self.discriminator is not None:
                verdict, value, gradient = _judge_in_training(self.discriminator, params, variables, images, stopped[0])
                last = params["autoencoder"]["decoder"]["output"]
                norms = [self._last_layer_norm(last, features, each) for each in (to_outputs, gradient)]
                weight = self.discriminator_weight * adaptive_weight(*norms)
                loss, to_outputs = loss + factor * weight * value, to_outputs + factor * weight * gradient
                values |= {"generator": value, "adaptive_weight": weight}
                values |= {"nll_gradient_norm": norms[0], "generator_gradient_norm": norms[1]}
            loss = with_gradients(loss, (outputs, to_outputs), (log_variance, to_variance))
        else:
            loss, terms = likelihood(outputs, log_variance)
            if self.discriminator is not None:
                verdict = _judge(self.discriminator, params, variables, images, outputs)
        loss = loss + penalty
        if verdict is not None:
            values |= {"discriminator": verdict.loss}
            values |= {"logits_real": jnp.mean(verdict.real), "logits_fake": jnp.mean(verdict.fake)}
            loss = loss + factor * verdict.loss
            variables = {**variables, "discriminator": verdict.variables}
        values = {"loss": loss, **terms, **values, "mse255": mse255(images, jnp.clip(outputs, -1, 1))}
        return loss, Aux(metrics=mean_metrics(len(images), values), variables=variables)

    @property
    def measured(self) -> int:
        """How many examples `measure` is to see."""
        return self.measured_examples if self.model.latent_scale is None else 0

    def measure(
        self, params: Tree, variables: Tree, frozen: Tree, batch: Batch, rng: Key[Array, ""], number: Int[Array, ""]
    ) -> Tree:
        """The variables with what a second stage's latents of a batch measure, beside those of the batches before."""
        del frozen
        own = variables["autoencoder"]
        before = own["statistics"]["latents"]
        before = {**before, "count": jnp.asarray(number, before["count"].dtype)}  # which forgets earlier weights
        tree = {"params": params["autoencoder"], **own}
        z: Array = self.model.apply(tree, from_uint8(batch["image"]), method="encode")
        if isinstance(self.model, KLAutoencoder):
            z = draw_posterior(z, example_keys(rng, batch))
        return {**variables, "autoencoder": {**own, "statistics": {"latents": measure_latents(before, z)}}}

    def has_measured(self, variables: Tree) -> bool:
        """Whether there are statistics of more than a batch, which are better than those that one batch gives."""
        return float(jax.device_get(variables["autoencoder"]["statistics"]["latents"]["count"])) > 1

    def preview(
        self, params: Tree, variables: Tree, frozen: Tree, batch: Batch, rng: Key[Array, ""]
    ) -> dict[str, Preview]:
        """Two rows: originals and reconstructions."""
        sampler = AutoencoderSampler(self.model)
        images = sampler(params, variables, frozen, {"image": batch["image"]}, example_keys(rng, batch))["image"]
        original = to_host(from_uint8(batch["image"]))
        return {"reconstruction": Preview(images=np.concatenate([original, to_host(images)]), columns=len(original))}

    def _encode(
        self, tree: Tree, images: Float[Array, "b H W c"], keys: Key[Array, "b"], train: bool
    ) -> tuple[Array, Array, dict[str, Array]]:
        """(what is decoded, the weighted bottleneck term, metrics)."""
        encoded: Array = self.model.apply(tree, images, method="encode")
        if isinstance(self.model, KLAutoencoder):
            moments = encoded
            mean, log_variance = posterior(moments)
            latents = encoded = mean
            if train:
                latents = encoded = draw_posterior(moments, keys)
            kl = kl_to_standard_normal(mean, log_variance)
            penalty, values = self.kl_weight * jnp.mean(kl), {"kl": kl}
        else:
            tokens: Array = self.model.apply(tree, encoded, method="quantize")
            codes: Array = self.model.apply(tree, tokens, method="lookup")
            latents = straight_through(encoded, codes)
            codebook = codebook_loss(encoded, codes, self.commitment, self.legacy_commitment)
            usage, perplexity = code_statistics(tokens, self.model.vocab_size)
            penalty = self.codebook_weight * jnp.mean(codebook)
            values = {"codebook": codebook, "code_usage": usage, "perplexity": perplexity}
        return latents, penalty, {**values, "latent_mean": jnp.mean(encoded), "latent_std": jnp.std(encoded)}

    def _likelihood(
        self, frozen: Tree, images: Float[Array, "b H W c"], outputs: Float[Array, "b H W c"], log_variance: Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """nll, mean over examples, and metrics."""
        absolute = jnp.mean(jnp.abs(images - outputs), axis=(1, 2, 3))
        values, error = {"reconstruction": absolute}, absolute
        if self.perceptual is not None:
            tree = {"params": frozen["lpips"]["params"]}
            values["perceptual"] = self.perceptual.apply(tree, images, outputs)
            error = absolute + self.perceptual_weight * values["perceptual"]
        pixels = math.prod(images.shape[1:]) if self.reduction == "sum" else 1
        nll = pixels * (error * jnp.exp(-log_variance) + log_variance)
        if self.output_variance:
            values["log_variance"] = log_variance
        return jnp.mean(nll), {"nll": nll, **values}

    def _last_layer_norm(
        self, last: Tree, features: Float[Array, "b h2 w2 f"], gradient: Float[Array, "b H W c"]
    ) -> Float[Array, ""]:
        """Norm of the gradient at the kernel of the decoder's last layer, of one at what it makes of features."""
        last, features = jax.lax.stop_gradient((last, features))

        def pixels(kernel: Array) -> Array:
            tree = {"params": {"decoder": {"output": {**last, "kernel": kernel}}}}
            return self.model.apply(tree, features, method="pixels")

        _, pullback = jax.vjp(pixels, last["kernel"])
        return jnp.sqrt(jnp.sum(jnp.square(pullback(gradient)[0])))


@dataclasses.dataclass(frozen=True)
class _Verdict:
    """What a discriminator makes of a batch.

    Attributes:
      loss: its line, with a gradient to its parameters alone.
      real, fake: logits of pictures and of reconstructions, [b h w 1].
      variables: its collections.
    """

    loss: Array
    real: Array
    fake: Array
    variables: Tree


def _judge(
    model: PatchDiscriminator, params: Tree, variables: Tree, images: Array, outputs: Float[Array, "b H W c"]
) -> _Verdict:
    """In evaluation, by the running statistics."""
    tree = {"params": params["discriminator"], **variables["discriminator"]}
    real, fake = model.apply(tree, images), model.apply(tree, jax.lax.stop_gradient(outputs))
    return _Verdict(hinge_loss(real, fake), real, fake, variables["discriminator"])


def _judge_in_training(
    model: PatchDiscriminator, params: Tree, variables: Tree, images: Array, outputs: Float[Array, "b H W c"]
) -> tuple[_Verdict, Float[Array, ""], Float[Array, "b H W c"]]:
    """One pass over pictures and one over reconstructions, from which both sides have their gradients.

    Returns:
      The verdict; g; and the gradient of g at the reconstructions.
    """
    own, statistics = params["discriminator"], variables["discriminator"]

    def logits(own: Tree, images: Array) -> tuple[Array, Tree]:
        result, moved = model.apply({"params": own, **statistics}, images, train=True, mutable=["batch_stats"])
        return result, dict(moved)

    stopped, outputs = jax.lax.stop_gradient((own, outputs))
    real, pull_real, moved_by_real = jax.vjp(logits, stopped, images, has_aux=True)
    fake, pull_fake, moved_by_fake = jax.vjp(logits, stopped, outputs, has_aux=True)
    loss, (to_real, to_fake) = jax.value_and_grad(hinge_loss, argnums=(0, 1))(real, fake)
    gradients = jax.tree.map(jnp.add, pull_real(to_real)[0], pull_fake(to_fake)[0])
    loss = with_gradients(loss, *zip(jax.tree.leaves(own), jax.tree.leaves(gradients), strict=True))
    # The mean of a step towards the one and a step towards the other is a step towards their mean.
    moved = jax.tree.map(lambda one, other: (one + other) / 2, moved_by_real, moved_by_fake)
    value, to_logits = jax.value_and_grad(lambda fake: -jnp.mean(fake))(fake)
    return _Verdict(loss, real, fake, moved), value, pull_fake(to_logits)[1]
