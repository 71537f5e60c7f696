"""Sampling from a run folder, and what `python -m sample` writes."""

import io
import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from cli.errors import UserError
from data.preprocess import center_square, clip_evaluation
from data.tokenizer import Tokenizer
from sample.__main__ import main
from sample.command import draw_samples
from sample.conditions import Order, make_conditions
from sample.embedding import ClipEmbedder
from sample.trained import TrainedSampler
from weights.checkpoint import CheckpointStore
from weights.run import CHECKPOINTS, TOKENIZER


@pytest.fixture
def folder(debug_run):
    return debug_run("scenes/dalle.py")


@pytest.fixture
def clip_folder(debug_run):
    return debug_run("scenes/clip.py")


@pytest.fixture
def stage1(debug_run):
    return debug_run("scenes/dvae.py")


def test_a_picture_depends_on_its_prompt_seed_and_index_alone(folder):
    trained = TrainedSampler.open(folder, chunk=8)
    many = draw_samples(trained, Order(make_conditions(["a red circle", "a large blue star on black"]), seed=3), 7)
    star = make_conditions(["a large blue star on black"])
    alone = draw_samples(trained, Order(star, seed=3), 3)
    assert (alone.images == many.images[7:10]).all()
    other_seed = draw_samples(trained, Order(star, seed=4), 3)
    assert (other_seed.images != alone.images).any()


def test_ema_and_parameters_are_told_apart(folder):
    assert TrainedSampler.open(folder).weights.ema
    assert not TrainedSampler.open(folder, ema=False).weights.ema
    with pytest.raises(UserError, match="it has 4, 2"):
        TrainedSampler.open(folder, step=3)


