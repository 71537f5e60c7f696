"""The VQ-VAE's loss: the codebook moves as the paper says, and only by it."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from cli.errors import UserError
from train.objectives.vqvae import VectorQuantizedVAEObjective, seed_codes, update_codebook

KEY = jax.random.key(0)


def objective(**loss):
    """A tiny objective with 2 x 2 tokens; keywords override its loss."""
    return VectorQuantizedVAEObjective.from_config(
        ConfigDict(
            {
                "models": {
                    "dvae": {
                        "name": "vqvae",
                        "image_size": 8,
                        "vocab_size": 16,
                        "code_dim": 4,
                        "encoder_hidden": 16,
                        "decoder_hidden": 16,
                        "decoder_init": 8,
                        "width_multipliers": (1,),
                        "patch_size": 4,
                        "blocks_per_group": 1,
                        "input_kernel": 1,
                    }
                },
                "loss": {
                    "reconstruction": "l2",
                    "commitment": 0.25,
                    "codebook_decay": 0.9,
                    "restart_every": 0,
                    "restart_threshold": 0.1,
                    **loss,
                },
            }
        )
    )


def random_batch(size=8):
    image = np.random.default_rng(0).integers(0, 256, (size, 8, 8, 3), np.uint8)
    return {"image": jnp.asarray(image), "index": jnp.arange(size)}


def init(tiny, batch):
    """Parameters of the shapes of `tiny.init`, drawn by numpy, which saves compiling that."""
    params, variables = jax.eval_shape(tiny.init, KEY, batch)
    rng = np.random.default_rng(0)

    def draw(x):
        scale = 0.1 if x.ndim == 1 else np.prod(x.shape[:-1]) ** -0.5
        return jnp.asarray(rng.normal(size=x.shape, scale=scale), x.dtype)

    codebook = {"embedding": draw(jnp.zeros((16, 4))), "usage": jnp.zeros(16), "sums": jnp.zeros((16, 4))}
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, {"dvae": {"codebook": codebook}})
    return jax.tree.map(draw, params), {"dvae": {"codebook": codebook}}


# Compiled as a whole, which is much sooner than one operation at a time.
@functools.partial(jax.jit, static_argnums=0, static_argnames="train")
def run(tiny, params, variables, batch, step, train=True):
    return tiny.loss(params, variables, {}, batch, KEY, step, train)


@functools.partial(jax.jit, static_argnums=0)
def run_with_gradient(tiny, params, variables, batch, step):
    def loss(params, variables):
        return tiny.loss(params, variables, {}, batch, KEY, step, True)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, variables)


@functools.partial(jax.jit, static_argnums=0)
def encode(tiny, params, variables, batch):
    """Encoder outputs, one row per token."""
    tree = {"params": params["dvae"], **variables["dvae"]}
    return tiny.model.apply(tree, batch["image"] / 127.5 - 1, method="encode").reshape(-1, 4)


def used(codebook):
    """The same codebook, marked as used by every code once."""
    return {"embedding": codebook["embedding"], "usage": jnp.ones(16), "sums": codebook["embedding"]}


def test_update_equals_numpy():
    rng = np.random.default_rng(1)
    z, tokens = rng.normal(size=(40, 4)).astype(np.float32), rng.integers(0, 12, 40)
    codebook = {
        "embedding": rng.normal(size=(16, 4)).astype(np.float32),
        "usage": rng.uniform(0.5, 2, 16).astype(np.float32),
        "sums": rng.normal(size=(16, 4)).astype(np.float32),
    }
    codebook["usage"][15] = 0  # never used: stays where it is
    codebook["sums"][15] = 0
    new = update_codebook(jax.tree.map(jnp.asarray, codebook), jnp.asarray(z), jnp.asarray(tokens), 0.9)
    for code in range(15):
        mine = z[tokens == code]
        usage = 0.9 * codebook["usage"][code] + 0.1 * len(mine)
        sums = 0.9 * codebook["sums"][code] + 0.1 * mine.sum(0)
        np.testing.assert_allclose(new["usage"][code], usage, rtol=1e-5)
        np.testing.assert_allclose(new["embedding"][code], sums / usage, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(new["embedding"][15], codebook["embedding"][15])


def test_first_step_seeds_the_codebook_from_encoder_outputs():
    tiny, batch = objective(codebook_decay=0.0), random_batch()
    params, variables = jax.jit(tiny.init)(KEY, batch)
    assert not np.any(variables["dvae"]["codebook"]["usage"])
    _, aux = run(tiny, params, variables, batch, 0)
    codebook = aux.variables["dvae"]["codebook"]
    assert jax.tree.structure(aux.variables) == jax.tree.structure(variables)
    z = np.asarray(encode(tiny, params, variables, batch))
    # With decay 0 a code is the mean of what is nearest to it: all of them stay within the cloud of encoder outputs.
    assert np.all(codebook["embedding"] >= z.min(0) - 1e-5)
    assert np.all(codebook["embedding"] <= z.max(0) + 1e-5)
    assert float(aux.metrics["code_usage"][0] / aux.metrics["code_usage"][1]) == 1  # 16 different outputs, 16 codes


def test_seeding_picks_different_outputs_and_repeats_with_the_key():
    z = jnp.arange(40.0).reshape(20, 2)
    codebook = {"embedding": jnp.zeros((16, 2)), "usage": jnp.zeros(16), "sums": jnp.zeros((16, 2))}
    everything = jnp.full(16, True)
    first = seed_codes(codebook, everything, z, KEY, 0.5)
    assert len(np.unique(np.asarray(first["embedding"]), axis=0)) == 16
    np.testing.assert_allclose(first["sums"], first["embedding"] * first["usage"][:, None])
    np.testing.assert_array_equal(first["embedding"], seed_codes(codebook, everything, z, KEY, 0.5)["embedding"])
    other = seed_codes(codebook, everything, z, jax.random.key(1), 0.5)
    assert np.any(first["embedding"] != other["embedding"])


def test_a_loaded_codebook_is_kept_at_step_zero():
    tiny, batch = objective(codebook_decay=0.999), random_batch()
    params, variables = init(tiny, batch)
    codebook = used(variables["dvae"]["codebook"])
    _, aux = run(tiny, params, {"dvae": {"codebook": codebook}}, batch, 0)
    moved = jnp.abs(aux.variables["dvae"]["codebook"]["embedding"] - codebook["embedding"])
    assert float(moved.max()) < 0.1


def test_dead_codes_restart_on_encoder_outputs_when_due():
    tiny, batch = objective(restart_every=5, codebook_decay=0.5), random_batch()
    params, variables = init(tiny, batch)
    codebook = used(variables["dvae"]["codebook"])
    far = codebook["embedding"].at[3].set(1e3)  # nothing is nearest to it
    codebook = {"embedding": far, "usage": codebook["usage"].at[3].set(1e-4), "sums": codebook["sums"].at[3].set(0.1)}
    variables = {"dvae": {"codebook": codebook}}

    def after(step, train=True):
        _, aux = run(tiny, params, variables, batch, step, train=train)
        return np.asarray(aux.variables["dvae"]["codebook"]["embedding"][3]), aux

    z = np.asarray(encode(tiny, params, variables, batch))
    moved, aux = after(10)
    assert np.min(np.abs(z - moved).max(-1)) < 1e-5
    assert float(aux.metrics["restarts"][0]) > 0
    np.testing.assert_allclose(after(9)[0], 1e3, rtol=1e-3)
    np.testing.assert_allclose(after(0)[0], 1e3, rtol=1e-3)
    np.testing.assert_array_equal(after(10)[0], moved)
    unchanged, aux = after(10, train=False)
    np.testing.assert_allclose(unchanged, 1e3)
    assert "restarts" not in aux.metrics


def test_a_living_code_is_not_restarted():
    tiny, batch = objective(restart_every=5, codebook_decay=0.999), random_batch()
    params, variables = init(tiny, batch)
    variables = {"dvae": {"codebook": used(variables["dvae"]["codebook"])}}
    _, aux = run(tiny, params, variables, batch, 5)
    assert float(aux.metrics["restarts"][0]) == 0


def test_gradient_passes_the_codes_to_the_encoder_but_not_to_the_codebook():
    tiny, uncommitted, batch = objective(), objective(commitment=0.0), random_batch()
    params, variables = init(tiny, batch)
    variables = {"dvae": {"codebook": used(variables["dvae"]["codebook"])}}

    _, (to_params, _) = run_with_gradient(uncommitted, params, variables, batch, 1)
    _, (_, to_variables) = run_with_gradient(tiny, params, variables, batch, 1)
    assert np.any(to_params["dvae"]["encoder"]["input"]["kernel"] != 0)
    for leaf in jax.tree.leaves(to_params):
        assert np.all(np.isfinite(leaf))
    for leaf in jax.tree.leaves(to_variables):
        np.testing.assert_array_equal(leaf, 0)

    def drift(params):  # and the new codebook does not depend on the parameters by a gradient
        return sum(x.sum() for x in jax.tree.leaves(run(tiny, params, variables, batch, 1)[1].variables))

    for leaf in jax.tree.leaves(jax.jit(jax.grad(drift))(params)):
        np.testing.assert_array_equal(leaf, 0)


def test_commitment_is_weighted():
    batch = random_batch()
    with_weight, without = objective(commitment=0.25), objective(commitment=0.0)
    params, variables = init(with_weight, batch)
    first, aux = run(with_weight, params, variables, batch, 0, train=False)
    second, _ = run(without, params, variables, batch, 0, train=False)
    commitment = float(aux.metrics["commitment"][0] / aux.metrics["commitment"][1])
    assert float(first - second) == pytest.approx(0.25 * commitment, rel=1e-4)
    assert commitment > 0


@pytest.mark.parametrize("reconstruction", ["l2", "logit_laplace"])
def test_a_few_steps_reduce_the_loss(reconstruction):
    tiny, batch = objective(reconstruction=reconstruction, restart_every=10), random_batch()
    params, variables = init(tiny, batch)
    optimizer = optax.adam(3e-3)
    state = optimizer.init(params)

    @jax.jit
    def train(params, variables, state, step):
        (_, aux), (grads, _) = run_with_gradient(tiny, params, variables, batch, step)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), aux.variables, state, aux.metrics["reconstruction"][0] / 8

    losses = []
    for step in range(60):
        params, variables, state, loss = train(params, variables, state, jnp.int32(step))
        losses.append(float(loss))
    assert losses[-1] < losses[0] - (0.01 if reconstruction == "l2" else 0.1)


def test_preview_shows_originals_and_reconstructions():
    tiny, batch = objective(), random_batch(4)
    params, variables = init(tiny, batch)
    preview = tiny.preview(params, variables, {}, batch, KEY)["reconstruction"]
    assert preview.images.shape == (8, 8, 8, 3)
    assert preview.columns == 4
    np.testing.assert_array_equal(preview.images[:4], batch["image"])


def test_a_wrong_setting_is_a_user_error():
    with pytest.raises(UserError, match="codebook_decay must be at least 0 and below 1, not 1.0"):
        objective(codebook_decay=1.0)


SHARDED = """
import sys
sys.path[:0] = sys.argv[1:]
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from test_vqvae import init, objective, random_batch, run
tiny, batch = objective(restart_every=2, restart_threshold=0.5), random_batch()
params, variables = init(tiny, batch)
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
results = []
for spec in (P(), P("data")):
    placed = jax.device_put(batch, NamedSharding(mesh, spec))
    new = variables
    for i in range(3):
        loss, aux = run(tiny, params, new, placed, i)
        new = aux.variables
    results.append((loss, new))
for a, b in zip(*map(jax.tree.leaves, results)):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
print(len(jax.devices()), "devices agree")
"""


@pytest.mark.slow
def test_codebook_is_the_same_for_a_batch_sharded_over_devices():
    """Seeding, update and restart over the global batch: one replicated run against one with two examples a device."""
    here = Path(__file__).resolve()
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, str(here.parent), str(here.parents[3])],
        env={**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "4 devices agree" in done.stdout
