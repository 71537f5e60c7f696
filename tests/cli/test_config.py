"""Configs from the command line, and to JSON and back."""

from pathlib import Path

import pytest

from cli.config import flatten, from_json, load_config, to_json
from cli.errors import UserError

CONFIG = """
from ml_collections import ConfigDict, config_dict

def get_config(argument=""):
    if argument not in ("", "big"):
        raise ValueError(f"unknown argument {argument!r}; choose big")
    config = ConfigDict()
    config.steps = 1000 if argument == "big" else 10
    config.rate = 0.5
    config.name = "x"
    config.flag = False
    config.grid = (8, 8)
    config.limit = config_dict.placeholder(int)
    config.model = ConfigDict({"width": 4, "rules": ((".*", ()),)})
    return config
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "experiment.py"
    file.write_text(CONFIG)
    return str(file)


def test_overrides_keep_the_type_of_the_key(path):
    config = load_config(
        [
            f"--config={path}:big",
            "--config.rate=2",
            "--config.name=7",
            "--config.flag=true",
            "--config.grid=(4, 2)",
            "--config.limit=3",
            "--config.model.width",
            "16",
        ]
    )
    assert config.steps == 1000
    assert config.rate == 2.0 and isinstance(config.rate, float)
    assert config.name == "7"
    assert config.flag is True
    assert config.grid == (4, 2)
    assert config.limit == 3
    assert config.model.width == 16


def test_the_config_is_locked(path):
    with pytest.raises(AttributeError):
        load_config([f"--config={path}"]).stepz = 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one config"),
        (["--config=missing.py"], "no config file missing.py"),
        (["--config={path}:huge"], "unknown argument 'huge'"),
        (["--config={path}", "--config.stepz=1"], "did you mean steps"),
        (["--config={path}", "--config.model.blocks=1"], "config.model has rules, width"),
        (["--config={path}", "--config.steps.more=1"], "unknown config key config.steps.more"),
        (["--config={path}", "--config.steps=1.5"], "must be a whole number"),
        (["--config={path}", "--config.steps=true"], "must be a whole number"),
        (["--config={path}", "--config.flag=1"], "must be true or false"),
        (["--config={path}", "--config.rate=fast"], "must be a number"),
        (["--config={path}", "--config.model=1"], "is a group of keys"),
        (["--config={path}", "--config.steps"], "needs a value"),
        (["--config={path}", "--stpes=1"], "unknown argument --stpes"),
    ],
)
def test_mistakes_are_named_in_one_line(path, arguments, message):
    with pytest.raises(UserError) as error:
        load_config([argument.format(path=path) for argument in arguments])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_without_get_config_is_refused(tmp_path):
    file = tmp_path / "empty.py"
    file.write_text("x = 1\n")
    with pytest.raises(UserError, match="has no get_config"):
        load_config([f"--config={file}"])


def test_a_syntax_error_is_located(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("x = (\n")
    with pytest.raises(UserError, match="line 1"):
        load_config([f"--config={file}"])


def test_json_round_trip_gives_the_same_config(path):
    config = load_config([f"--config={path}"])
    again = from_json(to_json(config))
    assert again.grid == (8, 8)
    assert again.model.rules == ((".*", ()),)
    assert flatten(again) == flatten(config)


def test_flatten_names_every_value_by_its_path(path):
    flat = flatten(load_config([f"--config={path}"]))
    assert flat["model.width"] == 4
    assert flat["grid"] == [8, 8]
