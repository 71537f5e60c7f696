"""Llama 3's tokenizer, from other people's tokenizer.json: byte-level BPE, and the turns of a conversation.

Dubey et al. 2024, "The Llama 3 Herd of Models", and the prompt format that was published with the weights. A text for a
language model alone has a start before it, and an end behind it where it is learned and not gone on with. In a
conversation each turn is

    <|start_header_id|> who <|end_header_id|> two line feeds, what is said, <|eot_id|>

so that a question is the user's turn with the head of the answer's behind it, and an answer ends with <|eot_id|>. A
picture's token stands first in what the user says. Nothing of a system is said, as in the published template where
there is a picture.
"""

import functools
import json
from typing import Any

import numpy as np
import tokenizers

from cli.errors import UserError
from data.tokenizer import Encoded, Tokenizer

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
END_OF_TURN, END_OF_MESSAGE = "<|eot_id|>", "<|eom_id|>"
IMAGE = "<|image|>"
# What the published template says where there is a picture and no system, in other words.
CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages -%}
<|start_header_id|>{{ message.role }}<|end_header_id|>{{ "\\n\\n" }}
{%- if message.content is string %}{{ message.content | trim }}
{%- else %}{% for part in message.content %}{% if part.type == "image" %}<|image|>{% else %}{{ part.text | trim }}
{%- endif %}{% endfor %}{% endif %}<|eot_id|>
{%- endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{{ "\\n\\n" }}{% endif %}"""

_HEAD, _HEAD_END = "<|start_header_id|>", "<|end_header_id|>"
_PADS = ("<|finetune_right_pad_id|>", "<|reserved_special_token_0|>")  # the second one of Llama 3.0


class LlamaTokenizer(Tokenizer):
    """Reads texts as Llama 3 does: letters keep their case; specials that a text spells are words like others.

    How a text is framed is said by the file's own post-processor, which `with_ends` changes: published ones put a start
    before it.
    """

    def __init__(self, model: tokenizers.Tokenizer):
        """Takes over a tokenizer.json.

        Raises:
          UserError: if tokens of Llama 3's are missing.
        """
        if lacks := self.lacks(model):
            raise UserError(f"this tokenizer is not Llama 3's: it has no {lacks}")
        model.no_padding()
        model.no_truncation()
        self._clip = self._letters = self._gpt2 = False
        self._take(model)

    @staticmethod
    def recognizes(model: tokenizers.Tokenizer) -> bool:
        """Whether a tokenizer has the start and the end of Llama 3's texts."""
        return all(model.token_to_id(name) is not None for name in (BEGIN, END_OF_TURN))

    @staticmethod
    def lacks(model: tokenizers.Tokenizer) -> str:
        """A token of Llama 3's that a tokenizer does not have; "" if it has all that are needed."""
        missing = [name for name in (BEGIN, END, END_OF_TURN, _HEAD, _HEAD_END) if model.token_to_id(name) is None]
        if not missing and all(model.token_to_id(name) is None for name in _PADS):
            missing = [f"{' or '.join(_PADS)}, to fill texts up with"]
        return missing[0] if missing else ""

    def __reduce__(self) -> tuple[type["LlamaTokenizer"], tuple[tokenizers.Tokenizer]]:
        """Another process gets the vocabulary, and no cache."""
        return LlamaTokenizer, (self._model,)

    def with_ends(self) -> "LlamaTokenizer":
        """Returns a copy that frames a text as a turn of a conversation; one that does so already, as it is."""
        if self.in_turns:
            return self
        model = tokenizers.Tokenizer.from_str(self._model.to_str())
        model.encode_special_tokens = True
        breaks = model.encode("\n\n", add_special_tokens=False).ids

        def turn(who: str) -> list[int]:
            name = model.encode(who, add_special_tokens=False).ids
            return [model.token_to_id(_HEAD), *name, model.token_to_id(_HEAD_END), *breaks]

        picture = [] if self.image_id is None else [self.image_id]
        pieces = {
            "opening": [model.token_to_id(BEGIN), *turn("user"), *picture],
            "closing": [model.token_to_id(END_OF_TURN), *turn("assistant")],
        }
        # The library gives the ids of several tokens one name.
        special: Any = [
            {"id": name, "ids": ids, "tokens": [model.id_to_token(one) for one in ids]} for name, ids in pieces.items()
        ]
        model.post_processor = tokenizers.processors.TemplateProcessing(
            single="opening $A closing", pair="opening $A $B closing", special_tokens=special
        )
        return LlamaTokenizer(model)

    def published(self) -> str:
        """The text of a tokenizer.json as published ones are: texts have a start, and others frame turns."""
        if not self.in_turns:
            return self._model.to_str()
        model = tokenizers.Tokenizer.from_str(self._model.to_str())
        model.encode_special_tokens = False
        model.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, model.token_to_id(BEGIN))]
        )
        return model.to_str()

    @functools.cached_property
    def in_turns(self) -> bool:
        """Whether texts are framed as turns of a conversation."""
        return self._model.token_to_id(END_OF_TURN) in self._frame

    def name_of(self, token: int | None) -> str:
        """How the vocabulary spells an id that it has."""
        assert token is not None
        return self._model.id_to_token(token)

    @functools.cached_property
    def pad_id(self) -> int:
        """The id that fills texts up, which no text has."""
        return next(found for name in _PADS if (found := self._model.token_to_id(name)) is not None)

    @functools.cached_property
    def start_id(self) -> int | None:
        """The first id of every text."""
        return self._model.token_to_id(BEGIN)

    @functools.cached_property
    def end_id(self) -> int | None:
        """The id behind an answer: of a turn, or of a text where there are none."""
        return self._model.token_to_id(END_OF_TURN if self.in_turns else END)

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Other ids at which what is written ends."""
        found = [self._model.token_to_id(name) for name in (END, END_OF_MESSAGE, END_OF_TURN)]
        return tuple(one for one in found if one is not None and one != self.end_id)

    @functools.cached_property
    def image_id(self) -> int | None:
        """The id that stands for a picture; None of a vocabulary without."""
        return self._model.token_to_id(IMAGE)

    def encode(self, text: str, length: int, dropout: float = 0.0, rng: np.random.Generator | None = None) -> Encoded:
        """Encodes a framed text into exactly `length` ids; of one that is too long the text is cut, not the frame.

        Raises:
          UserError: if there is to be BPE dropout, or the frame alone is longer.
        """
        del rng
        return self._framed(text, length, dropout, *self._ends)

    def encode_whole(
        self, text: str, length: int, dropout: float = 0.0, rng: np.random.Generator | None = None
    ) -> Encoded:
        """As `encode`, with the end behind what is no turn, also where the text is cut."""
        del rng
        opening, closing = self._ends
        return self._framed(text, length, dropout, opening, closing or [self.end_id])

    def _framed(self, text: str, length: int, dropout: float, opening: list[int], closing: list[Any]) -> Encoded:
        if dropout > 0:
            raise UserError("config.data.bpe_dropout is of tokenizers that are trained here, not Llama's; set it to 0")
        room = length - len(opening) - len(closing)
        if room < 0:
            raise UserError(f"config.data.text_length={length} holds no turn; set it to more than {length - room}")
        pieces = self._encode(text.strip())
        ids = [*opening, *pieces[:room], *closing]
        row = np.full(length, self.pad_id, np.int32)
        row[: len(ids)] = ids
        return Encoded(row, len(pieces) > room)

    def count(self, text: str) -> int:
        """Returns how many ids a text takes if nothing is cut, its frame included."""
        return len(self._encode(text.strip())) + len(self._frame)

    def decode(self, ids: Any) -> str:
        """Returns the text of ids up to the first end, without specials."""
        kept, stops = [], {self.end_id, *self.stop_ids}
        for one in ids.tolist():
            if one in stops:
                break
            kept.append(one)
        return self._model.decode([one for one in kept if one != self.pad_id], skip_special_tokens=True).strip()

    @functools.cached_property
    def _frame(self) -> list[int]:
        return self._model.encode("", add_special_tokens=True).ids

    @functools.cached_property
    def _ends(self) -> tuple[list[int], list[int]]:
        """What stands before a text and behind it."""
        if not self.in_turns:
            return self._frame, []
        place = self._frame.index(self._model.token_to_id(END_OF_TURN))
        return self._frame[:place], self._frame[place:]


def is_instructed(*documents: dict[str, Any]) -> bool:
    """Whether documents of a language model say that it talks in turns.

    Args:
      *documents: config.json, generation_config.json, tokenizer_config.json. One with a `chat_template` says so, and
        one with several ends, `eos_token_id`.
    """
    ends = [document.get("eos_token_id") for document in documents]
    templates = any(document.get("chat_template") for document in documents)
    return templates or any(isinstance(found, list) and len(found) > 1 for found in ends)


def parse_tokenizer(text: str) -> tokenizers.Tokenizer:
    """Reads the text of a tokenizer.json, of any model.

    Raises:
      UserError: if it is none.
    """
    try:
        json.loads(text)
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"tokenizer.json cannot be read ({error}); fetch it again") from error


def words_of(tokenizer: Tokenizer, image_token: int | None) -> int:
    """How many ids a network must read and predict: all of a tokenizer, but a picture's that it keeps apart.

    Args:
      tokenizer: Llama 3's or another.
      image_token: the id of a picture to the network; None for none.
    """
    last = tokenizer.vocab_size - 1
    apart = isinstance(tokenizer, LlamaTokenizer) and tokenizer.image_id == image_token == last
    return tokenizer.vocab_size - apart
