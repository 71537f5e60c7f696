"""Files of tensors: every format gives back what was stored, and a file that is more than tensors is refused unread.

PyTorch's files are written here by its own rules without PyTorch; tests/parity/test_tensors.py reads real ones.
"""

import collections
import io
import json
import os
import pickle
import struct
import sys
import types
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from cli.errors import UserError
from weights.files.layout import check_tensors
from weights.files.tensors import read_tensors, write_tensors

MAGIC = 0x1950A86A20F9469CFC6C


def example() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "conv.weight": rng.normal(size=(2, 3, 3, 3)).astype(np.float32),
        "half": rng.normal(size=(5,)).astype(np.float16),
        "brain": rng.normal(size=(4, 2)).astype(jnp.bfloat16),
        "count": np.array(7, np.int64),
        "mask": np.array([True, False]),
        "empty": np.zeros((0, 3), np.float32),
    }


def assert_same(read, expected):
    assert list(read) == list(expected)
    for name, array in expected.items():
        assert read[name].dtype == array.dtype and read[name].shape == array.shape, name
        np.testing.assert_array_equal(np.asarray(read[name]), array)


STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}
STORAGES |= {"int64": "LongStorage", "bool": "BoolStorage"}


class Storage:
    def __init__(self, array: np.ndarray):
        self.array = np.ascontiguousarray(array).ravel()


