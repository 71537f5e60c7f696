"""Aspect-ratio buckets: which pictures they hold, in which order batches come, and what a run makes of them."""

import collections
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cli.config import load_config
from cli.errors import EXIT_OK, UserError
from data import folder
from data.buckets import BucketOrder, choose_buckets, cut_to
from data.picture_sizes import picture_sizes, sizes_file
from data.pipeline import ExampleStream
from data.records import dataset_folder, open_records
from train.distributed.mesh import make_mesh
from train.loop import train
from train.program import create_program
from weights.run import read_metrics

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ((32, 32), (24, 40), (40, 24))
BATCH = 4
EXIF_TURNED = 6  # stored lying, shown upright


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """A dataset of 50 pictures: wide, tall (some of them lying on their side) and square, none of them alike."""
    source, root = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for index in range(50):
        height, width = ((48, 80), (80, 50), (60, 60))[index % 3 if index > 5 else 0]
        picture = Image.fromarray(rng.integers(0, 256, (height // 4, width // 4, 3), np.uint8)).resize((width, height))
        exif = Image.Exif()
        if index % 3 == 1 and index % 2:
            exif[0x0112] = EXIF_TURNED
            picture = picture.transpose(Image.Transpose.ROTATE_90)
        picture.save(source / f"{index:02d}.jpg", exif=exif, quality=95)
        (source / f"{index:02d}.txt").write_text(f"picture {index}")
    request = folder.Request("shapes", str(source), validation=8)
    folder.prepare(request, folder.list_source(str(source), request.fields), root)
    return root


def config_of(data_dir, *overrides, name="scenes/dvae.py:debug"):
    own = (f"--config.data.data_dir={data_dir}", "--config.data.dataset=folder/shapes")
    shapes = ("--config.data.transform=random_crop", f"--config.data.buckets={SHAPES}", f"--config.batch_size={BATCH}")
    return load_config([f"--config={ROOT}/configs/{name}", *own, *shapes, *overrides])


def open_stream(data_dir, **options):
    given = {"split": "train", "seed": 0, "train": True, "batch_size": BATCH, **options}
    return ExampleStream(config_of(data_dir).data, None, **given)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 60])
def test_each_picture_is_seen_once_an_epoch_but_for_the_rest_of_a_batch(batch_size):
    buckets = np.random.default_rng(0).choice([0, 0, 1, 3], 101)
    order, epochs = BucketOrder(buckets, batch_size, 5, shuffle=True), 12
    seen = collections.Counter()
    batches = sum(epochs * count // batch_size for count in np.bincount(buckets))
    for index in range(batches * batch_size):
        seen[place := order.place(index)] += 1
        assert buckets[place] == order.bucket(index) == order.bucket(index - index % batch_size)
    for bucket in (0, 1, 3):
        times = [seen[place] for place in np.flatnonzero(buckets == bucket)]
        assert max(times) - min(times) <= 1 and 0 <= epochs * len(times) - sum(times) < batch_size
    again = pickle.loads(pickle.dumps(order))
    assert [again.place(index) for index in range(300)] == [order.place(index) for index in range(300)]
    other = BucketOrder(buckets, batch_size, 6, shuffle=True)
    assert [other.place(index) for index in range(300)] != [order.place(index) for index in range(300)]


def test_shapes_are_mixed_from_the_first_batches_on():
    buckets = np.repeat([0, 1, 2], 400)
    order = BucketOrder(buckets, 8, 0, shuffle=False)
    assert len({order.bucket(8 * batch) for batch in range(12)}) == 3
    members = [order.place(index) for index in range(150 * 8) if order.bucket(index) == 1]
    rows = np.array(members).reshape(-1, 8)
    assert sorted(members) == list(range(400, 800)) and (np.diff(rows) == 1).all()  # in stored order, batch by batch


def test_a_picture_is_in_the_bucket_that_cuts_least_of_it():
    sizes, shapes = np.random.default_rng(1).integers(16, 200, (300, 2)), np.array([*SHAPES, (20, 48), (64, 64)])
    scale = np.max(shapes[None] / sizes[:, None], axis=-1)  # to cover the bucket
    kept = shapes.prod(axis=1) / (scale**2 * sizes.prod(axis=1)[:, None])
    chosen = choose_buckets(sizes, [tuple(shape) for shape in shapes.tolist()])
    np.testing.assert_allclose(kept[np.arange(300), chosen], kept.max(axis=1), atol=2e-6)
    square = choose_buckets(np.array([[40, 40], [64, 64], [90, 90], [20, 20]]), [(32, 32), (64, 64)])
    assert square.tolist() == [0, 1, 1, 0]  # the largest that need not be enlarged to
    for size, shape in zip(sizes.tolist(), shapes[chosen].tolist(), strict=True):
        height, width = cut_to(tuple(size), tuple(shape))
        assert (height == size[0] or width == size[1]) and height <= size[0] and width <= size[1]
        assert abs(height * shape[1] - width * shape[0]) <= max(shape)  # to a pixel


def test_sizes_are_known_without_decoding(data_dir):
    data = config_of(data_dir).data
    path = sizes_file(dataset_folder(data.dataset, data.data_dir), "train")
    prepared = picture_sizes(data, "train")
    source = open_records(data, "train", captions=False, fields=())
    assert [source[place]["image"].shape[:2] for place in range(len(source))] == [tuple(size) for size in prepared]
    assert {tuple(size) for size in prepared} == {(48, 80), (80, 50), (60, 60)}
    path.rename(path.with_suffix(".away"))
    np.testing.assert_array_equal(picture_sizes(data, "train"), prepared)
    assert path.read_bytes() == path.with_suffix(".away").read_bytes()


def test_a_batch_has_one_shape_whoever_reads_it_and_wherever_a_run_begins(data_dir):
    stream, shapes = open_stream(data_dir), collections.Counter()
    for batch in range(30):
        whole = stream.batch(range(BATCH * batch, BATCH * (batch + 1)))
        shapes[whole["image"].shape[1:3]] += 1
        again = pickle.loads(pickle.dumps(stream)) if batch == 17 else open_stream(data_dir) if batch == 20 else stream
        for rows in ((0, 1), (2, 3)):
            part = again.batch([BATCH * batch + row for row in rows])
            assert all((part[name] == whole[name][list(rows)]).all() for name in whole)
    assert set(shapes) == set(SHAPES)
    validation = open_stream(data_dir, split="validation", train=False)
    counts = np.bincount(choose_buckets(picture_sizes(config_of(data_dir).data, "validation"), SHAPES))
    assert counts.sum() == 8 and validation.pass_batches(BATCH) == max(1, sum(counts // BATCH))


@pytest.mark.slow
def test_a_run_of_three_shapes_compiles_three_steps_and_goes_on_as_if_never_stopped(data_dir, tmp_path, monkeypatch):
    programs = []

    def keep(*args):
        programs.append(create_program(*args))
        return programs[-1]

    monkeypatch.setattr("train.loop.create_program", keep)
    quick = ("--config.evaluate.every=100", "--config.checkpoint.every=100")
    assert train(config_of(data_dir, "--config.steps=12", *quick), tmp_path / "whole") == EXIT_OK
    assert programs[0].train_step._cache_size() == 3
    for steps in (5, 12):
        assert train(config_of(data_dir, f"--config.steps={steps}", *quick), tmp_path / "parts") == EXIT_OK
    losses = [
        [(row["step"], row["loss"]) for row in read_metrics(tmp_path / name) if "loss" in row]
        for name in ("whole", "parts")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 12
    with pytest.raises(UserError, match="batch_size=5 does not divide the 48 examples"):
        train(config_of(data_dir, "--config.steps=13", "--config.batch_size=5", *quick), tmp_path / "parts")


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("scenes/dalle.py:debug", "", r"32 x 48 have .8, 12. tokens, and the transformer's image_grid is .8, 8."),
        ("scenes/clip.py:debug", "", r"has 32 x 48, which a network of this clip does not take"),
        ("scenes/unidiffuser.py:debug", "", r"this unidiffuser reads them by a CLIP, which takes squares"),
        ("scenes/captioner.py:debug_mlp", "", r"this captioner reads them by a CLIP, which takes squares"),
        (
            "scenes/ddpm_uvit.py:debug",
            "--config.models.denoiser.positions=learned",
            r"32 x 48, .* positions are learned",
        ),
        ("scenes/dvae.py:debug", "--config.data.buckets=((32,32),(32,32))", r"must be a tuple of different"),
        ("scenes/dvae.py:debug", "--config.data.buckets=((30,32),)", r"tokens are 4 x 4 pixels"),
    ],
)
def test_a_network_of_one_shape_is_refused_in_one_line(name, override, message):
    given = ("--config.data.buckets=((32,32),(32,48))", *([override] if override else []))
    config = load_config([f"--config={ROOT}/configs/{name}", *given])
    with pytest.raises(UserError, match=message) as error:
        create_program(config, make_mesh(config.mesh))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_networks_without_learned_places_take_any_shape():
    for name in ("ddpm_unet.py", "ddpm_uvit.py"):
        config = load_config(
            [f"--config={ROOT}/configs/scenes/{name}:debug", "--config.data.buckets=((32,32),(32,48))"]
        )
        assert create_program(config, make_mesh(config.mesh)).abstract_batch["image"].shape[1:] == (32, 48, 3)


def test_a_transform_that_cuts_squares_is_refused(data_dir):
    config = config_of(data_dir, "--config.data.transform=center_square")
    with pytest.raises(UserError, match="cuts squares; choose one of center_crop, random_crop"):
        ExampleStream(config.data, None, split="train", seed=0, train=True, batch_size=BATCH)
