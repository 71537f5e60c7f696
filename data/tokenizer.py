"""Byte-pair encoding of captions: train, encode (with BPE dropout), decode."""

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Int

from cli.errors import UserError

PAD_ID = 0
_PAD = "<pad>"


class Encoded(NamedTuple):
    """A caption as ids.

    Attributes:
      ids: [l] int32, padded with PAD_ID.
      truncated: whether the caption was longer than l and lost its end.
    """

    ids: Int[np.ndarray, " l"]
    truncated: bool


class Tokenizer:
    """Lower-cased byte-level BPE; id 0 is padding. Any text can be encoded, so no word is unknown."""

    def __init__(self, model: tokenizers.Tokenizer):
        if model.token_to_id(_PAD) != PAD_ID:
            raise UserError(f"this tokenizer was not made by Tessera: its id {PAD_ID} is not {_PAD}")
        self._model = model

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learns at most `vocab_size` ids from texts: padding, 256 bytes, then the most frequent merges.

        Raises:
          UserError: if `vocab_size` does not hold the padding id and the bytes.
        """
        if vocab_size < 257:
            raise UserError(f"a byte-level vocabulary needs at least 257 ids (padding and 256 bytes), not {vocab_size}")
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.normalizer = tokenizers.normalizers.Sequence(
            [tokenizers.normalizers.NFKC(), tokenizers.normalizers.Lowercase(), tokenizers.normalizers.Strip()]
        )
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
        model.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[_PAD],
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        model.train_from_iterator(texts, trainer)
        return cls(model)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a tokenizer that `save` wrote.

        Raises:
          UserError: if the file is missing or is not a tokenizer.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"there is no tokenizer at {path}; run `python -m scripts.prepare` for its dataset first")
        try:
            return cls(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")))
        except Exception as error:
            # The library raises bare Exception for a malformed file.
            raise UserError(f"{path} is not a tokenizer file ({error}); prepare the dataset again") from error

    def save(self, path: str | Path) -> None:
        """Writes one JSON file that the `tokenizers` library reads too."""
        path = Path(path)
        draft = path.with_suffix(".tmp")
        draft.write_text(self._model.to_str(), encoding="utf-8")
        draft.replace(path)

    @property
    def vocab_size(self) -> int:
        """Number of ids, padding included."""
        return self._model.get_vocab_size()

    def encode(self, text: str, length: int, dropout: float = 0.0, rng: np.random.Generator | None = None) -> Encoded:
        """Encodes a caption into exactly `length` ids, cutting its end or padding it.

        Args:
          text: the caption.
          length: l, how many ids to return.
          dropout: probability that a merge is passed over (BPE dropout, Provilkov et al. 2020; DALL-E trains with
            0.1). The library's own dropout cannot be seeded, and an example must depend on its index alone.
          rng: the source of randomness; needed when `dropout` is positive.
        """
        if dropout > 0:
            if rng is None:
                raise ValueError("BPE dropout needs a random generator")
            ids = self._encode_with_dropout(text, dropout, rng)
        else:
            ids = self._encode(text)
        padded = np.full(length, PAD_ID, np.int32)
        kept = ids[:length]
        padded[: len(kept)] = kept
        return Encoded(padded, len(ids) > length)

    def decode(self, ids: Int[np.ndarray, " l"]) -> str:
        """Returns the text of ids; padding is left out."""
        return self._model.decode([int(i) for i in ids if i != PAD_ID]).strip()

    @functools.lru_cache(maxsize=2**16)  # noqa: B019  (a process has one or two tokenizers, and they live as long)
    def _encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def _encode_with_dropout(self, text: str, dropout: float, rng: np.random.Generator) -> list[int]:
        normalizer, splitter = self._model.normalizer, self._model.pre_tokenizer
        assert normalizer is not None and splitter is not None  # `train` sets both
        ids: list[int] = []
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)):
            ids.extend(self._model.token_to_id(piece) or PAD_ID for piece in self._merge(word, dropout, rng))
        return ids

    def _merge(self, word: str, dropout: float, rng: np.random.Generator) -> list[str]:
        """Applies the merges to one word in order of rank; each possible merge is passed over with `dropout`."""
        pieces = list(word)
        while len(pieces) > 1:
            candidates = [
                (rank, place)
                for place, pair in enumerate(zip(pieces, pieces[1:], strict=False))
                if (rank := self._merge_ranks.get(pair)) is not None and rng.random() >= dropout
            ]
            if not candidates:
                break
            _, place = min(candidates)
            pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
        return pieces

    @functools.cached_property
    def _merge_ranks(self) -> dict[tuple[str, str], int]:
        merges = json.loads(self._model.to_str())["model"]["merges"]
        return {tuple(pair): rank for rank, pair in enumerate(merges)}
