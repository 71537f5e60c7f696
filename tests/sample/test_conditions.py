"""Captions with a negative prompt, classes, and nothing: what `python -m sample` draws of each, and what it refuses."""

import json

import numpy as np
import pytest
from PIL import Image

from cli.errors import UserError
from sample.__main__ import main


@pytest.fixture
def draw(tmp_path):
    """Draws by the command; gives pictures, records and settings."""

    def run(*arguments):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        main([*arguments, f"--out={folder}/grid.png", f"--files={folder}"])
        written = json.loads((folder / "samples.json").read_text())
        pictures = [np.asarray(Image.open(folder / sample["file"])).astype(int) for sample in written["samples"]]
        return np.stack(pictures), written["samples"], written["settings"]

    return run


def test_a_run_of_classes_draws_each_and_none(diffusion_run, draw):
    run = f"--run={diffusion_run('classes')}"
    images, records, _ = draw(run, "--label=1", "--label=4", "--num=2")
    assert [(record["label"], record["index"]) for record in records] == [(1, 0), (1, 1), (4, 0), (4, 1)]
    assert "prompt" not in records[0]
    assert np.abs(images[0] - images[2]).max() > 2  # the same noise, another class
    alone, _, _ = draw(run, "--label=4", "--num=1", "--guidance=7")
    assert np.abs(alone[0] - images[2]).max() <= 2  # guided from none to none


def test_a_run_that_reads_nothing_draws_as_many_as_asked(diffusion_run, draw):
    images, records, _ = draw(f"--run={diffusion_run('nothing')}", "--num=3", "--seed=5")
    assert [record["index"] for record in records] == [0, 1, 2] and "label" not in records[0]
    assert np.abs(images[0] - images[1]).max() > 2


def test_a_negative_prompt_changes_guided_pictures_and_is_written_down(diffusion_run, draw):
    command = [f"--run={diffusion_run('captions')}", "--prompt=a red circle", "--num=1", "--guidance=4"]
    plain, _, settings = draw(*command)
    led, _, with_negative = draw(*command, "--negative_prompt=a large blue star on a black background")
    assert np.abs(led - plain).max() > 2
    assert "negative_prompt" not in settings
    assert with_negative == {**settings, "negative_prompt": "a large blue star on a black background"}
    itself, _, _ = draw(*command, "--negative_prompt=a red circle")
    unguided, _, _ = draw(*command[:-1], "--guidance=1")
    assert np.abs(itself - unguided).max() <= 2  # nothing is left to lead to


@pytest.mark.parametrize(
    ("reads", "arguments", "message"),
    [
        ("captions", [], "takes captions; give --prompt=TEXT"),
        ("captions", ["--label=1"], "takes no classes; it takes captions; give --prompt"),
        ("captions", ["--prompt=x", "--negative_prompt=y", "--guidance=1"], "no effect with guidance 1"),
        ("captions", ["--prompt=x", "--negative_prompt= "], "--negative_prompt is empty"),
        ("captions", ["--prompt=x", "--label=1"], "takes no classes; it takes captions; give --prompt=TEXT"),
        ("captions", ["--image=x.png"], "takes no pictures; it takes captions; give --prompt=TEXT"),
        ("classes", ["--image=x.png"], "takes no pictures; it takes classes; give --label=N, N from 0 to 4"),
        ("classes", [], r"takes classes; give --label=N, N from 0 to 4, the last for none"),
        ("classes", ["--label=5"], "there is no class 5; classes are 0 to 4"),
        ("classes", ["--label=-1"], "there is no class -1"),
        ("classes", ["--label=one"], "argument --label: invalid int value: 'one'"),
        ("classes", ["--prompt=x"], "takes no captions; it takes classes; give --label=N"),
        ("classes", ["--label=1", "--negative_prompt=x"], "takes no negative prompt"),
        ("nothing", ["--prompt=x"], "takes no captions; it takes no condition at all"),
        ("nothing", ["--label=1"], "takes no classes; it takes no condition at all"),
        ("nothing", ["--guidance=2"], "nothing to guide"),
        ("nothing", ["--image=x.png"], "takes no pictures; it takes no condition at all"),
    ],
)
def test_mistakes_get_a_line(diffusion_run, tmp_path, reads, arguments, message):
    with pytest.raises(UserError, match=message) as raised:
        main([f"--run={diffusion_run(reads)}", f"--out={tmp_path}/grid.png", *arguments])
    assert "\n" not in str(raised.value)


def test_a_dalle_takes_no_negative_prompt(debug_run, tmp_path):
    with pytest.raises(UserError, match="takes no negative prompt; it takes captions"):
        main([f"--run={debug_run('scenes/dalle.py')}", "--prompt=x", "--negative_prompt=y", f"--out={tmp_path}/x.png"])
