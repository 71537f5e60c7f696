"""The embedded dataset on disk: what TFDS writes, without TensorFlow, and what it gives back."""

import hashlib
import io
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from cli.errors import UserError
from data import scenes
from data.scenes import scenes_dataset_builder
from data.scenes.scenes_dataset_builder import Builder, generate_example

SIZES = {"train": 30, "validation": 12, "held_out": 12}


@pytest.fixture(scope="module", params=list(scenes.WORLDS))
def prepared(request, tmp_path_factory):
    """A small dataset of each config, and its world."""
    folder = tmp_path_factory.mktemp("data")
    return scenes.prepare(request.param, folder, **SIZES), scenes.WORLDS[request.param]


def read_scene(builder: Builder, example: dict) -> scenes.Scene:
    """Turns an example's labels back into its scene."""
    features: Any = builder.info.features
    labels = {key: features["objects"][key].int2str for key in ("shape", "color", "size")}
    columns = [[labels[key](int(value)) for value in example["objects"][key]] for key in ("shape", "color", "size")]
    relation = features["relation"].int2str(int(example["relation"]))
    return scenes.Scene(
        features["background"].int2str(int(example["background"])),
        tuple(scenes.SceneObject(*item) for item in zip(*columns, strict=True)),
        None if relation == "none" else relation,
    )


@pytest.mark.filterwarnings("ignore:OpenCV")
def test_splits_hold_what_they_promise_and_need_no_tensorflow(prepared):
    builder, world = prepared
    for split, size in SIZES.items():
        source = builder.as_data_source(split=split)
        assert len(source) == size
        names = set()
        for k in range(size):
            example = source[k]
            scene = read_scene(builder, example)
            assert world.is_held_out(scene) == (split == "held_out")
            captions = tuple(caption.decode() for caption in example["captions"])
            assert captions == scenes.write_captions(world, scene)
            assert (
                example["image"].shape == (world.image_size, world.image_size, 3) and example["image"].dtype == np.uint8
            )
            names.add(example["id"].decode())
        assert names == {f"{split}_{k:06d}" for k in range(size)}
    assert "tensorflow" not in sys.modules


@pytest.mark.filterwarnings("ignore:OpenCV")
def test_stored_pictures_are_the_generated_ones(prepared):
    builder, world = prepared
    for example in builder.as_data_source(split="validation"):
        split, index = example["id"].decode().rsplit("_", 1)
        expected = generate_example(world, "1.0.0", split, int(index))
        np.testing.assert_array_equal(example["image"], np.asarray(Image.open(io.BytesIO(expected["image"]))))


def test_tfds_finds_it_by_name_and_the_source_survives_pickling(prepared):
    builder, world = prepared
    again: Any = tfds.builder(f"scenes/{world.name}", data_dir=builder.data_dir_root, file_format="array_record")
    assert again.info.splits["train"].num_examples == SIZES["train"]
    source = again.as_data_source(split="train[:50%]", decoders={"image": tfds.decode.SkipDecoding()})
    assert len(source) == SIZES["train"] // 2
    assert pickle.loads(pickle.dumps(source))[3] == source[3]


@pytest.mark.parametrize(
    ("name", "digest"),
    [("single32", "3ae71bae3049130e"), ("pair32", "815d9d9371e55f4b"), ("pair64", "ca713682b67cbcd4")],
)
def test_an_example_depends_on_its_index_alone(name, digest):
    world = scenes.WORLDS[name]
    summary = hashlib.sha256()
    pictures = set()
    for split in SIZES:
        for index in (0, 1, 19_999):
            example = generate_example(world, "1.0.0", split, index)
            pixels = np.asarray(Image.open(io.BytesIO(example["image"]))).tobytes()
            summary.update(pixels + "".join(example["captions"]).encode())
            pictures.add(pixels)
    assert len(pictures) == 9
    assert summary.hexdigest()[:16] == digest
    newer = generate_example(world, "2.0.0", "train", 0)
    assert newer["image"] != generate_example(world, "1.0.0", "train", 0)["image"]


def test_preparing_again_returns_at_once(tmp_path, monkeypatch):
    scenes.prepare("single32", tmp_path, **SIZES)

    def fail(*_):
        raise AssertionError("generated again")

    monkeypatch.setattr(scenes_dataset_builder, "generate_example", fail)
    for sizes in (SIZES, {"train": 30}, {}):
        builder = scenes.prepare("single32", tmp_path, **sizes)
        assert builder.info.splits["train"].num_examples == 30


@pytest.mark.parametrize("missing", ["dataset_info.json", "*train*array_record*"])
def test_what_is_not_whole_is_written_anew(tmp_path, missing):
    folder = Path(scenes.prepare("single32", tmp_path, **SIZES).data_dir)
    (victim,) = folder.glob(missing)
    victim.unlink()
    builder: Any = scenes.prepare("single32", tmp_path, **SIZES)
    assert victim.exists()
    assert len(builder.as_data_source(split="train")) == SIZES["train"]


def test_an_interrupted_preparation_does_not_count(tmp_path, monkeypatch):
    def stop(world, version, split, index):
        if index == 5:
            raise KeyboardInterrupt
        return generate_example(world, version, split, index)

    with monkeypatch.context() as patch:
        patch.setattr(scenes_dataset_builder, "generate_example", stop)
        with pytest.raises(KeyboardInterrupt):
            scenes.prepare("single32", tmp_path, **SIZES)
    builder: Any = scenes.prepare("single32", tmp_path, **SIZES)
    assert len(builder.as_data_source(split="held_out")) == SIZES["held_out"]


def test_a_full_disk_is_an_error_of_the_disk(tmp_path, monkeypatch):
    def full(path: str, options: str) -> ArrayRecordWriter:
        return ArrayRecordWriter("/dev/full", options)

    monkeypatch.setattr("array_record.python.array_record_module.ArrayRecordWriter", full)
    with pytest.raises(OSError, match="No space left on device"):
        scenes.prepare("single32", tmp_path, train=1, validation=1, held_out=1)


def test_mistakes_are_one_clear_line(tmp_path):
    scenes.prepare("single32", tmp_path, **SIZES)
    with pytest.raises(UserError, match="'train': 30.* not .*'train': 31.*another data_dir"):
        scenes.prepare("single32", tmp_path, train=31)
    with pytest.raises(UserError, match="no config 'triple32'; choose one of single32, pair32, pair64"):
        scenes.prepare("triple32", tmp_path)
    with pytest.raises(UserError, match="no split test; it has train, validation, held_out"):
        scenes.prepare("single32", tmp_path, test=3)
