"""Records of other people's datasets: what their fields hold, and what of it is read."""

import io
import multiprocessing
import shutil

import aiohttp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from cli.errors import Outage, UserError
from configs.scenes.dvae import get_config
from data import fields
from data.fields import find_image_field
from data.pipeline import ExampleStream
from data.records import RecordSource, dataset_folder, first_captions, first_classes
from data.tally import DAMAGED, INCOMPLETE
from data.tokenizer import Tokenizer

from .made_up import NAME, prepare_made_up, with_file


def file(picture: Image.Image, form: str = "PNG", **options) -> bytes:
    picture.save(stream := io.BytesIO(), form, **options)
    return stream.getvalue()


def test_a_batch_holds_pictures_of_every_kind(tmp_path, capsys):
    color = Image.new("RGB", (40, 40), (10, 20, 30))
    sideways = Image.Exif()
    sideways[0x0112] = 6
    files = [
        file(color),
        file(color.convert("RGBA")),
        file(color.quantize(2)),
        file(Image.new("LA", (40, 40), (7, 255))),
        file(Image.new("1", (40, 40), 1)),
        file(Image.fromarray(np.full((40, 40), 0x1234, np.uint16))),
        file(Image.new("RGB", (60, 40), (0, 0, 255)), "JPEG", exif=sideways),
        b"<html>not found</html>",
    ]
    prepare_made_up(tmp_path, {}, {"train": [{"image": data} for data in files]})
    source = RecordSource(NAME, "train", str(tmp_path))
    records = [source[index] for index in range(8)]
    shown = {tuple(record["image"][0, 0].tolist()) for record in records}
    assert shown == {(10, 20, 30), (7,) * 3, (255,) * 3, (0x12,) * 3, (0, 0, 254)}
    assert (60, 40, 3) in [record["image"].shape for record in records]
    assert len(source.damaged) == 1 and "it is a web page" in capsys.readouterr().out
    config = get_config("debug").data
    with config.unlocked():
        config.dataset, config.data_dir = NAME, str(tmp_path)
    for transform in ("center_square", "dvae_training", "dalle_training", "clip_training", "adm_training"):
        with config.unlocked():
            config.transform = transform
        batch = ExampleStream(config, None, split="train", seed=0, train=True).batch(range(8))
        assert batch["image"].shape == (8, 32, 32, 3)


@pytest.mark.parametrize(("damage", "message"), [("reader", "broken file"), ("picture", "no picture of a kind")])
def test_a_damaged_record_is_replaced_and_counted(scenes_dir, capsys, monkeypatch, damage, message):
    monkeypatch.setattr("data.records.READ_AGAIN", (0.0, 0.0))
    source = RecordSource("scenes/single32", "train", str(scenes_dir))
    healthy = source[4]

    class Damaged:
        def __len__(self):
            return len(inner)

        def __getitem__(self, index):
            if index == 3 and damage == "reader":
                raise OSError("broken file")
            return inner[index].replace(b"PNG", b"GNP") if index == 3 else inner[index]

    inner, source._source = source._source, Damaged()
    assert (source[3]["image"] == healthy["image"]).all()
    assert source.damaged == {3}
    said = capsys.readouterr().out
    assert said.startswith("warning: record 3 of scenes/single32 (train) cannot be read (") and message in said


def test_a_reader_that_fails_for_a_moment_changes_nothing(scenes_dir, monkeypatch):
    monkeypatch.setattr("data.records.READ_AGAIN", (0.0, 0.0))
    source = RecordSource("scenes/single32", "train", str(scenes_dir))
    healthy, failures = source[3], iter([OSError("timed out"), ValueError("short read")])

    class Failing:
        def __len__(self):
            return len(inner)

        def __getitem__(self, index):
            for error in failures:
                raise error
            return inner[index]

    inner, source._source = source._source, Failing()
    assert (source[3]["image"] == healthy["image"]).all()
    assert not source.damaged


def test_cached_records_are_the_same(scenes_dir):
    plain, cached = (RecordSource("scenes/single32", "train", str(scenes_dir), cache=cache) for cache in (False, True))
    assert (plain[7]["image"] == cached[7]["image"]).all()
    assert cached[7] is cached[7]


