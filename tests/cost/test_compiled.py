"""What is read from a compiled step: memory, refusals of memory, parameters and FLOPs."""

import dataclasses
import math
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from cli.config import load_config
from cli.errors import UserError
from cost import compiled
from cost.chips import GIB
from cost.flops import plain_config
from cost.hlo import Collectives, Traffic
from scripts.describe import describe
from train.distributed.mesh import make_mesh
from train.program import create_program

ROOT = Path(__file__).resolve().parents[2]


def debug(name: str, *overrides: str):
    return load_config([f"--config={ROOT}/configs/{name}:debug", *overrides])


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (96.36G) "
            "exceeds available HBM (15.75G).",
            (round(96.36 * GIB), round(15.75 * GIB)),
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 812.50M "
            "of 512.0M hbm. Exceeded hbm capacity by 300.50M.",
            (812.5 * 2**20, 512 * 2**20),
        ),
        ("RESOURCE_EXHAUSTED: out of something else", None),
        ("INTERNAL: required for HLO temporaries (96.36G) exceeds available HBM (15.75G)", None),
    ],
)
def test_the_compilers_refusal_is_read(message, expected):
    assert compiled.read_out_of_memory(message) == expected


@pytest.fixture(scope="module")
def program():
    """The smallest program, on one device; its step is to be replaced."""
    config = debug("paper/dvae.py")
    return create_program(config, make_mesh(config.mesh, jax.devices()[:1]))


def test_a_compiled_step_has_its_memory_read(program):
    def step(state, frozen, batch):
        image = batch["image"].astype(jnp.float32)
        return image + state.step, jnp.sort(image.ravel())

    compilation = compiled.compile_step(dataclasses.replace(program, train_step=jax.jit(step)))
    pixels = 4 * 32 * 32 * 3
    assert compilation.fits and compilation.available_bytes is None
    assert compilation.argument_bytes == pixels + 4  # what the step does not read is no argument
    outputs = compilation.output_bytes or 0
    assert 2 * 4 * pixels <= outputs < 2 * 4 * pixels + 64
    assert compilation.memory_bytes >= compilation.argument_bytes + outputs
    assert compilation.collectives == Collectives((), 0) and compilation.seconds > 0


def test_running_out_of_memory_is_an_answer_and_other_failures_are_not(program):
    def compile_failing_with(message: str) -> compiled.Compilation:
        def fail():
            raise jax.errors.JaxRuntimeError(message)

        step = types.SimpleNamespace(lower=lambda *arguments: types.SimpleNamespace(compile=fail))
        return compiled.compile_step(dataclasses.replace(program, train_step=step))

    refused = compile_failing_with("RESOURCE_EXHAUSTED: ... HLO temporaries (20.00G) exceeds available HBM (15.75G).")
    assert not refused.fits and refused.collectives is None
    assert (refused.memory_bytes, refused.available_bytes) == (20 * GIB, round(15.75 * GIB))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        compile_failing_with("INTERNAL: a bug")


@pytest.fixture
def one_device(monkeypatch):
    """This machine's CPU in the place of a slice, and of its compiler's answer."""
    traffic = Traffic("all-reduce", 3, 200_000_000)
    answer = compiled.Compilation(True, GIB, 819_000_000, 0, None, Collectives((traffic,), 0), 1.0)
    monkeypatch.setattr(compiled, "topology_devices", lambda topology: jax.devices()[:1])
    monkeypatch.setattr(compiled, "compile_step", lambda program: answer)


def test_a_step_is_fitted_without_its_frozen_stage(one_device):
    overrides = ("--config.frozen.dvae.source=runs/nowhere", "--config.models.dalle.depth=2")
    config = debug("paper/dalle_12b.py", *overrides)
    fitted = compiled.fit(config, "v5e:1x1")
    assert fitted.mesh == {"data": 1, "fsdp": 1, "tensor": 1, "microbatches": 1}
    expected = describe(debug("paper/dalle_12b.py", *overrides, "--config.models.dalle.remat=none"), depth=1)
    assert fitted.trained_parameters == expected["trained"]["dalle"]["parameters"]
    assert fitted.frozen_parameters == expected["frozen"]["dvae"]["parameters"]
    # Parameters, moving average and two moments in float32; a step counter here and there; the batch.
    state = 4 * 4 * fitted.trained_parameters + 4 * fitted.frozen_parameters
    batch = 4 * (32 * 32 * 3 + 4 + 12 * 4)
    assert state + batch < fitted.shape_bytes < state + batch + 64
    # What is recomputed takes time, and is not counted as useful.
    assert fitted.step_flops == expected["matrix_flops_per_step"]
    assert fitted.step_flops < fitted.compute_flops < 4 / 3 * fitted.step_flops
    bound = fitted.bound
    assert (bound.memory, bound.interconnect) == pytest.approx((1e-3, 1e-3))
    assert bound.compute == pytest.approx(fitted.compute_flops / 197e12)
    assert fitted.utilization == pytest.approx(fitted.step_flops / 197e12 / bound.seconds)


def test_a_mesh_that_does_not_fit_is_one_line(one_device):
    with pytest.raises(UserError, match="does not fit 1 device$"):
        compiled.fit(debug("paper/dvae.py", "--config.mesh.fsdp=3"), "v5e:1x1")


def test_kernels_that_hide_their_products_are_counted_as_the_plain_one():
    config = debug("paper/dalle_12b.py", "--config.models.dalle.implementation=splash")
    plain = plain_config(config, recompute=False)
    assert plain.models.dalle.implementation == "xla" and plain.models.dalle.remat == "none"
    assert plain_config(config).models.dalle.remat == config.models.dalle.remat == "full"
    assert config.models.dalle.implementation == "splash"
    assert math.prod(plain.models.dalle.image_grid) == 16  # the rest stays
