"""What `python -m sample` draws of captions (with a negative prompt, a picture to complete), classes and nothing."""

import csv
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cli.errors import UserError
from data.preprocess import center_square
from sample.__main__ import main
from sample.command import draw_samples
from sample.conditions import Order, find_sources, make_conditions, order_rows, refuse_unread
from sample.conditions import draw as draw_order
from sample.sheets.axes import Axis
from sample.sheets.grid import to_uint8
from sample.sheets.sweep import make_cells
from sample.trained import TrainedSampler


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
        ("captions", ["--label=1"], "takes no classes; it takes captions; give --prompt=TEXT .and besides .*--image"),
        ("captions", ["--prompt=x", "--negative_prompt=y", "--guidance=1"], "no effect with guidance 1"),
        ("captions", ["--prompt=x", "--negative_prompt= "], "--negative_prompt is empty"),
        ("captions", ["--prompt=x", "--label=1"], "takes no classes; it takes captions; give --prompt=TEXT"),
        ("classes", [], r"takes classes; give --label=N, N from 0 to 4, the last for none"),
        ("classes", ["--label=5"], "there is no class 5; classes are 0 to 4"),
        ("classes", ["--label=-1"], "there is no class -1; classes are 0 to"),
        ("classes", ["--label=99999999999"], "no class 99999999999; .* takes classes; give --label=N, N from 0"),
        ("classes", ["--label=one"], "argument --label: invalid int value: 'one'"),
        ("classes", ["--prompt=x"], "takes no captions; it takes classes; give --label=N"),
        ("classes", ["--label=1", "--negative_prompt=x"], "takes no negative prompt"),
        ("nothing", ["--prompt=x"], "takes no captions; it takes no condition at all"),
        ("nothing", ["--label=1"], "takes no classes; it takes no condition at all"),
        ("nothing", ["--guidance=2"], "nothing to guide"),
        ("nothing", ["--image=x.png"], "cannot read the picture x.png: there is no such file"),
    ],
)
def test_mistakes_get_a_line(diffusion_run, tmp_path, reads, arguments, message):
    with pytest.raises(UserError, match=message) as raised:
        main([f"--run={diffusion_run(reads)}", f"--out={tmp_path}/grid.png", *arguments])
    assert "\n" not in str(raised.value)


def test_a_dalle_takes_no_negative_prompt(debug_run, tmp_path):
    with pytest.raises(UserError, match="takes no negative prompt; it takes captions"):
        main([f"--run={debug_run('scenes/dalle.py')}", "--prompt=x", "--negative_prompt=y", f"--out={tmp_path}/x.png"])


@pytest.fixture
def halves(tmp_path):
    """Names of two picture files, wider than high, and what evaluation makes of them."""
    folder, pictures = tmp_path / "given", []
    folder.mkdir()
    for name, colors in (("a", ("red", "white")), ("b", ("black", "blue"))):
        picture = Image.new("RGB", (96, 64), colors[0])
        picture.paste(Image.new("RGB", (96, 20), colors[1]), (0, 44))
        picture.save(folder / f"{name}.png")
        pictures.append(center_square(np.asarray(picture), 32))
    return [f"{folder}/a.png", f"{folder}/b.png"], np.stack(pictures)


def test_a_dalle_completes_the_top_of_a_picture(debug_run, halves, draw, tmp_path):
    run, (names, squares) = debug_run("scenes/dalle.py"), halves
    trained = TrainedSampler.open(run)
    tokens = draw_tokens(trained, squares)
    options = ["--prompt=a red circle", "--prompt=a blue star", *(f"--image={name}" for name in names), "--num=2"]
    images, records, settings = draw(f"--run={run}", *options, "--keep_rows=3")
    assert settings["keep_rows"] == 3 and "keep_rows" not in trained.config.sample
    told = [(Path(record["image"]).stem, record["prompt"], record["index"]) for record in records]
    assert told == [(i, p, n) for i in "ab" for p in ("a red circle", "a blue star") for n in (0, 1)]
    text = trained.encode(["a red circle", "a red circle"])["text"]
    beginning = {"image_prefix": np.repeat(tokens[1:, :24], 2, axis=0)}
    known = trained({"text": text, **beginning}, seed=0, indices=[0, 1])
    np.testing.assert_array_equal(images[4:6], to_uint8(known["image"]))
    grid = np.asarray(Image.open(next(tmp_path.glob("*/grid.png"))))
    for row, square in enumerate(np.repeat(squares, 2, axis=0)):  # the picture, enlarged 4 times, then two completions
        top = 8 + row * (len(grid) - 8) // 4
        np.testing.assert_array_equal(grid[top : top + 128 : 4, 8 : 8 + 128 : 4], square)
    _, records, settings = draw(f"--run={run}", "--prompt=a", f"--image={names[0]}")
    assert settings["keep_rows"] == 4 and len(records) == 8  # half of the rows, several ways to go on
    whole, _, settings = draw(f"--run={run}", "--prompt=a red circle", "--num=2")
    assert "keep_rows" not in settings
    none, _, _ = draw(f"--run={run}", "--prompt=a red circle", f"--image={names[0]}", "--keep_rows=0", "--num=2")
    np.testing.assert_array_equal(none, whole)


