"""Blocks of memory that processes share: free when nobody looks at them, and never another file."""

import os

import numpy as np
import pytest

from data import shared_batches
from data.shared_batches import Blocks, bytes_of, view, write_rows

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="blocks need memfd")


@pytest.fixture(autouse=True)
def nothing_opened(monkeypatch):
    monkeypatch.setattr(shared_batches, "_opened", {})


def examples(first: int, count: int, side: int = 3) -> list[dict]:
    return [{"image": np.full((side, side, 3), row, np.uint8), "index": np.int32(row)} for row in range(first, count)]


def take(blocks: Blocks, size: int):
    taken = blocks.take(size)
    assert taken is not None
    return taken


def write(*arguments) -> dict:
    places = write_rows(*arguments)
    assert places is not None
    return places


def test_parts_of_a_batch_lie_in_one_block():
    blocks = Blocks()
    block, shared = take(blocks, 4096)
    parts = [write(block, examples(0, 2), 0, 5), write(block, examples(2, 5), 2, 5)]
    assert parts[0] == parts[1]
    batch = {name: view(shared, place) for name, place in parts[0].items()}
    assert batch["index"].tolist() == [0, 1, 2, 3, 4] and batch["index"].dtype == np.int32
    assert batch["image"].shape == (5, 3, 3, 3) and (batch["image"][:, 2, 2, 2] == batch["index"]).all()
    assert all(array.ctypes.data % 64 == 0 for array in batch.values()) and bytes_of(batch) == 192 + 64


def test_a_block_is_free_once_no_array_of_it_is_left():
    blocks = Blocks()
    first, shared = take(blocks, 200)
    place = write(first, examples(0, 1), 0, 1)["image"]
    held = view(shared, place)[0, 1:]
    del shared
    second, _ = take(blocks, 200)
    assert second.file != first.file  # a part of an array is held
    write(second, examples(7, 8), 0, 1)
    assert (held == 0).all()
    del held
    again, _ = take(blocks, 50)
    assert again.file == first.file


def test_what_does_not_fit_is_not_written():
    blocks = Blocks()
    block, _ = take(blocks, 64)
    assert write_rows(block, examples(0, 1, side=8), 0, 1) is None
    larger, _ = take(blocks, 4096)
    assert larger.size == 4096 and write_rows(larger, examples(0, 1, side=8), 0, 1)


def test_a_block_that_is_gone_is_not_taken_for_the_file_that_has_its_number(tmp_path):
    blocks = Blocks()
    block, shared = take(blocks, 4096)
    del shared, blocks
    path = tmp_path / "records"
    path.write_bytes(bytes(8192))
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.dup2(descriptor, block.descriptor)
        assert write_rows(block, examples(1, 2), 0, 1) is None and path.read_bytes() == bytes(8192)
    finally:
        os.close(block.descriptor)
        if descriptor != block.descriptor:
            os.close(descriptor)
