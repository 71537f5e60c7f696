"""What is wrong with a config itself, found before anything is read."""

from unittest import mock

import pytest

from cli.config import load_config
from cli.errors import UserError
from configs.common import get_defaults
from data.tokenizer import Tokenizer
from train.checks import check_config, check_parts


@pytest.mark.parametrize(
    ("group", "key", "value", "message"),
    [
        ("ema", "paths", "(", r"config.ema.paths: '\(' is not a pattern of paths"),
        ("mesh", "rules", (("(", ()),), r"config.mesh.rules\[0\]: '\(' is not a pattern of paths"),
        ("mesh", "rules", ((".*", ()), 3), r"config.mesh.rules\[1\] is 3; it must be \(pattern, "),
        ("mesh", "rules", ((".*", (1,)),), r"config.mesh.rules\[0\] is \('\.\*', \(1,\)\)"),
    ],
)
def test_patterns_are_checked(group, key, value, message):
    config = get_defaults()
    config.steps = config.batch_size = config.log.every = config.evaluate.every = config.checkpoint.every = 1
    check_config(config)
    config[group][key] = value
    with pytest.raises(UserError, match=message):
        check_config(config)


WORDS = mock.Mock(spec=Tokenizer, vocab_size=353, end_id=352, pad_id=0)


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        ("captioner", ("frozen.clip.text_end_id=5",), "frozen.clip.text_end_id is 5, but the tokenizer ends captions"),
        (
            "captioner",
            ("frozen.clip.text_vocab_size=100",),
            "frozen.clip.text_vocab_size is 100, but the tokenizer has",
        ),
        (
            "captioner",
            ("models.captioner.text_vocab_size=500", "initialize.language.source=pretrained/gpt2"),
            "500 ids with the end 352.* give its tokenizer as config.data.writes_with",
        ),
    ],
)
def test_captions_are_read_and_written_with_the_vocabulary_of_the_tokenizer(config, overrides, message):
    arguments = [f"--config=configs/scenes/{config}.py:debug"]
    check_parts(load_config([*arguments, "--config.frozen.clip.image_size=64"]), WORDS)  # pictures are resized for it
    with pytest.raises(UserError, match=message):
        check_parts(load_config([*arguments, *(f"--config.{override}" for override in overrides)]), WORDS)


def test_a_frozen_captioner_may_write_with_a_vocabulary_of_its_own():
    other = ("--config.frozen.captioner.text_vocab_size=200", "--config.frozen.captioner.text_end_id=199")
    check_parts(load_config(["--config=configs/scenes/unidiffuser.py:debug", *other]), WORDS)
