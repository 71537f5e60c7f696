"""One update: microbatches, and updates that are not finite."""

import contextlib
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from cli.config import load_config
from cli.errors import UserError
from train import loop
from train.distributed.mesh import make_mesh, place_batch
from train.program import create_program
from train.state import count_examples, create_state
from train.step import make_measure
from weights.sources import load_frozen

ROOT = Path(__file__).resolve().parents[2]


def config(name, *overrides):
    return load_config([f"--config={ROOT}/configs/{name}", "--config.batch_size=8", *overrides])


def program_and_state(config):
    program = create_program(config, make_mesh(config.mesh, jax.devices()[:1]))
    rng = np.random.default_rng(0)
    batch = {name: rng.integers(0, 200, leaf.shape).astype(leaf.dtype) for name, leaf in program.abstract_batch.items()}
    batch["index"] = np.arange(8, dtype=np.int32)
    batch = place_batch(batch, range(8), 8, program.rows)
    with program.in_mesh():
        return program, program.init(batch), load_frozen(config, 0, program.abstract_frozen), batch


def one_step(config):
    program, state, frozen, batch = program_and_state(config)
    with program.in_mesh():
        state, metrics, health = program.train_step(state, frozen, batch)
    return jax.device_get(state), jax.device_get(metrics), jax.device_get(health)


@pytest.mark.parametrize(
    "name", ["scenes/dvae.py:gumbel", pytest.param("scenes/dalle.py:debug", marks=pytest.mark.slow)]
)
def test_microbatches_give_the_update_of_the_whole_batch(name):
    fields = {"encoder_hidden": 16, "decoder_hidden": 16, "blocks_per_group": 1} if "dvae" in name else {}
    small = [f"--config.models.dvae.{field}={value}" for field, value in fields.items()]
    whole, metrics, health = one_step(config(name, *small))
    parts, part_metrics, part_health = one_step(config(name, *small, "--config.mesh.microbatches=4"))
    np.testing.assert_allclose(part_health.loss, health.loss, rtol=1e-5)
    np.testing.assert_allclose(part_health.leaf_norms, health.leaf_norms, rtol=1e-5)
    for key in ("loss", "gradient_norm"):
        np.testing.assert_allclose(np.divide(*part_metrics[key]), np.divide(*metrics[key]), rtol=1e-5)
    assert part_metrics["loss"][1] == metrics["loss"][1] == 8
    moments = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(whole.opt_state) if "mu" in str(path)]
    others = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(parts.opt_state) if "mu" in str(path)]
    for moment, other in zip(moments, others, strict=True):
        np.testing.assert_allclose(other, moment, atol=1e-5 * max(np.max(np.abs(moment)), 1e-12))


class Draws:
    """An objective that finds out what it draws."""

    measured = 6

    def measure(self, params, variables, frozen, batch, rng, number):
        return {"drawn": variables["drawn"].at[number].set(jax.random.normal(rng)), "count": number + 1.0}

    def has_measured(self, variables):
        return float(variables["count"]) > 1


def test_each_batch_that_is_measured_has_a_key_and_a_hurry_throws_nothing_away(monkeypatch):
    measure = make_measure(ConfigDict({"seed": 0}), Draws())
    program = SimpleNamespace(objective=Draws(), measure=measure, in_mesh=contextlib.nullcontext, rows=None)
    training = Mock(loop._Training, program=program, rows=[], frozen={})
    training.stream = SimpleNamespace(pass_batches=lambda size: 9)
    reads = []

    def read(*_):
        reads.append("opened")
        yield from ({} for _ in range(9))

    monkeypatch.setattr(loop, "_reader", read)
    monkeypatch.setattr(loop, "place_batch", lambda batch, *_: batch)
    settings = ConfigDict({"batch_size": 2})
    new = create_state({}, {"drawn": jnp.zeros(3), "count": jnp.zeros(())}, {}, averaged={})
    one = loop._measure(settings, training, new, Draws.measured, hurry=True)  # there was nothing before
    assert float(one.variables["count"]) == 1
    assert float(loop._measure(settings, training, one, Draws.measured, hurry=True).variables["count"]) == 1
    full = loop._measure(settings, training, one, Draws.measured, hurry=False)
    assert float(full.variables["count"]) == 3 and len(set(full.variables["drawn"].tolist())) == 3
    assert full.variables["drawn"].all() and len(reads) == 3
    assert loop._measure(settings, training, full, Draws.measured, hurry=True) is full and len(reads) == 3


def test_a_codebook_takes_microbatches_in_turn():
    """What the examples of a batch decide together is not theirs as parts, as the documentation says."""
    whole, _, _ = one_step(config("scenes/dvae.py:debug"))
    parts, _, _ = one_step(config("scenes/dvae.py:debug", "--config.mesh.microbatches=4"))
    codebooks = [state.variables["dvae"]["codebook"] for state in (whole, parts)]
    assert np.max(np.abs(codebooks[0]["embedding"] - codebooks[1]["embedding"])) > 1e-3


@pytest.mark.parametrize(
    ("microbatches", "message"), [(0, "must be at least 1"), (3, "does not divide over 1 device x 3 microbatches$")]
)
def test_microbatches_that_do_not_divide_are_errors(microbatches, message):
    wrong = config("scenes/dvae.py:debug", f"--config.mesh.microbatches={microbatches}")
    with pytest.raises(UserError, match=message):
        create_program(wrong, make_mesh(wrong.mesh, jax.devices()[:1]))


@pytest.mark.parametrize("mode", ["skip", "stop"])
def test_an_update_that_is_not_finite_is_left_out_if_the_config_says_so(mode):
    program, state, frozen, batch = program_and_state(config("scenes/dvae.py:debug", f"--config.nonfinite={mode}"))
    params = dict(state.params["dvae"])
    params["decoder"] = jax.tree.map(lambda leaf: leaf * np.nan, params["decoder"])
    broken = state.replace(params={"dvae": params})
    before = jax.device_get(broken)
    with program.in_mesh():
        after, _, health = program.train_step(broken, frozen, batch)
    assert bool(health.applied) == (mode == "stop") and not np.all(np.isfinite(health.leaf_norms))
    assert (int(after.step), count_examples(after.examples_seen)) == (1, 8)  # the stream goes on either way
    same = [
        np.array_equal(one, other, equal_nan=True)
        for one, other in zip(
            jax.tree.leaves((before.params["dvae"]["encoder"], before.opt_state, before.variables)),
            jax.tree.leaves(jax.device_get((after.params["dvae"]["encoder"], after.opt_state, after.variables))),
            strict=True,
        )
    ]
    assert all(same) == (mode == "skip")
