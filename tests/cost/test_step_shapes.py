"""Arithmetic for meshes of any size agrees with the program of one device."""

from pathlib import Path

import jax
import pytest

from cli.config import load_config
from cli.errors import UserError
from cost.compiled import shard_bytes, step_flops
from cost.flops import plain_config
from cost.step_shapes import StepShapes
from cost.temporaries import temporary_bytes
from train.distributed.mesh import make_mesh
from train.program import create_program

ROOT = Path(__file__).resolve().parents[2]


def test_one_trace_answers_for_every_mesh():
    config = load_config([f"--config={ROOT}/configs/paper/dalle_12b.py:debug", "--config.batch_size=8"])
    shapes = StepShapes(config, jax.devices()[0])
    program = create_program(config, make_mesh(config.mesh, jax.devices()[:1]))
    arguments = program.abstract_state, program.abstract_frozen, program.abstract_batch
    whole, batch = shard_bytes(arguments), shard_bytes(program.abstract_batch)
    assert shapes.argument_bytes(config, 1) == whole
    assert shapes.state_bytes() == whole - batch
    assert shapes.argument_bytes(config, 4) == whole - batch + batch // 4
    with program.in_mesh():
        assert shapes.temporary_bytes(config, 1) == temporary_bytes(program.train_step, *arguments)

    recomputed = step_flops(plain_config(config), program.mesh)  # a forward pass more: a quarter of it at most
    assert 0.75 * recomputed <= shapes.step_flops() < recomputed

    copied, split = shapes.temporary_bytes(config, 4), config.copy_and_resolve_references()
    split.mesh.fsdp = 2
    assert 0.45 * whole < shapes.argument_bytes(split, 4) < 0.6 * whole  # a few small parameters stay whole
    assert shapes.temporary_bytes(split, 4) <= copied < shapes.temporary_bytes(config, 1)
    split.mesh.fsdp = 3
    with pytest.raises(UserError, match="does not fit 4 devices"):
        shapes.argument_bytes(split, 4)
    split.mesh.fsdp, split.mesh.microbatches = 2, 4
    with pytest.raises(UserError, match="does not divide over 4 devices x 4 microbatches"):
        shapes.argument_bytes(split, 4)
