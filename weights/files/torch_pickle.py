"""The pickles that PyTorch writes, read without PyTorch and without executing anything they name.

Formats: `torch.save` (a zip archive with `data.pkl` and one file for each storage; before version 1.6 a stream of five
pickles followed by the storages) and `torch.jit.save` (the same archive, whose objects are modules of compiled code).

A pickle is a program for a small machine that calls functions by name. Only names in the tables below are known, and
each stands for a function of this file that records or rearranges data. What a file says of its own sizes is compared
with the file before memory is taken for it.
"""

import collections
import dataclasses
import io
import math
import mmap
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

Tensors = dict[str, np.ndarray]

_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a stream
_STREAM_VERSION = 1001

_DTYPES = {
    **{"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": jnp.bfloat16},
    **{"int64": np.int64, "int32": np.int32, "int16": np.int16, "int8": np.int8, "bool": np.bool_},
    **{"uint64": np.uint64, "uint32": np.uint32, "uint16": np.uint16, "uint8": np.uint8},
    **{"complex64": np.complex64, "complex128": np.complex128},
    **{"float8_e4m3fn": jnp.float8_e4m3fn, "float8_e5m2": jnp.float8_e5m2},
}
_STORAGES = {
    **{"DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16"},
    **{"LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8"},
    **{"ByteStorage": "uint8", "BoolStorage": "bool", "UntypedStorage": "uint8"},
    **{"ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128"},
}


class Refused(Exception):
    """What the file holds is not tensors alone; the message continues "<file> ...": what it holds."""


@dataclasses.dataclass
class _Storage:
    """A flat piece of memory that tensors are views of; a stream gives its bytes only after the tensors.

    A dtype is a key of `_DTYPES` until an array is made: a pickle may give any, of which Python objects are one.
    """

    dtype: str
    size: int
    data: bytes | None = None


