"""Files that PyTorch itself saved are read without it, tensor for tensor as PyTorch reads them."""

import numpy as np
import pytest
import torch

from cli.errors import UserError
from weights.files.tensors import read_tensors, write_tensors

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64),
    *(torch.uint16, torch.uint32, torch.uint64),
]


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shared = torch.randn(6, 4)
    tensors = {str(dtype): (torch.rand(3, 2) * 9).to(dtype) for dtype in DTYPES}
    tensors |= {"shared.whole": shared, "shared.column": shared[:, 1], "shared.transposed": shared.T}
    tensors |= {"expanded": torch.ones(1, 3).expand(4, 3), "scalar": torch.tensor(5), "empty": torch.zeros(0, 3)}
    return tensors | {"parameter": torch.nn.Parameter(torch.randn(2))}


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def assert_same(read: dict[str, np.ndarray], expected: dict[str, torch.Tensor]) -> None:
    assert set(read) == set(expected)
    for name, tensor in expected.items():
        assert str(read[name].dtype) == str(tensor.dtype).removeprefix("torch.")
        assert read[name].shape == tuple(tensor.shape)
        np.testing.assert_array_equal(np.ascontiguousarray(read[name]).reshape(-1).view(np.uint8), bits(tensor))


@pytest.mark.parametrize("zipped", [True, False])
def test_state_dicts(zipped, tmp_path):
    tensors = state()
    torch.save(tensors, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    assert_same(read_tensors(tmp_path / "w.pth"), tensors)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_module_s_state_dict_under_its_key(zipped, tmp_path):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    checkpoint = {"state_dict": module.state_dict(), "epoch": 3, "optimizer": {"lr": 0.1}}
    torch.save(checkpoint, tmp_path / "w.ckpt", _use_new_zipfile_serialization=zipped)
    assert_same(read_tensors(tmp_path / "w.ckpt"), dict(module.state_dict()))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_whole_module_gives_its_parameters_and_buffers_and_one_of_other_code_is_refused(zipped, tmp_path):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4, affine=False))
    torch.save(module, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    assert_same(read_tensors(tmp_path / "w.pt"), dict(module.state_dict()))
    torch.save(Other(), tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="is a pickle that names .*Other, which is not part of a tensor"):
        read_tensors(tmp_path / "w.pt")


class Other(torch.nn.Linear):
    def __init__(self):
        super().__init__(1, 1)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript(tmp_path):
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4).half())
            self.scale = torch.nn.Parameter(torch.tensor(2.0))
            self.sizes = [1, 2]
            self.register_buffer("count", torch.arange(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x) * self.scale + self.sizes[0]

    network = Network().eval()
    torch.jit.script(network).save(tmp_path / "w.pt")
    assert_same(read_tensors(tmp_path / "w.pt"), dict(network.state_dict()))


def test_pytorch_reads_what_is_written(tmp_path):
    from safetensors.torch import load_file

    tensors = {name: tensor for name, tensor in state().items() if "complex" not in name}
    torch.save(tensors, tmp_path / "w.pth")
    write_tensors(tmp_path / "w.safetensors", read_tensors(tmp_path / "w.pth"))
    read = load_file(tmp_path / "w.safetensors")
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        np.testing.assert_array_equal(bits(read[name]), bits(tensor))
