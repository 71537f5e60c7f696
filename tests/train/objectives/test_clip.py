"""CLIP's losses against numpy, what the batch decides together, and what the objective refuses."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cli.errors import UserError
from configs.scenes.clip import get_config
from models.clip import ClipOutput
from train.objectives import create_objective
from train.objectives.clip import contrastive_logits, contrastive_loss, sigmoid_loss, similarity_matrix
from train.optimizer import apply_bounds


def debug_config(*, argument="debug", **changes):
    config = get_config(argument)
    with config.unlocked():
        for key, value in changes.items():
            group, name = key.split("__")
            config[group][name] = value
        config.models.clip.text_layers = 1
        if config.models.clip.image_tower == "resnet":
            config.models.clip.image_width = 8
    return config


def make_batch(config, size=6):
    rng = np.random.default_rng(0)
    text = rng.integers(1, 300, (size, config.data.text_length)).astype(np.int32)
    text[:, 7] = config.models.clip.text_end_id
    images = rng.integers(0, 256, (size, 32, 32, 3)).astype(np.uint8)
    return {"image": jnp.asarray(images), "text": jnp.asarray(text), "index": jnp.arange(size)}


def features(size=5, scale=20.0, bias=0.0):
    rng = np.random.default_rng(1)
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(2, size, 8)))
    return ClipOutput(
        image=jnp.asarray(image, jnp.float32),
        text=jnp.asarray(text, jnp.float32),
        logit_scale=jnp.float32(scale),
        logit_bias=jnp.float32(bias),
    )


def test_contrastive_loss_is_both_cross_entropies():
    out = features()
    logits = 20.0 * np.asarray(out.image, np.float64) @ np.asarray(out.text, np.float64).T
    p_text = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    p_image = np.exp(logits) / np.exp(logits).sum(axis=0, keepdims=True)
    expected = -(np.log(np.diag(p_text)) + np.log(np.diag(p_image))) / 2
    np.testing.assert_allclose(contrastive_loss(*contrastive_logits(out)), expected, rtol=1e-5, atol=1e-6)


def test_features_that_tell_nothing_lose_ln_b():
    out = features()
    same = jnp.ones_like(out.image) / math.sqrt(8)
    blind = ClipOutput(image=same, text=same, logit_scale=out.logit_scale, logit_bias=out.logit_bias)
    np.testing.assert_allclose(contrastive_loss(*contrastive_logits(blind)), math.log(5), rtol=1e-6)


def test_sigmoid_loss_is_a_yes_or_no_for_every_pair():
    out = features(scale=10.0, bias=-10.0)
    logits = 10.0 * np.asarray(out.image, np.float64) @ np.asarray(out.text, np.float64).T - 10
    yes = 1 / (1 + np.exp(-logits))
    expected = -np.where(np.eye(5) == 1, np.log(yes), np.log(1 - yes)).sum(axis=1)
    np.testing.assert_allclose(sigmoid_loss(contrastive_logits(out)[0]), expected, rtol=1e-5)


@pytest.mark.parametrize("argument", ["debug", "pair32"])
def test_loss_metrics_and_statistics(argument):
    config = debug_config(argument=argument)
    objective = create_objective(config)
    batch = make_batch(config)
    params, variables = jax.jit(objective.init)(jax.random.key(0), batch)
    assert bool(variables) == (argument == "pair32")
    rng = jax.random.key(1)
    loss_of = jax.jit(objective.loss, static_argnums=6)
    loss, aux = loss_of(params, variables, {}, batch, rng, jnp.int32(0), True)
    values = {name: float(total / count) for name, (total, count) in aux.metrics.items()}
    assert values["loss"] == pytest.approx(float(loss), rel=1e-6)
    assert values["logit_scale"] == pytest.approx(1 / 0.07) and values["no_learning"] == pytest.approx(math.log(6))
    assert 0 <= values["image_to_text"] <= 1 and 0 <= values["text_to_image"] <= 1
    moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (aux.variables, variables)), strict=True)]
    assert not moved or max(moved) > 0
    still = loss_of(params, variables, {}, batch, rng, jnp.int32(0), False)[1].variables
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), still, variables))


def test_a_caption_without_an_end_stops_the_run():
    config = debug_config()
    objective, batch = create_objective(config), make_batch(config)
    params, variables = jax.jit(objective.init)(jax.random.key(0), batch)
    batch["text"] = jnp.where(batch["text"] == config.models.clip.text_end_id, 5, batch["text"])
    loss_of = jax.jit(objective.loss, static_argnums=6)
    assert np.isnan(loss_of(params, variables, {}, batch, jax.random.key(1), jnp.int32(0), True)[0])
    with pytest.raises(UserError, match="caption 0 of 6 has no end token"):
        objective.sampler.request(text=np.asarray(batch["text"]))


def test_the_factor_of_the_cosines_stays_at_100_or_below():
    config = debug_config()
    params = {"clip": {"logit_scale": jnp.float32(4.7), "image": {"first_norm": {"scale": jnp.float32(9)}}}}
    bounded = apply_bounds(config.optimizer, params)
    assert float(jnp.exp(bounded["clip"]["logit_scale"])) == pytest.approx(100)
    assert bounded["clip"]["image"]["first_norm"]["scale"] == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh__microbatches": 2}, "microbatches=2 would train another network"),
        ({"loss__kind": "triplet"}, "kind='triplet' is unknown"),
        ({"loss__kind": "sigmoid"}, "set config.models.clip.logit_bias_init=-10.0 and logit_scale_init=2.3026"),
    ],
)
def test_what_cannot_be_trained_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        create_objective(debug_config(argument="single32", **changes))


@pytest.mark.parametrize("kind", ["contrastive", "sigmoid"])
def test_parts_of_a_batch_have_the_gradient_of_the_whole(kind):
    """Not that of their own losses: every picture is compared with the captions of all parts."""
    batch, values = None, []
    for parts in (1, 3):
        config = debug_config(loss__kind=kind, mesh__microbatches=parts)
        if kind == "sigmoid":
            with config.unlocked():
                config.models.clip.logit_bias_init = -10.0
        objective = create_objective(config)
        batch = batch or make_batch(config)
        params, _ = jax.jit(objective.init)(jax.random.key(0), batch)
        arguments = {}, {}, batch, jax.random.key(1), jnp.int32(0), True
        values.append(
            jax.jit(jax.value_and_grad(lambda p, o=objective, a=arguments: o.loss(p, *a), has_aux=True))(params)
        )
    ((loss, aux), gradient), ((same, same_aux), same_gradient) = values
    assert float(same) == pytest.approx(float(loss), rel=1e-5)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-5), aux.metrics, same_aux.metrics))
    assert float(jnp.abs(gradient["clip"]["logit_scale"])) > 0
    assert (float(jnp.abs(gradient["clip"].get("logit_bias", 0))) > 0) == (kind == "sigmoid")
    for one, two in zip(jax.tree.leaves(gradient), jax.tree.leaves(same_gradient), strict=True):
        np.testing.assert_allclose(two, one, atol=1e-5 * max(np.abs(one).max(), 1))


def test_parts_of_a_batch_need_less_memory():
    """Batch 64, in which activations outweigh parameters."""
    memory = []
    for parts in (1, 8):
        config = debug_config(mesh__microbatches=parts)
        objective = create_objective(config)
        batch = make_batch(config, 64)
        params, _ = jax.eval_shape(objective.init, jax.random.key(0), batch)
        arguments = {}, {}, batch, jax.random.key(1), jnp.int32(0), True
        gradient = jax.jit(jax.grad(lambda p, o=objective, a=arguments: o.loss(p, *a)[0]))
        memory.append(gradient.lower(params).compile().memory_analysis().temp_size_in_bytes)
    assert memory[1] < memory[0] / 3


def test_preview_is_a_matrix_with_its_pictures():
    config = debug_config()
    objective, batch = create_objective(config), make_batch(config, 3)
    params, variables = jax.jit(objective.init)(jax.random.key(0), batch)
    preview = objective.preview(params, variables, {}, batch, jax.random.key(1))["similarity"]
    assert preview.images.shape == (1, 4 * 32, 4 * 32, 3)
    np.testing.assert_array_equal(preview.images[0, :32, 64:96], batch["image"][1])
    matrix = similarity_matrix(np.asarray(batch["image"]), np.array([[0.0, 1.0, 0.5]] * 3))
    assert [int(matrix[0, 48, 48 + 32 * i, 0]) for i in range(3)] == [255, 0, 127]
