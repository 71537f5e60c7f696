"""Rules, schedules, clipping, decay masks, bounds and moving averages."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from einops import rearrange

from cli.errors import UserError
from configs.common import get_defaults
from train.optimizer import apply_bounds, complete_rules, create_optimizer, create_schedule, update_ema
from train.state import start_average
from weights import power_averages

PARAMS = {
    "image": {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}},
    "text": {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}},
}


def optimizer_config(**values):
    config = get_defaults()
    with config.unlocked():
        for key, value in values.items():
            config.optimizer[key] = value
        config.optimizer.schedule.name = "constant"
        config.optimizer.schedule.peak = 0.1
    return config.optimizer


def update(config, gradients, params=PARAMS):
    optimizer, _ = create_optimizer(config, params, steps=10)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    return updates


def test_one_rule_is_adamw():
    config = optimizer_config(weight_decay=0.3, no_decay="bias$")
    gradients = jax.tree.map(lambda x: x * 0.5, PARAMS)
    mask = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "bias", PARAMS)
    reference = optax.adamw(0.1, weight_decay=0.3, mask=mask)
    expected, _ = reference.update(gradients, reference.init(PARAMS), PARAMS)
    for ours, theirs in zip(jax.tree.leaves(update(config, gradients)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_the_first_matching_rule_wins_and_may_override_anything():
    rules = ({"pattern": "^text/", "schedule": {"peak": 0.0}}, {"pattern": ".*", "transform": "sgd"})
    updates = update(optimizer_config(rules=rules), jax.tree.map(jnp.ones_like, PARAMS))
    assert (updates["text"]["dense"]["kernel"] == 0).all()
    np.testing.assert_allclose(updates["image"]["dense"]["kernel"], -0.1, rtol=1e-6)


def test_each_rule_clips_its_own_norm():
    rules = ({"pattern": "^text/"}, {"pattern": ".*"})
    config = optimizer_config(rules=rules, transform="sgd", clip_norm=1.0)
    gradients = {**jax.tree.map(lambda x: 1e-3 * x, PARAMS), "text": jax.tree.map(lambda x: 1e3 * x, PARAMS["text"])}
    updates = update(config, gradients)
    np.testing.assert_allclose(optax.tree.norm(updates["text"]), 0.1, rtol=1e-5)
    # The huge gradient of one part leaves the other's as it was.
    np.testing.assert_allclose(updates["image"]["dense"]["bias"], -1e-4, rtol=1e-5)


def test_rules_that_do_not_fit_are_errors():
    with pytest.raises(UserError, match="no optimizer rule matches parameter text/dense/bias"):
        create_optimizer(optimizer_config(rules=({"pattern": "kernel"}, {"pattern": "image"})), PARAMS, 10)
    with pytest.raises(UserError, match="matches no parameter"):
        create_optimizer(optimizer_config(rules=({"pattern": ".*"}, {"pattern": "audio"})), PARAMS, 10)
    with pytest.raises(UserError, match="may set"):
        create_optimizer(optimizer_config(rules=({"pattern": ".*", "learning_rate": 1},)), PARAMS, 10)
    with pytest.raises(UserError, match="choose float32, bfloat16 or"):
        create_optimizer(optimizer_config(mu_dtype="float16"), PARAMS, 10)
    with pytest.raises(UserError, match="adamw, lion, muon, sgd"):
        create_optimizer(optimizer_config(transform="adam2"), PARAMS, 10)


@pytest.mark.parametrize("transform", ["adamw", "lion", "muon"])
def test_the_first_moment_may_be_kept_in_bfloat16(transform):
    """Moments of two updates by float32 gradients; the second moment, whose updates are small, stays in float32."""
    params = {"kernel": jnp.ones((2, 3))}
    gradients = {"kernel": jax.random.normal(jax.random.key(0), (2, 3))}
    moments, updates = {}, {}
    for dtype in ("float32", "bfloat16"):
        optimizer, _ = create_optimizer(optimizer_config(transform=transform, mu_dtype=dtype), params, steps=10)
        state = optimizer.init(params)
        for _ in range(2):
            updates[dtype], state = optimizer.update(gradients, state, params)
        moments[dtype] = [x for x in jax.tree.leaves(state) if x.shape == (2, 3)]
    second = [jnp.float32] if transform == "adamw" else []
    assert [x.dtype for x in moments["bfloat16"]] == [jnp.bfloat16, *second]
    for fine, coarse in zip(moments["float32"], moments["bfloat16"], strict=True):
        np.testing.assert_allclose(coarse.astype(np.float32), fine, rtol=2**-7)
    np.testing.assert_allclose(updates["bfloat16"]["kernel"], updates["float32"]["kernel"], rtol=0.05, atol=1e-3)


def muon(params, gradients):
    return update(optimizer_config(transform="muon", b1=0.95), gradients, params)


@pytest.mark.parametrize(
    ("name", "shape", "matrices"),
    [
        ("mlp/up/kernel", (6, 15), "a b -> 1 a b"),
        ("conv/kernel", (3, 3, 2, 12), "a b c d -> 1 (a b c) d"),
        ("attention/out/kernel", (2, 4, 20), "a b c -> 1 (a b) c"),
        ("attention/query/kernel", (6, 4, 5), "a b c -> 1 a (b c)"),
        ("attention/key_value/kernel", (6, 2, 4, 5), "a two b c -> two a (b c)"),
        ("attention/query_key_value/kernel", (6, 3, 4, 5), "a three b c -> three a (b c)"),
        ("mlp/up_gate/kernel", (6, 2, 15), "a two b -> two a b"),
    ],
)
def test_muon_makes_each_matrix_of_a_kernel_orthogonal(name, shape, matrices):
    outer, inner, leaf = name.rsplit("/", 2) if name.count("/") == 2 else ("x", *name.split("/"))
    params = {outer: {inner: {leaf: jnp.ones(shape)}}}
    gradient = jax.random.normal(jax.random.key(0), shape)
    (updated,) = jax.tree.leaves(muon(params, {outer: {inner: {leaf: gradient}}}))
    for step, matrix in zip(rearrange(updated, matrices), rearrange(gradient, matrices), strict=True):
        left, _, right = np.linalg.svd(matrix, full_matrices=False)
        turned = left.T @ np.asarray(step) @ right.T  # diagonal, as the gradient's singular vectors are kept
        strength = -np.diag(turned) / (0.1 * 0.2 * max(matrix.shape) ** 0.5)
        assert (strength > 0.6).all() and (strength < 1.3).all()  # five iterations come no nearer to 1
        np.testing.assert_allclose(turned - np.diag(np.diag(turned)), 0, atol=1e-5)


def test_muon_follows_nesterovs_momentum():
    params = {"mlp": {"up": {"kernel": jnp.ones((4, 6))}}}
    first, second = ({"mlp": {"up": {"kernel": jax.random.normal(jax.random.key(seed), (4, 6))}}} for seed in (1, 2))
    optimizer, _ = create_optimizer(optimizer_config(transform="muon", b1=0.6), params, steps=10)
    _, state = optimizer.update(first, optimizer.init(params), params)
    updates, _ = optimizer.update(second, state, params)
    # The sum m_2 = g_2 + 0.6 g_1, and one step ahead of it.
    momentum = jax.tree.map(lambda a, b: 0.6 * (b + 0.6 * a) + b, first, second)
    np.testing.assert_allclose(*map(jax.tree.leaves, (updates, muon(params, momentum))), rtol=1e-3, atol=1e-5)


def test_muon_refuses_what_is_no_kernel():
    with pytest.raises(UserError, match="muon' is of kernels, and parameter text/dense/bias is none"):
        muon({"text": PARAMS["text"]}, {"text": PARAMS["text"]})


def schedule(steps=100, **values):
    base = {"name": "warmup_cosine", "peak": 1.0, "end": 0.1, "warmup_steps": 10, "decay_steps": 0, "factor": 0.5}
    return create_schedule({**base, "boundaries": (), **values}, steps)


def test_warmup_cosine_goes_through_its_known_points():
    rate = schedule()
    assert [float(rate(step)) for step in (0, 5, 10, 55, 100, 200)] == pytest.approx([0, 0.5, 1, 0.55, 0.1, 0.1])


def test_decay_steps_end_the_schedule_before_the_run():
    assert float(schedule(steps=1000, decay_steps=100)(100)) == pytest.approx(0.1)


def test_steps_down_multiplies_at_each_boundary():
    rate = schedule(name="warmup_steps_down", boundaries=(50, 80))
    assert [float(rate(step)) for step in (5, 49, 51, 79, 81)] == pytest.approx([0.5, 1, 0.5, 0.5, 0.25])


def test_steps_down_act_inside_the_warm_up_and_twice_where_they_stand_twice():
    rate = schedule(name="warmup_steps_down", boundaries=(5,))
    assert [float(rate(step)) for step in (4, 5, 7, 9, 10, 11)] == pytest.approx([0.4, 0.25, 0.35, 0.45, 0.5, 0.5])
    rate = schedule(name="warmup_steps_down", boundaries=(50, 50))
    assert [float(rate(step)) for step in (49, 50)] == pytest.approx([1, 0.25])
    assert float(schedule(name="warmup_steps_down", warmup_steps=0)(0)) == 1


def test_a_constant_rate_is_warmed_up_too():
    assert [float(schedule(name="constant")(step)) for step in (0, 5, 10, 99)] == pytest.approx([0, 0.5, 1, 1])
    assert float(schedule(name="constant", warmup_steps=0)(0)) == 1


def test_impossible_schedules_are_errors():
    with pytest.raises(UserError, match="warmup_steps=10 must be below the 10 steps of the schedule"):
        schedule(steps=10)
    with pytest.raises(UserError, match="schedule.warmup_steps=10 must not be above the 9 steps of the run"):
        schedule(steps=9, name="constant")
    with pytest.raises(UserError, match="unknown schedule"):
        schedule(name="cosine")
    for key in ("peak", "end", "factor"):
        for value in (-1.0, float("nan"), float("inf")):
            with pytest.raises(UserError, match=f"config.optimizer.schedule.{key} must be at least 0, not {value}"):
                schedule(**{key: value})
    with pytest.raises(UserError, match="warmup_steps must be at least 0, not -3"):
        schedule(warmup_steps=-3)
    with pytest.raises(UserError, match="boundaries must be at least 1 .*, not -5"):
        schedule(name="warmup_steps_down", boundaries=(50, -5))
    with pytest.raises(UserError, match="boundaries must be at least 1 and below 2147483648, not 9223372036854775808"):
        schedule(name="warmup_steps_down", boundaries=(2**63,))
    with pytest.raises(UserError, match="boundaries has 1.5, which is no step"):
        schedule(name="warmup_steps_down", boundaries=(1.5,))


@pytest.mark.parametrize(
    ("key", "values"),
    [
        *(("b1", (value,)) for value in (1.5, 1.0, -0.1, float("nan"))),
        *(("b2", (value,)) for value in (1.0, 2.0, float("nan"))),
        *(("eps", (value,)) for value in (-1.0, 0.0, float("nan"))),
        *(("weight_decay", (value,)) for value in (-1.0, float("nan"), float("inf"))),
        *(("clip_norm", (value,)) for value in (-1.0, float("nan"), float("inf"))),
    ],
)
def test_impossible_numbers_of_a_rule_are_named(key, values):
    for value in values:
        with pytest.raises(UserError, match=f"config.optimizer.{key} must be .*, not {value}"):
            complete_rules(optimizer_config(**{key: value}), 10)
        with pytest.raises(UserError, match=rf"config.optimizer.rules\[1\].{key} must be .*, not {value}"):
            complete_rules(optimizer_config(rules=({"pattern": "a"}, {"pattern": ".*", key: value})), 10)


def test_impossible_bounds_and_patterns_are_named():
    for low, high in ((1.0, 0.5), (math.inf, math.inf), (-math.inf, -math.inf), (0.0, math.nan)):
        with pytest.raises(UserError, match=f"bounds of 'a' are impossible: no number is from {low} to {high}"):
            complete_rules(optimizer_config(bounds=(("a", low, high),)), 10)
    complete_rules(optimizer_config(bounds=(("a", -math.inf, 0.5),)), 10)  # one side alone
    with pytest.raises(UserError, match=r"rules\[0\].pattern: '\(' is not a pattern"):
        complete_rules(optimizer_config(rules=({"pattern": "("},)), 10)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rules": (3,)}, r"rules\[0\] is 3; it must be a dict such as"),
        ({"rules": ({"pattern": ".*", "schedule": None},)}, r"rules\[0\].schedule is None; it must be a dict"),
        ({"rules": ({"pattern": ".*", "schedule": "constant"},)}, r"rules\[0\].schedule is 'constant'"),
        (
            {"rules": ({"pattern": ".*", "schedule": {"paek": 1}},)},
            "schedule has no paek; it may set .*peak",
        ),
        ({"rules": ({"pattern": ".*", "schedule": {"name": []}},)}, r"unknown schedule \[\]"),
        ({"rules": ({"pattern": ".*", "schedule": {"boundaries": 5}},)}, "boundaries is 5; it must be a tuple"),
        ({"rules": ({"pattern": ".*", "transform": []},)}, r"unknown optimizer transform \[\]"),
        ({"rules": ({"pattern": b"a"},)}, r"rules\[0\].pattern: b'a' is not a pattern of paths"),
        ({"bounds": ((1, 2),)}, r"bounds\[0\] is \(1, 2\); it must be \(pattern, low, high\)"),
        ({"bounds": (("a", "x", 2),)}, r"bounds\[0\] is \('a', 'x', 2\)"),
        ({"bounds": (("a", 0, 1), (1, 1, 2))}, r"bounds\[1\]: 1 is not a pattern of paths"),
    ],
)
def test_rules_and_bounds_of_another_form_are_named(values, message):
    with pytest.raises(UserError, match=message):
        complete_rules(optimizer_config(**values), 10)


def test_bounds_project_only_what_they_name():
    config = optimizer_config(bounds=(("image/.*bias", 0.0, 0.5),))
    params = apply_bounds(config, PARAMS)
    assert (params["image"]["dense"]["bias"] == 0.5).all()
    assert (params["text"]["dense"]["bias"] == 1).all()


def ema_config(**values):
    config = get_defaults().ema
    with config.unlocked():
        config.update({"decay": 0.9, "warm_up": False, **values})
    return config


def test_ema_moves_every_few_steps_by_its_decay():
    ema, params = {"a": jnp.zeros(2)}, {"a": jnp.ones(2)}
    config = ema_config(every=25)
    assert (update_ema(config, ema, params, jnp.int32(24))["a"] == 0).all()
    np.testing.assert_allclose(update_ema(config, ema, params, jnp.int32(25))["a"], 0.1, rtol=1e-5)


def test_ema_warm_up_forgets_the_initialization():
    ema, params = {"a": jnp.zeros(2)}, {"a": jnp.ones(2)}
    moved = update_ema(ema_config(warm_up=True), ema, params, jnp.int32(1))["a"]
    np.testing.assert_allclose(moved, 1 - 2 / 11, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_ema_moves_whatever_dtype_the_parameters_have(dtype):
    start, params = {"a": jnp.ones(1, dtype)}, {"a": jnp.full(1, 2, dtype)}
    average, config = start_average(start), ema_config(decay=0.999, warm_up=False)
    assert average["a"].dtype == jnp.float32
    moved = jax.lax.fori_loop(0, 5000, lambda i, ema: update_ema(config, ema, params, i + 1), average)
    assert float(moved["a"][0]) == pytest.approx(2 - 0.999**5000, abs=1e-3)
    copied = update_ema(ema_config(paths="^b"), average, params, jnp.int32(1))
    assert copied["a"].dtype == jnp.float32 and copied["a"][0] == 2


def test_ema_is_not_kept_in_less_than_float32():
    params = {"a": jnp.ones(1, jnp.bfloat16)}
    with pytest.raises(UserError, match="moving average in bfloat16 stops moving"):
        update_ema(ema_config(), params, params, jnp.int32(1))


def test_ema_copies_what_its_paths_leave_out():
    ema, params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}, {"a": jnp.ones(2), "b": jnp.ones(2)}
    moved = update_ema(ema_config(paths="^a"), ema, params, jnp.int32(1))
    np.testing.assert_allclose(moved["a"], 0.1, rtol=1e-5)
    assert (moved["b"] == 1).all()


def test_what_is_said_of_a_part_holds_for_its_low_rank_pairs():
    """And a rule may be of pairs alone."""
    params = {"part": {"kernel": jnp.ones(2)}, "lora": {"part": {"down": jnp.ones(2)}, "other": {"down": jnp.ones(2)}}}
    config = optimizer_config(
        rules=({"pattern": "^part/", "transform": "sgd"}, {"pattern": "^lora/", "transform": "sgd", "clip_norm": 1e-9}),
        bounds=(("^part/", 0.0, 0.5),),
    )
    pairs = update(config, params, params)["lora"]
    assert (pairs["part"]["down"] < -0.05).all() and (pairs["other"]["down"] > -1e-6).all()
    bounded = apply_bounds(config, params)["lora"]
    assert (bounded["part"]["down"] == 0.5).all() and (bounded["other"]["down"] == 1).all()
    decay = {"transform": "sgd", "weight_decay": 1.0, "no_decay": "^part/"}
    decayed = update(
        optimizer_config(rules=({"pattern": ".*", **decay},)), jax.tree.map(jnp.zeros_like, params), params
    )
    assert (decayed["lora"]["part"]["down"] == 0).all() and (decayed["lora"]["other"]["down"] < 0).all()
    averaged = update_ema(ema_config(paths="^part/"), jax.tree.map(jnp.zeros_like, params), params, jnp.int32(1))
    np.testing.assert_allclose(averaged["lora"]["part"]["down"], 0.1, rtol=1e-5)
    assert (averaged["lora"]["other"]["down"] == 1).all()
    (kept,) = power_averages.start(params, (0.1,), "^part/").values()
    assert kept["lora"].keys() == {"part"}
