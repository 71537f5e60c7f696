"""CLIP's text as published: how a caption is cleaned and cut into words, and the files its vocabulary comes in.

The vocabulary itself is not part of this repository. Sources: Radford et al. 2021, section 2.4, for a lower-cased
byte-pair encoding framed by a start and an end token; the rest are facts of the files that its authors released.
"""

import gzip
import html
import json
import re
import zlib
from typing import Any, NamedTuple

import ftfy
import tokenizers

from cli.errors import UserError
from cli.locations import Location, locate_from_home
from cli.text_files import read_text

START, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"  # of the last piece of every word

# The published list of merges is longer than CLIP's, whose 49,408 ids are 256 bytes twice, its merges and 2 ends.
_MERGES = 49_408 - 2 * 256 - 2

# U+0345 is part of no word, as in the published expression: the only mark whose upper case is a letter.
_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{345}]+"

_FILES = ("tokenizer.json", "merges.txt", "bpe_simple_vocab_16e6.txt.gz")


class ClipVocabulary(NamedTuple):
    """What a vocabulary's files say.

    Attributes:
      ids: piece -> id, from 0 without gaps; the start and the end token have the two highest.
      merges: pairs of pieces that become one, the first merged first.
      pad: the piece that fills captions up; None for that of id 0, as published.
    """

    ids: dict[str, int]
    merges: list[tuple[str, str]]
    pad: str | None = None


def clean_caption(text: str) -> str:
    """Mends a caption's encoding, resolves HTML entities (twice), collapses white space and lowers the case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def read_clip_vocabulary(path: str | Location) -> ClipVocabulary:
    """Reads a vocabulary of CLIP's form in any format that it is found in.

    Args:
      path: OpenAI's and open_clip's `bpe_simple_vocab_16e6.txt.gz`; of transformers, `merges.txt` (with the ids of a
        `vocab.json` beside it, if there is one) or `tokenizer.json`; or a folder that holds one of them.

    Raises:
      UserError: if nothing is there, or it is something else.
    """
    file = _vocabulary_file(locate_from_home(path))
    try:
        vocabulary = _read_tokenizer_file(file) if file.suffix == ".json" else _read_merges_file(file)
        _check(vocabulary)
    except (
        *(OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RecursionError),
        zlib.error,  # of a damaged .gz
    ) as error:
        reason = f"has no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{file} is not a CLIP vocabulary ({reason}); give one of {', '.join(_FILES)}") from error
    return vocabulary


def clip_model(vocabulary: ClipVocabulary, ends: bool = True) -> tokenizers.Tokenizer:
    """Builds what encodes cleaned captions and decodes ids; framing by the `ends` it then has is left to the caller."""
    ids = vocabulary.ids if ends else {piece: id for piece, id in vocabulary.ids.items() if piece not in (START, END)}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(ids, vocabulary.merges, end_of_word_suffix=END_OF_WORD))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(_WORD), "removed", invert=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    space = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(" ")[0][0]
    model.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace(END_OF_WORD, space), tokenizers.decoders.ByteLevel()]
    )
    if ends:
        model.add_special_tokens([START, END])
    if vocabulary.pad in ids:  # an end may be left out, and then id 0 fills up
        model.enable_padding(pad_id=ids[vocabulary.pad], pad_token=vocabulary.pad)  # stored with it
    return model


def byte_pieces() -> list[str]:
    """The 256 characters that stand for bytes, in the order of their ids in CLIP's vocabulary."""
    return sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def _vocabulary_file(path: Location) -> Location:
    if path.is_dir():
        for name in _FILES:
            if (path / name).is_file():
                return path / name
        raise UserError(f"{path} holds no CLIP vocabulary; give a folder with one of {', '.join(_FILES)}")
    if not path.is_file():
        raise UserError(f"there is no CLIP vocabulary at {path}; give one of {', '.join(_FILES)}, or their folder")
    return path


def _read_merges_file(file: Location) -> ClipVocabulary:
    """Reads a list of merges, a pair a line after a line with its version."""
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    version, *lines = content.decode("utf-8").split("\n")
    if "#version" not in version:
        raise ValueError("its first line names no #version")
    merges = [_pair(line) for line in lines[:_MERGES] if line.strip()]
    beside = file.with_name("vocab.json")
    if file.name == "merges.txt" and beside.is_file():
        return ClipVocabulary(json.loads(read_text(beside)), merges)
    alphabet = byte_pieces()
    words = [piece + END_OF_WORD for piece in alphabet]
    pieces = [*alphabet, *words, *("".join(pair) for pair in merges), START, END]
    return ClipVocabulary({piece: place for place, piece in enumerate(pieces)}, merges)


def _read_tokenizer_file(file: Location) -> ClipVocabulary:
    """Reads the one file that transformers, and a run of this project, keep a tokenizer in."""
    stored: dict[str, Any] = json.loads(read_text(file))
    model = stored["model"]
    if model.get("end_of_word_suffix") != END_OF_WORD:
        raise ValueError(f"its words do not end in {END_OF_WORD}")
    added = {token["content"]: token["id"] for token in stored.get("added_tokens", ())}
    pad = (stored.get("padding") or {}).get("pad_token")
    return ClipVocabulary({**model["vocab"], **added}, [_pair(merge) for merge in model["merges"]], pad)


def _pair(merge: str | list[str]) -> tuple[str, str]:
    pair = tuple(re.split("[ \r]+", merge.strip())) if isinstance(merge, str) else tuple(merge)
    if len(pair) != 2:
        raise ValueError(f"{merge!r} is not a pair to merge")
    return pair


def _check(vocabulary: ClipVocabulary) -> None:
    """Raises ValueError unless every caption can be encoded, and the ends have the highest ids."""
    ids, merges, pad = vocabulary
    if sorted(ids.values()) != list(range(len(ids))):
        raise ValueError("its ids are not 0, 1, 2, ...")
    pieces = {piece + suffix for piece in byte_pieces() for suffix in ("", END_OF_WORD)}
    missing = sorted((pieces | {part for pair in merges for part in (*pair, "".join(pair))}) - ids.keys())
    if missing:
        raise ValueError(f"{len(missing)} pieces have no id, such as {missing[0]!r}")
    if (ids.get(START), ids.get(END)) != (len(ids) - 2, len(ids) - 1):
        raise ValueError(f"its two highest ids are not {START} and {END}")
    if pad is not None and pad not in ids:
        raise ValueError(f"it pads with {pad!r}, which has no id")
