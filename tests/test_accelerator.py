"""What only a GPU or TPU can show: `make test-accelerator`, and the first part of `scripts.benchmark --suite=gpu`.

With TESSERA_TESTS_ACCELERATOR=rehearsal the CPU stands in for it, so that these tests do not rot where there is none.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cli.config import load_config
from cost.hlo import read_attention
from cost.measured import made_up_batch, measure_step, program_bytes, without_sources
from models.layers.attention import KeyLengths, attend
from train.distributed.mesh import make_mesh
from train.program import create_program
from weights.sources import load_frozen

pytestmark = pytest.mark.accelerator

FAMILIES = (
    *("dvae", "dalle", "clip", "autoencoder", "latent_unet", "ddpm_uvit", "ddpm_dit", "unidiffuser", "captioner"),
    *("llama", "vision_adapter"),
)
KERNELS = {"gpu": "cudnn", "tpu": "splash", "cpu": "splash_interpreted"}  # the fused attention of a platform


@pytest.fixture(scope="module")
def device():
    found = jax.devices()[0]
    if found.platform == "cpu" and os.environ["TESSERA_TESTS_ACCELERATOR"] != "rehearsal":
        pytest.skip("JAX sees no GPU or TPU here, only the CPU")
    return found


def debug_program(name, device, dtype):
    """The program of a debug variant on one device, its networks in `dtype`; (program, state, frozen, batch)."""
    config = without_sources(load_config([f"--config=configs/scenes/{name}.py:debug"]))
    with config.unlocked():
        for network in (*config.models.values(), *config.frozen.values()):
            if "dtype" in network:
                network.dtype = dtype
    program = create_program(config, make_mesh(config.mesh, [device]))
    with program.in_mesh():
        batch = made_up_batch(program, config)
        frozen = load_frozen(config, config.seed, program.abstract_frozen)
        return program, program.init(batch), frozen, batch


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_in_bfloat16_is_finite_and_near_float32_on_the_cpu(family, device):
    found = []
    for place, dtype in ((jax.devices("cpu")[0], "float32"), (device, "bfloat16")):
        program, *arguments = debug_program(family, place, dtype)
        with program.in_mesh():
            state, _, health = program.train_step(*arguments)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state.params)))
        found.append((float(health.loss), np.asarray(health.leaf_norms)))
    (loss, norms), (near, near_norms) = found
    assert near == pytest.approx(loss, rel=0.03)
    assert np.linalg.norm(near_norms - norms) < 0.1 * np.linalg.norm(norms)


@pytest.mark.parametrize(
    ("length", "kind"), [(256, "none"), (256, "causal"), (257, "none"), (129, "causal"), (256, "lengths")]
)
def test_fused_attention_and_its_gradients_are_those_of_the_plain_one(length, kind, device):
    if kind == "lengths" and device.platform != "gpu":
        pytest.skip("lengths of keys are a mask of cuDNN's kernel, on NVIDIA GPUs")
    q, k, v, given = np.random.default_rng(0).normal(size=(4, 2, length, 2, 128))
    masks = {"none": None, "causal": np.tri(length, dtype=bool), "lengths": KeyLengths(jnp.array([length, 100]))}

    def both(implementation, dtype):
        def attention(q, k, v):
            return attend(q, k, v, masks[kind], implementation)

        arrays = [jnp.asarray(each, jnp.bfloat16).astype(dtype) for each in (q, k, v, given)]

        @jax.jit
        def run(q, k, v, given):
            out, gradients = jax.vjp(attention, q, k, v)
            return out, *gradients(given)

        with jax.default_matmul_precision("highest"):
            return [np.asarray(each, np.float32) for each in run(*arrays)]

    for ours, plain in zip(both(KERNELS[device.platform], jnp.bfloat16), both("xla", jnp.float32), strict=True):
        assert np.abs(ours - plain).max() < 0.03 * np.abs(plain).max()


def test_attention_is_fused_where_the_device_has_a_kernel_that_gains(device):
    x = jnp.zeros((2, 64, 2, 64), jnp.bfloat16)
    compiled = jax.jit(lambda x: attend(x, x, x, implementation="auto")).lower(x).compile()
    assert read_attention(compiled.as_text()) == ("cudnn" if device.platform == "gpu" else "xla",)
    assert jax.block_until_ready(compiled(x)).shape == x.shape


def test_a_donated_state_is_not_held_twice(device):
    def held():
        stats = device.memory_stats()
        return stats["bytes_in_use"] if stats else sum(array.nbytes for array in jax.live_arrays())

    program, state, frozen, batch = debug_program("dvae", device, "bfloat16")
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    with program.in_mesh():
        donated = program.train_step.lower(state, frozen, batch).compile()
        kept = jax.jit(program.train_step.__wrapped__).lower(state, frozen, batch).compile()
        planned = [each.memory_analysis() for each in (kept, donated)]
        assert [each.alias_size_in_bytes > 0.9 * size for each in planned] == [False, True]
        assert program_bytes(planned[1]) < program_bytes(planned[0])
        before = held()
        new, *_ = jax.block_until_ready(donated(state, frozen, batch))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
        assert held() - before < 0.5 * size
        other, *_ = jax.block_until_ready(kept(new, frozen, batch))
        assert held() - before > 0.9 * size
        assert int(other.step) == int(new.step) + 1


def test_memory_is_counted(device):
    if device.memory_stats() is None:
        pytest.skip("a CPU keeps no count of its memory")
    before = device.memory_stats()["bytes_in_use"]
    array = jax.block_until_ready(jax.device_put(np.zeros(2**24, np.float32), device))
    stats = device.memory_stats()
    assert stats["bytes_in_use"] - before >= array.nbytes
    assert stats["bytes_limit"] > stats["peak_bytes_in_use"] >= stats["bytes_in_use"]
    step = measure_step(load_config(["--config=configs/scenes/dvae.py:debug"]), windows=1, steps=1, warmup=0)
    assert step["memory"]["device_peak_bytes"] >= stats["peak_bytes_in_use"]
