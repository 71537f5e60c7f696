"""The published names of Inception's tensors: both ways, and a clear list when they are not those."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from cli.errors import UserError
from weights.files.tensors import read_tensors, write_tensors
from weights.formats.inception import from_torch, to_torch


@pytest.fixture(scope="module")
def model():
    return models.create_model("inception", width_divisor=16, image_size=75)


@pytest.fixture(scope="module")
def variables(model):
    """Every value different from every other one."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs(1))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes)


def test_there_and_back_through_a_file(model, variables, tmp_path):
    write_tensors(tmp_path / "inception.safetensors", to_torch(variables))
    back = from_torch(model, read_tensors(tmp_path / "inception.safetensors"))
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_published_names_and_layout(variables):
    state = to_torch(variables)
    assert state["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (24, 24, 3, 1)
    kernel = variables["params"]["Mixed_7c"]["branch3x3dbl_3b"]["conv"]["kernel"]
    assert state["Mixed_7c.branch3x3dbl_3b.conv.weight"][5, 7, 2, 0] == kernel[2, 0, 7, 5]
    assert state["fc.weight"].shape == (1008, 128) and state["fc.bias"].shape == (1008,)
    leaves = {name.rpartition(".")[2] for name in state if ".bn." in name}
    assert leaves == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert len(state) == 94 * 6 + 2


def test_other_weights_are_refused_with_a_list(model, variables):
    state = to_torch(variables)
    del state["Mixed_5b.branch1x1.conv.weight"]
    state["AuxLogits.fc.bias"] = np.zeros(1)
    state["fc.bias"] = np.zeros(1000)
    with pytest.raises(UserError) as error:
        from_torch(model, state)
    assert "missing: Mixed_5b.branch1x1.conv.weight" in str(error.value)
    assert "unexpected: AuxLogits.fc.bias" in str(error.value)
    assert "fc.bias is (1000,), expected (1008,)" in str(error.value)
    with pytest.raises(UserError, match="and 464 more"):
        from_torch(model, {})
