"""The run folder of a Llama, with or without pictures, of any format: its tokenizer, and how it is asked."""

from collections.abc import Mapping
from typing import Any

from cli.errors import UserError
from cli.text_files import read_text
from data.llama_tokenizer import LlamaTokenizer, is_instructed, parse_tokenizer, words_of
from weights.files.origin import Origin
from weights.formats.contract import Converted, Tree, refuse_unread

PROMPTS = ("turns", "texts")

_TEXT_LENGTH = 256  # of a prompt and of an answer, unless told otherwise
_TELLING = ("generation_config.json", "tokenizer_config.json", "chat_template.json")
_TEMPLATE = "chat_template.jinja"


def text_run(
    origin: Origin, fields: Mapping[str, Any], params: Tree, data: Mapping[str, Any], prompts: str = ""
) -> Converted:
    """A language model, or one with an image adapter, with its tokenizer where the files have Llama 3's.

    Without it nothing says which ids are the ends: such a run can be trained further, and not sampled.

    Args:
      origin: where it is from.
      fields: {name, fields} of the network.
      params: its parameters.
      data: keys of `config.data`.
      prompts: one of `PROMPTS`, of an instructed model and of another one; "" for what other documents tell.

    Raises:
      UserError: if the tokenizer cannot be read or is another network's, or `prompts` is none of these.
    """
    if prompts not in ("", *PROMPTS):
        raise UserError(f"--prompts={prompts} is unknown; choose one of {', '.join(PROMPTS)}")
    name, path = fields["name"], origin.find("tokenizer.json")
    model = None if path is None else parse_tokenizer(read_text(path))
    lacks = "" if model is None else LlamaTokenizer.lacks(model)
    if model is None or lacks:
        refuse_unread("a Llama without Llama 3's tokenizer.json", prompts=prompts)
        note = "it has no tokenizer.json, without which it is not sampled: put that into INPUT and convert again"
        if model is not None:
            note = f"its tokenizer.json is left behind, so that it is not sampled: it is not Llama 3's (no {lacks})"
        config = {"objective": "", "models": {name: dict(fields)}, "data": dict(data)}
        return Converted(config, {name: params}, notes=(note,))
    tokenizer = LlamaTokenizer(model)
    told = [origin.json(file) for file in _TELLING if origin.find(file) is not None]
    documents = [*told, *([origin.json("config.json")] if origin.find("config.json") is not None else [])]
    documents += [document["text_config"] for document in documents if isinstance(document.get("text_config"), dict)]
    if prompts == "turns" or (not prompts and (is_instructed(*documents) or origin.find(_TEMPLATE) is not None)):
        tokenizer = tokenizer.with_ends()
    has, needed = fields["text_vocab_size"], words_of(tokenizer, fields.get("image_token"))
    if needed > has:
        raise UserError(f"its tokenizer.json has {needed} ids, and the network {has}; give its own")
    image = tokenizer.image_id
    if tokenizer.in_turns and image is not None and fields.get("image_token", image) != image:
        token = fields["image_token"]
        raise UserError(f"its tokenizer.json has {image} for a picture, and the network {token}; give its own")
    ends = {"text_end_id": tokenizer.end_id, "text_stop_ids": tokenizer.stop_ids, "text_pad_id": tokenizer.pad_id}
    config = {
        "objective": name,
        "models": {name: {**fields, **ends}},
        "data": {**data, "text_length": _TEXT_LENGTH, "text_ends": tokenizer.in_turns},
        "sample": {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "answer_length": _TEXT_LENGTH},
    }
    notes = ["a prompt is " + ("a turn of a conversation" if tokenizer.in_turns else "a text that it goes on with")]
    if not (prompts or told or tokenizer.in_turns):
        notes.append(
            f"its files do not tell whether it is instructed: if it is, put its {_TELLING[0]} into INPUT, or (of "
            "Meta's) give --prompts=turns, and convert again"
        )
    return Converted(config, {name: params}, tokenizer=tokenizer, notes=tuple(notes))
