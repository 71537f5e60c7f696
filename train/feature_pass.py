"""The pass over a dataset that stores what a frozen network makes of it: `python -m scripts.precompute`.

Values are those that the step would compute, to the bit, where a compiler rounds the network alone as it does inside
the step.
"""

import collections
import contextlib
import fcntl
import functools
import io
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, UInt8
from ml_collections import ConfigDict

from cli.errors import UserError
from cli.locations import Location, in_store, make_folder, write_whole
from cli.plurals import spell_count
from data.pipeline import load_tokenizer, picture_reader
from data.precomputed import (
    CAPTIONS_STEM,
    MADE_OF,
    PROVENANCE,
    check_made_of,
    field_folder,
    file_stem,
    made_of,
    read_provenance,
    starts_of,
)
from data.preprocess import transform_pair
from data.records import CAPTIONS, PLACE, open_records
from data.row_writer import Claim, RowWriter, StoredRowWriter, open_writer
from data.tokenizer import Tokenizer
from train.distributed.mesh import batch_sharding, make_mesh, place_batch
from train.distributed.sharding import shardings
from train.environment import describe_environment
from train.precomputed import FIELDS, parts_of, weights_of
from train.progress import ProgressBar
from weights.sources import abstract_frozen, load_frozen

Tree = Any

_VIEW_SEED = 2**31 - 17  # of stored views, which runs of all seeds share
_WORKERS = 4  # threads that read


class _Views:
    """The pictures of a split as a frozen network sees them: view v of record r is number r * views + v, endlessly."""

    unit = "picture"

    def __init__(self, config: ConfigDict, split: str, views: int):
        """Opens a split: of `views` views in training, or as evaluation sees it where they are 0."""
        self._source = open_records(config, split, captions=False, fields=(), read=picture_reader(config))
        pair = transform_pair(config.transform)
        self._draws = bool(views) and pair.training is not pair.evaluation
        self._transform = pair.training if self._draws else pair.evaluation
        self.stem = file_stem(split, self._transform.__name__)
        self.counts = (len(self._source), max(views, 1))
        self._size = config.image_size

    @property
    def damaged(self) -> set[int]:
        """Records that could not be read so far."""
        return self._source.damaged

    def batch(self, indices: Sequence[int]) -> np.ndarray:
        """The views of these numbers."""
        total = self.counts[0] * self.counts[1]
        return np.stack([self._view(*divmod(index % total, self.counts[1])) for index in indices])

    def _view(self, place: int, view: int) -> UInt8[np.ndarray, "H W c"]:
        rng = np.random.default_rng((_VIEW_SEED, place, view)) if self._draws else None
        return self._transform(self._source[place]["image"], self._size, rng)


class _Captions:
    """The captions of a split as a frozen network reads them, all of a record's one after another, endlessly."""

    unit = "caption"

    def __init__(self, config: ConfigDict, split: str, tokenizer: Tokenizer, folder: Location):
        """Opens a split, and counts its captions if the folder does not say yet where each record's begin."""
        self._source = open_records(config, split, pictures=False, captions=True, fields=())
        self.stem = file_stem(split, CAPTIONS_STEM)
        self._length, self._tokenizer = config.text_length, tokenizer
        self.damaged: set[int] = set()
        self._starts = self._find_starts(starts_of(folder / f"{self.stem}.npy"), split)
        self.counts = (int(self._starts[-1]),)
        if not self.counts[0]:
            raise UserError(f"{config.dataset} ({split}) has no captions")
        self._captions_of = functools.lru_cache(maxsize=64)(lambda place: self._source[place][CAPTIONS])

    def batch(self, indices: Sequence[int]) -> np.ndarray:
        """The ids of the captions of these numbers."""
        return np.stack([self._caption(index % self.counts[0]) for index in indices])

    def _caption(self, number: int) -> np.ndarray:
        place = int(np.searchsorted(self._starts, number, side="right")) - 1
        caption = self._captions_of(place)[number - self._starts[place]]
        return self._tokenizer.encode(caption, self._length).ids

    def _find_starts(self, path: Location, split: str) -> np.ndarray:
        """The number of each record's first caption, and that of all."""
        if path.is_file():
            starts = np.load(io.BytesIO(path.read_bytes()))
            if len(starts) == len(self._source) + 1:
                return starts
            has = spell_count(len(starts) - 1, "record")
            raise UserError(f"{path} is of {has}, not {len(self._source)}; remove it to begin anew")
        counts, bar = [], ProgressBar(len(self._source), 0, f"captions of {split}", unit="record")
        with contextlib.closing(bar):
            for place in range(len(self._source)):
                record = self._source[place]
                # Where another stands in its place, it could not be read.
                counts.append(len(record[CAPTIONS]) if record[PLACE] == place else 0)
                if place % 1024 == 1023 or place + 1 == len(self._source):
                    bar.update(place + 1, {})
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.damaged = self._source.damaged
        _write_json(path.with_name(f"{self.stem}.json"), {"damaged": sorted(self.damaged)})
        data = io.BytesIO()
        np.save(data, starts)
        write_whole(path, data.getvalue())
        return starts


