"""Samplers that make text, of pictures, prompts and classes: throw-away ones, each a class and a registry entry."""

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cli.config import to_json
from cli.errors import UserError
from configs.common import get_defaults
from data.tokenizer import Tokenizer
from evaluation.__main__ import main as evaluate
from models import MODELS
from sample.__main__ import main
from sample.samplers.registry import SAMPLERS
from weights.checkpoint import CheckpointStore
from weights.run import CHECKPOINTS, CONFIG, TOKENIZER

COLORS = ("red", "green", "blue")
SAYINGS = [[f"a {color} picture" for color in COLORS], [f"{color} i think" for color in COLORS]]
INK = (36, 88, 160)  # of texts that were made


@dataclasses.dataclass(frozen=True)
class Namer:
    """Says a picture's color after an optional prompt; in one of two ways, by its key."""

    temperature: float = 0.5
    reads = ("image", "text")
    makes = ("text",)

    @classmethod
    def from_config(cls, config):
        return cls(**config.sample)

    @property
    def settings(self):
        return dataclasses.asdict(self)

    def request(self, image, text=None, **overrides: Any):
        rows = {"image": image} if text is None else {"image": image, "text": text}
        return {**rows, **self.settings, **overrides}

    def __call__(self, params, variables, frozen, request, keys):
        color = jnp.argmax(jnp.mean(jnp.asarray(request["image"], jnp.float32), axis=(1, 2)), axis=1)
        way = (jax.vmap(jax.random.uniform)(keys) < request["temperature"]).astype(int)
        said = params["namer"]["sayings"][way, color]
        return {"text": jnp.concatenate([request["text"], said], axis=1) if "text" in request else said}


@dataclasses.dataclass(frozen=True)
class Painter:
    """Paints the color of a class, and says which it is."""

    reads = ("label",)
    makes = ("image", "text")
    settings = {}  # noqa: RUF012  (a throw-away class)

    @classmethod
    def from_config(cls, config):
        return cls()

    def request(self, label):
        return {"label": label}

    def __call__(self, params, variables, frozen, request, keys):
        color = 2 * jax.nn.one_hot(request["label"], 3)[:, None, None] - 1
        return {
            "image": jnp.broadcast_to(color, (len(keys), 16, 16, 3)),
            "text": params["namer"]["sayings"][0, jnp.asarray(request["label"])],
        }


@dataclasses.dataclass(frozen=True)
class Parrot:
    """Goes on from a prompt."""

    reads = ("text",)
    makes = ("text",)
    settings = {}  # noqa: RUF012

    @classmethod
    def from_config(cls, config):
        return cls()

    def request(self, text):
        return {"text": text}

    def __call__(self, params, variables, frozen, request, keys):
        said = jnp.broadcast_to(params["namer"]["sayings"][1, 2], (len(keys), 8))
        return {"text": jnp.concatenate([request["text"], said], axis=1)}


@dataclasses.dataclass(frozen=True)
class Translator:
    """Paints what is said, and says what is painted, one color further each time."""

    reads = ("text", "image")
    makes = ("image", "text")
    settings = {}  # noqa: RUF012

    @classmethod
    def from_config(cls, config):
        return cls()

    def request(self, text=None, image=None):
        return {name: row for name, row in (("text", text), ("image", image)) if row is not None}

    def __call__(self, params, variables, frozen, request, keys):
        sayings = params["namer"]["sayings"][0]
        if "text" in request:
            named = jnp.argmax(jnp.all(request["text"][:, None] == sayings, axis=-1), axis=1)
            color = 2 * jax.nn.one_hot((named + 1) % 3, 3)[:, None, None] - 1
            return {"image": jnp.broadcast_to(color, (len(keys), 16, 16, 3))}
        color = jnp.argmax(jnp.mean(jnp.asarray(request["image"], jnp.float32), axis=(1, 2)), axis=1)
        return {"text": sayings[color]}


