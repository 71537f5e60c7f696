"""docs/own_data.md from its first command to its last, and what a killed preparation leaves."""

import contextlib
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.pipeline import ExampleStream, load_tokenizer
from data.preprocess import TRANSFORMS
from data.records import RecordSource, dataset_folder
from scripts.prepare import main as prepare

from ..data.folder.damaged import FORMS, MIN_SIZE, encode, make, reasons
from ..data.folder.files import contents

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "own_data.md").read_text(encoding="utf-8")
WORDS = (
    "cat",
    "dog",
    "bird",
    "beach",
    "house",
    "tree",
    "red",
    "blue",
    "old",
    "small",
    "near",
    "under",
    "behind",
    "quiet",
)


def photographs(folder: Path, num: int) -> None:
    """Pictures of any size and aspect with captions that fill a vocabulary."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for index in range(num):
        height, width = rng.integers(64, 160, 2)
        colors = np.linspace(rng.integers(0, 256, 3), rng.integers(0, 256, 3), width).astype(np.uint8)
        (folder / f"{index}.png").write_bytes(encode(np.broadcast_to(colors, (height, width, 3))))
        letters = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 5))
        words = " ".join(rng.choice(WORDS, rng.integers(3, 9)))
        (folder / f"{index}.txt").write_text(f"a {words} called {letters}\n")


def commands() -> list[list[str]]:
    """The commands of the page's blocks, one after the other."""
    text = re.sub(r"\\\n\s*", "", PAGE)
    return [shlex.split(line)[2:] for line in text.splitlines() if line.startswith("    python -m ")]


def test_every_transform_takes_pictures_of_any_size_and_aspect(tmp_path: Path):
    from configs.scenes.dalle import get_config

    photographs(tmp_path / "photos", 20)
    rows = (f'{{"file_name": "{index}.png", "text": "of {index}", "label": {index % 2}}}' for index in range(20))
    (tmp_path / "photos" / "metadata.jsonl").write_text("\n".join(rows))
    prepare(["--dataset=folder", f"--source={tmp_path}/photos", f"--data_dir={tmp_path}", "--workers=1"])
    config = get_config("debug").copy_and_resolve_references()
    with config.unlocked():
        config.data.update(dataset="folder/photos", data_dir=str(tmp_path), text_length=16, image_size=32)
    tokenizer = load_tokenizer(config.data)
    for transform in sorted(set(TRANSFORMS) - {"celeba_training"}):  # which is of one size
        config.data.transform = transform
        for train, split in ((True, "train"), (False, "validation")):
            config.data.label_field = "label" if "flip" in transform else ""
            batch = ExampleStream(config.data, tokenizer, split=split, seed=0, train=train).batch(range(8))
            assert batch["image"].shape == (8, 32, 32, 3) and batch["text"].shape == (8, 16)
            assert batch["text"].any(axis=1).all()
            assert "label" not in batch or set(batch["label"]) <= {0, 1}