def draw_tokens(trained, squares):
    """The frozen tokenizer's tokens [b n] of pictures."""
    part, decoder = trained.frozen["dvae"], trained.sampler.image_tokens.model
    tree = {"params": part["params"], **part["variables"]}
    tokens = decoder.apply(tree, jnp.asarray(squares) / 127.5 - 1, method="tokenize")
    return np.asarray(tokens).reshape(len(squares), -1)


def test_kept_rows_and_pictures_can_be_swept(debug_run, halves, tmp_path):
    run, (names, squares) = debug_run("scenes/dalle.py"), halves
    options = ["--sweep=keep_rows=0,4", f"--sweep=image={names[0]},{names[1]}", "--num=2", f"--out={tmp_path}/s/g.png"]
    main([f"--run={run}", "--prompt=a red circle", *options])
    with (tmp_path / "s" / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["keep_rows"], Path(row["image"]).stem) for row in rows] == [(k, i) for k in "04" for i in "ab"]
    page = np.asarray(Image.open(tmp_path / "s" / "g.png"))
    cell = page[-72:-8, -(3 * 66 - 2) - 8 : -8]  # the last one: 3 pictures of 64 pixels in a row
    np.testing.assert_array_equal(cell[::2, :64:2], squares[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image={a}"], "also takes captions; give --prompt=TEXT"),
        (["--prompt=x", "--keep_rows=2"], "keep_rows=2 is of a picture that is given, and there is none"),
        (["--prompt=x", "--image={a}", "--keep_rows=8"], "keep_rows=8 is impossible; a picture has 8 rows of tokens"),
        (["--prompt=x", "--image={a}", "--sweep=keep_rows=1,9"], "keep_rows=9 is impossible"),
        (["--prompt=x", "--sweep=keep_rows=1,2"], "keep_rows=1 is of a picture"),
        (["--prompt=x", "--image={a}.not"], "cannot read the picture"),
        (["--label=1"], r"takes no classes; it takes captions; give --prompt=TEXT \(and besides --image=FILE\)"),
    ],
)
def test_mistakes_of_a_completion_get_a_line(debug_run, halves, tmp_path, arguments, message):
    arguments = [argument.format(a=halves[0][0]) for argument in arguments]
    with pytest.raises(UserError, match=message) as raised:
        main([f"--run={debug_run('scenes/dalle.py')}", *arguments, f"--out={tmp_path}/x.png"])
    assert "\n" not in str(raised.value)


