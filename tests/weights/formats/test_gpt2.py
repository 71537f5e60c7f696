"""GPT-2's tokenizer comes along with its weights, from either of the forms that it is published in."""

import json

import pytest
import tokenizers

from data.tokenizer import Tokenizer
from models.gpt2 import GPT2
from scripts.convert import main as convert
from weights.formats.contract import write_files
from weights.formats.transformers_gpt2 import gpt2_files
from weights.run import Run

from ...models.random_parameters import random_parameters

PIECES = ["!", *"abcdefghijklmnopqrstuvwxyz", "\u0120", "th", "the", "<|endoftext|>"]  # \u0120 is a space


@pytest.fixture
def folder(tmp_path):
    """A GPT-2 of as many ids as the vocabulary that lies beside it."""
    model = GPT2(text_vocab_size=len(PIECES), length=8, width=8, depth=1, heads=1)
    write_files(tmp_path / "theirs", gpt2_files(model, random_parameters(model)))
    (tmp_path / "theirs/vocab.json").write_text(json.dumps({piece: place for place, piece in enumerate(PIECES)}))
    (tmp_path / "theirs/merges.txt").write_text("#version: 0.2\nt h\nth e\n")
    return tmp_path / "theirs"


@pytest.mark.parametrize("whole", [False, True])
def test_the_tokenizer_comes_along(folder, whole, tmp_path):
    if whole:  # as the tokenizers library stores it
        files = [str(folder / name) for name in ("vocab.json", "merges.txt")]
        theirs = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*files))
        theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        theirs.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
        theirs.decoder = tokenizers.decoders.ByteLevel()
        theirs.add_special_tokens(["<|endoftext|>"])
        theirs.save(str(folder / "tokenizer.json"))
        (folder / "vocab.json").unlink()
    convert([f"--input={folder}", f"--output={tmp_path}/ours"])
    tokenizer = Tokenizer.load(tmp_path / "ours" / "tokenizer.json")  # what config.data.writes_with names
    assert Run.open(tmp_path / "ours").config.models.gpt2.text_vocab_size == tokenizer.vocab_size == len(PIECES)
    ids = tokenizer.encode("the cab", 8).ids
    assert [PIECES[one] for one in ids] == ["the", "\u0120", "c", "a", "b", "<|endoftext|>", "!", "!"]
    assert tokenizer.decode(ids) == "the cab"


def test_a_tokenizer_of_another_network_is_left_out_and_said(folder, tmp_path, capsys):
    Tokenizer.train(["a b"], 300).save(folder / "tokenizer.json")
    convert([f"--input={folder}", f"--output={tmp_path}/ours"])
    assert not (tmp_path / "ours" / "tokenizer.json").exists()
    assert "its tokenizer is left out: it has" in capsys.readouterr().out
