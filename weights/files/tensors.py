"""Files of named tensors as numpy arrays: safetensors, npz, and what PyTorch saves, which is read without PyTorch.

Tensors of a safetensors file stay in it until they are used, and are written one by one: of a network that is larger
than the memory, no more than a tensor needs be in it.

A PyTorch file (.pt, .pth, .bin, .ckpt, .pkl) is a pickle, and unpickling runs whatever code the file names. The reader
here knows the few names that a tensor is made of, gives them harmless stand-ins, and refuses every other one. It reads
zip archives (PyTorch 1.6 and later), the stream of pickles of earlier versions, and pickled modules and TorchScript
archives, of which it takes the parameters and buffers and leaves the code.
"""

import dataclasses
import json
import math
import os
import pickle
import uuid
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
import safetensors
from jax.typing import DTypeLike

from cli.errors import UserError
from cli.locations import Location, local_copy, locate
from weights.files.torch_pickle import Refused, read_pickle, tensors_of

Tensors = dict[str, np.ndarray]
Result = TypeVar("Result")

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")

# What training programs put before all names of a network that they wrap.
WRAPPERS = ("module.", "_orig_mod.", "model.", "ema.", "ema_model.", "state_dict.", "_fsdp_wrapped_module.")

# The names of the safetensors format; its own numpy reader lacks bfloat16 in the oldest version that works here.
_SAFETENSORS_DTYPES = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "BOOL": np.bool_},
    **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8},
    **{"U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8},
    **{"F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2},
}

_NAMES_OF_DTYPES = {np.dtype(dtype): name for name, dtype in _SAFETENSORS_DTYPES.items()}
_HEADER = 8  # bytes of a safetensors file before its header, which say how long that is

# What a damaged file makes of the readers; none of them executes what a file says.
_DAMAGE = (
    *(ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, OverflowError, RecursionError),
    *(MemoryError, NotImplementedError, pickle.UnpicklingError, zipfile.BadZipFile, safetensors.SafetensorError),
)


@dataclasses.dataclass(frozen=True)
class Deferred:
    """An array that is made when numpy asks for it, and not kept.

    Attributes:
      shape: of the array.
      dtype: of the array.
      make: returns it.
    """

    shape: tuple[int, ...]
    dtype: DTypeLike
    make: Callable[[], np.ndarray]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        """The array, as numpy's protocol has it."""
        del copy  # nobody else has it
        return np.asarray(self.make(), self.dtype if dtype is None else dtype)


def read_tensors(path: str | Location) -> Tensors:
    """Reads a file of named tensors.

    Args:
      path: .safetensors, .npz, or a PyTorch file: a state dict or a module, also as one entry of a checkpoint, or
        TorchScript.

    Returns:
      name -> array of the stored dtype (bfloat16 and float8 as ml_dtypes has them) and shape, in the file's order. Some
      arrays may be read-only, strided, or share memory, as the stored tensors did; those of a safetensors file are the
      file itself (memory-mapped), which must not be overwritten in place while they are used.

    Raises:
      UserError: if the file is missing, damaged, of another format, or holds anything but tensors.
    """
    path = locate(path)
    if not path.is_file():
        raise UserError(f"there is no file of weights {path}; give the path of a .safetensors, .npz or .pth file")
    readers: dict[str, Callable[[Path], Tensors]] = {
        **{".safetensors": _read_safetensors, ".npz": _read_npz},
        **dict.fromkeys(TORCH_SUFFIXES, lambda path: tensors_of(read_pickle(path))),
    }
    if path.suffix not in readers:
        raise UserError(f"{path}: weights are read from files named {', '.join(readers)}; save them as .safetensors")
    return read_with(lambda path: readers[path.suffix](local_copy(path)), path)


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says beside its tensors, {key: text}; {} of any other file.

    Raises:
      UserError: if it is missing or damaged.
    """
    if path.suffix != ".safetensors":
        return {}

    def read(path: Any) -> dict[str, str]:
        with safetensors.safe_open(path, framework="numpy") as file:
            return file.metadata() or {}

    return read_with(read, path)


def read_with(reader: Callable[[Location], Result], path: Location) -> Result:
    """Returns what a reader makes of a file.

    Raises:
      UserError: if the file cannot be read, is damaged, or holds what the reader refuses.
    """
    try:
        return reader(path)
    except Refused as error:
        raise UserError(f"{path} {error}; save its state dict as .safetensors and give that file") from error
    except OSError as error:
        raise UserError(f"cannot read the weights {path}: {error.strerror or error}") from error
    except _DAMAGE as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path} is damaged, or not a {path.suffix} file ({what}); fetch or save it again") from error


def unwrapped(tensors: Tensors) -> Tensors:
    """Names as of the network, where a training program wrapped all of it (`WRAPPERS`), once or several times."""
    while tensors and (found := [each for each in WRAPPERS if all(name.startswith(each) for name in tensors)]):
        tensors = {name.removeprefix(found[0]): array for name, array in tensors.items()}
    return tensors


def check_finite(what: str, tensors: Mapping[str, np.ndarray], allowed: bool = False) -> None:
    """Looks for values that are no numbers.

    Args:
      what: the file, for the error.
      tensors: name -> array.
      allowed: print a warning in place of the error.

    Raises:
      UserError: if a value is NaN or infinite; names the first such tensor by name.
    """
    for name, array in sorted(tensors.items()):  # a library gives them in an order that differs from run to run
        if array.dtype.kind in "biu" or not array.size:
            continue
        once = array[tuple(slice(None) if stride else slice(1) for stride in array.strides)]  # of repeated ones
        if bad := int(np.count_nonzero(~np.isfinite(once))):
            said = f"{what}: {name} has {bad:,} of {array.size:,} values that are NaN or infinite"
            if not allowed:
                raise UserError(f"{said}; fetch or save it again, or convert with --allow_nonfinite to go on")
            print(f"warning: {said}")
            return


def write_tensors(path: str | Path, tensors: Mapping[str, Any]) -> None:
    """Writes named arrays as safetensors, whole or not at all.

    Args:
      path: of the file, named .safetensors; its folder is made.
      tensors: name -> array, of any strides, or `Deferred`; made and written one by one.

    Raises:
      UserError: if the path is named otherwise or cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"weights are written as .safetensors, not as {path.name}; name the file so")
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # two writers never share a draft
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write_safetensors(draft, tensors)
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write the weights {path}: {error}") from error


