"""`python -m scripts.prepare` as a user calls it: what it says, what it refuses, and the page that shows a dataset."""

import contextlib
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from cli.errors import UserError
from data.records import RecordSource, dataset_folder
from scripts.prepare import main

from ..data.folder.damaged import MIN_SIZE, encode, make, reasons, write_folder

MADE = make(60, 20)


def call(capsys, *arguments: str) -> str:
    main(arguments)
    return capsys.readouterr().out


def test_the_table_says_what_was_left_out_and_where_it_is(tmp_path: Path, capsys):
    source = write_folder(MADE, tmp_path / "my pets")
    options = (f"--source={source}", f"--data_dir={tmp_path}", f"--min_size={MIN_SIZE}", "--workers=1")
    printed = call(capsys, "--dataset=folder", *options)
    for reason, count in reasons(MADE).items():
        assert re.search(rf"^ +{count}  {reason}: \S", printed, re.MULTILINE)
    assert "left out: 20, all of them in" in printed
    assert re.search(r"00011\.png \(latin|of 00000\.png\)", printed)
    assert "preparing folder/my_pets of a folder of pictures: 58 captions of files beside the pictures" in printed
    assert RecordSource("folder/my_pets", "train", str(tmp_path)).has_captions
    assert (dataset_folder("folder/my_pets", str(tmp_path)) / "tokenizer.json").is_file()
    again = call(capsys, "--dataset=folder/my_pets", *options)
    assert re.sub(r"\(\d+ s\)", "", again) == re.sub(r"\(\d+ s\)", "", printed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset=folder"], "needs a --source"),
        (["--dataset=folder", "--source={tmp}/none"], "there is no file"),
        (["--dataset=folder", "--source={tmp}", "--name=../x"], "--name='../x' must be of letters"),
        (["--dataset=folder/a", "--source={tmp}", "--name=b"], "disagree"),
        (["--dataset=folder", "--source={tmp}", "--validation=1.5"], "a share below 1, or a whole number"),
        (["--dataset=folder", "--source={tmp}", "--validation=nan"], "a share below 1, or a whole number"),
        (["--dataset=folder", "--source={tmp}", "--size=-1"], "must not be negative"),
        (["--dataset=folder", "--source={tmp}", "--workers=0"], "--workers must be at least 1"),
        (["--dataset=folder", "--source={tmp}", "--vocab_size=10"], "--vocab_size must be at least 257"),
        (["--dataset=scenes/heart32", "--vocab_size=10"], "--vocab_size must be at least 257"),
        (["--dataset=folder", "--source={tmp}", "--resize=wide"], "invalid choice: 'wide'"),
        (["--dataset=scenes/single32", "--source={tmp}"], "--source is of --dataset=folder"),
        (["--dataset=scenes/single32", "--resize=long"], "--resize is of --dataset=folder"),
        (["--dataset=scenes/single32", "--encoding=png"], "--encoding is of --dataset=folder"),
        (["--dataset=scenes", "--inspect={tmp}/page.html"], "is one page, and --dataset=scenes is"),
        (["--dataset=scenes/none"], "unknown dataset 'scenes/none'; choose scenes"),
        (["--dataset=no_such_data"], "unknown dataset 'no_such_data'; choose scenes"),
        (["--dataset=no such data"], "TensorFlow Datasets cannot prepare no such data"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, tmp_path: Path):
    with pytest.raises(UserError, match=re.escape(message)):
        main([argument.format(tmp=tmp_path) for argument in [*arguments, "--data_dir={tmp}"]])


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path):
    source = write_folder(MADE[:5], tmp_path / "in")
    with pytest.raises(UserError, match="cannot write the dataset to /proc/nowhere"):
        main(["--dataset=folder", f"--source={source}", "--data_dir=/proc/nowhere"])


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch):
    def full(path: str, options: str) -> ArrayRecordWriter:
        return ArrayRecordWriter("/dev/full", options)

    monkeypatch.setattr("data.folder.examination.ArrayRecordWriter", full)
    source = write_folder(MADE[:5], tmp_path / "in")
    with pytest.raises(UserError, match="cannot write the dataset to .*: .*No space left on device"):
        main(["--dataset=folder", f"--source={source}", f"--data_dir={tmp_path}", "--workers=1"])


class Texts(HTMLParser):
    """What a browser shows of a page, and the tags it meets."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        loaded = [str(value) for name, value in attrs if name in ("src", "href", "xlink:href")]
        assert all(value.startswith(("data:", "#")) for value in loaded)
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data):
        self.text += data


def test_the_page_shows_pictures_captions_sizes_and_what_was_left_out(tmp_path: Path, capsys):
    attack = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    made = [*MADE, *make(61, 0)[60:]]
    source = Path(write_folder(made, tmp_path / "in"))
    (source / f"{attack.replace('/', '')}.png").write_bytes(b"no picture")
    (source / "00060.txt").write_text(attack)
    page = tmp_path / "page.html"
    options = (
        f"--source={source}",
        f"--data_dir={tmp_path}",
        f"--min_size={MIN_SIZE}",
        "--validation=0",
        "--workers=1",
    )
    printed = call(capsys, "--dataset=folder", *options, f"--inspect={page}")
    assert f"look at it: {page}" in printed
    shown = Texts(page.read_text(encoding="utf-8"))
    assert "script" not in shown.tags and attack in shown.text and attack.replace("/", "") in shown.text
    assert shown.tags.count("figure") > 20 and shown.tags.count("svg") == 4
    for expected in ("41 training pictures", "config.data.text_length", "of 00000.png", "noise of 3 colors"):
        assert expected in shown.text
    for title in ("tokens of a caption", "characters of a caption", "short side", "width over height"):
        assert title in page.read_text(encoding="utf-8")
    for reason, count in reasons(MADE).items():
        assert f"{reason}{count + (reason == 'corrupt')}" in shown.text


def test_a_prepared_dataset_can_be_looked_at_without_a_report(scenes_dir: Path, tmp_path: Path, capsys):
    page = tmp_path / "page.html"
    printed = call(capsys, "--dataset=scenes/single32", f"--data_dir={scenes_dir}", f"--inspect={page}")
    assert "look at it" in printed
    assert "300 training pictures" in page.read_text()


class TenNumbers(tfds.core.GeneratorBasedBuilder):
    """A dataset as TFDS would find it by its name."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(shape=(4, 4, 3)), "label": tfds.features.ClassLabel(num_classes=2)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number in range(10):
            yield number, {"image": encode(np.full((4, 4, 3), number, np.uint8)), "label": number % 2}


def test_a_dataset_of_tfds_is_prepared_by_its_name(tmp_path: Path, capsys):
    tfds.disable_progress_bar()
    with contextlib.redirect_stderr(io.StringIO()):
        printed = call(capsys, "--dataset=ten_numbers", f"--data_dir={tmp_path}")
    assert "ten_numbers: 10 training pictures, no captions, 2 classes (label)" in printed
    assert len(RecordSource("ten_numbers", "train", str(tmp_path))) == 10


def test_a_dataset_that_cannot_be_downloaded_is_one_line(tmp_path: Path, monkeypatch):
    def fail(*_: object) -> None:
        raise ConnectionError("no route to host\nat all")

    monkeypatch.setattr(TenNumbers, "download_and_prepare", fail)
    with pytest.raises(UserError, match="TensorFlow Datasets cannot prepare ten_numbers: no route to host$"):
        main(["--dataset=ten_numbers", f"--data_dir={tmp_path}"])
