"""Activations on a mesh: what is constrained, what is left as it is, and what each device computes."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec, use_abstract_mesh

from models.layers.partitioning import device_platform, join_rows, map_rows_and_heads, shard_rows, split_rows

ROOT = Path(__file__).resolve().parents[3]
AXES = ("data", "fsdp", "tensor")
FREE = PartitionSpec.UNCONSTRAINED


def mesh(*sizes, axes=AXES, device=None):
    """A mesh of no devices in particular: enough to trace under."""
    return AbstractMesh(sizes, axes, axis_types=(AxisType.Auto,) * len(axes), abstract_device=device)


def constraint(x):
    """The PartitionSpec that `shard_rows` puts on x under the mesh in context, None for none."""
    equations = jax.make_jaxpr(shard_rows)(x).eqns
    assert len(equations) <= 1
    return equations[0].params["sharding"].spec if equations else None


def test_rows_are_split_and_the_rest_is_left_to_the_compiler():
    with use_abstract_mesh(mesh(2, 4, 2)):
        assert constraint(jnp.zeros((16, 3, 5))) == PartitionSpec(("data", "fsdp"), FREE, FREE)
        assert constraint(jnp.zeros(8, jnp.int32)) == PartitionSpec(("data", "fsdp"))


def test_nothing_is_asked_where_rows_cannot_be_split():
    x = jnp.zeros((8, 3))
    assert shard_rows(x) is x
    with use_abstract_mesh(mesh(2, 4, axes=("data", "model"))):
        assert constraint(x) is None
    with use_abstract_mesh(mesh(2, 4, 1)):
        assert constraint(x[:6]) is None  # a batch that does not divide
        # Inside a shard_map a device has its own rows already.
        inner = jax.shard_map(shard_rows, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"))
        assert "sharding_constraint" not in str(jax.make_jaxpr(inner)(jnp.zeros((16, 3))))


def test_parts_of_a_batch_are_taken_from_the_rows_of_every_device():
    x = jnp.arange(16)
    assert split_rows(x, 2).tolist() == [list(range(0, 16, 2)), list(range(1, 16, 2))]
    assert (join_rows(split_rows(x, 2)) == x).all()
    with use_abstract_mesh(mesh(2, 4, 2)):
        (*_, constrained) = jax.make_jaxpr(lambda x: split_rows(x, 2))(x).eqns
        assert constrained.params["sharding"].spec == PartitionSpec(None, ("data", "fsdp"))


@pytest.mark.parametrize(
    ("batch", "heads", "local"), [(16, 4, (2, 2)), (6, 4, (6, 2)), (16, 3, (2, 3)), (1, 1, (1, 1))]
)
def test_each_device_computes_its_own_rows_and_heads(batch, heads, local):
    seen = []

    def function(q, k):
        seen.append((q.shape, k.shape))
        return q

    q, k = jnp.zeros((batch, 5, heads, 8)), jnp.zeros((batch, 7, heads, 8))
    with use_abstract_mesh(mesh(2, 4, 2)):
        out = jax.eval_shape(lambda q, k: map_rows_and_heads(function, q, k), q, k)
    assert seen == [((local[0], 5, local[1], 8), (local[0], 7, local[1], 8))]
    assert out.shape == q.shape
    assert map_rows_and_heads(function, q, k) is q  # without a mesh: called as it is


def test_a_program_is_for_the_devices_of_the_mesh_and_not_of_this_host():
    assert device_platform() == "cpu"
    with use_abstract_mesh(mesh(1, 4, 1, device=AbstractDevice("TPU v5 lite", 1, "tpu"))):
        assert device_platform() == "tpu"
    with use_abstract_mesh(mesh(1, 4, 1)):
        assert device_platform() == "cpu"


ON_EIGHT_DEVICES = """
import jax, numpy as np
from jax.sharding import AxisType, PartitionSpec as P
from models.layers.partitioning import map_rows_and_heads, shard_rows
mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
x = np.arange(8 * 3 * 4 * 5, dtype=np.float32).reshape(8, 3, 4, 5)
with jax.set_mesh(mesh):
    for function in (shard_rows, jax.jit(shard_rows)):
        y = function(x)
        assert y.sharding.spec[0] == ("data", "fsdp"), y.sharding
        np.testing.assert_array_equal(y, x)
    # Each device sums over what it has: two rows, all of the length, two heads.
    y = jax.jit(lambda x: map_rows_and_heads(lambda x: x + x.sum(), x))(x)
blocks = x.reshape(4, 2, 3, 2, 2, 5)
np.testing.assert_allclose(y, (blocks + blocks.sum((1, 2, 4, 5), keepdims=True)).reshape(x.shape))
gradient = jax.jit(jax.grad(lambda x: (map_rows_and_heads(lambda x: x**2, shard_rows(x))).sum()))
with jax.set_mesh(mesh):
    np.testing.assert_allclose(gradient(x), 2 * x)
"""


@pytest.mark.slow
def test_eight_devices_hold_what_was_asked_for():
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-c", ON_EIGHT_DEVICES]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