def test_the_command_writes_grid_files_and_settings(folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\na blue star\n")
    main(
        [f"--run={folder}", f"--prompt=@{prompts}", "--prompt=a green cross", "--num=2", "--seed=5", "--guidance=3"]
        + [f"--out={tmp_path}/deep/grid.png", f"--files={tmp_path}/files"]
    )
    with Image.open(tmp_path / "deep" / "grid.png") as grid:
        assert grid.width > 2 * 128 and grid.height > 3 * 128
    record = json.loads((tmp_path / "files" / "samples.json").read_text())
    assert record["settings"]["guidance"] == 3 and record["settings"]["step"] == 4
    assert [sample["prompt"] for sample in record["samples"]] == ["a red circle"] * 2 + ["a blue star"] * 2 + [
        "a green cross"
    ] * 2
    with Image.open(tmp_path / "files" / record["samples"][5]["file"]) as picture:
        assert picture.size == (32, 32)


def test_a_tokenizer_run_reconstructs_pictures(stage1, tmp_path):
    Image.new("RGB", (50, 40), (200, 30, 30)).save(tmp_path / "red.png")
    main([f"--run={stage1}", f"--image={tmp_path}/red.png", f"--out={tmp_path}/grid.png", f"--files={tmp_path}/out"])
    assert (tmp_path / "out" / "00000.png").is_file()


@pytest.mark.parametrize(("name", "transform"), [("dvae_training", center_square), ("clip_training", clip_evaluation)])
def test_pictures_are_seen_as_evaluation_sees_them(stage1, name, transform):
    trained = TrainedSampler.open(stage1)
    with trained.config.unlocked():
        trained.config.data.transform = name
    pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8)
    np.testing.assert_array_equal(trained.picture_rows([pixels])["image"][0], transform(pixels, 32, None))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run={stage1}", "--prompt=a red circle"], "takes no captions"),
        (["--run={folder}", "--image=x.png"], "also takes captions; give --prompt=TEXT"),
        (["--run={folder}", "--prompt=x", "--top_p=0"], "top_p=0"),
        (["--run={folder}", "--prompt=x", "--out=/proc/nowhere/x.png"], "cannot write"),
        (["--run={folder}", "--prompt=x", "--out={tmp}/grid.txt"], "cannot write"),
        (["--run={stage1}", "--image={tmp}/none.png"], "cannot read the picture"),
        (["--run={stage1}", "--image=x.png", "--guidance=3"], "is a run of vqvae; leave out --guidance"),
    ],
)
def test_mistakes(folder, stage1, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        main([argument.format(folder=folder, stage1=stage1, tmp=tmp_path) for argument in arguments])


def test_long_prompts_are_cut_with_a_warning(folder, capsys):
    trained = TrainedSampler.open(folder)
    ids = trained.encode(["a red circle " * 20])["text"]
    assert ids.shape == (1, 12) and np.count_nonzero(ids) == 12
    caption = "a red circle " * 20
    trained.encode([caption, "a blue star " * 20, "a star", caption])
    one, two = capsys.readouterr().out.splitlines()
    assert one == f"warning: only the first 12 tokens count of {caption!r}" and two == f"{one} and of 1 more"


def test_a_clip_keeps_the_pictures_that_it_finds_nearest(folder, clip_folder, tmp_path):
    command = [f"--run={folder}", "--prompt=a red circle", "--prompt=a blue star", "--num=6", "--seed=5"]
    main([*command, f"--out={tmp_path}/all.png", f"--files={tmp_path}/all"])
    main([*command, f"--rerank={clip_folder}", "--keep=2", f"--out={tmp_path}/best.png", f"--files={tmp_path}/best"])
    drawn, best = (json.loads((tmp_path / name / "samples.json").read_text()) for name in ("all", "best"))
    assert best["settings"]["candidates"] == 6 and best["settings"]["rerank"] == str(clip_folder)
    rows = drawn["samples"]
    pictures = {(row["prompt"], row["index"]): np.asarray(Image.open(tmp_path / "all" / row["file"])) for row in rows}
    clip = ClipEmbedder.open(clip_folder)
    for prompt in ("a red circle", "a blue star"):
        images = np.stack([pictures[prompt, index] for index in range(6)])
        features, text = clip.images(images), clip.texts([prompt])[0]
        kept = [row for row in best["samples"] if row["prompt"] == prompt]
        assert [row["index"] for row in kept] == list(np.argsort(-(features @ text))[:2])
        np.testing.assert_allclose([row["clip_cosine"] for row in kept], np.sort(features @ text)[::-1][:2], atol=1e-5)
        assert (np.asarray(Image.open(tmp_path / "best" / kept[0]["file"])) == pictures[prompt, kept[0]["index"]]).all()


def test_mistakes_of_reranking(folder, clip_folder):
    command = [f"--run={folder}", "--prompt=a red circle", "--num=2"]
    for extra, message in [
        (["--keep=1"], "--keep needs --rerank"),
        ([f"--rerank={clip_folder}", "--keep=3"], "between 1 and --num=2"),
        ([f"--rerank={folder}"], "is a run of dalle, not of clip"),
        ([f"--run={clip_folder}"], "makes features, which nothing can show; give it to --rerank"),
    ]:
        with pytest.raises(UserError, match=message):
            main([*command, *extra])


def test_a_guide_without_effect_is_refused_and_one_with_is_recorded(diffusion_run, tmp_path):
    folder, worse = diffusion_run("captions"), tmp_path / "worse"
    trained = TrainedSampler.open(folder)
    with pytest.raises(UserError, match="captions has the very weights of .*captions, so it has no effect"):
        trained.guided_by(folder)
    shutil.copytree(folder, worse)
    store = CheckpointStore(worse / CHECKPOINTS)
    params = jax.tree.map(lambda leaf: 0.5 * leaf, trained.weights.params)
    store.save(6, {"params": params, "variables": {}})
    store.close()
    guided = trained.guided_by(worse)
    assert guided.describe(0, {})["guide_ema"] is False and guided.describe(0, {})["guide_step"] == 6
    guided.check_settings({}, {"guidance": (1.0, 3.0)})
    with pytest.raises(UserError, match="--guide_run has no effect, as guidance 1 means none"):
        guided.check_settings({"guidance": 1.0})
    with pytest.raises(UserError, match="keeps no moving average, of which --ema=1 is"):
        guided.run.check_average(1.0)
    (worse / TOKENIZER).unlink()
    with pytest.raises(UserError, match="worse has no tokenizer.json that would say which ids it reads"):
        trained.guided_by(worse)


def test_a_run_that_reads_framed_text_is_asked_with_an_end():
    asked, trained = {}, object.__new__(TrainedSampler)
    trained.sampler = SimpleNamespace(reads=("text",), request=lambda **rows: asked.update(rows))
    trained.config = ConfigDict({"sample": {"temperature": 0.0}, "data": {"text_length": 4}})
    trained.tokenizer = Tokenizer.train(["a red circle"], 260).with_ends()
    trained.check_request({"temperature": 1.0})
    assert asked["text"].tolist() == [[0, 0, 0, trained.tokenizer.end_id]] and asked["temperature"] == 1.0


@pytest.mark.parametrize(("kind", "shows"), [("dalle", ["3/3"]), ("diffusion", ["12/12", "2/3 drawn", "steps/s"])])
def test_a_terminal_shows_how_much_is_drawn_and_a_file_does_not(kind, shows, folder, diffusion_run, monkeypatch):
    """Of three chunks: as each is done, of a diffusion each step. What is drawn is the same."""
    trained = TrainedSampler.open(folder if kind == "dalle" else diffusion_run("captions"), chunk=1)
    settings = {} if kind == "dalle" else {"steps": 4}
    rows = trained.encode(["a red circle"] * 3)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    drawn = []
    for stream in (io.StringIO(), Terminal()):
        monkeypatch.setattr("sys.stderr", stream)
        drawn.append((trained(rows, seed=0, indices=range(3), **settings), stream.getvalue()))
    (plain, silent), (shown, bar) = drawn
    assert silent == "" and "drawing 3" in bar and all(text in bar for text in shows)
    np.testing.assert_array_equal(shown["image"], plain["image"])
