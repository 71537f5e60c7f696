"""Malformed inputs at every door: each is read, left out and counted, or refused in one line; nothing else is raised.

A seeded generator makes them by damaging whole ones: `pytest tests/test_malformed_inputs.py --malformed=20000` tries
more, `--malformed_seed=N` others. A failure says which input it was.
"""

import copy
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import models
from cli.errors import UserError
from cli.text_files import read_lines
from configs.scenes import ddpm_unet
from data import folder
from data.pictures import read_picture
from data.tokenizer import Tokenizer
from sample.samplers import create_sampler
from weights.files.origin import open_origin, read_json
from weights.files.tensors import write_tensors
from weights.formats import FORMATS, uvit
from weights.formats.contract import Network
from weights.run import read_config

from .data.folder import damaged
from .weights.clip_samples import FIELDS as CLIP
from .weights.unet_samples import DDPM

FIRST_STAGE = {"name": "autoencoder_kl", "image_size": 8, "width": 8, "multipliers": (1, 2), "groups": 4, "blocks": 1}
FIRST_STAGE |= {"latent_scale": 0.5}

PIECES = (
    b"",
    b"\0",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\n",
    b'"',
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"../",
    b"{" * 50,
)
VALUES = (None, True, -1, 0, 2.5, 1e308, 10**30, "", "64", "../x", "\ud800", [], [1, 2, 3], {}, {"a": 1}, [None])
LETTERS = "ab c$^_{}\\%#&~\0\t\r\n\u2028\u202e\ufeff\u00e9e\u0301\U0001f600\u4e2d"


class Malformed:
    """What damages inputs, and remembers nothing: input `index` of `kind` is the same whenever it is asked for."""

    def __init__(self, seed: int, kind: str, index: int):
        self.rng = np.random.default_rng([seed, *kind.encode(), index])

    def data(self, data: bytes) -> bytes:
        """Bytes that are damaged in one to four places."""
        for _ in range(self.rng.integers(1, 5)):
            start, stop = sorted(self.rng.integers(0, len(data) + 1, size=2))
            stop = stop if self.rng.random() < 0.3 else min(stop, start + 8)
            piece = PIECES[self.rng.integers(len(PIECES))]
            match self.rng.integers(5):
                case 0:
                    data = data[:start] + data[stop:]
                case 1:
                    data = data[:start] + self.rng.bytes(stop - start) + data[stop:]
                case 2:
                    data = data[:start] + piece + data[start:]
                case 3:
                    data = data[:stop] + data[start:stop] + data[stop:]
                case _:
                    data = data[:start] + piece + data[start + len(piece) :]
        return data

    def document(self, document: Any) -> bytes:
        """JSON of which one to three values are of another kind, gone or twice there; now and then damaged as bytes."""
        document = copy.deepcopy(document)
        for _ in range(self.rng.integers(1, 4)):
            inner = document
            while True:
                keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
                if not keys:
                    break
                key = keys[self.rng.integers(len(keys))]
                if isinstance(inner[key], (dict, list)) and inner[key] and self.rng.random() < 0.7:
                    inner = inner[key]
                    continue
                change = self.rng.integers(4)
                if change == 0:
                    del inner[key]
                elif change == 1 and isinstance(inner, dict):
                    inner[f"{key}_"] = inner.pop(key)
                else:
                    inner[key] = VALUES[self.rng.integers(len(VALUES))]
                break
        data = json.dumps(document).encode()
        return self.data(data) if self.rng.random() < 0.2 else data

    def text(self) -> str:
        """A caption that nobody writes."""
        length = int(self.rng.choice([1, 20, 3000]))
        letters = [LETTERS[place] for place in self.rng.integers(len(LETTERS), size=length)]
        return "".join(letters) if self.rng.random() < 0.7 else letters[0] * length


