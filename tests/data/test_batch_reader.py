"""Batches are the same whoever reads them; processes that read end with their parent and say nothing of their own."""

import itertools
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import tensorflow_datasets as tfds

from cli.errors import UserError
from configs.scenes.dvae import get_config
from data.batch_reader import BatchReader
from data.pipeline import ExampleStream
from data.tally import DAMAGED, TRUNCATED
from data.tokenizer import Tokenizer

from .made_up import NAME, prepare_made_up

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Pictures with captions, one of them damaged; the split `broken` has nothing else."""
    folder = tmp_path_factory.mktemp("odd")
    rng = np.random.default_rng(0)
    good = [{"image": rng.integers(0, 256, (40, 50, 3), np.uint8), "text": f"a small star {n}"} for n in range(30)]
    bad = {"image": b"no picture", "text": "a small star"}
    prepare_made_up(folder, {"text": tfds.features.Text()}, {"train": [*good, bad], "broken": [bad] * 3})
    data = get_config("debug").data
    with data.unlocked():
        keys = {"dataset": NAME, "data_dir": str(folder), "text_length": 4, "bpe_dropout": 0.3}
        data.update({**keys, "transform": "dalle_training", "image_size": 32})
    return data


def make_stream(config, split="train"):
    tokenizer = Tokenizer.train(["a small star", "a large circle"], 300)
    return ExampleStream(config, tokenizer, split=split, seed=3, train=True)


def read(stream, count, **options):
    reader = BatchReader(stream, batch_size=24, rows=range(2, 22), examples_seen=24, **options)
    batches = list(itertools.islice(reader, count))
    reader.close()
    return batches


def test_processes_read_what_threads_read(config, capfd):
    stream, alone = make_stream(config), make_stream(config)
    batches = read(stream, 4, workers=2, processes=True)
    for number, batch in enumerate(batches):
        expected = alone.batch([24 + 24 * number + row for row in range(2, 22)])
        assert batch.keys() == expected.keys()
        assert all((batch[name] == expected[name]).all() for name in batch)
    assert stream.tally.places(DAMAGED) == alone.tally.places(DAMAGED) and len(stream.tally.places(DAMAGED)) == 1
    assert stream.tally.places(TRUNCATED) == alone.tally.places(TRUNCATED) != set()
    said = capfd.readouterr().out
    assert said.count("no picture of a kind") == 2 and said.count("caption cut") == 2  # once by each of the streams


@pytest.mark.slow
def test_an_error_of_a_process_is_a_line(config):
    with pytest.raises(UserError, match=r"no record of made_up \(broken\) can be used"):
        read(make_stream(config, "broken"), 1, processes=True)


@pytest.mark.parametrize(("workers", "rows"), [(1, 20), (3, 20), (16, 20), (5, 64)])
def test_no_worker_waits_while_the_step_takes_a_batch(config, workers, rows):
    reader = BatchReader(make_stream(config), batch_size=64, rows=range(rows), examples_seen=0, workers=workers)
    begun = sum(len(tasks) for tasks, _ in reader._ready)
    parts = len(reader._ready[0][0])
    reader.close()
    assert begun - parts >= workers - parts and begun > workers and parts <= workers


def test_a_part_of_a_batch_has_its_rows_in_order(config):
    stream = make_stream(config)
    for workers in (1, 2, 3):
        (batch,) = read(stream, 1, workers=workers)
        assert batch["index"].tolist() == list(range(26, 46))


PARENT = """
import sys, pickle
from data.batch_reader import BatchReader
if __name__ == "__main__":
    stream = pickle.loads(bytes.fromhex(sys.argv[1]))
    reader = BatchReader(stream, batch_size=8, rows=range(8), examples_seen=0, workers=2, processes=True)
    try:
        while True:
            next(reader)
            print("read", flush=True)
    except KeyboardInterrupt:
        reader.close()
        print("interrupted", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_processes_end_with_their_parent(config, tmp_path, start_process, number):
    (tmp_path / "parent.py").write_text(PARENT)
    command = [sys.executable, str(tmp_path / "parent.py"), pickle.dumps(make_stream(config)).hex()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    parent = start_process(command, **pipes)
    while "read" not in parent.stdout.readline():
        assert parent.poll() is None
    children = psutil.Process(parent.pid).children(recursive=True)
    assert len(children) >= 2
    group = number == signal.SIGINT  # as a terminal sends it, to all of them
    (os.killpg if group else os.kill)(parent.pid, number)
    out, err = parent.communicate(timeout=60)
    assert not group or (out.endswith("interrupted\n") and "Traceback" not in err)
    deadline = time.monotonic() + 30
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)