@pytest.mark.slow
def test_every_command_of_the_page_works(tmp_path: Path, start_process: Callable):
    """At the debug variants' sizes, the last of a run's arguments; other words are the page's own."""
    photographs(tmp_path / "photos", 600)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TFDS_DATA_DIR": str(tmp_path / "data")}
    done = []
    for command in commands():
        module, *arguments = [argument.replace(".py", ".py:debug") for argument in command]
        if module == "train" and "dalle.py" in arguments[0]:
            arguments += ["--config.models.dalle.width=32", "--config.batch_size=4"]
        if "--validation=500" in arguments:
            arguments[arguments.index("--validation=500")] = "--validation=50"
        process = start_process(
            [sys.executable, "-m", module, *arguments],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        printed = process.communicate(timeout=600)[0]
        assert process.returncode == 0, f"{command}: {printed}"
        if module == "scripts.prepare":
            assert "--config.models.clip.text_vocab_size=514 --config.models.clip.text_end_id=513" in printed
        done.append(module)
    assert done == ["scripts.prepare", "train", "train", "sample", "train", "train", "scripts.prepare"]
    assert (tmp_path / "dogs.png").is_file()
    assert (tmp_path / "data" / "folder" / "photos" / "1.0.0" / "inspect.html").stat().st_size > 50_000
    report = json.loads((tmp_path / "data" / "folder" / "photos_256" / "1.0.0" / "report.json").read_text())
    assert report["splits"]["validation"] == 50


# A portion is small here, so that there is much to interrupt.
PREPARE = """
import sys
from pathlib import Path
from data import folder
from data.folder import parquet_files, picture_folder

if __name__ == "__main__":
    picture_folder.PORTION = parquet_files.PORTION = 40
    source, data_dir, min_size, workers = sys.argv[1:]
    fields, pictures = folder.Fields(), folder.PictureSettings(min_size=int(min_size))
    request = folder.Request("made", source, fields, pictures=pictures)
    folder.prepare(request, folder.list_source(source, fields), Path(data_dir), int(workers))
"""


def finished(work: Path) -> int:
    """How many portions have been examined, and written."""
    return len([*work.glob("*/examined/*.jsonl"), *work.glob("*/written/*.json")])


def wait_for_group(group: int) -> None:
    """Returns once the workers of a process that was killed have ended too."""
    with contextlib.suppress(ProcessLookupError):
        for _ in range(1000):
            os.killpg(group, 0)
            time.sleep(0.02)
        raise AssertionError("workers outlive the process that started them")


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_thousand_pictures_of_which_fifty_are_damaged(form: str, tmp_path: Path, start_process: Callable):
    """Reported exactly, the same bytes after ten kills at random moments as without one, and trained on."""
    made = make(1000, 50)
    write = {"folder": {}, "tar": {"shards": 25}, "parquet": {"rows": 40}}[form]
    source = FORMS[form](made, tmp_path / "in", **write)

    def start(data_dir: Path, workers: int) -> subprocess.Popen:
        arguments = [source, str(data_dir), str(MIN_SIZE), str(workers)]
        return start_process([sys.executable, "-c", PREPARE, *arguments], cwd=ROOT)

    assert start(tmp_path / "once", 2).wait(timeout=300) == 0
    folder = dataset_folder("folder/made", str(tmp_path / "once"))
    report = json.loads((folder / "report.json").read_text())
    assert report["skipped"] == reasons(made)
    assert sum(report["splits"].values()) == 950
    named = [next(each for each in made if each.name in left["name"]) for left in report["left_out"]]
    assert [left["reason"] for left in report["left_out"]] == [each.reason for each in named]

    rng, work = random.Random(form), tmp_path / "killed" / "folder" / ".made"
    for kill in range(10):
        process = start(tmp_path / "killed", 1 + kill % 2)
        enough = 1 + kill * 3 + rng.randrange(3)  # portions that are finished in one pass or the other, of 50
        while process.poll() is None and finished(work) < enough:
            time.sleep(0.001)
        time.sleep(rng.random() / 50)
        process.kill()
        assert process.wait() in (0, -signal.SIGKILL)
        wait_for_group(process.pid)
        if (tmp_path / "killed" / "folder" / "made").exists():  # it was faster than a late kill
            assert kill >= 5
            break
    assert start(tmp_path / "killed", 2).wait(timeout=300) == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "once")

    prepare(
        ["--dataset=folder", "--name=made", f"--source={source}", f"--min_size={MIN_SIZE}", f"--data_dir={tmp_path}"]
    )
    assert len(RecordSource("folder/made", "train", str(tmp_path))) == report["splits"]["train"]
    from cli.config import load_config
    from train.loop import train

    config = load_config(
        [f"--config={ROOT}/configs/scenes/dvae.py:debug", f"--config.data.data_dir={tmp_path}"]
        + ["--config.data.dataset=folder/made", "--config.data.transform=dvae_training"]
    )
    assert train(config, tmp_path / "run") == 0
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][-1] == 4
