"""VQ-VAE (van den Oord et al. 2017): straight-through codes, commitment, and a codebook learned by moving k-means.

    loss = reconstruction + commitment * mean |z - sg(code)|^2

The codebook has no gradient. Each step moves it to the means of what was encoded to each code (App. A.1), starts it
from encoder outputs if it has never been used, and moves dead codes onto encoder outputs. All of that is sums over the
global batch in plain jax.numpy, so it is the same for any sharding. It is not the same in microbatches, which move the
codebook one after the other.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict

from cli.ranges import check_ranges
from models.dvae import VectorQuantizedVAE
from models.layers.quantizer import straight_through
from sample.samplers.dvae import ReconstructionSampler, from_uint8
from sample.samplers.from_config import build_network
from train.objectives.contract import Aux, Batch, Preview, Tree, example_keys
from train.objectives.dvae import (
    check_reconstruction,
    code_statistics,
    mean_metrics,
    mse255,
    reconstruction_loss,
)
from train.objectives.preview import to_host

Codebook = dict[str, Array]

# A seeded code counts as if it had this share of the uniform usage at least, so that its sums never divide by zero.
MINIMUM_SHARE = 1e-3


def seed_codes(
    codebook: Codebook, chosen: Array, z: Float[Array, "n e"], key: Key[Array, ""], share: float
) -> Codebook:
    """Moves codes onto randomly chosen encoder outputs.

    Args:
      codebook: embedding [v e], usage [v], sums [v e].
      chosen: bool [v], the codes to move.
      z: the encoder outputs of the batch; different ones are taken for different codes if there are enough.
      key: the same key chooses the same outputs.
      share: the usage a moved code starts with, relative to n / v, the uniform usage. Small, so that its first real
        assignments count and a code that gets none falls below a threshold of this size at once.

    Returns:
      The new codebook.
    """
    codes = len(chosen)
    picks = z[jax.random.choice(key, len(z), (codes,), replace=codes > len(z))]
    start = max(share, MINIMUM_SHARE) * len(z) / codes
    return {
        "embedding": jnp.where(chosen[:, None], picks, codebook["embedding"]),
        "usage": jnp.where(chosen, start, codebook["usage"]),
        "sums": jnp.where(chosen[:, None], picks * start, codebook["sums"]),
    }


def update_codebook(codebook: Codebook, z: Float[Array, "n e"], tokens: Int[Array, "n"], decay: float) -> Codebook:
    """One step of moving k-means (van den Oord et al. 2017, eq. 6-8): each code to the mean of what it stands for."""
    counts = jnp.zeros_like(codebook["usage"]).at[tokens].add(1)
    totals = jnp.zeros_like(codebook["sums"]).at[tokens].add(z)
    usage = decay * codebook["usage"] + (1 - decay) * counts
    sums = decay * codebook["sums"] + (1 - decay) * totals
    # Where a code has long been unused both underflow; it stays where it was.
    alive = usage > 1e-12
    means = sums / jnp.where(alive, usage, 1)[:, None]
    return {"embedding": jnp.where(alive[:, None], means, codebook["embedding"]), "usage": usage, "sums": sums}


_NUMBERS = {
    **dict.fromkeys(("codebook_decay", "restart_threshold"), "[0, 1)"),
    **dict.fromkeys(("commitment", "restart_every"), "[0, inf)"),
}


@dataclasses.dataclass(frozen=True)
class VectorQuantizedVAEObjective:
    """Trains part `dvae`, a `models.dvae.VectorQuantizedVAE`.

    Attributes:
      model: the network.
      reconstruction: "l2" or "logit_laplace", as for the discrete VAE.
      commitment: weight that keeps the encoder near its codes.
      codebook_decay: of the moving averages of the codebook, per step.
      restart_every: steps between restarts of dead codes; 0 for none.
      restart_threshold: a code is dead below this share of the mean usage of a code. It is relative, so it does not
        depend on the batch size.
    """

    model: VectorQuantizedVAE
    reconstruction: str
    commitment: float
    codebook_decay: float
    restart_every: int
    restart_threshold: float

    @classmethod
    def from_config(cls, config: ConfigDict) -> "VectorQuantizedVAEObjective":
        """Reads `config.models.dvae` and `config.loss`.

        Raises:
          UserError: if the network cannot be built, the reconstruction term is unknown or a number is impossible.
        """
        objective = cls(model=build_network(config, "models.dvae"), **config.loss)
        check_reconstruction(objective.reconstruction)
        check_ranges("config.loss", config.loss.to_dict(), _NUMBERS)
        return objective

    def init(self, rng: Key[Array, ""], batch: Batch) -> tuple[Tree, Tree]:
        """Returns ({"dvae": parameters}, {"dvae": {"codebook": ...}}); the first training step seeds the codebook."""
        variables = dict(self.model.init(rng, from_uint8(batch["image"][:1])))
        return {"dvae": variables.pop("params")}, {"dvae": variables}

    def loss(
        self, params: Tree, variables: Tree, frozen: Tree, batch: Batch, rng: Key[Array, ""], step: Array, train: bool
    ) -> tuple[Float[Array, ""], Aux]:
        """Reconstruction and commitment, mean over examples; in training `Aux.variables` holds the moved codebook.

        Metrics: loss, reconstruction, commitment (mean |z - code|^2 per channel, without its weight), mse255_hard,
        code_usage, perplexity, and in training restarts (codes moved in this step).
        """
        images = from_uint8(batch["image"])
        collections = variables["dvae"]
        codebook = dict(collections["codebook"])
        z: Array = self.model.apply({"params": params["dvae"], **collections}, images, method="encode")
        outputs = jax.lax.stop_gradient(z).reshape(-1, z.shape[-1])
        key = jax.random.fold_in(rng, step)

        if train:
            # A codebook that was loaded has been used, so it is kept even where training starts at step 0.
            untouched = jnp.sum(codebook["usage"]) == 0
            codebook = self._seed_if(untouched, codebook, jnp.full(self.model.vocab_size, True), outputs, key)
        tree = {"params": params["dvae"], **collections, "codebook": codebook}
        tokens: Array = self.model.apply(tree, z, method="quantize")
        codes = jax.lax.stop_gradient(self.model.apply(tree, tokens, method="lookup"))
        stats = self.model.apply(tree, straight_through(z, codes), method="decode")

        reconstruction = reconstruction_loss(self.reconstruction, images, stats)
        commitment = jnp.mean(jnp.square(z - codes), axis=(1, 2, 3))
        loss = reconstruction + self.commitment * commitment
        usage, perplexity = code_statistics(tokens, self.model.vocab_size)
        values = {
            "loss": loss,
            "reconstruction": reconstruction,
            "commitment": commitment,
            "mse255_hard": mse255(images, self.model.apply(tree, stats, method="reconstruction")),
            "code_usage": usage,
            "perplexity": perplexity,
        }
        if train:
            codebook = update_codebook(codebook, outputs, tokens.ravel(), self.codebook_decay)
            codebook, values["restarts"] = self._restart(codebook, outputs, key, step)
            variables = {**variables, "dvae": {**collections, "codebook": codebook}}
        return jnp.mean(loss), Aux(metrics=mean_metrics(len(images), values), variables=variables)

    def preview(
        self, params: Tree, variables: Tree, frozen: Tree, batch: Batch, rng: Key[Array, ""]
    ) -> dict[str, Preview]:
        """Two rows: originals and reconstructions from tokens."""
        images = _reconstruct(self, params, variables, frozen, batch, rng)
        original = to_host(from_uint8(batch["image"]))
        return {"reconstruction": Preview(images=np.concatenate([original, to_host(images)]), columns=len(original))}

    def _seed_if(
        self, condition: Array, codebook: Codebook, chosen: Array, z: Float[Array, "n e"], key: Key[Array, ""]
    ) -> Codebook:
        """`seed_codes` under a condition: choosing without replacement sorts the batch, so it is not done in vain."""
        seed = functools.partial(seed_codes, share=self.restart_threshold)
        return jax.lax.cond(condition, seed, lambda codebook, *_: codebook, codebook, chosen, z, key)

    def _restart(
        self, codebook: Codebook, z: Float[Array, "n e"], key: Key[Array, ""], step: Array
    ) -> tuple[Codebook, Float[Array, ""]]:
        """Moves dead codes every `restart_every` steps; returns the codebook and how many were moved."""
        if not self.restart_every:
            return codebook, jnp.zeros(())
        due = (step > 0) & (step % self.restart_every == 0)
        dead = due & (codebook["usage"] < self.restart_threshold * jnp.mean(codebook["usage"]))
        moved = jnp.sum(dead).astype(jnp.float32)
        return self._seed_if(moved > 0, codebook, dead, z, jax.random.fold_in(key, 1)), moved


@functools.partial(jax.jit, static_argnums=0)
def _reconstruct(
    objective: VectorQuantizedVAEObjective,
    params: Tree,
    variables: Tree,
    frozen: Tree,
    batch: Batch,
    rng: Key[Array, ""],
) -> Float[Array, "b h w c"]:
    """Reconstructions from tokens, compiled once per objective."""
    sampler = ReconstructionSampler(objective.model)
    return sampler(params, variables, frozen, {"image": batch["image"]}, example_keys(rng, batch))["image"]