def picture(form: str, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(file := io.BytesIO(), form)
    return file.getvalue()


PICTURES = (
    *(picture(form) for form in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")),
    picture("JPEG", "CMYK"),
    picture("PNG", "RGBA"),
    picture("PNG", "P"),
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["a small red circle", "a large blue square"] * 4, 300)


@pytest.fixture
def attempt(request: pytest.FixtureRequest, tmp_path: Path):
    """Runs a reader on the malformed inputs of one kind, each in a folder of its own."""
    seed, total = (int(request.config.getoption(name) or 0) for name in ("--malformed_seed", "--malformed"))
    share = -(-total // len(KINDS))
    kind = request.node.name.removeprefix("test_").split("[")[0] + request.node.name.partition("[")[2]

    def run(reader: Callable[[Malformed, Path], Any]) -> int:
        refused = 0
        for index in range(share):
            folder = tmp_path / str(index)
            folder.mkdir()
            try:
                reader(Malformed(seed, kind, index), folder)
            except UserError as error:
                refused += 1
                assert str(error) and "\n" not in str(error), f"input {index} of seed {seed}: {error!r}"
            except Exception as error:
                raise AssertionError(f"input {index} of seed {seed}: {type(error).__name__}: {error}") from error
            assert {path.name for path in tmp_path.iterdir()} == {str(place) for place in range(index + 1)}
        return refused

    return run


def test_captions(attempt, tokenizer: Tokenizer):
    def read(malformed: Malformed, place: Path) -> None:
        ids, length = tokenizer.encode(malformed.text(), 16, float(malformed.rng.choice([0, 0.1])), malformed.rng)
        assert ids.shape == (16,) and 0 <= length <= 16 and ids.max() < tokenizer.vocab_size

    assert attempt(read) == 0


def test_text_files(attempt):
    whole = "a small red circle\na large blue square\r\n\nein Bär\n".encode()

    def read(malformed: Malformed, place: Path) -> None:
        (place / "words.txt").write_bytes(malformed.data(whole))
        lines = read_lines(place / "words.txt")
        assert lines and all(line.strip() and "\n" not in line for line in lines)

    assert attempt(read)


def test_pictures(attempt):
    def read(malformed: Malformed, place: Path) -> None:
        data = malformed.data(PICTURES[malformed.rng.integers(len(PICTURES))])
        pixels = read_picture(data)
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[-1] == 3 and pixels.size

    assert attempt(read)


def prepare(source: str, place: Path) -> dict[str, Any]:
    """Prepares a dataset; what was found is kept or named, and nothing is written but the dataset."""
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    fields = folder.Fields()
    request = folder.Request("made", source, fields, pictures=folder.PictureSettings())
    report = folder.prepare(request, folder.list_source(source, fields), place / "data", workers=1)
    assert {path: path.read_bytes() for path in before} == before
    outside = {path for path in place.rglob("*") if path.is_file() and not path.is_relative_to(place / "data")}
    assert outside == set(before)
    assert sum(report["skipped"].values()) == len(report["left_out"])
    return report


MADE = damaged.make(4, 0)


def test_folders(attempt):
    """Sidecars and tables beside pictures."""

    def read(malformed: Malformed, place: Path) -> None:
        source = place / "source"
        damaged.write_folder(MADE, source)
        rows = [{"file_name": each.name, "text": each.caption.decode()} for each in MADE if each.caption]
        tables = {
            "": b"",
            "captions.csv": "file_name,text\n" + "".join(f'{row["file_name"]},"{row["text"]}"\n' for row in rows),
            "metadata.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        }
        name = list(tables)[malformed.rng.integers(len(tables))]
        if name:
            (source / name).write_bytes(malformed.data(tables[name].encode()))
        else:
            chosen = sorted(source.iterdir())[malformed.rng.integers(2 * len(MADE))]
            chosen.write_bytes(malformed.data(chosen.read_bytes()))
        prepare(str(source), place)

    attempt(read)


def test_archives(attempt):
    def read(malformed: Malformed, place: Path) -> None:
        damaged.write_tar(MADE, place / "source", shards=1)
        path = place / "source" / "000.tar"
        if malformed.rng.random() < 0.5:
            hostile = malformed.rng.choice(["../out.png", "/tmp/out.png", "a/../../out.png", "x\n.png", "a\0.png"])
            kinds = (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)
            kind = kinds[malformed.rng.integers(len(kinds))]
            with tarfile.open(path, "a") as archive:
                data = MADE[0].data if kind == tarfile.REGTYPE else b""
                damaged.add_member(archive, str(hostile), data, type=kind, linkname="../../etc/passwd")
        else:
            path.write_bytes(malformed.data(path.read_bytes()))
        prepare(str(path), place)

    attempt(read)


def test_parquet_files(attempt):
    def read(malformed: Malformed, place: Path) -> None:
        damaged.write_parquet(MADE, place / "source")
        (path,) = (place / "source").iterdir()
        path.write_bytes(malformed.data(path.read_bytes()))
        prepare(str(path), place)

    attempt(read)


def test_configs_of_runs(attempt):
    whole = json.loads(ddpm_unet.get_config("debug").to_json_best_effort())

    def read(malformed: Malformed, place: Path) -> None:
        (place / "config.json").write_bytes(malformed.document(whole))
        create_sampler(read_config(place))

    assert attempt(read)


@pytest.fixture(scope="module")
def foreign() -> dict[tuple[str, str], tuple[dict[str, Any], str, dict[str, Any]]]:
    """Format and network -> (documents by name, the name of its weights, the weights)."""
    made = {}
    networks = (("transformers", CLIP), ("diffusers", DDPM), ("diffusers", FIRST_STAGE), ("open_clip", CLIP))
    for name, fields in networks:
        model = models.create_model(**fields)
        shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs(1))
        params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes["params"])
        write = FORMATS[name].write
        assert write is not None
        written = write(Network(model, params, {}))
        weights = next(file for file in written if file.endswith(".safetensors"))
        documents = {file: value for file, value in written.items() if file != weights}
        made[name, fields["name"]] = documents, weights, dict(written[weights])
    return made


def test_documents_and_weights_of_others(attempt, foreign):
    def read(malformed: Malformed, place: Path) -> None:
        name, network = list(foreign)[malformed.rng.integers(len(foreign))]
        documents, weights, tensors = foreign[name, network]
        for file, value in documents.items():
            (place / file).write_text(json.dumps(value), encoding="utf-8")
        write_tensors(place / weights, tensors)
        chosen = [*documents, weights][malformed.rng.integers(len(documents) + 1)]
        if chosen == weights and malformed.rng.random() < 0.5:
            index = {"weight_map": dict.fromkeys(list(tensors)[:20], weights)}
            (place / f"{weights}.index.json").write_bytes(malformed.document(index))
        elif chosen == weights:
            data = (place / weights).read_bytes()
            (place / weights).write_bytes(malformed.data(data[:3000]) + data[3000:])
        else:
            (place / chosen).write_bytes(malformed.document(documents[chosen]))
        FORMATS[name].read(open_origin(str(place)))

    assert attempt(read)


def test_u_vit_arguments(attempt):
    fields = {"image_size": 8, "patch_size": 2, "in_channels": 3, "width": 16, "depth": 2, "heads": 2, "num_classes": 3}
    whole = uvit.uvit_arguments(models.create_model("uvit", activation="gelu", convolution="image", **fields))

    def read(malformed: Malformed, place: Path) -> None:
        (place / "nnet.json").write_bytes(malformed.document(whole))
        uvit.uvit_fields(read_json(place / "nnet.json"))

    assert attempt(read)


KINDS = [name for name in dir() if name.startswith("test_")]