class Both(Translator):
    """The same, both ways in one call."""

    def made_of(self, request):
        return {output: "given" for output, row in (("image", "text"), ("text", "image")) if row in request}

    def __call__(self, params, variables, frozen, request, keys):
        outputs = {}
        for row in request:
            outputs |= super().__call__(params, variables, frozen, {row: request[row]}, keys)
        return outputs


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """`make_run(Namer)`: a run folder of the sampler, which is in the registry while the test lasts."""

    def make(sampler: type) -> Path:
        name, folder = sampler.__name__.lower(), tmp_path / sampler.__name__
        monkeypatch.setitem(SAMPLERS, name, sampler)
        monkeypatch.setitem(MODELS, "namer", nn.Module)  # a network that has no fields
        tokenizer = Tokenizer.train([text for way in SAYINGS for text in way] + ["what is it"], 400)
        sayings = np.stack([[tokenizer.encode(text, 8).ids for text in way] for way in SAYINGS])
        config = get_defaults()
        config.objective, config.data.image_size, config.data.text_length = name, 16, 8
        config.models = {"namer": {"name": "namer"}}
        store = CheckpointStore(folder / CHECKPOINTS)
        store.save(1, {"params": {"namer": {"sayings": jnp.asarray(sayings)}}, "variables": {}})
        store.close()
        (folder / CONFIG).write_text(to_json(config))
        tokenizer.save(folder / TOKENIZER)
        return folder

    return make


@pytest.fixture
def pictures(tmp_path):
    """Two picture files: red.png and blue.png."""
    for color in ("red", "blue"):
        Image.new("RGB", (40, 30), color).save(tmp_path / f"{color}.png")
    return [str(tmp_path / f"{color}.png") for color in ("red", "blue")]


def written(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "samples.json").read_text())["samples"]


def is_ink(pixels: np.ndarray) -> np.ndarray:
    return (np.abs(pixels.astype(int) - INK) < 40).all(axis=-1)


def test_pictures_get_texts_in_the_grid_in_json_and_in_files(make_run, pictures, tmp_path, capsys):
    options = [f"--image={name}" for name in pictures]
    main([f"--run={make_run(Namer)}", *options, "--num=3", f"--out={tmp_path}/g.png", f"--files={tmp_path}/files"])
    samples = written(tmp_path / "files")
    assert [(sample["image"], sample["index"]) for sample in samples] == [(n, i) for n in pictures for i in range(3)]
    assert {sample["text"] for sample in samples[:3]} == {"a red picture", "red i think"}
    assert all("blue" in sample["text"] and "file" not in sample for sample in samples[3:])
    for sample in samples:
        assert (tmp_path / "files" / sample["text_file"]).read_text() == sample["text"] + "\n"
    assert not list((tmp_path / "files").glob("*.png"))
    grid = np.asarray(Image.open(tmp_path / "g.png"))
    centers = [(grid[72, left], grid[-100, left]) for left in (72, 208, 344)]
    assert np.array_equal(centers, [((255, 0, 0), (0, 0, 255))] * 3)  # each condition's own picture, as often as texts
    rows = np.flatnonzero(is_ink(grid).any(axis=1))
    assert len(rows) and rows.min() > 8 + 128  # under the pictures
    assert "6 texts" in capsys.readouterr().out


def test_a_condition_may_hold_a_picture_and_a_prompt(make_run, pictures, tmp_path):
    options = [*(f"--image={name}" for name in pictures), "--prompt=what is it", "--prompt=a"]
    main([f"--run={make_run(Namer)}", *options, "--temperature=0", f"--out={tmp_path}/g.png", f"--files={tmp_path}/f"])
    samples = written(tmp_path / "f")
    assert [(Path(sample["image"]).stem, sample["prompt"], sample["text"]) for sample in samples] == [
        ("red", "what is it", "what is it a red picture"),
        ("red", "a", "a a red picture"),
        ("blue", "what is it", "what is it a blue picture"),
        ("blue", "a", "a a blue picture"),
    ]


def test_a_run_may_make_pictures_and_text(make_run, tmp_path, capsys):
    command = [f"--run={make_run(Painter)}", "--label=0", "--label=2", "--num=1"]
    main([*command, f"--out={tmp_path}/g.png", f"--files={tmp_path}/f"])
    samples = written(tmp_path / "f")
    assert [(sample["label"], sample["text"]) for sample in samples] == [(0, "a red picture"), (2, "a blue picture")]
    for sample, color in zip(samples, ((255, 0, 0), (0, 0, 255)), strict=True):
        with Image.open(tmp_path / "f" / sample["file"]) as picture:
            assert picture.getpixel((3, 3)) == color
        assert (tmp_path / "f" / sample["text_file"]).is_file()
    grid = np.asarray(Image.open(tmp_path / "g.png"))
    inked = np.flatnonzero(is_ink(grid[8 + 128 :]).any(axis=0))
    assert inked.min() < 136 < 144 <= inked.max()  # under both
    assert "2 pictures with texts" in capsys.readouterr().out


