"""Byte-pair encoding of captions: train, encode (with BPE dropout, framed or not), decode."""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Int

from cli.errors import UserError
from cli.locations import Location, locate, write_whole
from cli.text_files import read_text
from data.bounded_cache import BoundedCache
from data.clip_vocabulary import (
    END,
    END_OF_WORD,
    START,
    ClipVocabulary,
    clean_caption,
    clip_model,
    read_clip_vocabulary,
)

PAD_ID = 0
_PAD = "<pad>"
_EOS = "<|EOS|>"  # what UniDiffuser's captioner has behind GPT-2's own end

_CACHE_BYTES = 2**25  # of encodings, and as much of words
_LONGEST_KEPT = 1024  # letters of a caption whose encoding is kept
# Longer words (of letters, digits, other signs, blanks) are cut where a vocabulary is learned: time grows with their
# square. A text without blanks is many words, as its signs end them.
_LONGEST_WORD = 1000
_KINDS = (r"[^\W\d_]", r"\d", r"(?:[^\w\s]|_)", r"\s")
_LONG_WORDS = re.compile("|".join(rf"(?<!{kind})({kind}{{{_LONGEST_WORD}}}){kind}+" for kind in _KINDS))
_PER_ITEM = 64  # bytes of an id or a letter in a list, about

_MERGED_AT_ONCE = 64  # letters of a word under BPE dropout, whose cost grows with their square; few words are longer


class Encoded(NamedTuple):
    """A caption as ids.

    Attributes:
      ids: [l] int32, padded.
      truncated: whether the caption was longer than l and lost its end.
    """

    ids: Int[np.ndarray, " l"]
    truncated: bool