class Tensor:
    """A view of a storage: what `torch.save` is given, reduced to what it writes."""

    def __init__(self, storage: Storage, offset: int, shape: tuple, strides: tuple):
        self.arguments = (storage, offset, shape, strides, False, collections.OrderedDict())

    @classmethod
    def of(cls, array: np.ndarray) -> "Tensor":
        strides = tuple(stride // array.itemsize for stride in np.ascontiguousarray(array).strides)[: array.ndim]
        return cls(Storage(array), 0, array.shape, strides)


class TorchPickler(pickle.Pickler):
    """Pickles as `torch.save` does: tensors by the names of PyTorch's functions, storages aside, by key."""

    def __init__(self, file, torch, legacy):
        super().__init__(file, protocol=2)
        self.torch, self.legacy, self.storages = torch, legacy, {}

    def reducer_override(self, obj):
        if isinstance(obj, Tensor):
            return self.torch._utils._rebuild_tensor_v2, obj.arguments
        return NotImplemented

    def persistent_id(self, obj):
        if not isinstance(obj, Storage):
            return None
        key, _ = self.storages.setdefault(id(obj), (str(len(self.storages)), obj))
        kind = getattr(self.torch, STORAGES[obj.array.dtype.name])
        return ("storage", kind, key, "cpu", obj.array.size) + ((None,) if self.legacy else ())


@pytest.fixture
def torch(monkeypatch):
    """Modules with PyTorch's names, for pickle to refer to."""
    modules = {name: types.ModuleType(name) for name in ("torch", "torch._utils", "__torch__", "__torch__.clip")}
    modules["torch"]._utils = modules["torch._utils"]
    for name in STORAGES.values():
        setattr(modules["torch"], name, type(name, (), {"__module__": "torch"}))

    def _rebuild_tensor_v2():
        raise AssertionError("a stand-in is called instead")

    _rebuild_tensor_v2.__module__ = "torch._utils"
    _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
    modules["torch._utils"]._rebuild_tensor_v2 = _rebuild_tensor_v2
    modules["__torch__.clip"].CLIP = type("CLIP", (), {"__module__": "__torch__.clip"})
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules["torch"]


def save_zip(torch, path: Path, content) -> None:
    data = io.BytesIO()
    pickler = TorchPickler(data, torch, legacy=False)
    pickler.dump(content)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights/data.pkl", data.getvalue())
        archive.writestr("weights/byteorder", "little")
        for key, storage in pickler.storages.values():
            archive.writestr(f"weights/data/{key}", storage.array.tobytes())
        archive.writestr("weights/version", "3\n")


def save_stream(torch, path: Path, content) -> None:
    with path.open("wb") as file:
        for value in (MAGIC, 1001, {"little_endian": True}):
            pickle.dump(value, file, protocol=2)
        pickler = TorchPickler(file, torch, legacy=True)
        pickler.dump(content)
        pickle.dump([key for key, _ in pickler.storages.values()], file, protocol=2)
        for _, storage in pickler.storages.values():
            file.write(struct.pack("<q", storage.array.size) + storage.array.tobytes())


SAVERS = {"zip": save_zip, "stream": save_stream}


@pytest.fixture(params=SAVERS)
def save(request, torch):
    return lambda path, content: SAVERS[request.param](torch, path, content)


def test_safetensors_keep_every_dtype_and_any_strides(tmp_path):
    tensors = example() | {"strided": np.arange(24, dtype=np.float32).reshape(4, 6).T[::2]}
    write_tensors(tmp_path / "new" / "w.safetensors", tensors | {"big_endian": np.arange(3, dtype=">f4")})
    tensors["big_endian"] = np.arange(3, dtype=np.float32)
    read = read_tensors(tmp_path / "new" / "w.safetensors")
    assert_same({name: read[name] for name in tensors}, tensors)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["w.safetensors"]


def test_a_write_that_fails_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "w.safetensors"
    write_tensors(path, {"a": np.ones(2, np.float32)})
    with pytest.raises(UserError, match="cannot write the weights"):
        write_tensors(path, {"a": np.array(["text"])})
    np.testing.assert_array_equal(read_tensors(path)["a"], np.ones(2))
    assert [entry.name for entry in tmp_path.iterdir()] == ["w.safetensors"]


def test_npz(tmp_path):
    tensors = {name: array for name, array in example().items() if name != "brain"}
    np.savez(tmp_path / "w.npz", **tensors)
    assert_same(read_tensors(tmp_path / "w.npz"), tensors)


@pytest.mark.parametrize("nested", [False, True])
def test_a_pytorch_state_dict(save, nested, tmp_path):
    state = collections.OrderedDict((name, Tensor.of(array)) for name, array in example().items())
    state._metadata = {"": {"version": 1}}  # as modules attach it
    save(tmp_path / "w.pth", {"epoch": 3, "state_dict": state} if nested else state)
    assert_same(read_tensors(tmp_path / "w.pth"), example())


def test_views_of_one_storage(save, tmp_path):
    storage = Storage(np.arange(12, dtype=np.float32))
    views = {
        "rows": Tensor(storage, 0, (3, 4), (4, 1)),
        "transposed": Tensor(storage, 0, (4, 3), (1, 4)),
        "part": Tensor(storage, 5, (2, 2), (4, 2)),
        "expanded": Tensor(storage, 2, (2, 5), (0, 0)),
        "scalar": Tensor(storage, 11, (), ()),
    }
    save(tmp_path / "w.pt", views)
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    expected = {"rows": rows, "transposed": rows.T, "part": np.array([[5, 7], [9, 11]], np.float32)}
    expected |= {"expanded": np.full((2, 5), 2, np.float32), "scalar": np.array(11, np.float32)}
    assert_same(read_tensors(tmp_path / "w.pt"), expected)


def test_torchscript_gives_parameters_of_all_modules(torch, tmp_path):
    def module(**attributes):
        made = sys.modules["__torch__.clip"].CLIP()
        vars(made).update(attributes)
        return made

    kernel = np.ones((2, 2), np.float16)
    inner = module(weight=Tensor.of(kernel), training=False)
    save_zip(torch, tmp_path / "w.pt", module(visual=module(conv1=inner), scale=Tensor.of(np.array(3, np.int64))))
    assert_same(read_tensors(tmp_path / "w.pt"), {"visual.conv1.weight": kernel, "scale": np.array(3)})


class Attack:
    """Runs a command where a file is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("where", ["content", "beside"])
def test_nothing_that_a_pickle_names_is_executed(save, where, tmp_path):
    target = tmp_path / "executed"
    content = {"w": Attack(target)} if where == "content" else {"state_dict": {}, "callback": Attack(target)}
    save(tmp_path / "w.pth", content)
    with pytest.raises(UserError, match=r"names (posix|nt).mkdir, which is not part of a tensor.*safetensors"):
        read_tensors(tmp_path / "w.pth")
    assert not target.exists()


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [((4,), (1,), 0), ((2,), (1,), 2), ((2,), (3,), 0), ((2,), (-1,), 1), ((1,), (1,), -1), ((2, 2), (1,), 0)],
)
def test_a_tensor_outside_its_storage_is_refused(save, shape, strides, offset, tmp_path):
    save(tmp_path / "w.pth", {"w": Tensor(Storage(np.zeros(3, np.float32)), offset, shape, strides)})
    with pytest.raises(UserError, match="damaged"):
        read_tensors(tmp_path / "w.pth")


def test_a_tensor_of_python_objects_is_refused(torch, tmp_path):
    """Bytes that are taken for addresses would crash the process, or worse."""
    view = Tensor(Storage(np.zeros(3, np.float32)), 0, (1,), (1,))
    view.arguments += ("O",)
    torch._utils._rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v3"
    torch._utils._rebuild_tensor_v3 = torch._utils._rebuild_tensor_v2
    save_zip(torch, tmp_path / "w.pth", {"w": view})
    with pytest.raises(UserError, match="damaged.*KeyError: 'O'"):
        read_tensors(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"w": 3}, "holds 'w': a int, which is not a tensor"),
        ({"model": {"w": 3}}, "holds 'model': a dict, which is not a tensor"),
        ([1, 2], "holds a list, not a state dict"),
    ],
)
def test_what_is_no_state_dict_is_refused(save, content, message, tmp_path):
    save(tmp_path / "w.pth", content)
    with pytest.raises(UserError, match=message):
        read_tensors(tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["w.safetensors", "w.npz", "zip.pth", "stream.pth"])
@pytest.mark.parametrize("keep", [0.2, 0.6, 0.97])
def test_a_cut_file_is_refused_with_one_line(name, keep, torch, tmp_path):
    path = tmp_path / name
    tensors = {"a": np.arange(100, dtype=np.float32), "b": np.ones((3, 3), np.float32)}
    if path.suffix == ".safetensors":
        write_tensors(path, tensors)
    elif path.suffix == ".npz":
        np.savez(path, **tensors)
    else:
        SAVERS[path.stem](torch, path, {key: Tensor.of(array) for key, array in tensors.items()})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(UserError) as error:
        read_tensors(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match="no file of weights"):
        read_tensors(tmp_path / "none.safetensors")
    (tmp_path / "w.h5").write_bytes(b"x")
    with pytest.raises(UserError, match="weights are read from files named"):
        read_tensors(tmp_path / "w.h5")
    (tmp_path / "w.pth").write_text("<html>not found</html>")
    with pytest.raises(UserError, match="not a file that PyTorch saved"):
        read_tensors(tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "z.pth", "w") as archive:
        archive.writestr("a.txt", "x")
    with pytest.raises(UserError, match="not one that PyTorch saved"):
        read_tensors(tmp_path / "z.pth")
    np.savez(tmp_path / "o.npz", a=np.array([{}], object))
    with pytest.raises(UserError, match="damaged"):
        read_tensors(tmp_path / "o.npz")
    with pytest.raises(UserError, match="written as .safetensors"):
        write_tensors(tmp_path / "w.pth", {})


HEADER = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}


@pytest.mark.parametrize(
    "header",
    [
        {"a": {**HEADER["a"], "data_offsets": [0, 32]}},
        {"a": {**HEADER["a"], "data_offsets": [8, 16]}},
        {"a": {**HEADER["a"], "data_offsets": [16, 0]}},
        {"a": {**HEADER["a"], "data_offsets": [0, 2**63]}},
        {"a": {**HEADER["a"], "shape": [2, 3]}},
        {"a": {**HEADER["a"], "shape": [2**40, 2**40]}},
        {"a": {**HEADER["a"], "shape": [-2, -2]}},
        {"a": {**HEADER["a"], "dtype": "F64"}},
        {"a": {**HEADER["a"], "dtype": "O"}},
        {"a": HEADER["a"], "b": HEADER["a"]},
        {"a": None},
        [],
    ],
)
def test_a_safetensors_header_that_lies_is_refused_in_a_line(header, tmp_path):
    text = json.dumps(header).encode()
    for length in (len(text), 2**60):
        (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", length) + text + bytes(16))
        with pytest.raises(UserError, match="is damaged, or not a .safetensors file") as error:
            read_tensors(tmp_path / "w.safetensors")
        assert "\n" not in str(error.value)


def test_sizes_that_a_pickle_announces_and_has_not_take_no_memory(torch, tmp_path):
    path, far = tmp_path / "w.pth", 2**34
    place = b"\x80\x02}r" + struct.pack("<I", 2**31) + b"."  # puts a dict to a far place of the machine's memory
    bytes_of_none = b"\x80\x04\x8e" + struct.pack("<Q", far) + b"."

    def refused(message):
        with pytest.raises(UserError, match=message) as error:
            read_tensors(path)
        assert "\n" not in str(error.value)

    save_zip(torch, path, {"w": Tensor(Storage(np.zeros(3, np.float32)), 0, (10**9, 10**9), (0, 1))})
    refused("a tensor of shape .* in a storage of 3 elements")
    for program in (place, bytes_of_none):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("weights/data.pkl", program)
        refused("damaged")
        path.write_bytes(pickle.dumps(MAGIC, protocol=2) + program)
        refused("damaged")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("weights/data.pkl", bytes(10**6))
    refused("is compressed")


def test_a_storage_is_as_long_as_the_pickle_says(torch, tmp_path):
    tensor = Tensor.of(np.zeros(3, np.float32))
    save_zip(torch, tmp_path / "w.pth", {"w": tensor})
    with zipfile.ZipFile(tmp_path / "w.pth") as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "v.pth", "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data + bytes(4) if name.endswith("data/0") else data)
    with pytest.raises(UserError, match="storage 0 has 16 bytes, announced were 3 elements of float32"):
        read_tensors(tmp_path / "v.pth")


def test_of_several_sets_of_tensors_the_state_dict_is_meant(save, tmp_path):
    one, two = ({"w": Tensor.of(np.full(1, value, np.float32))} for value in (1, 2))
    save(tmp_path / "w.pth", {"epoch": 3, "weights": one, "hparams": {"dim": 4}, "opt": {"state": {0: two}}})
    assert read_tensors(tmp_path / "w.pth")["w"] == 1
    save(tmp_path / "w.pth", {"ema": one, "state_dict": two})
    assert read_tensors(tmp_path / "w.pth")["w"] == 2
    save(tmp_path / "w.pth", {"ema": one, "model": two})
    with pytest.raises(UserError, match="holds several sets of tensors .'ema', 'model'."):
        read_tensors(tmp_path / "w.pth")


def test_classes_that_a_training_program_names_beside_the_weights_are_left_alone(save, tmp_path, monkeypatch):
    """Stable Diffusion's checkpoints name a callback of PyTorch Lightning."""
    module = types.ModuleType("pytorch_lightning")
    module.Saver = type("Saver", (), {"__module__": "pytorch_lightning"})
    monkeypatch.setitem(sys.modules, "pytorch_lightning", module)
    weights = {"w": Tensor.of(np.full(1, 3, np.float32))}
    save(tmp_path / "w.ckpt", {"callbacks": {module.Saver: {"best": 1.0}}, "state_dict": weights})
    assert read_tensors(tmp_path / "w.ckpt")["w"] == 3


def test_a_wrong_prefix_is_said():
    wanted = {"a.b": (1,), "c": (2,)}
    given = {"net.a.b": (1,), "net.c": (2,), "epoch": ()}
    with pytest.raises(UserError, match="unexpected: epoch, net.a.b, net.c; they are there under 'net.'"):
        check_tensors("it", wanted, given)
    with pytest.raises(UserError, match="unexpected: x0, x1, .* and 32 more$"):
        check_tensors("it", {}, {f"x{i}": () for i in range(40)})