def test_damaged_bytes_of_a_file_are_passed_over_and_a_file_that_is_gone_is_said(scenes_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("data.records.READ_AGAIN", ())
    shutil.copytree(scenes_dir, tmp_path / "data")
    (file,) = (tmp_path / "data").glob("scenes/single32/*/*-train.array_record*")
    whole = file.read_bytes()
    middle = len(whole) // 2
    file.write_bytes(
        whole[:middle] + bytes(byte ^ 0xFF for byte in whole[middle : middle + 800]) + whole[middle + 800 :]
    )
    source = RecordSource("scenes/single32", "train", f"{tmp_path}/data", fields=())
    assert all(source[index]["image"].shape == (32, 32, 3) for index in range(300))
    assert 0 < len(source.damaged) < 10 and source[299]["place"] == 299
    file.unlink()
    with pytest.raises(UserError, match="a file of scenes/single32 cannot be read: .*; prepare the dataset again"):
        RecordSource("scenes/single32", "train", f"{tmp_path}/data")[0]


def test_a_store_that_fails_for_a_moment_is_asked_again(scenes_dir, monkeypatch):
    monkeypatch.setattr("data.records.READ_AGAIN", (0, 0))
    source = RecordSource("scenes/single32", "train", str(scenes_dir), fields=())
    whole, stored = source[7], source._source
    answers = iter((RuntimeError("UNAVAILABLE: gs://b/x"),) * 2)

    class Failing:
        __len__ = stored.__len__

        def __getitem__(self, place):
            if (error := next(answers, None)) is not None:
                raise error
            return stored[place]

    source._source = Failing()
    assert (source[7]["image"] == whole["image"]).all() and not source.damaged
    answers = iter((RuntimeError("UNAVAILABLE: gs://b/x"),) * 3)
    with pytest.raises(Outage, match="a file of the store cannot be read: UNAVAILABLE"):
        source[7]


def test_the_memory_of_cached_records_has_a_bound(scenes_dir, monkeypatch):
    monkeypatch.setattr("data.records.CACHE_BYTES", 10 * 32 * 32 * 3)
    source = RecordSource("scenes/single32", "train", str(scenes_dir), cache=True, fields=())
    first = [source[index] for index in range(40)]
    kept = [source[index] is record for index, record in enumerate(first)]
    assert 5 < sum(kept) < 10 and kept == sorted(kept, reverse=True)
    assert (source[39]["image"] == first[39]["image"]).all()


def test_only_the_fields_asked_for_are_decoded(scenes_dir):
    whole = RecordSource("scenes/single32", "train", str(scenes_dir))[7]
    assert whole["id"] and whole["objects"]["color"]
    part = RecordSource("scenes/single32", "train", str(scenes_dir), pictures=False, fields=())[7]
    assert part == {"captions": whole["captions"], "place": 7}
    stored = RecordSource("scenes/single32", "train", str(scenes_dir), captions=False, fields=("background",))[7]
    assert stored.keys() == {"image", "background", "place"} and (stored["image"] == whole["image"]).all()


def test_a_dataset_that_is_read_from_start_to_end_alone_is_refused(tmp_path):
    prepare_made_up(tmp_path, {"text": tfds.features.Text()}, {"train": [{"text": "one"}]})
    path = tmp_path / NAME / "1.0.0" / "dataset_info.json"
    path.write_text(path.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(
        UserError, match="in a format without random access; move it away and run `python -m scripts.prepare"
    ):
        RecordSource(NAME, "train", str(tmp_path))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("dataset_info.json", lambda text: "", "is damaged"),
        ("dataset_info.json", lambda text: text[:40], "is damaged"),
        ("dataset_info.json", lambda text: "\ufeff" + text, "is damaged"),
        ("dataset_info.json", lambda text: text.replace("array_record", "anything"), "is damaged"),
        ("dataset_info.json", lambda text: text.replace("array_record", "parquet"), "without random access"),
        (
            "dataset_info.json",
            lambda text: '{"fileFormat": "array_record"}',
            "is damaged|names no features or no splits",
        ),
        ("features.json", lambda text: text[:40], "is damaged"),
        ("features.json", None, "is damaged|names no features"),
        ("dataset_info.json", lambda text: text.replace('"3"', '"9"'), "has 3 records, and the index says 9; copy"),
        ("dataset_info.json", lambda text: text.replace('"3"', '"2"'), "has 3 records, and the index says 2; copy"),
    ],
)
def test_an_index_that_is_damaged_or_tells_another_number_is_one_line(tmp_path, name, change, message):
    prepare_made_up(tmp_path, {"text": tfds.features.Text()}, {"train": [{"text": word} for word in "abc"]})
    path = tmp_path / NAME / "1.0.0" / name
    text = path.read_text()
    path.unlink() if change is None else path.write_text(change(text))
    with pytest.raises(UserError, match=message) as raised:
        RecordSource(NAME, "train", str(tmp_path))
    assert "\n" not in str(raised.value) and "scripts.prepare" in str(raised.value)


