"""Heights and widths of a dataset's pictures, known without decoding any: a file beside the records of each split."""

import contextlib
import io
from typing import Any
from urllib.parse import quote

import numpy as np
from jaxtyping import Int32
from ml_collections import ConfigDict
from tqdm import tqdm

from cli.locations import Location, in_store, write_whole
from data.pictures import picture_size
from data.records import dataset_folder, open_records
from data.storage import whole_file


def picture_sizes(data: ConfigDict, split: str) -> Int32[np.ndarray, "n 2"]:
    """Heights and widths of the pictures of a split of `config.data`, upright.

    `scripts.prepare --dataset=folder` has stored them. For any other dataset they are read here, once, from the first
    bytes of each file, and stored where the folder can be written to.
    """
    # A record that cannot be read has the size of the one that takes its place.
    source = open_records(data, split, captions=False, fields=(), read=picture_size)
    path = sizes_file(dataset_folder(data.dataset, data.data_dir), split, source.image_field)
    if path.is_file():
        sizes = np.load(io.BytesIO(path.read_bytes()))
        if sizes.shape == (len(source), 2):
            return sizes
    places = tqdm(range(len(source)), desc="sizes of pictures", disable=None, leave=False)
    sizes = np.array([_size_of(source[place]["image"]) for place in places], np.int32)
    with contextlib.suppress(OSError):
        store_sizes(path, sizes)
    return sizes


def sizes_file(folder: Location, split: str, image_field: str = "image") -> Location:
    """The file of a split, below the folder of the dataset's version."""
    return folder / f"sizes-{quote(split, safe='')}-{quote(image_field, safe='')}.npy"


def store_sizes(path: Location, sizes: Int32[np.ndarray, "n 2"]) -> None:
    """Writes such a file, whole or not at all."""
    file = io.BytesIO()
    np.save(file, sizes)
    if in_store(path):
        write_whole(path, file.getvalue())
        return
    with whole_file(path) as draft:
        draft.write_bytes(file.getvalue())


def _size_of(picture: Any) -> tuple[int, int]:
    """Of what a source makes of a picture: pixels, where they are stored as such."""
    return picture if isinstance(picture, tuple) else picture.shape[:2]
