"""The language model of Llama 3 (Dubey et al. 2024, section 3): next-token prediction of texts.

    loss = mean over tokens of -ln p [+ answer_weight * the mean over the answers' tokens]

over the tokens behind the first of each text, pads left out.
"""

import dataclasses

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key
from ml_collections import ConfigDict

from cli.errors import UserError
from models.llama import Llama
from sample.samplers.llama import LlamaSampler
from train.objectives.contract import Aux, Batch, Metrics, Preview, Tree
from train.objectives.packing import Row, pack, read_packing


@dataclasses.dataclass(frozen=True)
class LlamaObjective:
    """Trains part `llama`, a `models.llama.Llama`.

    Attributes:
      sampler: holds the network.
      packing: texts in a row, and tokens of such a row; see `train.objectives.packing`.
      answer_weight: of the mean over the answers' tokens alone, which is added; needs questions with answers.
    """

    sampler: LlamaSampler
    packing: tuple[int, int] = (1, 0)
    answer_weight: float = 0.0

    @classmethod
    def from_config(cls, config: ConfigDict) -> "LlamaObjective":
        """Reads `config.models.llama`, `config.sample`, and of `config.loss` what it has.

        That is `pack`, `packed_length` and `answer_weight`.

        Raises:
          UserError: if answers count and texts have none, or as `read_packing`.
        """
        weight = config.loss.get("answer_weight", 0.0)
        if weight < 0 or (weight and not config.data.get("dialogues", "")):
            raise UserError(
                f"config.loss.answer_weight={weight} must be 0, or positive for texts that are questions with answers "
                "(config.data.dialogues)"
            )
        return cls(LlamaSampler.from_config(config), read_packing(config.loss), weight)

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
        """The cross-entropy, mean over examples of the mean over their tokens; see `token_loss`.

        Where answers have a weight, so many times the same of their tokens alone is added.

        Metrics: as of `token_loss`, loss with what is added; exact_answers, exact of the answers alone.
        `batch` holds text int32 [b t], pads where there is no token, and text_mask bool [b t] of the answers.
        """
        del frozen, rng, step, train
        text = batch["text"]
        row = Row.of_texts(text, text != self.model.text_pad_id, self.sampler.end_id)
        read = row.counted
        row = pack(row, read, *self.packing)
        logits = self.model.apply({"params": params["llama"]}, row.tokens, row.positions, row.segments)
        loss, metrics = token_loss(logits, row)
        if self.answer_weight:
            answers = Row.of_texts(text, batch["text_mask"], self.sampler.end_id)
            answer_loss, answer_metrics = token_loss(logits, pack(answers, read, *self.packing))
            loss += self.answer_weight * answer_loss
            metrics["exact_answers"] = answer_metrics["exact"]
            learned, count = metrics["loss"]
            metrics["loss"] = (learned + self.answer_weight * answer_metrics["loss"][0], count)
        return loss, Aux(metrics=metrics, variables=variables)

    def preview(
        self, params: Tree, variables: Tree, frozen: Tree, batch: Batch, rng: Key[Array, ""]
    ) -> dict[str, Preview]:
        """Nothing: there are no pictures."""
        return {}


def token_loss(logits: Float[Array, "r l v"], row: Row) -> tuple[Float[Array, ""], Metrics]:
    """Cross-entropy of tokens, mean over examples of the mean over their counted tokens, and metrics.

    An example's loss does not depend on the others, and that of one of which nothing is left is 0: so the gradient adds
    up over any split of the batch.

    Metrics: loss, mean over the examples that have a counted token; nats, per counted token of all examples; accuracy,
    the share of counted tokens whose most likely prediction is right; exact, of the examples that have one, the share
    of those that are whole and all of whose tokens are right; cut, the share of all examples that are not whole, as the
    rest did not fit `config.data.text_length` or `config.loss.packed_length`.
    """
    targets, counted = row.targets, row.counted
    nats = row.per_text(
        optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counted, targets, 0)) * counted
    )
    count = row.per_text(counted.astype(jnp.float32))
    loss = nats / jnp.maximum(count, 1)
    right = (jnp.argmax(logits, axis=-1) == targets) & counted
    exact = row.whole & (row.per_text((counted & ~right).astype(jnp.float32)) == 0)
    read = jnp.sum(count > 0, dtype=jnp.float32)
    metrics = {
        "loss": (jnp.sum(loss), read),
        "nats": (jnp.sum(nats), jnp.sum(count)),
        "accuracy": (jnp.sum(right, dtype=jnp.float32), jnp.sum(count)),
        "exact": (jnp.sum(exact, dtype=jnp.float32), read),
        "cut": (jnp.sum(~row.whole, dtype=jnp.float32), jnp.asarray(len(count), jnp.float32)),
    }
    return jnp.mean(loss), metrics
