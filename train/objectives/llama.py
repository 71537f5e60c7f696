"""The language model of Llama 3 (Dubey et al. 2024, section 3): next-token prediction of texts.

    loss = mean over tokens of -ln p

over the tokens behind the first of each row, pads left out.
"""

import dataclasses

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key
from ml_collections import ConfigDict

from models.llama import Llama
from sample.samplers.llama import LlamaSampler
from train.objectives.contract import Aux, Batch, Metrics, Preview, Tree


@dataclasses.dataclass(frozen=True)
class LlamaObjective:
    """Trains part `llama`, a `models.llama.Llama`.

    Attributes:
      sampler: holds the network.
    """

    sampler: LlamaSampler

    @classmethod
    def from_config(cls, config: ConfigDict) -> "LlamaObjective":
        """Reads `config.models.llama` and `config.sample`."""
        return cls(LlamaSampler.from_config(config))

    @property
    def model(self) -> Llama:
        """The network that is trained."""
        return self.sampler.model

    def init(self, rng: Key[Array, ""], batch: Batch) -> tuple[Tree, Tree]:
        """Returns ({"llama": parameters}, {})."""
        del batch
        inputs = [jnp.zeros(x.shape, x.dtype) for x in self.model.example_inputs(1)]
        return {"llama": self.model.init(rng, *inputs)["params"]}, {}

    def loss(
        self, params: Tree, variables: Tree, frozen: Tree, batch: Batch, rng: Key[Array, ""], step: Array, train: bool
    ) -> tuple[Float[Array, ""], Aux]:
        """The cross-entropy, mean over examples of the mean over their tokens.

        An example's loss does not depend on the others, so it adds up over any split of the batch.

        Metrics: as of `token_loss`. `batch` holds text int32 [b t], pads where there is no token.
        """
        del frozen, rng, step, train
        text = batch["text"]
        logits = self.model.apply({"params": params["llama"]}, text[:, :-1])
        loss, metrics = token_loss(logits, text[:, 1:], text[:, 1:] != self.model.text_pad_id)
        return loss, Aux(metrics=metrics, variables=variables)

    def preview(
        self, params: Tree, variables: Tree, frozen: Tree, batch: Batch, rng: Key[Array, ""]
    ) -> dict[str, Preview]:
        """Nothing: there are no pictures."""
        return {}


def token_loss(
    logits: Float[Array, "b l v"], targets: Int[Array, "b l"], counted: Bool[Array, "b l"]
) -> tuple[Float[Array, ""], Metrics]:
    """Cross-entropy of tokens, mean over examples of the mean over their counted tokens, and metrics.

    Metrics: loss; nats, per counted token of all examples; accuracy, the share of counted tokens whose most likely
    prediction is right; exact, the share of examples all of whose counted tokens are.
    """
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counted, targets, 0)) * counted
    count = jnp.sum(counted, axis=1, dtype=jnp.float32)
    loss = jnp.sum(nats, axis=1) / jnp.maximum(count, 1)
    right = (jnp.argmax(logits, axis=-1) == targets) & counted
    exact = jnp.all(right | ~counted, axis=1)
    rows = jnp.asarray(len(targets), jnp.float32)
    metrics = {
        "loss": (jnp.sum(loss), rows),
        "nats": (jnp.sum(nats), jnp.sum(count)),
        "accuracy": (jnp.sum(right, dtype=jnp.float32), jnp.sum(count)),
        "exact": (jnp.sum(exact, dtype=jnp.float32), rows),
    }
    return jnp.mean(loss), metrics
