"""Pictures of which some are damaged in ten ways, as a folder, a tar archive and a parquet file."""

import dataclasses
import io
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

MIN_SIZE = 12  # pixels; smaller ones count as damaged

# How a picture is damaged -> the reason that is given.
WAYS = {
    "cut short": "corrupt",
    "empty": "corrupt",
    "noise": "corrupt",
    "a web page": "corrupt",
    "a bomb": "corrupt",
    "no caption": "no caption",
    "blank caption": "no caption",
    "latin-1 caption": "bad caption",
    "seen before": "duplicate",
    "tiny": "too small",
}


@dataclasses.dataclass(frozen=True)
class Made:
    """A picture's file, its caption's bytes, if any, and the reason for which it must be left out ("" if kept)."""

    name: str
    data: bytes
    caption: bytes | None
    reason: str


def make(num: int, damaged: int) -> list[Made]:
    """`num` pictures of which `damaged` are, each way as often as the next, spread over all."""
    rng = np.random.default_rng(0)
    made: list[Made] = []
    for index in range(num):
        height, width = rng.integers(16, 48, 2)
        data, caption = (
            encode(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)),
            f"noise of {index} colors".encode(),
        )
        step = num // damaged if damaged else num + 1
        if index % step == step - 1 and index // step < damaged:
            way = list(WAYS)[index // step % len(WAYS)]
            data, caption = damage(way, data, caption, made[0].data)
            made.append(Made(f"{index:05d}.png", data, caption, WAYS[way]))
        else:
            made.append(Made(f"{index:05d}.png", data, caption, ""))
    return made


def damage(way: str, data: bytes, caption: bytes, first: bytes) -> tuple[bytes, bytes | None]:
    """The file and the caption after one of `WAYS`."""
    match way:
        case "cut short":
            data = data[: len(data) // 2]
        case "empty":
            data = b""
        case "noise":
            data = np.random.default_rng(len(data)).bytes(len(data))
        case "a web page":
            data = b"<!doctype html><title>404</title>"
        case "a bomb":
            header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
            data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
        case "seen before":
            with Image.open(io.BytesIO(first)) as picture:
                data = encode(np.asarray(picture), level=9)  # other bytes, the same pixels
        case "tiny":
            data = encode(np.random.default_rng(len(data)).integers(0, 256, (8, 40, 3), dtype=np.uint8))
        case "no caption":
            return data, None
        case "blank caption":
            caption = b" \n\n"
        case "latin-1 caption":
            caption = "ein Bär".encode("latin-1")
    return data, caption


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def encode(pixels: np.ndarray, level: int = 1) -> bytes:
    """A PNG."""
    Image.fromarray(pixels).save(file := io.BytesIO(), "PNG", compress_level=level)
    return file.getvalue()


def reasons(made: Sequence[Made]) -> dict[str, int]:
    """How many must be left out for each reason."""
    return dict(Counter(each.reason for each in made if each.reason))


def write_folder(made: Sequence[Made], folder: Path) -> str:
    """As files with captions beside them; returns the `--source`."""
    folder.mkdir(parents=True)
    for each in made:
        (folder / each.name).write_bytes(each.data)
        if each.caption is not None:
            (folder / each.name).with_suffix(".txt").write_bytes(each.caption)
    return str(folder)


def write_tar(made: Sequence[Made], folder: Path, shards: int = 2) -> str:
    """As img2dataset's shards."""
    folder.mkdir(parents=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as archive:
            for each in made[shard * len(made) // shards : (shard + 1) * len(made) // shards]:
                add_member(archive, each.name, each.data)
                if each.caption is not None:
                    add_member(archive, each.name.replace(".png", ".txt"), each.caption)
    return f"{folder}/{{000..{shards - 1:03d}}}.tar"


def add_member(archive: tarfile.TarFile, name: str, data: bytes, **attributes: object) -> None:
    """Adds a file to an archive."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in attributes.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(data))


def write_parquet(made: Sequence[Made], folder: Path, rows: int = 600) -> str:
    """As Hugging Face's datasets do: a struct of bytes and path beside a text."""
    folder.mkdir(parents=True)
    pictures = [{"bytes": each.data, "path": each.name} for each in made]
    captions = pa.array([each.caption for each in made], pa.binary())
    # Text that is no UTF-8 can be stored: a reader that trusts the schema meets it.
    texts = pa.StringArray.from_buffers(len(captions), *captions.buffers()[1:], null_bitmap=captions.buffers()[0])
    pq.write_table(pa.table({"image": pictures, "text": texts}), folder / "train-00000.parquet", row_group_size=rows)
    return str(folder)


FORMS = {"folder": write_folder, "tar": write_tar, "parquet": write_parquet}