def precompute(
    config: ConfigDict, name: str, *, splits: Sequence[str] = (), views: int = 0, batch_size: int = 64
) -> Location:
    """Stores a field of splits; what is there already is left as it is, and what was interrupted goes on.

    Args:
      config: of the run that will use it; frozen stages are resolved.
      name: of the field, one of `precomputable(config)`.
      splits: to store as evaluation sees them; none for those that the config trains on, and validates with.
      views: how many of a transform that draws are stored for each picture; 0 for none that does, and of captions.
      batch_size: pictures or captions at once, rounded up to a multiple of the devices.

    Returns:
      The folder.

    Raises:
      UserError: if the transform draws and `views` is not given, it does not fit, the network cannot be built, or what
        is there already was made of something else.
    """
    field, parts, data = FIELDS[name], parts_of(config, name), config.data
    captions = MADE_OF[name] == "text"
    if not captions:
        _check_views(data, views, splits)
    wanted = [(split, 0) for split in splits] or [(data.split, max(views, 1)), (data.validation_split, 0)]
    mesh = make_mesh(config.mesh)
    rows = batch_sharding(mesh)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    batch_size = -(-batch_size // shards) * shards

    tokenizer = load_tokenizer(data) if captions and data.text_length else None
    made = made_of(name, data, tokenizer)
    builder = field.build(config, parts[0])
    weights = weights_of(config, *parts)
    folder = field_folder(name, data, tokenizer, weights)
    networks = abstract_frozen(config)
    abstract = {part: networks[part] for part in parts}
    placed = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings(abstract, config.mesh.rules, mesh),
    )
    only = ConfigDict({"frozen": {part: config.frozen[part] for part in parts}})
    trees = load_frozen(only, config.seed, placed)

    @jax.jit
    def compute(trees: Tree, given: Array) -> Array:
        return field.compute(builder, trees, given)

    with _alone(folder) as check:
        _write_provenance(config, name, folder, made, weights)
        for split, count in wanted:
            items = _Captions(data, split, tokenizer, folder) if tokenizer else _Views(data, split, count)
            example = items.batch([0])
            shape = jax.eval_shape(compute, trees, jax.ShapeDtypeStruct(example.shape, example.dtype)).shape[1:]
            path = folder / f"{items.stem}.npy"
            dtype, depth = np.dtype(field.dtype(builder)), len(items.counts)
            writer = open_writer(path, (*items.counts, *shape), dtype, depth=depth, whole=batch_size)
            with jax.set_mesh(mesh):
                label = f"{name} of {split}"
                _fill(writer, items, path, label, batch_size, lambda batch: compute(trees, batch), rows, check)
    return folder


def _check_views(data: ConfigDict, views: int, splits: Sequence[str]) -> None:
    """Raises UserError unless a number of views is given exactly where a transform draws."""
    pair = transform_pair(data.transform)
    draws = pair.training is not pair.evaluation
    if not draws and views:
        raise UserError(
            f"config.data.transform={data.transform} draws nothing, so there is one view; leave out --views"
        )
    if views and splits:
        raise UserError("--splits are stored as evaluation sees them, which draws nothing; leave out --views")
    if draws and not views and not splits:
        raise UserError(
            f"config.data.transform={data.transform} draws anew in every epoch; say how many views of a picture to "
            "store with --views=K (epoch e of a run then sees view e modulo K)"
        )


