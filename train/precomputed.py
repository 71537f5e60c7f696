"""What frozen networks make of a dataset's pictures, computed once and found again; `data.precomputed` is the format.

A field is precomputed where `config.data.<field>` says so: "auto" for the folder beside the dataset that belongs to the
frozen weights, or the folder itself. Training then reads it in place of the picture. Values are those that the step
would compute, to the bit, where a compiler rounds the network alone as it does inside the step.
"""

import collections
import contextlib
import dataclasses
import fcntl
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import jax
import numpy as np
from jaxtyping import Array, UInt8
from ml_collections import ConfigDict

from cli.errors import UserError
from cli.locations import Location, in_store, locate, make_folder, write_whole
from data.pipeline import picture_reader
from data.precomputed import (
    AUTO,
    FOLDER,
    PROVENANCE,
    Claim,
    RowWriter,
    StoredRowWriter,
    check_pictures,
    file_stem,
    open_writer,
    pictures_of,
    read_provenance,
)
from data.preprocess import transform_pair
from data.records import dataset_folder, open_records
from sample.image_tokens import PART, ImageTokens
from sample.samplers.dvae import from_uint8
from train.distributed.mesh import batch_sharding, make_mesh, place_batch
from train.distributed.processes import from_first
from train.distributed.sharding import shardings
from train.environment import describe_environment
from train.progress import ProgressBar
from weights.fingerprint import fingerprint
from weights.sources import abstract_frozen, load_frozen, load_part

Tree = Any

_VIEW_SEED = 2**31 - 17  # of stored views, which runs of all seeds share
_WORKERS = 4  # threads that read pictures


@dataclasses.dataclass(frozen=True)
class Field:
    """How a frozen network makes a field.

    Attributes:
      part: the network's, of `config.frozen`.
      build: config -> what computes it; raises UserError where the network cannot.
      compute: (that, {part: its trees}, pictures) -> the field.
      dtype: that -> what it is stored as.
    """

    part: str
    build: Callable[[ConfigDict], Any]
    compute: Callable[[Any, Tree, UInt8[Array, "b H W c"]], Array]
    dtype: Callable[[Any], Any]


def _tokens(image_tokens: ImageTokens, frozen: Tree, images: UInt8[Array, "b H W c"]) -> Array:
    return image_tokens.encode(frozen, from_uint8(images)).reshape(len(images), -1)


def _tokens_dtype(image_tokens: ImageTokens) -> Any:
    return np.uint16 if image_tokens.vocab_size <= 2**16 else np.int32


FIELDS: Mapping[str, Field] = {
    "image_tokens": Field(PART, ImageTokens.from_config, _tokens, _tokens_dtype),
}


def precomputable(config: ConfigDict) -> str:
    """The field that can be precomputed for a config.

    Raises:
      UserError: if there is none.
    """
    for name, field in FIELDS.items():
        if name in config.data and field.part in config.frozen:
            return name
    raise UserError(
        f"a {config.objective} has nothing that can be precomputed; {', '.join(FIELDS)} can, of configs with "
        f"{', '.join(f'config.data.{name} and config.frozen.{field.part}' for name, field in FIELDS.items())}"
    )


def locate_precomputed(config: ConfigDict) -> ConfigDict:
    """A config whose precomputed fields are folders that belong to its frozen weights; itself without such fields.

    Raises:
      UserError: if one was not stored, or with other weights.
    """
    named = [name for name in FIELDS if config.data.get(name, "")]
    if not named:
        return config
    found = from_first(lambda: {name: str(_find(config, name)) for name in named})
    config = config.copy_and_resolve_references()
    with config.unlocked():
        for name, folder in found.items():
            config.data[name] = folder
    return config


def _find(config: ConfigDict, name: str) -> Location:
    part = FIELDS[name].part
    if part not in config.frozen:
        raise UserError(f"config.data.{name} is made by config.frozen.{part}, which this config lacks")
    weights = fingerprint(load_part(config.frozen[part], config.seed))
    own = _folder(config, name, weights)
    folder = own if config.data[name] == AUTO else locate(config.data[name])
    made = read_provenance(folder)
    again = "run `python -m scripts.precompute` with this config"
    if made is None:
        others = sorted(path.parent.name for path in own.parent.glob(f"*/{PROVENANCE}"))
        there = f"; of other weights or sizes there are {', '.join(others)}" if others else ""
        raise UserError(f"no {name} of config.frozen.{part} are stored in {folder}{there}; {again}")
    if made.get("weights") != weights:
        raise UserError(
            f"{folder} has {name} of other weights ({made.get('source')}, step {made.get('step')}) than "
            f"config.frozen.{part}; {again}, or set config.data.{name}=auto"
        )
    return folder


def _folder(config: ConfigDict, name: str, weights: str) -> Location:
    """Where a field is stored that these weights make."""
    data = config.data
    named = f"-{quote(data.image_field, safe='')}" if data.image_field else ""
    side = pictures_of(data)["draft"]
    draft = f"-draft{side}" if side else ""
    folder = dataset_folder(data.dataset, data.data_dir) / FOLDER / name
    return folder / f"{weights[:12]}-{data.image_size}px{draft}{named}"


