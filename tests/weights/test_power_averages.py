"""Moving averages of any length, made after training: against averages taken directly, and what is refused."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cli.config import load_config
from cli.errors import EXIT_OK, UserError
from sample.trained import TrainedSampler
from train.loop import train
from weights.checkpoint import CheckpointStore
from weights.power_averages import AVERAGES, Snapshot, average_key, combination, exponent, start, synthesize, update
from weights.run import Run

CONFIG = f"--config={Path(__file__).resolve().parents[2]}/configs/toy/swiss_roll.py:debug"
KEPT, OTHERS = (0.05, 0.1), (0.03, 0.15, 0.25)


def direct(values, length):
    """The average of rows of parameters, by its definition: a weighted mean over all updates."""
    share = np.diff((np.arange(len(values) + 1) / len(values)) ** exponent(length))
    return np.tensordot(share, values, 1)


def test_a_length_is_the_deviation_of_its_profile():
    s = (np.arange(100_000) + 0.5) / 100_000
    for length in (0.05, 0.1, 0.28):
        weight = s ** (exponent(length) - 1)
        mean = np.average(s, weights=weight)
        assert np.average((s - mean) ** 2, weights=weight) ** 0.5 == pytest.approx(length, rel=1e-3)
    # Table of the paper: 0.05 is gamma 16.97, 0.1 is gamma 6.94.
    assert (exponent(0.05) - 1, exponent(0.1) - 1) == pytest.approx((16.97, 6.94), abs=0.01)


def test_an_update_moves_averages_as_defined():
    values = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    averages = start({"part": {"w": jnp.full(3, 100.0, jnp.bfloat16)}}, KEPT)
    for step, value in enumerate(values, start=1):
        averages = update(averages, {"part": {"w": jnp.asarray(value)}}, jnp.int32(step))
    for length in KEPT:
        average = averages[average_key(length)]["part"]["w"]
        assert average.dtype == jnp.float32  # of what it started at nothing is left
        np.testing.assert_allclose(average, direct(values, length), atol=1e-6)


def test_parameters_that_are_not_averaged_are_left_out():
    params = {"part": {"w": jnp.ones(3), "b": jnp.ones(2)}, "other": {"b": jnp.ones(1)}}
    averages = start(params, KEPT, "part/w$")
    assert averages.keys() == {average_key(length) for length in KEPT}
    moved = update(averages, params, jnp.int32(1))
    assert jax.tree.structure(moved) == jax.tree.structure(averages) and moved[average_key(0.1)].keys() == {"part"}
    assert len(jax.tree.leaves(moved)) == 2 and start(params, KEPT, "nothing") == {}


def test_a_length_that_snapshots_do_not_reach_is_refused():
    """One snapshot of each of two lengths is far from a longer average; what it names instead is within reach."""
    snapshots = [Snapshot(1000, length) for length in KEPT]
    with pytest.raises(
        UserError, match=r"no nearer than 60% to one of length 0.2 .*; lengths 0.05 to 0.06, 0.08 to 0.11 are within"
    ):
        combination(snapshots, Snapshot(1000, 0.2))
    assert combination(snapshots, Snapshot(1000, 0.1))[1] < 1e-6


def test_few_snapshots_come_near_any_length():
    """As in a long run: a hundred updates between snapshots, and parameters that wander."""
    steps = 3000
    values = np.cumsum(np.random.default_rng(0).normal(size=(steps, 50)), axis=0)
    snapshots = [Snapshot(step, length) for step in range(100, steps + 1, 100) for length in KEPT]
    stored = np.stack([direct(values[: each.step], each.length) for each in snapshots])
    for step, lengths in ((steps, OTHERS), (2000, (0.03, 0.15, 0.2))):
        for length in lengths:
            factors, missed = combination(snapshots, Snapshot(step, length))
            assert 0 < missed < 0.05
            assert factors.sum() == pytest.approx(1) and not np.any(factors[[s.step > step for s in snapshots]])
            wanted = direct(values[:step], length)
            error = np.linalg.norm(factors @ stored - wanted) / np.linalg.norm(wanted - values[step - 1])
            assert error < 0.02, (length, step, error)


@pytest.mark.slow
def test_three_lengths_of_a_run_equal_averages_that_it_kept(tmp_path):
    """All five are kept by one run, and three of them also made of the other two."""
    overrides = [f"--config.ema.lengths={KEPT + OTHERS}", "--config.steps=10", "--config.checkpoint.every=1"]
    assert train(load_config([CONFIG, *overrides]), tmp_path) == EXIT_OK
    assert len(Run.open(tmp_path).load().params) == 1  # the newest two checkpoints stay, of averages all
    store = CheckpointStore(tmp_path / AVERAGES)
    assert store.steps() == list(range(10, 0, -1))
    kept = store.load(10, (AVERAGES,))[AVERAGES]
    for length in OTHERS:
        made, _ = synthesize(tmp_path, length, 10, of=KEPT)
        for ours, theirs in zip(jax.tree.leaves(made), jax.tree.leaves(kept[average_key(length)]), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-6)
    # A run that was killed after it stored averages, and before the checkpoint of that step, makes them again.
    (tmp_path / "DONE").unlink()
    shutil.rmtree(tmp_path / "checkpoints" / "10")
    assert train(load_config([CONFIG, *overrides]), tmp_path) == EXIT_OK
    again = store.load(10, (AVERAGES,))[AVERAGES]
    jax.tree.map(np.testing.assert_array_equal, again, kept)
    # One that was killed between the two the other way round stores what it lacks.
    shutil.rmtree(tmp_path / AVERAGES / "10")
    assert train(load_config([CONFIG, *overrides]), tmp_path) == EXIT_OK
    jax.tree.map(np.testing.assert_array_equal, store.load(10, (AVERAGES,))[AVERAGES], kept)
    sampler = TrainedSampler.open(tmp_path, ema=0.15)
    assert sampler.describe(0, {})["ema"] == 0.15
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), sampler.weights.params, kept[average_key(0.15)]
    )


def test_what_cannot_be_made_is_said(tmp_path):
    with pytest.raises(UserError, match="length 0.3 is impossible; .* above 0 and up to 0.28"):
        exponent(0.3)
    with pytest.raises(UserError, match="no average was stored at or before step 5"):
        combination([Snapshot(10, 0.1)], Snapshot(5, 0.1))
    with pytest.raises(UserError, match=r"config.ema.lengths=\(0.5,\): a moving average of length 0.5"):
        train(load_config([CONFIG, "--config.ema.lengths=(0.5,)"]), tmp_path / "run")
    with pytest.raises(UserError, match="a moving average of length '0.1' is impossible; lengths are deviations"):
        exponent("0.1")
    with pytest.raises(UserError, match="it was trained with config.ema.lengths=.., which keeps none"):
        synthesize(tmp_path, 0.1, 5)