class Tokenizer:
    """Lower-cased byte-level BPE; id 0 is padding unless told otherwise. Any text can be encoded: no word is unknown.

    A tokenizer may frame captions by a start and an end token, which have the two highest ids; no caption's text
    becomes one of them, whatever it says. It is either trained here (`train`, `with_ends`), or reads as CLIP does
    (`from_clip_vocabulary`): words end in `</w>`, captions are framed, and the padding is also the piece "!", or
    another one (`padded_with`). Or it merges letters and not bytes, as minDALL-E's (`from_letter_vocabulary`): a letter
    that no piece has is an id of its own. Or it reads as GPT-2 does (`from_gpt2_vocabulary`): letters keep their case,
    captions have an end and no start, and the padding is also the piece "!". Llama 3's is a class of its own,
    `data.llama_tokenizer`.
    """

    def __init__(self, model: tokenizers.Tokenizer):
        """Takes over what `train`, `with_ends` or `clip_model` made.

        Raises:
          UserError: if it was made by something else.
        """
        marked = getattr(model.model, "end_of_word_suffix", None) == END_OF_WORD
        self._letters = marked and getattr(model.model, "unk_token", None) is not None
        self._clip = marked and not self._letters
        ends, size = (model.token_to_id(START), model.token_to_id(END)), model.get_vocab_size()
        self._gpt2 = not marked and model.token_to_id(_PAD) is None and ends[0] is None and ends[1] is not None
        if not marked and not self._gpt2 and model.token_to_id(_PAD) != PAD_ID:
            raise UserError(f"this tokenizer was not made by Tessera: its id {PAD_ID} is not {_PAD}")
        if not self._gpt2 and ends != (None, None) and ends != (size - 2, size - 1):
            raise UserError(f"this tokenizer was not made by Tessera: {START} and {END} are not its highest ids")
        self._take(model)

    def _take(self, model: tokenizers.Tokenizer) -> None:
        # Otherwise a caption that spells such a token would become it.
        model.encode_special_tokens = True
        self._model = model
        self._known_ids = BoundedCache[list[int]](_CACHE_BYTES, _LONGEST_KEPT, lambda ids: _PER_ITEM * len(ids))
        self._known_words = BoundedCache[list[tuple[str, ...]]](
            _CACHE_BYTES, _LONGEST_KEPT, lambda words: _PER_ITEM * sum(1 + len(word) for word in words)
        )

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[tokenizers.Tokenizer]]:
        """Another process gets the vocabulary, and no cache."""
        return Tokenizer, (self._model,)

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
        model.train_from_iterator(map(_cut_words, texts), trainer)
        return cls(model)

    @classmethod
    def from_clip_vocabulary(cls, path: str | Location, ends: bool = True) -> "Tokenizer":
        """Reads CLIP's published vocabulary, from any file or folder that `read_clip_vocabulary` takes.

        Args:
          path: of the vocabulary.
          ends: whether captions are framed, as CLIP's are; without, the two highest ids are left out.

        Raises:
          UserError: if nothing is there, or it is something else.
        """
        return cls(clip_model(read_clip_vocabulary(path), ends))

    @classmethod
    def from_letter_vocabulary(cls, vocabulary: Path, merges: Path, unknown: str, pad: str) -> "Tokenizer":
        """Reads a vocabulary of the `tokenizers` library's CharBPETokenizer, which encodes lower-cased here.

        Args:
          vocabulary: a JSON file, {piece: id}.
          merges: a text file, a pair a line.
          unknown: the piece that stands for a letter which is in no other.
          pad: the piece that fills captions up.

        Raises:
          UserError: if the files are no vocabulary, or have no such pieces.
        """
        model, normalizers = tokenizers.models.BPE, tokenizers.normalizers
        try:
            options = {"unk_token": unknown, "end_of_word_suffix": END_OF_WORD}
            whole = tokenizers.Tokenizer(model.from_file(str(vocabulary), str(merges), **options))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{vocabulary} and {merges} are no vocabulary ({error}); fetch them again") from error
        if missing := [piece for piece in (unknown, pad) if whole.token_to_id(piece) is None]:
            raise UserError(f"{vocabulary} has no piece {missing[0]!r}; fetch it again")
        whole.normalizer = normalizers.Sequence([normalizers.BertNormalizer(lowercase=False), normalizers.Lowercase()])
        whole.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        whole.decoder = tokenizers.decoders.BPEDecoder(suffix=END_OF_WORD)
        whole.enable_padding(pad_id=whole.token_to_id(pad), pad_token=pad)
        return cls(whole)

    @classmethod
    def from_gpt2_vocabulary(cls, vocabulary: Path, merges: Path, size: int) -> "Tokenizer":
        """Reads GPT-2's vocabulary.

        Args:
          vocabulary: a JSON file, {piece: id}.
          merges: a text file, a pair a line.
          size: ids that there are to be: as many as the file has, where its last one ends captions, or one more, which
            does then (UniDiffuser's).

        Raises:
          UserError: if the files are no vocabulary, or have another number of pieces.
        """
        try:
            whole = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocabulary), str(merges)))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{vocabulary} and {merges} are no vocabulary ({error}); fetch them again") from error
        if (found := whole.get_vocab_size()) not in (size, size - 1) or whole.token_to_id(END) is None:
            raise UserError(f"{vocabulary} has {found} pieces, and GPT-2's with {END} are {size} or one less here")
        whole.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        whole.decoder = tokenizers.decoders.ByteLevel()
        whole.add_special_tokens([END] if found == size else [END, _EOS])
        return cls(whole)

    @classmethod
    def load(cls, path: str | Location) -> "Tokenizer":
        """Reads a tokenizer that `save` wrote: trained or CLIP's, with or without ends; or Llama 3's, of other people.

        Raises:
          UserError: if the file is missing or is not a tokenizer.
        """
        path = locate(path)
        if not path.is_file():
            raise UserError(f"there is no tokenizer at {path}; run `python -m scripts.prepare` for its dataset first")
        text = read_text(path)
        try:
            model = tokenizers.Tokenizer.from_str(text)
            from data.llama_tokenizer import LlamaTokenizer  # which is one of these

            if LlamaTokenizer.recognizes(model):
                return LlamaTokenizer(model)
            if getattr(model.model, "end_of_word_suffix", None) == END_OF_WORD and model.token_to_id(END) is not None:
                # Another project's file of CLIP's vocabulary has its own ways of cleaning: only the ids are taken.
                return cls.from_clip_vocabulary(path)
            return cls(model)
        except Exception as error:
            # The library raises bare Exception for a malformed file.
            raise UserError(f"{path} is not a tokenizer file ({error}); prepare the dataset again") from error

    def save(self, path: str | Location) -> None:
        """Writes one JSON file that the `tokenizers` library reads too."""
        write_whole(locate(path), self._model.to_str())

    def with_ends(self) -> "Tokenizer":
        """Returns a copy that frames captions, by two more ids; a tokenizer that does so already, as it is."""
        if self.end_id is not None:
            return self
        model = tokenizers.Tokenizer.from_str(self._model.to_str())
        model.add_special_tokens([START, END])
        return Tokenizer(model)

    def padded_with(self, piece: str) -> "Tokenizer":
        """Returns a copy that fills captions up with another piece: Stable Diffusion 1 has the end token there.

        Raises:
          UserError: if there is no such piece.
        """
        if (pad := self._model.token_to_id(piece)) is None:
            raise UserError(f"the tokenizer is to pad with {piece!r}, which is none of its {self.vocab_size} pieces")
        model = tokenizers.Tokenizer.from_str(self._model.to_str())
        model.enable_padding(pad_id=pad, pad_token=piece)
        return Tokenizer(model)

    def clip_vocabulary(self) -> ClipVocabulary:
        """Pieces, merges and padding, of a tokenizer that reads as CLIP does.

        Raises:
          UserError: if it reads otherwise.
        """
        if not self._clip:
            raise UserError("this tokenizer was trained here and is not of CLIP's form")
        merges = [tuple(pair) for pair in json.loads(self._model.to_str())["model"]["merges"]]
        return ClipVocabulary(self._model.get_vocab(), merges, self._model.id_to_token(self.pad_id))

    @functools.cached_property
    def pad_id(self) -> int:
        """The id that fills captions up."""
        return PAD_ID if self._model.padding is None else int(self._model.padding["pad_id"])

    @property
    def reads_as_clip(self) -> bool:
        """Whether it cuts words as CLIP does."""
        return self._clip

    @property
    def vocab_size(self) -> int:
        """Number of ids, padding and ends included."""
        return self._model.get_vocab_size()

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of what it makes ids by: two tokenizers that have it in common make the same of any caption."""
        return hashlib.sha256(json.dumps(json.loads(self._model.to_str()), sort_keys=True).encode()).hexdigest()

    @functools.cached_property
    def start_id(self) -> int | None:
        """The id before every caption; None for a tokenizer that does not frame."""
        return self._model.token_to_id(START)

    @functools.cached_property
    def end_id(self) -> int | None:
        """The id after every caption, the highest of all; None for a tokenizer that does not frame."""
        return self.vocab_size - 1 if self._gpt2 else self._model.token_to_id(END)

    def encode(self, text: str, length: int, dropout: float = 0.0, rng: np.random.Generator | None = None) -> Encoded:
        """Encodes a caption into exactly `length` ids, cutting its end or padding it.

        With a start and an end token, these are among the `length`, and a caption that is cut keeps the end token in
        the last place: that is where CLIP's text feature is read.

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
            ids = self._encode_with_dropout(text, length, dropout, rng)
        else:
            ids = self._encode(text)
        if self.end_id is not None:
            ids = [*([] if self.start_id is None else [self.start_id]), *ids, self.end_id]
        padded = np.full(length, self.pad_id, np.int32)
        kept = ids[:length]
        padded[: len(kept)] = kept
        truncated = len(ids) > length
        if truncated and self.end_id is not None:
            padded[-1] = self.end_id
        return Encoded(padded, truncated)

    def encode_whole(
        self, text: str, length: int, dropout: float = 0.0, rng: np.random.Generator | None = None
    ) -> Encoded:
        """As `encode`, of a text that is learned and not gone on with; arguments as there."""
        return self.encode(text, length, dropout, rng)

    def pieces(self, text: str) -> list[int]:
        """The ids of a text, neither framed nor cut nor filled up."""
        return list(self._encode(text))

    def count(self, text: str) -> int:
        """Returns how many ids a caption takes if nothing is cut, ends included."""
        return len(self._encode(text)) + (self.start_id is not None) + (self.end_id is not None)

    def decode(self, ids: Int[np.ndarray, " l"]) -> str:
        """Returns the text of ids, without padding, ends, and what follows the first end.

        CLIP's vocabulary puts a space between any two words, punctuation included: the text was not kept.
        """
        kept = ids.tolist()
        if self.end_id in kept:
            kept = kept[: kept.index(self.end_id)]
        if self._clip:  # only at the end: elsewhere it is a "!", which is never the last piece of a word
            while kept and kept[-1] == PAD_ID:
                kept.pop()
        elif not self._gpt2:  # whose pads stand behind an end alone, and before it are a "!"
            kept = [i for i in kept if i != self.pad_id]
        return self._model.decode([i for i in kept if i != self.start_id]).strip()

    def _encode(self, text: str) -> list[int]:
        ids = self._known_ids.get(text)
        if ids is None:
            ids = self._model.encode(clean_caption(text) if self._clip else text, add_special_tokens=False).ids
            self._known_ids.put(text, ids)
        return ids

    def _encode_with_dropout(self, text: str, length: int, dropout: float, rng: np.random.Generator) -> list[int]:
        """The first ids of a caption, one more than `length` at least if there are so many: the rest would be cut.

        A word longer than `_MERGED_AT_ONCE` is merged in parts of that many letters, so that time grows as its length.
        """
        ids: list[int] = []
        for word in self._words(text):
            for start in range(0, len(word), _MERGED_AT_ONCE):
                if len(ids) > length:
                    return ids
                pieces = self._merge(word[start : start + _MERGED_AT_ONCE], dropout, rng)
                ids.extend(self._ids_of(pieces))
        return ids

    def _ids_of(self, pieces: Iterable[str]) -> Iterable[int]:
        """Ids of pieces; of one that is none, which only letters may be, that of the unknown one."""
        unknown = self._model.token_to_id(self._model.model.unk_token) if self._letters else PAD_ID
        return (unknown if (id := self._model.token_to_id(piece)) is None else id for piece in pieces)

    def _words(self, text: str) -> list[tuple[str, ...]]:
        """Returns the words of a caption, each as pieces of one byte."""
        words = self._known_words.get(text)
        if words is None:
            words = self._split(text)
            self._known_words.put(text, words)
        return words

    def _split(self, text: str) -> list[tuple[str, ...]]:
        normalizer, splitter = self._model.normalizer, self._model.pre_tokenizer
        assert splitter is not None  # `train` and `clip_model` set it
        if self._clip:
            text = clean_caption(text)
        elif normalizer is not None:
            text = normalizer.normalize_str(text)
        suffix = END_OF_WORD if self._clip or self._letters else ""
        return [(*word[:-1], word[-1] + suffix) for word, _ in splitter.pre_tokenize_str(text)]

    def _merge(self, word: Sequence[str], dropout: float, rng: np.random.Generator) -> list[str]:
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


def _cut_words(text: str) -> str:
    return text if len(text) <= _LONGEST_WORD else _LONG_WORDS.sub(r"\1\2\3\4", text)