def test_an_index_that_a_store_does_not_give_is_not_called_damaged(scenes_dir, monkeypatch):
    def fail(folder):
        raise aiohttp.ClientError("reset by peer")

    monkeypatch.setattr(tfds, "builder_from_directory", fail)
    with pytest.raises(Outage, match="the store cannot be reached .ClientError: reset by peer."):
        RecordSource("scenes/single32", "train", str(scenes_dir))


@pytest.mark.parametrize("content", [b"", b"<html>" * 100])
def test_a_file_of_records_that_is_none_is_said_when_it_is_opened(tmp_path, content):
    prepare_made_up(tmp_path, {"text": tfds.features.Text()}, {"train": [{"text": "a"}]})
    (path,) = (tmp_path / NAME / "1.0.0").glob("*.array_record*")
    path.write_bytes(content)
    with pytest.raises(UserError, match="a file of made_up cannot be read: .*; prepare the dataset again"):
        RecordSource(NAME, "train", str(tmp_path), pictures=False, captions=False)


def test_what_lies_beside_the_versions_of_a_dataset_is_none(tmp_path):
    prepare_made_up(tmp_path, {"text": tfds.features.Text()}, {"train": [{"text": "a"}]})
    shutil.copytree(tmp_path / NAME / "1.0.0", tmp_path / NAME / "1.0.0.bak")
    assert len(RecordSource(NAME, "train", str(tmp_path), pictures=False, captions=False)) == 1


def test_mistakes(scenes_dir, tmp_path):
    with pytest.raises(UserError, match="scripts.prepare"):
        dataset_folder("scenes/single32", str(tmp_path))
    with pytest.raises(UserError, match="run `python -m scripts.prepare --dataset=cifar10 --data_dir="):
        dataset_folder("cifar10", str(tmp_path))
    with pytest.raises(UserError, match="scripts.prepare --dataset=folder --source=... --name=pets`"):
        dataset_folder("folder/pets", "")
    with pytest.raises(UserError, match="choose one of scenes/single32, scenes/pair32"):
        dataset_folder("scenes/typo", str(tmp_path))
    with pytest.raises(UserError, match="it has .*held_out"):
        RecordSource("scenes/single32", "test", str(scenes_dir))


def test_a_split_without_any_picture_is_refused(tmp_path):
    prepare_made_up(tmp_path, {}, {"train": [{"image": b"no picture"}] * 2})
    with pytest.raises(UserError, match=r"no record of made_up \(train\) can be used: .*no picture of a kind"):
        RecordSource(NAME, "train", str(tmp_path))[0]


TEXT, TEXTS = tfds.features.Text(), tfds.features.Sequence(tfds.features.Text())


def data_config(folder, **keys):
    config = get_config("debug").data
    with config.unlocked():
        config.update({"dataset": NAME, "data_dir": str(folder), **keys})
    return config


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["a small red circle", "a blue star"], 300)