class _Views:
    """The pictures of a split as a frozen network sees them: view v of record r is number r * views + v, endlessly."""

    def __init__(self, config: ConfigDict, split: str, views: int):
        """Opens a split: of `views` views in training, or as evaluation sees it where they are 0."""
        self.source = open_records(config, split, captions=False, fields=(), read=picture_reader(config))
        pair = transform_pair(config.transform)
        self._draws = bool(views) and pair.training is not pair.evaluation
        self.transform = pair.training if self._draws else pair.evaluation
        self.views = max(views, 1)
        self._size = config.image_size

    def __len__(self) -> int:
        return len(self.source) * self.views

    def batch(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """The views of these numbers."""
        return {"image": np.stack([self._view(*divmod(index % len(self), self.views)) for index in indices])}

    def _view(self, place: int, view: int) -> UInt8[np.ndarray, "H W c"]:
        rng = np.random.default_rng((_VIEW_SEED, place, view)) if self._draws else None
        return self.transform(self.source[place]["image"], self._size, rng)


def precompute(config: ConfigDict, *, splits: Sequence[str] = (), views: int = 0, batch_size: int = 64) -> Location:
    """Stores a field of splits; what is there already is left as it is, and what was interrupted goes on.

    Args:
      config: of the run that will use it; frozen stages are resolved.
      splits: to store as evaluation sees them; none for those that the config trains on, and validates with.
      views: how many of a transform that draws are stored for each picture; 0 for none that does.
      batch_size: pictures at once, rounded up to a multiple of the devices.

    Returns:
      The folder.

    Raises:
      UserError: if nothing can be precomputed, the transform draws and `views` is not given, it does not fit, or what
        is there already was made of something else.
    """
    name = precomputable(config)
    field, data = FIELDS[name], config.data
    pair = transform_pair(data.transform)
    if pair.training is pair.evaluation and views:
        raise UserError(
            f"config.data.transform={data.transform} draws nothing, so there is one view; leave out --views"
        )
    if views and splits:
        raise UserError("--splits are stored as evaluation sees them, which draws nothing; leave out --views")
    if pair.training is not pair.evaluation and not views and not splits:
        raise UserError(
            f"config.data.transform={data.transform} draws anew in every epoch; say how many views of a picture to "
            "store with --views=K (epoch e of a run then sees view e modulo K)"
        )
    wanted = [(split, 0) for split in splits] or [(data.split, max(views, 1)), (data.validation_split, 0)]
    mesh = make_mesh(config.mesh)
    rows = batch_sharding(mesh)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    batch_size = -(-batch_size // shards) * shards

    builder = field.build(config)
    weights = fingerprint(load_part(config.frozen[field.part], config.seed))
    folder = _folder(config, name, weights)
    abstract = abstract_frozen(config)[field.part]
    placed = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        {field.part: abstract},
        shardings({field.part: abstract}, config.mesh.rules, mesh),
    )
    only = ConfigDict({"frozen": {field.part: config.frozen[field.part]}})
    trees = load_frozen(only, config.seed, placed)

    @jax.jit
    def compute(trees: Tree, images: Array) -> Array:
        return field.compute(builder, trees, images)

    with _alone(folder) as check:
        _write_provenance(config, name, folder, weights)
        for split, count in wanted:
            stream = _Views(data, split, count)
            image = stream.batch([0])["image"]
            shape = jax.eval_shape(compute, trees, jax.ShapeDtypeStruct(image.shape, image.dtype)).shape[1:]
            path = folder / f"{file_stem(split, stream.transform.__name__)}.npy"
            counts = (len(stream.source), stream.views)
            dtype = np.dtype(field.dtype(builder))
            writer = open_writer(path, (*counts, *shape), dtype, depth=2, whole=batch_size)
            with jax.set_mesh(mesh):
                label = f"{name} of {split}"
                _fill(writer, stream, path, label, batch_size, lambda batch: compute(trees, batch), rows, check)
    return folder


def _fill(
    writer: RowWriter | StoredRowWriter,
    stream: _Views,
    path: Location,
    label: str,
    batch_size: int,
    compute: Callable[[Array], Array],
    rows: Any,
    check: Callable[[], None],
) -> None:
    """Appends what is missing of a file, while `check` finds that nobody else does."""
    notes = path.with_suffix(".json")
    before = json.loads(notes.read_text(encoding="utf-8"))["damaged"] if writer.done and notes.is_file() else []
    known: set[int] = set(before)
    if writer.done < writer.total or not notes.is_file():
        _write_json(notes, {"damaged": sorted(known)})
    if writer.done == writer.total:
        print(f"{label}: all {writer.total} are there", flush=True)
        return writer.finish()
    bar = ProgressBar(writer.total, writer.done, label, unit="picture")
    with contextlib.closing(bar):
        for batch in _read_ahead(stream, range(writer.done, writer.total, batch_size), batch_size):
            images = place_batch(batch, range(batch_size), batch_size, rows)["image"]
            values = np.asarray(jax.device_get(compute(images)))
            check()
            if not stream.source.damaged <= known:
                known |= stream.source.damaged
                _write_json(notes, {"damaged": sorted(known)})
            writer.append(values[: writer.total - writer.done])
            bar.update(writer.done, {})
    writer.finish()


def _read_ahead(stream: _Views, starts: Sequence[int], batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """The batches that begin at these numbers, a few read ahead by threads."""
    pool, ready = ThreadPoolExecutor(_WORKERS), collections.deque()
    try:
        for start in starts:
            ready.append(pool.submit(stream.batch, range(start, start + batch_size)))
            if len(ready) > 2 * _WORKERS:
                yield ready.popleft().result()
        while ready:
            yield ready.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _write_provenance(config: ConfigDict, name: str, folder: Location, weights: str) -> None:
    """Says how a field is made, unless the same is said already.

    Raises:
      UserError: if something else is said.
    """
    made = read_provenance(folder)
    if made is not None:
        remedy = "remove it, or move it away, to begin anew"
        check_pictures(folder, made, config.data, remedy)
        if made.get("weights") != weights:
            raise UserError(f"{folder} has {name} of other weights; {remedy}")
        return
    entry, here = config.frozen[FIELDS[name].part], describe_environment()
    _write_json(
        folder / PROVENANCE,
        {
            "field": name,
            **pictures_of(config.data),
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