def in_shards(tensors: Mapping[str, Any], largest: int = 5 * 10**9) -> dict[str, Mapping[str, Any]]:
    """The files that transformers and diffusers have of a network: one, or several with an index of what is where.

    Args:
      tensors: name -> array or `Deferred`.
      largest: bytes of a file; one tensor may be larger.

    Returns:
      file name -> tensors, or the index's JSON object.
    """
    shards: list[dict[str, Any]] = [{}]
    filled = total = 0
    for name, array in tensors.items():
        size = _bytes(array)
        if shards[-1] and filled + size > largest:
            shards.append({})
            filled = 0
        shards[-1][name] = array
        filled, total = filled + size, total + size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    files = {f"model-{i + 1:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards)}
    places = {name: file for file, shard in files.items() for name in shard}
    return {**files, "model.safetensors.index.json": {"metadata": {"total_size": total}, "weight_map": places}}


def _read_safetensors(path: Path) -> Tensors:
    with safetensors.safe_open(path, framework="numpy"):  # checks names, shapes and places
        pass
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_HEADER), "little")
        header = json.loads(file.read(length))
    start = _HEADER + length
    data = np.memmap(path, np.uint8, mode="r", offset=start) if path.stat().st_size > start else np.zeros(0, np.uint8)
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise Refused(f"holds {name!r} as {entry['dtype']}, which numpy has no dtype for")
        begin, end = entry["data_offsets"]
        array = np.asarray(data)[begin:end].view(_SAFETENSORS_DTYPES[entry["dtype"]])
        tensors[name] = array.reshape(entry["shape"])
    return tensors


def _write_safetensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Writes header, then tensors one by one: wide ones first, so that each begins at a multiple of its width."""
    header, place = {}, 0
    dtypes = {name: np.dtype(array.dtype).newbyteorder("=") for name, array in tensors.items()}
    if unknown := [f"{name} as {dtype}" for name, dtype in dtypes.items() if dtype not in _NAMES_OF_DTYPES]:
        raise UserError(f"cannot write the weights {path}: safetensors has no place for {unknown[0]}")
    names = sorted(tensors, key=lambda name: (-dtypes[name].itemsize, name))
    for name in names:
        end = place + _bytes(tensors[name])
        kind = _NAMES_OF_DTYPES[dtypes[name]]
        header[name] = {"dtype": kind, "shape": list(tensors[name].shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(_HEADER, "little") + text)
        for name in names:
            array = np.array(tensors[name], dtypes[name], order="C")  # of any strides
            if array.nbytes != header[name]["data_offsets"][1] - header[name]["data_offsets"][0]:
                raise ValueError(f"{name} was said to be {list(tensors[name].shape)} and is {list(array.shape)}")
            file.write(array.reshape(-1).view(np.uint8).data)


def _bytes(array: Any) -> int:
    """Of an array that may be none yet."""
    return math.prod(array.shape) * np.dtype(array.dtype).itemsize


def _read_npz(path: Path) -> Tensors:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        tensors = {name: archive[name] for name in archive.files}
    for name, array in tensors.items():
        if array.dtype.kind not in "biufc":
            raise Refused(f"holds {name!r} as {array.dtype}, which is not numbers (npz does not keep bfloat16)")
    return tensors
