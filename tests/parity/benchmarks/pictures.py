"""Times reading pictures beside torch's DataLoader: `PYTHONPATH=. python tests/parity/benchmarks/pictures.py`.

The same files, in the same number of workers, to square pictures of 256 x 256 as uint8 batches. Here they are records
of a dataset, read in processes and in threads, with `config.data.draft` and without; there files, read through
torchvision's Resize and CenterCrop and torch's DataLoader, whose workers are processes. With --transform=center_square
each has its usual filter, area averages here and bilinear there; with clip_evaluation both are bicubic, and without
draft their pixels are the same. With --flip both flip half of the pictures. All keep four batches ready. They read in
alternating windows and do nothing with the batches: before a window, those that were ready are taken; after it, the
next ones are waited for, so that none reads in another's window. With --workers=0 both read in their own process.
Prints pictures a second and milliseconds of CPU a picture, medians over windows, and their ratios; on a machine that
does other work too, those of CPU.
"""

import argparse
import importlib
import io
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from PIL import Image

from cli.allocator import reexec_with_fast_allocator
from configs.common import get_defaults
from cost.timing import Spread
from data.batch_reader import BatchReader
from data.pipeline import ExampleStream

READY = 4  # batches that each keeps ready
COPIES = 8  # records of each file: the shuffle of very few records takes longer than that of many


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=640, help="of the stored pictures")
    parser.add_argument("--height", type=int, default=0, help="of them; 0 for 3/4 of the width")
    parser.add_argument("--form", choices=("jpeg", "png"), default="jpeg", help="JPEGs of quality 90, or PNGs")
    parser.add_argument("--num", type=int, default=256, help="pictures that are stored")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--transform", choices=("center_square", "clip_evaluation"), default="center_square")
    parser.add_argument("--flip", action="store_true", help="flip half of them, with center_square")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--windows", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8, help="batches in a window")
    options = parser.parse_args(arguments)
    if options.flip and options.transform != "center_square":
        parser.error("--flip goes with --transform=center_square")
    with tempfile.TemporaryDirectory() as folder:
        shape = (options.height or options.width * 3 // 4, options.width)
        files = write_files(Path(folder) / "files", options.num, shape, options.form)
        prepare(Path(folder) / "dataset", files)
        config = data_config(Path(folder) / "dataset", options.size, options.workers)
        config.transform = options.transform + ("_flip" if options.flip else "")
        published = "bilinear" if options.transform == "center_square" else "bicubic"
        readers = read_here(config, options.batch_size)
        readers["torch"] = read_with_torch(
            files, published, options.size, options.batch_size, options.workers, options.flip
        )
        windows: dict[str, list[tuple[float, float]]] = {label: [] for label in readers}
        for _ in range(options.windows):
            for label, reader in readers.items():
                windows[label].append(time_window(reader, options.steps, READY if options.workers else 0))
    wall, cpu = ({label: Spread.of([pair[k] for pair in pairs]) for label, pairs in windows.items()} for k in (0, 1))
    for label in windows:
        low, median, high = (options.batch_size / getattr(wall[label], name) for name in ("high", "median", "low"))
        rates = (
            f"{median:.0f} pictures/s ({low:.0f} to {high:.0f}), {1e3 * cpu[label].median / options.batch_size:.2f} ms"
        )
        # The system counts processor time in hundredths of a second: a window can be too short for one.
        faster, less = (times["torch"].median / (times[label].median or float("nan")) for times in (wall, cpu))
        print(f"{label}: {rates} of CPU a picture; {faster:.2f} times torch's rate, {less:.2f} by CPU", flush=True)


def time_window(reader: Iterator, steps: int, ready: int) -> tuple[float, float]:
    """Seconds of a batch, of those that were not ready before, and seconds of CPU that it took."""
    for _ in range(ready):
        next(reader)
    start, used = time.perf_counter(), cpu_seconds()
    for _ in range(steps):
        next(reader)
    seconds, used = time.perf_counter() - start, cpu_seconds() - used
    time.sleep(1.5 * ready * seconds / steps)
    return seconds / steps, used / steps


def cpu_seconds() -> float:
    """What this process and those that it started have used."""
    times = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
    return time.process_time() + sum(one.user + one.system for one in times)


def write_files(folder: Path, num: int, shape: tuple[int, int], form: str) -> list[Path]:
    """Pictures with smooth areas, edges and grain, some of them turned, about as large as photographs."""
    folder.mkdir()
    rng, files = np.random.default_rng(0), []
    for number in range(num):
        height, width = shape if number % 4 else shape[::-1]
        coarse = Image.fromarray(rng.integers(0, 256, (height // 40, width // 40, 3), np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32)
        picture = np.clip(smooth + rng.normal(0, 8, (height, width, 1)), 0, 255).astype(np.uint8)
        files.append(folder / f"{number:05d}.{form}")
        Image.fromarray(picture).save(files[-1], quality=90)  # which a PNG has not
    return files


def prepare(folder: Path, files: list[Path]) -> None:
    """The same files as a dataset."""

    class Photographs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(None, None, 3))})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for copy, path in itertools.product(range(COPIES), files):
                yield f"{copy} {path.name}", {"image": path.read_bytes()}

    tfds.disable_progress_bar()
    Photographs(data_dir=folder, file_format="array_record").download_and_prepare()


def data_config(folder: Path, size: int, workers: int) -> ConfigDict:
    """`config.data` of the dataset."""
    data = get_defaults().data
    data.update({"dataset": "photographs", "data_dir": str(folder), "image_size": size, "workers": workers})
    return data


def read_here(data: ConfigDict, batch_size: int) -> dict[str, Iterator]:
    """Batches of this project, in each way that there is."""
    streams = {
        label: ExampleStream(ConfigDict({**data, "draft": draft}), None, split="train", seed=0, train=True)
        for label, draft in (("", False), (", draft", True))
    }
    if not data.workers:
        return {"here" + label: batches(stream, batch_size) for label, stream in streams.items()}
    options: dict = {"batch_size": batch_size, "rows": range(batch_size), "examples_seen": 0, "workers": data.workers}
    return {
        way + label: BatchReader(stream, **options, read_ahead=READY, processes=way == "processes")
        for way in ("processes", "threads")
        for label, stream in streams.items()
    }


def batches(stream: ExampleStream, batch_size: int) -> Iterator:
    """Batches that are read when they are asked for."""
    return (stream.batch(range(start, start + batch_size)) for start in itertools.count(0, batch_size))


def read_with_torch(
    files: list[Path], interpolation: str, size: int, batch_size: int, workers: int, flip: bool
) -> Iterator:
    """The same with torch: PIL's files, torchvision's transforms, uint8 tensors."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    importlib.import_module("conftest")  # of the parity tests; makes torchvision importable
    import torch
    from torchvision import transforms

    class Files(torch.utils.data.Dataset):
        def __init__(self):
            self.transform = transforms.Compose(
                [
                    transforms.Resize(size, transforms.InterpolationMode(interpolation)),
                    transforms.CenterCrop(size),
                    *([transforms.RandomHorizontalFlip()] if flip else []),
                    transforms.PILToTensor(),
                ]
            )

        def __len__(self) -> int:
            return 10**6

        def __getitem__(self, index: int):
            with Image.open(io.BytesIO(files[index % len(files)].read_bytes())) as picture:
                return self.transform(picture.convert("RGB"))

    torch.set_num_threads(1)  # as in a worker
    ahead = {"prefetch_factor": max(1, READY // workers)} if workers else {}
    return iter(torch.utils.data.DataLoader(Files(), batch_size, num_workers=workers, **ahead))


if __name__ == "__main__":
    reexec_with_fast_allocator()  # as training does; torch has it too
    main()