def inked_cells(grid: np.ndarray) -> list[bool]:
    """Of cells in one row: whether a text that was made stands under the picture."""
    return [is_ink(grid[8 + 128 :, left : left + 128]).any() for left in range(8, grid.shape[1] - 8, 136)]


def test_a_text_of_the_given_picture_stands_under_that_and_not_under_what_a_prompt_drew(make_run, pictures, tmp_path):
    command = [f"--run={make_run(Both)}", f"--image={pictures[1]}", "--prompt=a red picture", "--num=2"]
    main([*command, f"--out={tmp_path}/g.png", f"--files={tmp_path}/f"])
    for sample in written(tmp_path / "f"):
        assert (sample["prompt"], sample["text"]) == ("a red picture", "a blue picture")
        assert (sample["file_of"], sample["text_of"]) == ("prompt", "image")
        with Image.open(tmp_path / "f" / sample["file"]) as picture:
            assert picture.getpixel((3, 3)) == (0, 255, 0)
    grid = np.asarray(Image.open(tmp_path / "g.png"))
    assert [tuple(grid[72, left].tolist()) for left in range(72, 72 + 4 * 136, 136)] == [(0, 0, 255), (0, 255, 0)] * 2
    assert inked_cells(grid) == [True, False] * 2


def test_cells_of_a_sweep_show_the_given_picture_over_its_text(make_run, pictures, tmp_path):
    command = [f"--run={make_run(Both)}", f"--image={pictures[1]}", "--sweep=prompt=a red picture,a green picture"]
    main([*command, "--num=1", f"--out={tmp_path}/g.png", f"--files={tmp_path}/f"])
    assert all((one["file_of"], one["text_of"]) == ("prompt", "image") for one in written(tmp_path / "f"))
    page = np.asarray(Image.open(tmp_path / "g.png"))
    counts = [(page == color).all(axis=-1).sum() for color in ((0, 0, 255), (0, 255, 0))]
    assert counts == [3 * 64 * 64, 64 * 64]  # the given one in both cells; what is drawn of a green one is blue


def test_text_may_be_written_with_another_tokenizer_than_prompts_are_read_with(make_run, tmp_path, monkeypatch):
    monkeypatch.setattr(Painter, "writes_with", "words.json", raising=False)
    folder = make_run(Painter)
    command = [f"--run={folder}", "--label=0", "--num=1", f"--out={tmp_path}/g.png", f"--files={tmp_path}/f"]
    with pytest.raises(UserError, match="has no words.json, which would read it"):
        main(command)
    other = Tokenizer.train(["some other words, so that ids mean other pieces"], 400)
    other.save(folder / "words.json")
    main(command)
    (sample,) = written(tmp_path / "f")
    assert sample["text"] == other.decode(Tokenizer.load(folder / TOKENIZER).encode("a red picture", 8).ids)
    assert sample["text"] != "a red picture"


def test_text_of_a_prompt_alone_is_a_grid_of_texts(make_run, tmp_path):
    command = [f"--run={make_run(Parrot)}", "--prompt=what is it", "--prompt=red", "--num=2"]
    main([*command, f"--out={tmp_path}/g.png", f"--files={tmp_path}/f"])
    assert [(sample["index"], sample["text"]) for sample in written(tmp_path / "f")] == [
        (index, f"{prompt} blue i think") for prompt in ("what is it", "red") for index in (0, 1)
    ]
    grid = np.asarray(Image.open(tmp_path / "g.png"))
    assert is_ink(grid).any() and len(grid) < 128  # no room is left for pictures


