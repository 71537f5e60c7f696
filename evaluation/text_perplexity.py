"""How probable texts without a picture are to a language model: what an adapter or fine-tuning makes it forget."""

import math

import jax
import numpy as np
from ml_collections import ConfigDict

from cli.errors import UserError
from cli.plurals import spell_count
from data.dialogues import ABOUT_SCENES, SCENES
from data.pipeline import open_stream
from evaluation.answer_perplexity import nats_of
from evaluation.records import Record
from sample.samplers.llama import LlamaSampler
from sample.trained import TrainedSampler

TEXT_PERPLEXITY = "text_perplexity"
_CHUNK = 50  # the same program for a language model alone and within another network: results agree to the bit


def text_perplexity(trained: TrainedSampler, split: str, num: int) -> Record:
    """Exp of the mean of -ln p over all tokens of the first texts of a split, questions and answers, but their first.

    Args:
      trained: a language model, or one that reads pictures and is shown none.
      split: of its dataset, which has questions with answers.
      num: texts, one a picture.

    Returns:
      values: text_perplexity, the exp of the objective's metric `nats` of `train.objectives.llama`, on these texts.

    Raises:
      UserError: if the split has fewer records.
    """
    data = trained.config.data
    # The same texts for a language model that learned with captions before questions as for an adapter of it.
    data = ConfigDict({**data, "dialogues": SCENES if data.dialogues in ABOUT_SCENES else data.dialogues})
    stream = open_stream(data, trained.tokenizer, split=split, seed=0, train=False)
    if stream.epoch_size < num:
        has = spell_count(stream.epoch_size, "record")
        raise UserError(f"split {split!r} of {data.dataset} has {has}; set --num to that or less")
    model = trained.sampler.model
    part = "llama" if isinstance(trained.sampler, LlamaSampler) else "vision_adapter"
    total = np.zeros(2)
    for start in range(0, num, _CHUNK):
        places = np.arange(start, start + _CHUNK)
        text = stream.batch(np.minimum(places, num - 1).tolist())["text"]
        text = text[:, : (text != model.text_pad_id).any(axis=0).sum()]  # as programs of both, whose rows differ
        mask = (text != model.text_pad_id) & (places < num)[:, None]
        total += jax.device_get(nats_of(model, trained.weights.params[part], text, mask, None))
    return {"values": {TEXT_PERPLEXITY: math.exp(total[0] / max(total[1], 1))}, "counted": {}}
