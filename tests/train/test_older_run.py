"""A run folder of an earlier version goes on, is sampled and is evaluated, with what that version gave.

`older_run.zip` is what commit ab84068 made of `configs/toy/swiss_roll.py:debug`; the numbers below are that commit's.
"""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from cli.config import load_config
from cli.errors import EXIT_OK, UserError
from evaluation.__main__ import main as evaluate
from sample.trained import TrainedSampler
from train.loop import train
from weights.run import read_metrics

CONFIG = "--config=configs/toy/swiss_roll.py:debug"
POINTS = [[1.0442632, -0.3800132], [-2.1055162, 0.5264774], [-3.3161080, -1.6624781], [-0.8133181, 5.2672830]]
ENERGY_DISTANCE = 0.7630814
LOSSES = {5: 1.4321172, 6: 1.0017401}


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """The run folder."""
    with zipfile.ZipFile(Path(__file__).with_name("older_run.zip")) as archive:
        archive.extractall(tmp_path / "run")
    return tmp_path / "run"


def without(folder: Path, *keys: str) -> None:
    """Takes keys out of the config, as if they had been added later."""
    config = json.loads((folder / "config.json").read_text())
    for key in keys:
        *parents, last = key.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        del node[last]
    (folder / "config.json").write_text(json.dumps(config))


def test_it_is_sampled_and_evaluated_without_the_keys_that_came_later(older):
    without(older, "data.label_field", "nonfinite", "mesh.topology", "loss.dropout")
    without(older, "sample.guidance_stop", "sample.rescale")
    points = TrainedSampler.open(older)({}, seed=3, indices=range(4))["point"]
    np.testing.assert_allclose(points, POINTS, atol=1e-4)
    evaluate([f"--run={older}", "--num=64"])
    (record,) = json.loads((older / "evaluation.json").read_text())
    assert record["guidance_stop"] == 1 and record["rescale"] == 0  # what it was computed with, the config's or not
    assert record["values"]["energy_distance"] == pytest.approx(ENERGY_DISTANCE, abs=1e-4)


def test_it_goes_on_without_the_keys_that_came_later(older):
    without(older, "data.label_field", "data.text_ends", "loss.dropout", "models.denoiser.depth")
    without(older, "sample.guidance_stop", "sample.rescale")
    more = load_config([CONFIG, "--config.steps=6"])
    with pytest.raises(UserError, match=r"another config \(models.denoiser.depth: absent -> 1\)"):
        train(more, older)  # the network's own default is another one
    config = json.loads((older / "config.json").read_text())
    config["models"]["denoiser"]["depth"] = 1
    (older / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"data.label_field: '' -> 'shape'"):
        train(load_config([CONFIG, "--config.steps=6", "--config.data.label_field=shape"]), older)
    assert train(more, older) == EXIT_OK
    losses = {row["step"]: row["loss"] for row in read_metrics(older) if row["step"] in LOSSES and "loss" in row}
    assert losses == pytest.approx(LOSSES, abs=1e-4)
