"""Run folders in a store of objects: read like any other, and trained in, killed and continued like any other."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import evaluation.__main__
import sample.__main__
from cli.config import load_config
from cli.errors import UserError
from evaluation.report import Section, write_report
from sample.trained import TrainedSampler
from train.loop import train
from weights.run import Run, read_metrics
from weights.sources import find_source, load_part, resolve_frozen

from ..object_store import ObjectStore

ROOT = Path(__file__).resolve().parents[2]


def rows_of(run) -> list[dict]:
    """The metrics of a run but for what may differ between reruns."""
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in read_metrics(run)]


def test_a_run_is_sampled_from_evaluated_and_frozen_where_it_lies(
    object_store: ObjectStore, bucket: str, debug_run, tmp_path: Path
):
    here, there = debug_run("scenes/dvae.py"), f"gs://{bucket}/runs/stage1"
    object_store.put_folder(f"{bucket}/runs/stage1", here)
    assert Run.open(there).identity() == Run.open(here).identity() and Run.open(there).latest_step() == 4

    Image.new("RGB", (50, 40), (200, 30, 30)).save(tmp_path / "red.png")
    object_store.put(f"{bucket}/red.png", (tmp_path / "red.png").read_bytes())
    for number, run in enumerate((here, there)):
        picture = (tmp_path / "red.png", f"gs://{bucket}/red.png")[number]
        place = (tmp_path, f"gs://{bucket}")[number]
        written = [f"--out={place}/drawn/grid.png", f"--files={place}/drawn/files"]
        sample.__main__.main([f"--run={run}", f"--image={picture}", *written])
    for name in ("grid.png", "files/00000.png"):
        assert (tmp_path / "drawn" / name).read_bytes() == object_store[f"{bucket}/drawn/{name}"]
    assert json.loads(object_store[f"{bucket}/drawn/files/samples.json"])["settings"]["run"] == there

    evaluation.__main__.main([f"--run={there}", "--num=8", "--splits=validation"])
    *_, record = json.loads(object_store[f"{bucket}/runs/stage1/evaluation.json"])  # others' may have come along
    assert record["metric"] == "reconstruction" and record["num"] == 8
    assert f"{bucket}/runs/stage1/evaluation.probe" not in object_store.objects
    section = Section("stage 1", "", Run.open(there).folder, {"loss": "loss"}, {"previews": "*_reconstruction.png"})
    write_report(tmp_path / "report.html", "", "", [section])
    assert "finished, step 4" in (page := (tmp_path / "report.html").read_text()) and "data:image/png" in page

    config = load_config([f"--config={ROOT}/configs/scenes/dalle.py:debug", f"--config.frozen.dvae.source={there}"])
    resolve_frozen(config)
    assert config.frozen.dvae.source == there and config.frozen.dvae.step == 4
    ours, theirs = load_part(config.frozen.dvae), TrainedSampler.open(here).weights
    assert ours.params.keys() == theirs.params["dvae"].keys()
    moved = find_source("runs/stage1", near=Run.open(there).folder)
    assert moved == there  # runs that were moved together find each other beside each other
    with pytest.raises(UserError, match=f"gs://{bucket}/runs/none does not exist; train one with"):
        Run.open(f"gs://{bucket}/runs/none")


@pytest.mark.slow
def test_a_killed_run_in_a_store_continues_to_the_same_end(
    object_store: ObjectStore, bucket: str, scenes_dir: Path, debug_run, start_process
):
    object_store.put_folder(f"{bucket}/data", scenes_dir)
    run, place = f"gs://{bucket}/runs/stage1", f"{bucket}/runs/stage1"
    command = [sys.executable, "-m", "train", "--config=configs/scenes/dvae.py:debug", f"--workdir={run}"]
    command.append(f"--config.data.data_dir=gs://{bucket}/data")
    first = start_process(command, cwd=ROOT)
    while f"{place}/checkpoints/2/commit_success.txt" not in object_store.objects:
        assert first.poll() is None
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    # Of the next save a part had arrived.
    name = next(name for name in object_store.names(f"{place}/checkpoints/2/") if "/d/" in name)
    object_store.put(f"{place}/checkpoints/4/{name}", b"half of it")

    second = start_process(command, cwd=ROOT, stdout=-1)
    output = second.communicate(timeout=240)[0]
    assert second.returncode == 0 and "4 was not finished when the run ended" in output
    assert "continuing at step 2 of 4" in output
    here = debug_run("scenes/dvae.py")
    assert rows_of(run) == rows_of(here)
    kept = ("config.json", "environment.json", "metrics.jsonl", "DONE", "wandb/id")
    there = object_store.names(f"{place}/")
    assert {*kept, *(f"samples/{path.name}" for path in (here / "samples").iterdir())} == {
        name for name in there if not name.startswith("checkpoints/")
    }
    ours, theirs = Run.open(run).load(), Run.open(here).load()
    np.testing.assert_equal(jax.device_get(ours.params), jax.device_get(theirs.params))


@pytest.mark.slow
def test_a_second_stage_is_trained_on_a_first_one_in_the_same_store(
    object_store: ObjectStore, bucket: str, scenes_dir: Path, debug_run
):
    object_store.put_folder(f"{bucket}/runs/stage1", debug_run("scenes/dvae.py"))
    config = load_config(
        [f"--config={ROOT}/configs/scenes/dalle.py:debug", f"--config.data.data_dir={scenes_dir}"]
        + [f"--config.frozen.dvae.source=gs://{bucket}/runs/stage1"]
    )
    run = f"gs://{bucket}/runs/stage2"
    assert train(config, run, profile=1) == 0
    assert f"{bucket}/runs/stage2/tokenizer.json" in object_store.objects
    assert any(name.endswith(".xplane.pb") for name in object_store.names(f"{bucket}/runs/stage2/profile/"))
    trained = TrainedSampler.open(run)
    outputs = trained(trained.encode(["a red circle"]), seed=0, indices=[0])
    assert outputs["image"].shape == (1, 32, 32, 3)
