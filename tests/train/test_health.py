"""Updates that are not finite are noticed, named, and end the run or are passed over."""

import jax.numpy as jnp
import numpy as np
import pytest

from cli.errors import UserError
from train.health import LAG, PATIENCE, HealthCheck
from train.step import Health

PARAMS = {"net": {"a": np.zeros(2), "b": np.zeros(2), "c": np.zeros(2), "d": np.zeros(2), "e": np.zeros(2)}}
METRICS = {"loss": (jnp.float32(6), jnp.int32(2)), "learning_rate": (jnp.float32(1), jnp.int32(1))}


def verdict(loss=1.0, norms=(1, 1, 1, 1, 1), applied=True):
    return Health(loss=np.float32(loss), leaf_norms=np.asarray(norms, np.float32), applied=np.asarray(applied))


def test_the_first_update_that_is_not_finite_is_named():
    check = HealthCheck("stop", PARAMS, print)
    check.add(1, METRICS, verdict())
    check.add(2, METRICS, verdict(norms=(1, np.nan, 1, np.inf, 1)))
    for step in range(3, 2 + LAG):
        check.add(step, METRICS, verdict(loss=np.nan))
    with pytest.raises(UserError, match="step 2 is not finite: loss 3; the gradient is not finite at net/b, net/d;"):
        check.add(2 + LAG, METRICS, verdict())


def test_a_loss_alone_is_enough_and_many_paths_are_counted():
    check = HealthCheck("stop", PARAMS, print)
    check.add(1, METRICS, verdict(loss=np.inf))
    with pytest.raises(UserError, match="step 1 is not finite: loss 3; lower the learning rate"):
        check.settle(1)
    check = HealthCheck("stop", PARAMS, print)
    check.add(1, METRICS, verdict(norms=[np.nan] * 5))
    with pytest.raises(UserError, match="net/a, net/b, net/c and 2 more; lower"):
        check.settle(1)


def test_norms_whose_squares_overflow_are_not_finite_as_in_the_step():
    check = HealthCheck("stop", PARAMS, print)
    check.add(1, METRICS, verdict(norms=[3e38, 1, 1, 1, 1]))
    with pytest.raises(UserError, match="step 1"):
        check.settle(1)


def test_a_state_that_overflowed_is_not_saved():
    check = HealthCheck("stop", PARAMS, print)
    fine = {"net": {"a": jnp.ones(2), "n": jnp.int32(3)}}
    check.check_state(1, fine, {})
    with pytest.raises(UserError, match="step 2: params/net/a is no longer finite"):
        check.check_state(2, {"net": {**fine["net"], "a": jnp.asarray([1.0, jnp.inf])}}, {})
    with pytest.raises(UserError, match="step 3: variables/codebook is no longer finite"):
        check.check_state(3, fine, {"codebook": jnp.asarray(jnp.nan)})


def test_skipped_updates_are_reported_until_there_are_too_many():
    said = []
    check = HealthCheck("skip", PARAMS, said.append)
    for step in range(1, PATIENCE):
        check.add(step, METRICS, verdict(loss=np.nan, applied=False))
    check.add(PATIENCE, METRICS, verdict())
    check.settle(PATIENCE)
    assert len(said) == PATIENCE - 1 and said[0].startswith("warning: step 1 is not finite")
    for step in range(1, PATIENCE):
        check.add(PATIENCE + step, METRICS, verdict(loss=np.nan))
    check.settle(2 * PATIENCE - 1)
    check.add(2 * PATIENCE, METRICS, verdict(loss=np.nan))
    with pytest.raises(UserError, match=f"{PATIENCE} updates in a row"):
        check.settle(2 * PATIENCE)
