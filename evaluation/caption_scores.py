"""How near captions that a run writes are to those that people wrote: BLEU and CIDEr, of any dataset with captions.

BLEU is sacrebleu's (Post 2018), lower-cased, of 0 to 100; `signature` says how it was computed. CIDEr is CIDEr-D
(Vedantam et al. 2015, "CIDEr: Consensus-based Image Description Evaluation", section 7), with the constants of COCO's
evaluation: 0 to 10, and published as a hundred times that where it is near 1. Words are runs of letters and digits,
lower-cased; COCO's evaluation has the Penn Treebank's rules, which differ in clitics and hyphens, so that figures are
near published ones and not the same.
"""

import collections
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from cli.errors import UserError
from data.preprocess import transform_pair
from data.records import CAPTIONS, first_records, open_records
from evaluation.clip.reranking import ClipScorer
from evaluation.clip.score import PREFIX, clip_score
from evaluation.records import Record
from sample.embedding import BLOCK
from sample.trained import TrainedSampler

CAPTION_SCORES = "caption_scores"

_LONGEST = 4  # n-grams, of both
_SIGMA = 6.0  # words by which lengths may differ

_Counts = collections.Counter[tuple[str, ...]]


def caption_score_values(
    trained: TrainedSampler,
    split: str,
    num: int,
    seed: int,
    settings: Mapping[str, Any],
    scorer: ClipScorer | None = None,
) -> Record:
    """Writes captions for the first records of a split, and compares each with all captions of its record.

    Args:
      trained: reads pictures, or captions alone (then the first of a record is said again), and makes text.
      split: of its dataset, with captions.
      num: records, at least 2: CIDEr weighs words by how few pictures have them.
      seed: of sampling.
      settings: of sampling.
      scorer: a CLIP that says how near captions are to their pictures besides; None for none.

    Returns:
      values: bleu, cider, and clip_score with a scorer; signature, and what the score depends on.

    Raises:
      UserError: if num is 1, there are fewer records, or one lacks captions; or sacrebleu is not installed.
    """
    if num < 2:
        raise UserError(f"{CAPTION_SCORES} is of several pictures, whose words it compares: set --num to 2 or more")
    _require_sacrebleu()
    data = trained.config.data
    references = [record[CAPTIONS] for record in first_records(data, split, num, (CAPTIONS,))]
    source, transform = open_records(data, split), transform_pair(data.transform).evaluation
    pictured = "image" in trained.sampler.reads
    texts: list[str] = []
    cosines: list[Float[np.ndarray, " b"]] = []
    for start in range(0, num, BLOCK):  # all pictures of a large split would not fit in memory
        places = range(start, min(start + BLOCK, num))
        rows = {} if pictured else trained.encode([references[place][0] for place in places])
        images = np.zeros(0)
        if pictured or scorer is not None:
            images = np.stack([transform(source[place]["image"], data.image_size, None) for place in places])
        outputs = trained({"image": images} if pictured else rows, seed=seed, indices=places, **settings)
        written = trained.decode(outputs["text"])
        texts += written
        if scorer is not None:
            prefix = PREFIX if scorer.convention == "hessel" else ""
            # A CLIP's tokenizer takes no empty caption.
            cosines.append(scorer.clip.cosines(images, [prefix + (text.strip() or ".") for text in written]))
    score, signature = bleu(texts, references)
    record: Record = {"values": {"bleu": score, "cider": float(np.mean(cider(texts, references)))}}
    record |= {"signature": signature}
    if scorer is not None:
        record["values"]["clip_score"] = clip_score(np.concatenate(cosines), scorer.convention)
        run = scorer.clip.trained
        record |= {"convention": scorer.convention, "clip": str(run.run.folder), "clip_step": run.weights.step}
    return record


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, str]:
    """BLEU of a corpus with up to four words, 0 to 100, and sacrebleu's signature of how it was computed.

    Args:
      texts: one for each picture.
      references: of each, one or more; their numbers may differ.
    """
    from sacrebleu.metrics.bleu import BLEU

    metric, most = BLEU(lowercase=True), max(map(len, references))
    streams = [[each[place] if place < len(each) else None for each in references] for place in range(most)]
    score = metric.corpus_score(list(texts), streams).score
    return float(score), str(metric.get_signature())


def cider(texts: Sequence[str], references: Sequence[Sequence[str]]) -> Float[np.ndarray, " n"]:
    """CIDEr-D of each text, 0 to 10.

    With g the counts of a sentence's n-grams times ln(number of pictures / pictures whose references have it), and l
    its words: the mean over n = 1 to 4, and over references, of

        10 exp(-(l - l_ref)^2 / (2 sigma^2)) min(g, g_ref) . g_ref / (|g| |g_ref|)

    Args:
      texts: one for each picture; n-grams are weighted by all of them, so that a score is of a set.
      references: of each, one or more.
    """
    ours = [_grams(text) for text in texts]
    theirs = [[_grams(text) for text in each] for each in references]
    found: _Counts = collections.Counter()
    for each in theirs:
        found.update({gram for grams in each for gram in grams})

    def weighted(grams: _Counts, size: int) -> dict[tuple[str, ...], float]:
        return {
            gram: count * math.log(len(texts) / max(1, found[gram]))
            for gram, count in grams.items()
            if len(gram) == size
        }

    scores = np.zeros(len(texts))
    for place, (grams, each) in enumerate(zip(ours, theirs, strict=True)):
        words = _words(grams)
        for size in range(1, _LONGEST + 1):
            written = weighted(grams, size)
            for reference in each:
                wanted = weighted(reference, size)
                shared = written.keys() & wanted.keys()
                product = sum(min(written[gram], wanted[gram]) * wanted[gram] for gram in shared)
                norms = math.hypot(*written.values()) * math.hypot(*wanted.values())
                near = math.exp(-((words - _words(reference)) ** 2) / (2 * _SIGMA**2))
                scores[place] += 10 * near * product / norms / len(each) / _LONGEST if norms else 0.0
    return scores


def _grams(text: str) -> _Counts:
    """How often a sentence has each of its n-grams."""
    words = re.findall(r"\w+", text.lower())
    return collections.Counter(
        tuple(words[start : start + size]) for size in range(1, _LONGEST + 1) for start in range(len(words) - size + 1)
    )


def _words(grams: _Counts) -> int:
    return sum(count for gram, count in grams.items() if len(gram) == 1)


def _require_sacrebleu() -> None:
    """Raises UserError unless it is installed."""
    try:
        import sacrebleu  # noqa: F401
    except ImportError:
        raise UserError(f"{CAPTION_SCORES} needs sacrebleu: pip install -e '.[captions]'") from None
