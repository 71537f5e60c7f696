"""Devices, rows and batches."""

import jax
import numpy as np
import pytest

from cli.errors import UserError
from configs.common import get_defaults
from train.distributed.mesh import batch_sharding, make_mesh, place_batch, process_rows
from train.distributed.sharding import shardings


def mesh_config(**sizes):
    config = get_defaults().mesh
    with config.unlocked():
        config.update(sizes)
    return config


def test_all_devices_are_used_by_default():
    assert make_mesh(mesh_config()).shape == {"data": len(jax.devices()), "fsdp": 1, "tensor": 1}


def test_sizes_that_do_not_fit_are_errors():
    for sizes in ({"data": 3}, {"data": -1, "fsdp": -1}, {"data": 0}, {"tensor": 7}):
        with pytest.raises(UserError):
            make_mesh(mesh_config(**sizes))


def test_a_batch_arrives_whole():
    sharding = batch_sharding(make_mesh(mesh_config()))
    rows = process_rows(sharding, 6)
    assert rows == list(range(6))
    batch = {"image": np.arange(24).reshape(6, 2, 2), "index": np.arange(6)}
    placed = place_batch(batch, rows, 6, sharding)
    assert all((np.asarray(placed[name]) == batch[name]).all() for name in batch)
    assert placed["image"].sharding.is_equivalent_to(sharding, 3)


def test_a_path_without_a_rule_is_named():
    mesh = make_mesh(mesh_config())
    tree = {"dense": {"kernel": np.ones((2, 2))}}
    with pytest.raises(UserError, match="no rule of config.mesh.rules matches dense/kernel"):
        shardings(tree, (("bias", ()),), mesh)
    spec = shardings(tree, (("kernel", ("fsdp", "tensor")), (".*", ())), mesh)["dense"]["kernel"].spec
    assert tuple(spec) == ("fsdp", "tensor")