@pytest.mark.parametrize(
    ("sampler", "options", "texts"),
    [
        (
            Namer,
            ["--sweep=image={red},{blue}", "--sweep=prompt=a,what"],
            ["a a red", "what a red", "a a bl", "what a bl"],
        ),
        (Namer, ["--image={red}", "--image={blue}", "--sweep=temperature=0,1"], ["a red picture | a b", "red i think"]),
        (Painter, ["--sweep=label=2,0"], ["a blue picture", "a red picture"]),
        (Parrot, ["--sweep=prompt=what,red"], ["what blue i think", "red blue i think"]),
    ],
)
def test_a_sweep_runs_over_what_the_sampler_reads(make_run, pictures, tmp_path, sampler, options, texts):
    red, blue = pictures
    options = [option.format(red=red, blue=blue) for option in options]
    command = [f"--run={make_run(sampler)}", *options, "--num=1"]
    if "temperature" not in options[-1]:
        command += ["--temperature=0"] * (sampler is Namer)
    main([*command, f"--out={tmp_path}/s/g.png", f"--files={tmp_path}/f"])
    with (tmp_path / "s" / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(texts)
    assert all(row["texts"].startswith(text) for row, text in zip(rows, texts, strict=True))
    assert {row["accuracy"] for row in rows} == {""}
    page = np.asarray(Image.open(tmp_path / "s" / "g.png"))
    assert is_ink(page).any() and (sampler is Parrot or (page == (255, 0, 0)).all(axis=-1).sum() >= 64 * 64)
    assert " | ".join(sample["text"] for sample in written(tmp_path / "f")) == " | ".join(row["texts"] for row in rows)


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        (
            Namer,
            ["--label=1"],
            "takes no classes; it takes pictures; give --image=FILE or captions; give --prompt=TEXT",
        ),
        (Namer, ["--prompt=what"], "also takes pictures; give --image=FILE"),
        (Namer, [], "takes pictures; give --image=FILE or captions; give --prompt=TEXT"),
        (Namer, ["--image={red}", "--negative_prompt=x"], "takes no negative prompt; it takes pictures"),
        (Namer, ["--image={red}", "--guidance=2"], r"is a run of namer; leave out --guidance \(it has temperature\)"),
        (Namer, ["--image={red}", "--sweep=guidance=1,2"], "has no such setting; it has temperature"),
        (Namer, ["--image={red}", "--trajectory"], "is a run of namer and makes text; --trajectory is for"),
        (Namer, ["--image={red}.not"], "cannot read the picture"),
        (Painter, ["--image={red}"], "takes no pictures; it takes classes; give --label=N$"),
        (Painter, ["--sweep=image={red}"], "takes no pictures; it takes classes; give --label=N$"),
    ],
)
def test_what_a_sampler_does_not_read_is_refused_with_what_it_reads(
    make_run, pictures, tmp_path, sampler, options, message
):
    options = [option.format(red=pictures[0]) for option in options]
    with pytest.raises(UserError, match=message) as raised:
        main([f"--run={make_run(sampler)}", *options, f"--out={tmp_path}/g.png"])
    assert "\n" not in str(raised.value)


def test_text_is_graded_and_needs_a_tokenizer(make_run, pictures, scenes_dir, tmp_path, capsys):
    folder = make_run(Namer)
    where = ["--dataset=scenes/single32", f"--data_dir={scenes_dir}", "--splits=validation"]
    evaluate([f"--run={folder}", *where, "--num=4"])
    assert "answers on validation" in capsys.readouterr().out
    (folder / TOKENIZER).unlink()
    with pytest.raises(UserError, match="has no tokenizer.json, which would read it"):
        main([f"--run={folder}", f"--image={pictures[0]}", f"--out={tmp_path}/g.png"])


def test_a_round_trip_reads_what_the_leg_before_made(make_run, pictures, tmp_path):
    folder, files = make_run(Translator), tmp_path / "trip"
    common = [f"--run={folder}", f"--out={tmp_path}/strip.png", f"--files={files}"]
    main([*common, "--prompt=a red picture", "--round_trip=3", "--num=2"])
    made = written(files)
    assert [one["captions"] for one in made] == [["a green picture"]] * 2
    with Image.open(tmp_path / "strip.png") as strip:
        assert strip.width > 4 * 128  # what it began with, and three legs
    main([f"--run={folder}", f"--out={tmp_path}/b.png", f"--files={tmp_path}/b", f"--image={pictures[1]}",
          "--round_trip=3"])  # fmt: skip
    assert [one["captions"] for one in written(tmp_path / "b")] == [["a blue picture", "a red picture"]]
    with pytest.raises(UserError, match="begins with --prompt or --image, one of the two"):
        main([*common[:2], "--prompt=a red picture", f"--image={pictures[0]}", "--round_trip=2"])
    with pytest.raises(UserError, match="does not draw captions and describe pictures"):
        main([f"--run={make_run(Painter)}", "--label=1", "--round_trip=2"])
