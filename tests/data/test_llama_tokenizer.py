"""Llama 3's tokenizer: texts, turns of a conversation, ends, and what is no tokenizer of it."""

import pickle

import numpy as np
import pytest

from cli.config import load_config
from cli.errors import UserError
from data.dialogues import encode_dialogue
from data.llama_tokenizer import LlamaTokenizer, is_instructed, parse_tokenizer
from data.pipeline import open_stream
from data.scenes.questions import Dialogue
from data.tokenizer import Tokenizer

from .llama_vocabulary import IMAGE, write_llama_vocabulary

BEGIN, END, PAD, HEAD, HEAD_END, EOM, EOT = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"),
)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """The file, and the ids of its specials."""
    path = tmp_path_factory.mktemp("llama") / "tokenizer.json"
    return path, write_llama_vocabulary(path)


def test_a_text_has_a_start_before_it_and_is_filled_up_with_what_no_text_has(vocabulary):
    path, ids = vocabulary
    tokenizer = Tokenizer.load(path)
    assert isinstance(tokenizer, LlamaTokenizer) and not tokenizer.in_turns
    row, truncated = tokenizer.encode("Wow! <|eot_id|>", 40)
    pads = row == ids[PAD]
    assert row[0] == ids[BEGIN] and ids[EOT] not in row and not truncated
    assert pads.sum() == 40 - tokenizer.count("Wow! <|eot_id|>") and pads[-1]
    assert tokenizer.decode(row) == "Wow! <|eot_id|>"
    assert (tokenizer.end_id, tokenizer.stop_ids) == (ids[END], (ids[EOM], ids[EOT]))


def test_a_text_that_is_learned_ends(vocabulary):
    path, ids = vocabulary
    tokenizer = Tokenizer.load(path)
    row, cut = tokenizer.encode_whole("what is it?", 40)
    assert row[row != ids[PAD]].tolist() == [ids[BEGIN], *tokenizer.pieces("what is it?"), ids[END]] and not cut
    row, cut = tokenizer.encode_whole("what is it?" * 9, 12)
    assert (row[0], row[-1]) == (ids[BEGIN], ids[END]) and cut
    turns = tokenizer.with_ends()
    np.testing.assert_array_equal(turns.encode_whole("a", 40).ids, turns.encode("a", 40).ids)


def test_captions_of_a_stream_end(vocabulary, scenes_dir):
    path, ids = vocabulary
    arguments = ["--config=configs/scenes/llama.py:debug", f"--config.data.data_dir={scenes_dir}"]
    arguments += ["--config.data.dialogues=", "--config.data.text_length=90"]
    stream = open_stream(load_config(arguments).data, Tokenizer.load(path), split="train", seed=0, train=True)
    text = stream[0]["text"]
    assert text[text != ids[PAD]][-1] == ids[END]


def test_a_question_is_a_turn_with_the_head_of_the_answer_behind_it(vocabulary, tmp_path):
    path, ids = vocabulary
    tokenizer = Tokenizer.load(path).with_ends()
    row, mask, truncated = encode_dialogue(tokenizer, Dialogue("what is it?", "it is red"), 80)
    words = [tokenizer.pieces(text) for text in ("user", "\n\n", "what is it?", "assistant", "it is red")]
    user, breaks, question, assistant, answer = words
    head = [ids[BEGIN], ids[HEAD], *user, ids[HEAD_END], *breaks, ids[IMAGE], *question, ids[EOT]]
    expected = [*head, ids[HEAD], *assistant, ids[HEAD_END], *breaks, *answer, ids[EOT]]
    assert row[: len(expected)].tolist() == expected and (row[len(expected) :] == ids[PAD]).all() and not truncated
    assert row[mask].tolist() == [*answer, ids[EOT]]
    assert tokenizer.decode(row[mask]) == "it is red"
    assert (tokenizer.end_id, tokenizer.stop_ids) == (ids[EOT], (ids[END], ids[EOM]))
    # Of one that is too long the question is cut, not what says that an answer begins.
    short, cut = tokenizer.encode("what is it? " * 9, 30)
    assert cut and short[-len(breaks) :].tolist() == breaks and ids[EOT] in short
    tokenizer.save(tmp_path / "tokenizer.json")
    for other in (Tokenizer.load(tmp_path / "tokenizer.json"), pickle.loads(pickle.dumps(tokenizer))):
        np.testing.assert_array_equal(other.encode("what is it?", 60).ids, tokenizer.encode("what is it?", 60).ids)


def test_who_talks_in_turns_is_said_by_its_documents():
    assert is_instructed({}, {"eos_token_id": [128001, 128009]}) and is_instructed({"chat_template": "..."})
    assert not is_instructed({"eos_token_id": 128001}, {})


def test_other_tokenizers_are_one_line(vocabulary):
    path, _ = vocabulary
    with pytest.raises(UserError, match="cannot be read"):
        parse_tokenizer("{")
    with pytest.raises(UserError, match=r"has no <\|begin_of_text"):
        LlamaTokenizer(parse_tokenizer(path.read_text().replace("<|begin_of_text|>", "<|other|>")))
    with pytest.raises(UserError, match="holds no turn"):
        Tokenizer.load(path).with_ends().encode("a", 5)
    with pytest.raises(UserError, match="bpe_dropout"):
        Tokenizer.load(path).encode("a", 9, 0.1, np.random.default_rng(0))