def read(folder, tokenizer=None, num=16, **keys):
    config = data_config(folder, **keys)
    stream = ExampleStream(config, tokenizer, split="train", seed=0, train=True)
    return stream, stream.batch(range(num))


def test_fields_of_usual_names_are_found_and_said(tmp_path, tokenizer, capsys, monkeypatch):
    jpg = tfds.features.Image(shape=(None, None, 3))
    prepare_made_up(
        tmp_path,
        {"txt": TEXT, "url": TEXT},
        {"train": [{"image": "red", "txt": "a blue star", "url": "x"}] * 4},
        image=("jpg", jpg),
    )
    _, batch = read(tmp_path, tokenizer, text_length=12)
    assert (batch["image"] == (255, 0, 0)).all()
    assert {tokenizer.decode(ids) for ids in batch["text"]} == {"a blue star"}
    said = capsys.readouterr().out
    assert "pictures are read from its field 'jpg'" in said and "captions are read from its field 'txt'" in said
    fields._say.cache_clear()
    monkeypatch.setattr(multiprocessing, "parent_process", object)  # as in a process that reads for this one
    read(tmp_path, tokenizer, text_length=12)
    assert not capsys.readouterr().out


def test_fields_that_a_config_names_are_read(tmp_path, tokenizer):
    other = tfds.features.Image(shape=(None, None, 3))
    records = [{"image": "red", "seen": with_file({"image": "blue"})["image"], "text": "a", "told": "a blue star"}] * 4
    prepare_made_up(tmp_path, {"seen": other, "text": TEXT, "told": TEXT}, {"train": records})
    _, batch = read(tmp_path, tokenizer, text_length=12, image_field="seen", text_field="told")
    assert (batch["image"] == (0, 0, 255)).all()
    assert {tokenizer.decode(ids) for ids in batch["text"]} == {"a blue star"}


def test_fields_that_are_missing_are_named_with_those_there_are(tmp_path, tokenizer):
    numbers = {"text": tfds.features.ClassLabel(num_classes=3), "caption": tfds.features.Scalar(np.int64), "name": TEXT}
    prepare_made_up(tmp_path, numbers, {"train": [{"text": 1, "caption": 2, "name": "x"}] * 2})
    for keys, message in [
        (
            {},
            "no field of captions of a usual name .it has: caption, image, name, text.; name one with",
        ),
        ({"text_field": "text"}, "field 'text' of made_up holds no captions .name can.; set config.data.text_field"),
        ({"text_field": "txt"}, "no field 'txt' .it has: caption, image, name, text.; set config.data.text_field"),
        ({"image_field": "jpg"}, "no field 'jpg' .it has: caption, image, name, text.; set config.data.image_field"),
        ({"image_field": "name"}, "field 'name' of made_up holds no pictures .image can.; set config.data.image_field"),
    ]:
        with pytest.raises(UserError, match=message):
            read(tmp_path, tokenizer, text_length=12, **keys)
    assert (read(tmp_path, tokenizer, text_length=4, text_field="name")[1]["text"] > 0).any()


def test_pixels_that_are_stored_as_numbers_are_pictures(tmp_path):
    for shape in ((28, 28), (28, 28, 1), (28, 28, 3)):
        pixels = tfds.features.Tensor(shape=shape, dtype=np.uint8)
        prepare_made_up(
            tmp_path / str(shape), {}, {"train": [{"image": np.full(shape, 7, np.uint8)}] * 2}, image=("image", pixels)
        )
        _, batch = read(tmp_path / str(shape))
        assert (batch["image"] == 7).all() and batch["image"].shape == (16, 32, 32, 3)


def test_gray_pictures_have_three_channels(tmp_path):
    gray = tfds.features.Image(shape=(28, 28, 1))
    prepare_made_up(tmp_path, {}, {"train": [{"image": np.full((28, 28), 7, np.uint8)}] * 2}, image=("image", gray))
    _, batch = read(tmp_path)
    assert (batch["image"] == 7).all() and batch["image"].shape == (16, 32, 32, 3)


