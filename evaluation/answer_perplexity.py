"""How probable the answers of a split are to a run, with the picture that is asked about, with another, with none."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from cli.errors import UserError
from cli.plurals import spell_count
from data.pipeline import open_stream
from evaluation.records import Record
from models.llama import Llama
from models.picture_reader import PictureReader
from sample.samplers.vision_adapter import PICTURE, answers_behind_pictures, tiles_of
from sample.trained import TrainedSampler

ANSWER_PERPLEXITY = "answer_perplexity"


def answer_perplexity(trained: TrainedSampler, split: str, num: int) -> Record:
    """Exp of the mean of -ln p over the tokens of all answers to the first questions of a split.

    Args:
      trained: a vision adapter whose dataset has questions with answers, `config.data.dialogues`.
      split: of its dataset.
      num: questions, one a picture, at least 2.

    Returns:
      values: answer_perplexity; with_wrong_picture_perplexity, each with the next question's picture; and
      without_picture_perplexity, which is the language model's where a picture's token stands before the text.

    Raises:
      UserError: if there are no such questions, num is 1, or the split has fewer records.
    """
    data = trained.config.data
    if not data.dialogues or num < 2:
        what = f"--num must be at least 2, not {num}" if data.dialogues else f"{trained.run.folder} learned none"
        raise UserError(f"{ANSWER_PERPLEXITY} is of several questions with answers: {what}")
    stream = open_stream(data, trained.tokenizer, split=split, seed=0, train=False)
    if stream.epoch_size < num:
        has = spell_count(stream.epoch_size, "record")
        raise UserError(f"split {split!r} of {data.dataset} has {has}; set --num to that or less")
    params = trained.weights.params["vision_adapter"]
    totals = {"answer": np.zeros(2), "with_wrong_picture": np.zeros(2), "without_picture": np.zeros(2)}
    for start in range(0, num, trained.chunk):
        places = np.minimum(np.arange(start, start + trained.chunk), num - 1)  # one program for every chunk
        batch, others = stream.batch(places.tolist()), stream.batch(((places + 1) % num).tolist())
        mask = batch["text_mask"] & (np.arange(start, start + trained.chunk) < num)[:, None]
        for name, shown in (("answer", batch), ("with_wrong_picture", others)):
            pictures = {row: shown[row] for row in PICTURE if row in shown}
            nats = nats_of(trained.sampler.model, params, batch["text"], mask, pictures)
            totals[name] += jax.device_get(nats)
        plain = nats_of(trained.sampler.model, params, batch["text"], mask, None)
        totals["without_picture"] += jax.device_get(plain)
    values = {f"{name}_perplexity": math.exp(nats / max(count, 1)) for name, (nats, count) in totals.items()}
    return {"values": values, "counted": {}}


@functools.partial(jax.jit, static_argnums=0)
def nats_of(
    model: Llama | PictureReader,
    params: dict,
    text: Int[Array, "b t"],
    mask: Bool[Array, "b t"],
    pictures: dict[str, Array] | None,
) -> Float[Array, "2"]:
    """-ln p of all tokens that `mask` has, and their number.

    Args:
      model: the network.
      params: of it.
      text: ids, pads behind.
      mask: of the tokens that count; the first never does.
      pictures: `PICTURE`, one a text, for a network that reads them; None for texts without.
    """
    shown = ()
    if pictures is not None:
        shown = tiles_of(pictures)
        text, mask = answers_behind_pictures(text, mask, model)
    logits = model.apply({"params": params}, text[:, :-1], *shown)
    counted = mask[:, 1:]
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counted, text[:, 1:], 0)) * counted
    return jnp.stack([jnp.sum(nats), jnp.sum(counted, dtype=jnp.float32)])