def _fill(
    writer: RowWriter | StoredRowWriter,
    items: _Views | _Captions,
    path: Location,
    label: str,
    batch_size: int,
    compute: Callable[[Array], Array],
    rows: Any,
    check: Callable[[], None],
) -> None:
    """Appends what is missing of a file, while `check` finds that nobody else does.

    Raises:
      UserError: if there are rows, and no notes of which could not be read.
    """
    notes = path.with_suffix(".json")
    if not notes.is_file() and (writer.done or items.unit == "caption"):  # written before rows, and captions' starts
        starts = f" and {starts_of(path).name}" if items.unit == "caption" else ""
        raise UserError(f"{notes}, which says what could not be read, is missing; remove {path}*{starts} to begin anew")
    before = json.loads(notes.read_text(encoding="utf-8"))["damaged"] if notes.is_file() else []
    known: set[int] = set(before) if writer.done or items.unit == "caption" else set()
    if writer.done < writer.total:
        _write_json(notes, {"damaged": sorted(known)})
    if writer.done == writer.total:
        print(f"{label}: all {writer.total} are there", flush=True)
        return writer.finish()
    bar = ProgressBar(writer.total, writer.done, label, unit=items.unit)
    with contextlib.closing(bar):
        for batch in _read_ahead(items, range(writer.done, writer.total, batch_size), batch_size):
            given = place_batch({"given": batch}, range(batch_size), batch_size, rows)["given"]
            values = np.asarray(jax.device_get(compute(given)))
            check()
            if not items.damaged <= known:
                known |= items.damaged
                _write_json(notes, {"damaged": sorted(known)})
            writer.append(values[: writer.total - writer.done])
            bar.update(writer.done, {})
    writer.finish()


def _read_ahead(items: _Views | _Captions, starts: Sequence[int], batch_size: int) -> Iterator[np.ndarray]:
    """The batches that begin at these numbers, a few read ahead by threads."""
    pool, ready = ThreadPoolExecutor(_WORKERS), collections.deque()
    try:
        for start in starts:
            ready.append(pool.submit(items.batch, range(start, start + batch_size)))
            if len(ready) > 2 * _WORKERS:
                yield ready.popleft().result()
        while ready:
            yield ready.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _write_provenance(config: ConfigDict, name: str, folder: Location, made_now: dict[str, Any], weights: str) -> None:
    """Says how a field is made, unless the same is said already.

    Raises:
      UserError: if something else is said.
    """
    made = read_provenance(folder)
    if made is not None:
        remedy = "remove it, or move it away, to begin anew"
        check_made_of(folder, made, made_now, remedy)
        if made.get("weights") != weights:
            raise UserError(f"{folder} has {name} of other weights; {remedy}")
        return
    entry, here = config.frozen[parts_of(config, name)[0]], describe_environment()
    _write_json(
        folder / PROVENANCE,
        {
            "field": name,
            **made_now,
            "weights": weights,
            "source": entry.source,
            "run": entry.get("run", ""),
            "step": entry.get("step", 0),
            "view_seed": _VIEW_SEED,
            "code": {key: here[key] for key in ("commit", "dirty", "python", "packages", "device_kind")},
        },
    )


@contextlib.contextmanager
def _alone(folder: Location) -> Iterator[Callable[[], None]]:
    """Keeps other processes out of a folder, which is made; yields what raises UserError if one came in all the same.

    Raises:
      UserError: if one is at it, or the folder cannot be written.
    """
    if in_store(folder):
        with contextlib.closing(Claim(folder)) as claim:
            yield claim.check
        return
    try:
        make_folder(folder)
        with (folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another process is writing {folder}; wait for it") from None
            yield lambda: None
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}; what is there is kept") from error


def _write_json(path: Location, value: Any) -> None:
    """Writes a file, or leaves it as it was."""
    write_whole(path, json.dumps(value, indent=2) + "\n")