def test_floats_and_classes_of_pixels_are_no_pictures(tmp_path):
    for feature, message in [
        (tfds.features.Image(shape=(4, 4, 1), dtype=np.float32), "holds floats, without an agreed white"),
        (tfds.features.LabeledImage(labels=2, shape=(4, 4, 1)), "no field of pictures of a usual name .it has: image."),
    ]:
        with pytest.raises(UserError, match=message):
            find_image_field({"image": feature}, "", NAME)


def test_blank_captions_are_none_in_training(tmp_path, tokenizer, capsys):
    """The record's next caption is taken; a record without any is passed over, named once and counted."""
    records = [
        {"captions": [" ", "a blue star"]},
        {"captions": ["\n"]},
        {"captions": []},
        {"captions": ["a blue star"]},
    ]
    prepare_made_up(tmp_path, {"captions": TEXTS}, {"train": records})
    for train in (True, False):
        config = data_config(tmp_path, text_length=12)
        stream = ExampleStream(config, tokenizer, split="train", seed=0, train=train)
        assert {tokenizer.decode(ids) for ids in stream.batch(range(16))["text"]} == {"a blue star"}
        assert len(stream.tally.places(INCOMPLETE)) == 2 and not stream.tally.places(DAMAGED)
        said = capsys.readouterr().out
        assert said.count("has no caption; the next one takes its place") == 1 and "of made_up (train)" in said
    assert not read(tmp_path)[0].tally.places(INCOMPLETE)  # nothing is missing where no text is read


def test_records_without_a_class_are_passed_over(tmp_path):
    prepare_made_up(
        tmp_path,
        {"label": tfds.features.ClassLabel(num_classes=3)},
        {"train": [{"label": -1}, {"label": 2}], "test": [{"label": -1}] * 3},
    )
    stream, batch = read(tmp_path, label_field="label")
    assert set(batch["label"].tolist()) == {2} and len(stream.tally.places(INCOMPLETE)) == 1
    hidden = ExampleStream(data_config(tmp_path, label_field="label"), None, split="test", seed=0, train=True)
    with pytest.raises(
        UserError, match=r"no record of made_up \(test\) can be used: .*no class number in its field 'label'"
    ):
        hidden[0]


def test_a_metric_names_the_first_record_that_lacks_something(tmp_path):
    records = [{"captions": ["one"], "label": 0}] * 9
    prepare_made_up(
        tmp_path,
        {"captions": TEXTS, "label": tfds.features.ClassLabel(num_classes=1)},
        {"train": records, "odd": [{"captions": [" "], "label": -1}] * 2},
    )
    config = data_config(tmp_path, label_field="label")
    assert first_captions(config, "train", 9) == ("one",) * 9
    assert first_classes(config, "train", 9).tolist() == [0] * 9
    with pytest.raises(UserError, match="record 0 of made_up has no caption .2 have none.; choose another split"):
        first_captions(config, "odd", 2)
    with pytest.raises(UserError, match="record 0 of made_up has no class number in its field 'label' .2 have none."):
        first_classes(config, "odd", 2)
    with pytest.raises(UserError, match="train has 9 records, fewer than --num=10"):
        first_captions(config, "train", 10)


def test_a_draft_reads_large_jpegs_smaller_and_shows_the_same(tmp_path):
    smooth = np.linspace(0, 255, 400).astype(np.uint8)[None, :, None].repeat(300, 0).repeat(3, 2)
    prepare_made_up(tmp_path, {}, {"train": [{"image": file(Image.fromarray(smooth), "JPEG", quality=95)}] * 2})
    batches = {
        draft: read(tmp_path, num=4, transform="dalle_training", draft=draft, cache=False) for draft in (False, True)
    }
    (whole, exact), (half, drafted) = batches[0], batches[1]
    assert whole.source[0]["image"].shape == (300, 400, 3) and half.source[0]["image"].size == (50, 38)
    assert exact["image"].shape == drafted["image"].shape == (4, 32, 32, 3)
    columns = (batch["image"][..., 0].astype(int).mean((0, 1)) for batch in (exact, drafted))
    assert np.abs(np.subtract(*columns)).max() < 12  # crops differ by a pixel of the smaller picture