@dataclasses.dataclass(frozen=True)
class _View:
    """A tensor: which elements of a storage, in units of its dtype."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str

    def array(self) -> np.ndarray:
        """The elements, without a copy.

        Raises:
          KeyError: if the dtype is not one of numbers.
          TypeError, ValueError: if the elements are not inside the storage.
        """
        dtype = np.dtype(_DTYPES[self.dtype])
        numbers = (self.offset, *self.shape, *self.strides)
        if any(type(number) is not int or number < 0 for number in numbers) or len(self.shape) != len(self.strides):
            raise ValueError(f"a tensor of shape {self.shape}, strides {self.strides} and offset {self.offset}")
        if 0 in self.shape:
            return np.zeros(self.shape, dtype)
        spread = [size for size, stride in zip(self.shape, self.strides, strict=True) if stride]
        if math.prod(spread) > self.storage.size:
            raise ValueError(f"a tensor of shape {self.shape} in a storage of {self.storage.size} elements")
        strides = [stride * dtype.itemsize for stride in self.strides]
        return np.ndarray(self.shape, dtype, self.storage.data or b"", self.offset * dtype.itemsize, strides)


class Module:
    """An object of PyTorch or of TorchScript that holds tensors: its attributes, without its code."""

    def __init__(self, *arguments: Any):
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


def read_pickle(path: Path) -> Any:
    """Reads what `torch.save` or `torch.jit.save` wrote: dicts, lists, tuples, strings, numbers, `Module`s and tensors.

    Tensors are views that `tensors_of` makes arrays of.

    Raises:
      Refused: if it is another file, or names anything that is no part of these.
      ValueError, KeyError and other errors of a reader: if it is damaged.
    """
    return _read_zip(path) if zipfile.is_zipfile(path) else _read_stream(path)


def _read_zip(path: Path) -> Any:
    """What `torch.save` of version 1.6 and later, or `torch.jit.save`, wrote."""
    room = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise Refused("is a zip archive, but not one that PyTorch saved")
        folder = pickles[0].removesuffix("data.pkl")
        storages: dict[str, _Storage] = {}

        def read(name: str) -> bytes:
            info = archive.getinfo(name)
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > room:
                raise ValueError(f"{name} has {info.file_size} bytes in a file of {room}, or is compressed")
            return archive.read(info)

        def load_storage(dtype: str, key: str, size: int) -> _Storage:
            if key not in storages:
                data = read(f"{folder}data/{key}")
                if len(data) != size * np.dtype(_DTYPES[dtype]).itemsize:
                    raise ValueError(f"storage {key} has {len(data)} bytes, announced were {size} elements of {dtype}")
                storages[key] = _Storage(dtype, size, data)
            return storages[key]

        if f"{folder}byteorder" in archive.namelist() and read(f"{folder}byteorder") != b"little":
            raise Refused("was saved by a big-endian machine")
        return _run(io.BytesIO(read(pickles[0])), load_storage)


def _read_stream(path: Path) -> Any:
    """What `torch.save` wrote before version 1.6, and writes since when asked to."""
    storages: dict[str, _Storage] = {}

    def load_storage(dtype: str, key: str, size: int) -> _Storage:
        return storages.setdefault(key, _Storage(dtype, size))

    # Mapped, so that a length that the file announces and has not takes no memory.
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as file:
        if _first_pickle(file) != _MAGIC or _run(file, load_storage) != _STREAM_VERSION:
            raise Refused("is not a file that PyTorch saved")
        _run(file, load_storage)  # sizes of C's integers
        content = _run(file, load_storage)
        for key in _run(file, load_storage):
            storage = storages[key]
            (size,) = struct.unpack("<q", _read_exactly(file, 8))
            if size != storage.size:
                raise ValueError(f"storage {key} has {size} elements, announced were {storage.size}")
            storage.data = _read_exactly(file, size * np.dtype(_DTYPES[storage.dtype]).itemsize)
    return content


def _run(file: Any, load_storage: Any) -> Any:
    """Runs the next pickle of a file."""
    start = file.tell()
    for count, (operation, argument, _) in enumerate(pickletools.genops(file)):
        # The machine takes memory for all places up to the one that is put to.
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > count:
            raise ValueError(f"a pickle that puts to place {argument} after {count} operations")
    file.seek(start)
    return _Unpickler(file, load_storage).load()


class _Unpickler(pickle.Unpickler):
    """Runs a pickle that may name nothing but the parts of a tensor."""

    def __init__(self, file: Any, load_storage: Any):
        super().__init__(file)
        self._load_storage = load_storage
        self._module = type("Module", (Module,), {})  # a pickle may change its attributes: not those of the next file

    def find_class(self, module: str, name: str) -> Any:
        """Returns the stand-in for a name.

        Raises:
          Refused: if there is none.
        """
        if module in ("torch", "torch.storage", "torch.cuda") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and name in _DTYPES:
            return name
        # Checkpoints of PyTorch Lightning name its callbacks beside their state dict.
        if module.split(".")[0] in ("__torch__", "dall_e", "pytorch_lightning") or module.startswith(
            "torch.nn.modules."
        ):
            return self._module
        if (module, name) in _FUNCTIONS:
            return _FUNCTIONS[module, name]
        raise Refused(f"is a pickle that names {module}.{name}, which is not part of a tensor and is not executed")

    def persistent_load(self, pid: Any) -> Any:
        """Returns the storage, or the class of a module, that a pickle refers to.

        Raises:
          Refused: if it refers to something else.
        """
        if isinstance(pid, tuple) and pid[:2] in (("module", self._module), (b"module", self._module)):
            return self._module  # its class; behind it is the source of that, which is left alone
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] not in ("storage", b"storage"):
            raise Refused(f"refers to a {pid[0] if isinstance(pid, tuple) and pid else pid!r}, not to tensors alone")
        _, dtype, key, _, size = pid[:5]
        if len(pid) > 5 and pid[5] is not None:
            raise Refused("has views of storages, as PyTorch before 0.4 wrote them")
        if dtype not in _DTYPES or not isinstance(key, str) or type(size) is not int or size < 0:
            raise ValueError(f"a storage {pid[1:]}")
        return self._load_storage(dtype, key, size)


def _view(storage: _Storage, offset: int, shape: Any, strides: Any, *rest: Any) -> _View:
    """Stands for torch._utils._rebuild_tensor and _v2."""
    return _View(storage, offset, tuple(shape), tuple(strides), storage.dtype)


def _view_of_dtype(
    storage: _Storage, offset: int, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: str, *rest: Any
) -> _View:
    """Stands for torch._utils._rebuild_tensor_v3, of dtypes that have no storage class of their own."""
    return _View(storage, offset, tuple(shape), tuple(strides), dtype)


def _first(value: Any, *rest: Any) -> Any:
    """Stands for wrappers: a Parameter is its tensor, a typed list of TorchScript is its list."""
    return value


def _nothing(*arguments: Any) -> None:
    """Stands for what says where or how a tensor lay in memory."""


_FUNCTIONS = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    **dict.fromkeys((("builtins", "set"), ("__builtin__", "set")), _nothing),
    ("torch", "Size"): tuple,
    ("torch", "device"): _nothing,
    ("torch._utils", "_rebuild_tensor"): _view,
    ("torch._utils", "_rebuild_tensor_v2"): _view,
    ("torch._utils", "_rebuild_tensor_v3"): _view_of_dtype,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch.nn.parameter", "Parameter"): _first,
    **{
        ("torch.jit._pickle", name): _first
        for name in ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag")
    },
}


def tensors_of(content: Any) -> Tensors:
    """Takes the arrays out of what `read_pickle` read, by dotted name.

    Args:
      content: a state dict, a module, or a training program's dict with one of them in it; of several that under
        "state_dict" is taken.

    Raises:
      Refused: if it is anything else.
    """
    if isinstance(content, Mapping):
        inside = [key for key, value in content.items() if _holds_tensors(value)]
        if "state_dict" in inside or len(inside) == 1:
            content = content["state_dict" if "state_dict" in inside else inside[0]]
        elif inside:
            names = ", ".join(map(repr, inside))
            raise Refused(f"holds several sets of tensors ({names}), which of them is meant it does not say")
    if isinstance(content, Module):
        return {name: view.array() for name, view in _attributes(content, "")}
    if not isinstance(content, Mapping):
        raise Refused(f"holds a {type(content).__name__.strip('_').lower()}, not a state dict")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, _View):
            raise Refused(f"holds {name!r}: a {type(value).__name__.strip('_').lower()}, which is not a tensor")
    return {name: view.array() for name, view in content.items()}


def _holds_tensors(value: Any) -> bool:
    """Whether a value is a module, or a state dict with something in it."""
    if isinstance(value, Mapping):
        return bool(value) and all(isinstance(n, str) and isinstance(v, _View) for n, v in value.items())
    return isinstance(value, Module)


def _attributes(module: Module, prefix: str) -> Iterator[tuple[str, _View]]:
    """The tensors of a module and of those in it, by dotted name."""
    for name, value in module.attributes.items():
        if name in ("_parameters", "_buffers", "_modules") and isinstance(value, Mapping):  # of a class of PyTorch's
            held = Module()
            held.attributes = dict(value)
            yield from _attributes(held, prefix)
        elif isinstance(value, _View):
            yield f"{prefix}{name}", value
        elif isinstance(value, Module):
            yield from _attributes(value, f"{prefix}{name}.")


def _first_pickle(file: Any) -> Any:
    """The first pickle, or None if the file starts with something else."""
    try:
        return _run(file, None)
    except (pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError):
        return None


def _read_exactly(file: Any, count: int) -> bytes:
    data = file.read(count)  # of a mapped file no more than there is
    if len(data) != count:
        raise EOFError(f"{count} bytes expected, {len(data)} left")
    return data
