"""Objectives from configs whose networks cannot be built."""

from pathlib import Path

import pytest

from cli.config import load_config
from cli.errors import UserError
from train.objectives import create_objective

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


@pytest.mark.parametrize(
    ("name", "part"), [("dvae.py:gumbel", "dvae"), ("dvae.py:debug", "dvae"), ("clip.py:debug", "clip")]
)
def test_the_entry_is_named(name, part):
    config = load_config([f"--config={CONFIGS}/scenes/{name}", f"--config.models.{part}.name=gan"])
    with pytest.raises(UserError, match=f"config.models.{part} cannot be built: no model is called 'gan'"):
        create_objective(config)
