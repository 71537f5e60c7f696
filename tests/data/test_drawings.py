"""The dataset of drawings: what is in it, how it is split, and that it is the same each time."""

import numpy as np
import pytest

from cli.errors import UserError
from data import drawings
from data.drawings import openmoji
from data.drawings.drawings_dataset_builder import BACKGROUNDS, is_held_out
from data.records import RecordSource

SIZES = {"train": 24, "validation": 3, "held_out": 8}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A small dataset, twice."""
    folders = [tmp_path_factory.mktemp("drawings") for _ in range(2)]
    for folder in folders:
        drawings.prepare("emoji32", folder, **SIZES)
    return folders


def test_things_that_are_held_out_are_never_trained_on():
    found = openmoji.drawings()
    assert len(found) > 1500 and len({drawing.code for drawing in found}) == len(found)
    held_out = {drawing.family for drawing in found if is_held_out(drawing)}
    trained = {drawing.family for drawing in found if not is_held_out(drawing)}
    assert not held_out & trained
    assert 0.06 < sum(map(is_held_out, found)) / len(found) < 0.14


def test_who_does_something_makes_no_other_family():
    families = {drawing.names[0]: drawing.family for drawing in openmoji.drawings()}
    assert families["man judge"] == families["woman judge"] == families["judge"]
    assert families["red apple"] != families["green apple"]


def test_a_picture_is_on_the_background_that_its_captions_name(prepared):
    for split, size in SIZES.items():
        source = RecordSource("drawings/emoji32", split, str(prepared[0]))
        assert len(source) == size
        for index in range(size):
            record = source[index]
            (background,) = (name for name in BACKGROUNDS if record["captions"][0].endswith(f" on a {name} background"))
            pixels = record["image"]
            assert pixels.shape == (32, 32, 3)
            is_background = np.all(pixels == BACKGROUNDS[background], axis=-1)
            assert is_background.any() and not is_background.all()


def test_variants_differ_and_two_preparations_do_not(prepared):
    first, second = (RecordSource("drawings/emoji32", "train", str(folder)) for folder in prepared)
    pictures = [first[index]["image"] for index in range(len(first))]
    assert all(np.array_equal(picture, second[index]["image"]) for index, picture in enumerate(pictures))
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)


def test_the_license_lies_beside_the_records(prepared):
    (path,) = prepared[0].rglob("LICENSE.txt")
    assert path.parent.joinpath("dataset_info.json").is_file()
    assert openmoji.ATTRIBUTION in path.read_text(encoding="utf-8")


def test_what_is_prepared_needs_no_packages_and_is_left_as_it_is(prepared, monkeypatch):
    (path,) = prepared[0].rglob("LICENSE.txt")
    before = path.stat().st_mtime_ns
    monkeypatch.setattr(openmoji, "_PACKAGES", dict.fromkeys(openmoji._PACKAGES, "no_such_module"))
    drawings.prepare("emoji32", prepared[0], **SIZES)
    assert path.stat().st_mtime_ns == before


def test_packages_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr(openmoji, "_PACKAGES", {**openmoji._PACKAGES, "names": "no_such_module"})
    openmoji.drawings.cache_clear()
    with pytest.raises(UserError, match=r"no_such_module.*pip install '\.\[drawings\]'"):
        openmoji.drawings()