def test_a_diffusion_changes_a_picture_where_a_mask_is_white(diffusion_run, draw, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    mask[8:24, 4:20] = 255
    names = []
    for name, array in (("picture", picture), ("mask", mask)):
        names.append(f"{tmp_path}/{name}.png")
        Image.fromarray(array).save(names[-1])
    command, prompt = [f"--run={diffusion_run('captions')}", f"--image={names[0]}", "--num=2"], "--prompt=a red circle"
    images, records, settings = draw(*command, prompt, f"--mask={names[1]}")
    for image in images:
        np.testing.assert_array_equal(image[mask == 0], picture[mask == 0])
        assert np.abs(image.astype(int) - picture)[mask > 0].mean() > 20
    assert np.abs(images[0] - images[1])[mask > 0].max() > 2
    assert (settings["mask"], settings["strength"], records[0]["image"]) == (names[1], 1.0, names[0])
    same, _, settings = draw(*command, "--strength=0")
    np.testing.assert_array_equal(same[0], picture)
    assert settings["strength"] == 0 and not {"mask", "steps", "sampler", "guidance"} & settings.keys()
    for unread in ("--steps=2", prompt, "--negative_prompt=a blue star"):
        name = unread.partition("=")[0].removeprefix("--")
        with pytest.raises(UserError, match=f"{name}.* has no effect, as strength 0 runs no step; leave it out"):
            draw(*command, "--strength=0", unread)
    trained = TrainedSampler.open(diffusion_run("captions"))
    told = Order(make_conditions(["a red circle"], images=names[:1]))
    with pytest.raises(UserError, match="--prompt has no effect"):
        make_cells(trained, told, [Axis("strength", (0.0,))])
    assert len(make_cells(trained, told, [Axis("strength", (0.0, 1.0))])) == 2
    guided = dataclasses.replace(trained, guide={"guide_run": "worse"})
    with pytest.raises(UserError, match="--guide_run has no effect, as strength 0"):
        refuse_unread(guided, Order(make_conditions(images=names[:1]), settings={"strength": 0.0}))
    assert trained.setting_names.count("strength") == 1  # which a picture brings, and a mask


def test_a_unidiffuser_changes_a_picture_as_strength_and_mask_say(debug_run, tmp_path):
    trained = TrainedSampler.open(debug_run("scenes/unidiffuser.py"), chunk=1)
    pixels, white = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8), np.zeros((32, 32), bool)
    white[9:24, 4:20] = True
    picture, mask = f"{tmp_path}/picture.png", f"{tmp_path}/mask.png"
    Image.fromarray(pixels).save(picture)
    Image.fromarray(white.astype(np.uint8) * 255).save(mask)
    conditions, settings = make_conditions(["a red circle"], images=[picture]), {"steps": 2}
    for solver in ("dpm_solver_singlestep", "ddpm"):
        order = Order(conditions, settings={**settings, "sampler": solver}, mask=mask)
        made = draw_order(trained, order, order_rows(trained, order), 1)
        assert made.texts is None and order.describe(trained)["strength"] == 1.0
        np.testing.assert_array_equal(made.images[0][~white], pixels[~white])
        assert np.abs(made.images[0].astype(int) - pixels)[white].mean() > 20
    same = Order(conditions, settings={"strength": 0.0})
    made = draw_order(trained, same, order_rows(trained, same), 1)
    assert find_sources(trained, same, order_rows(trained, same)) == {}
    assert set(trained.idle(same.call)) == {*trained.config.sample, "text"} - {"mode"}
    told = Order(conditions, settings={"strength": 0.0, "mode": "text_to_image"})
    assert "text" not in trained.idle(told.call)  # the mode asks for it
    decoded = reconstruct(trained.sampler.first_stage, trained.frozen, pixels[None])
    assert np.abs(made.images.astype(int) - decoded).max() <= 1

    for told, settings, message in [
        (make_conditions(images=[picture]), {"mode": "image_to_text"}, "mode image_to_text changes no picture"),
        (make_conditions(["x"]), {}, "strength is of a picture to change; give one, --image=FILE"),
    ]:
        with pytest.raises(UserError, match=message):
            order_rows(trained, Order(told, settings={"strength": 0.5, **settings}))
    guided = Order(make_conditions(images=[picture]), settings={"strength": 0.5, "guidance": 3.0})
    with pytest.raises(UserError, match="guidance=3.0 has no effect, as mode image is told nothing that guidance"):
        draw_samples(trained, guided, 1)


def reconstruct(stage, frozen, pixels):
    """The first stage's pictures of pictures, whole numbers."""
    image = jnp.asarray(pixels / np.float32(127.5) - 1)
    return to_uint8(np.asarray(jax.jit(lambda image: stage.decode(frozen, stage.mean(frozen, image)))(image))).astype(
        int
    )


def test_a_mask_is_cut_with_its_picture(diffusion_run, tmp_path):
    """It marks a corner of wide pictures, whose central squares are seen."""
    trained = TrainedSampler.open(diffusion_run("captions"))
    pixels, mask = np.random.default_rng(0).integers(0, 256, (64, 128, 3), np.uint8), np.zeros((64, 128), np.uint8)
    mask[:16, :48] = 255  # of that the columns from 32 are in the square
    names = [f"{tmp_path}/{name}.png" for name in ("large", "small", "whole", "half", "square", "tall")]
    arrays = (pixels, pixels[::2, ::2], mask, mask[::2, ::2], mask[:, :64], mask.T)
    for name, array in zip(names, arrays, strict=True):
        Image.fromarray(array).save(name)
    conditions, corner = make_conditions(["x"], images=names[:2]), np.zeros((32, 32), bool)
    corner[:8, :8] = True
    for name in names[2:4]:
        rows = order_rows(trained, Order(conditions, mask=name))
        assert [row.tolist() for row in rows["mask"]] == [corner.tolist()] * 2
    for name in names[4:]:
        with pytest.raises(
            UserError, match="has .* pixels, and the picture .*large.png 64 x 128; a mask lies on its"
        ) as e:
            order_rows(trained, Order(conditions, mask=name))
        assert "\n" not in str(e.value)
    mask[:, 32:] = 0  # what is left of it is cut off with the picture
    Image.fromarray(mask).save(names[2])
    with pytest.raises(UserError, match="the mask is black all over what is seen of its picture"):
        order_rows(trained, Order(conditions, mask=names[2]))


def test_a_mask_is_of_a_picture(diffusion_run, debug_run, tmp_path):
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(tmp_path / "mask.png")
    more = [f"--mask={tmp_path}/mask.png", f"--out={tmp_path}/grid.png", "--prompt=x"]
    with pytest.raises(UserError, match="mask is of a picture to change; give one, --image=FILE"):
        main([f"--run={diffusion_run('captions')}", *more])
    with pytest.raises(UserError, match="takes no mask; it takes"):
        main([f"--run={debug_run('scenes/dalle.py')}", *more])
