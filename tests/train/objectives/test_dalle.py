"""DALL-E's loss: closed forms and weights, pads, caption dropout, image tokens, learning and previews."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from cli.errors import UserError
from sample.samplers.dvae import from_uint8
from train.objectives.dalle import DalleObjective

T, N, TEXT_VOCAB, IMAGE_VOCAB = 4, 16, 11, 7
KEY = jax.random.key(0)


def make_objective(model=None, **loss):
    """A tiny objective over 4 x 4 tokens; keywords override its loss."""
    return DalleObjective.from_config(
        ConfigDict(
            {
                "models": {
                    "dalle": {
                        "name": "dalle",
                        "text_vocab_size": TEXT_VOCAB,
                        "text_length": T,
                        "image_vocab_size": IMAGE_VOCAB,
                        "image_grid": (4, 4),
                        "width": 32,
                        "depth": 2,
                        "heads": 2,
                        **(model or {}),
                    }
                },
                "frozen": {
                    "dvae": {
                        "name": "dvae",
                        "image_size": 8,
                        "vocab_size": IMAGE_VOCAB,
                        "encoder_hidden": 8,
                        "decoder_hidden": 8,
                        "decoder_init": 4,
                        "width_multipliers": (1,),
                        "patch_size": 2,
                        "input_kernel": 1,
                        "source": "random",
                        "part": "dvae",
                    }
                },
                "sample": {"guidance": 2.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
                "loss": {
                    "text_weight": 1 / 8,
                    "image_weight": 7 / 8,
                    "mask_pads": False,
                    "caption_dropout": 0.0,
                    **loss,
                },
            }
        )
    )


def random_tree(shapes, scale):
    """Random parameters without biases."""
    rng = np.random.default_rng(0)
    return jax.tree.map_with_path(
        lambda path, x: jnp.asarray(rng.normal(scale=scale, size=x.shape) * (path[-1].key != "bias"), x.dtype), shapes
    )


def params_of(objective, scale=0.3):
    """Random parameters of the objective's network; scale 0 gives uniform predictions."""
    return random_tree(jax.eval_shape(objective.init, KEY, {})[0], scale)


@functools.cache
def frozen():
    """A random image tokenizer that uses several codes."""
    tokenizer = make_objective().image_tokens.model
    shapes = jax.eval_shape(tokenizer.init, KEY, *tokenizer.example_inputs(1))["params"]
    return {"dvae": {"params": random_tree(shapes, 1.0), "variables": {}}}


def make_batch(size=4, tokens=True):
    """Captions with pads, and image tokens or pictures."""
    rng = np.random.default_rng(3)
    text = rng.integers(1, TEXT_VOCAB, (size, T))
    text[0, 1:] = 0
    batch = {"text": jnp.asarray(text, jnp.int32), "index": jnp.arange(50, 50 + size)}
    if tokens:
        return {**batch, "image_tokens": jnp.asarray(rng.integers(0, IMAGE_VOCAB, (size, N)), jnp.int32)}
    colors = 255 * rng.integers(0, 2, (size, 4, 4, 3))  # one per token
    return {**batch, "image": jnp.asarray(colors.repeat(2, axis=1).repeat(2, axis=2), jnp.uint8)}


def evaluate(objective, params, batch, train=False, rng=KEY):
    """(loss, metrics as (sum, count) of floats)."""
    run = jax.jit(lambda p, f, b, r: objective.loss(p, {}, f, b, r, jnp.array(0), train))
    loss, aux = run(params, frozen(), batch, rng)
    assert aux.variables == {}
    return float(loss), {name: (float(total), float(count)) for name, (total, count) in aux.metrics.items()}


def means(metrics):
    """Name -> logged value."""
    return {name: total / count for name, (total, count) in metrics.items()}


def test_loss_at_uniform_predictions_is_the_log_of_the_vocabularies():
    objective = make_objective()
    loss, metrics = evaluate(objective, params_of(objective, 0.0), make_batch())
    assert means(metrics)["text_loss"] == pytest.approx(np.log(TEXT_VOCAB + T), rel=1e-5)
    assert means(metrics)["image_loss"] == pytest.approx(np.log(IMAGE_VOCAB), rel=1e-5)
    assert loss == pytest.approx(np.log(TEXT_VOCAB + T) / 8 + np.log(IMAGE_VOCAB) * 7 / 8, rel=1e-5)
    assert means(metrics)["loss"] == pytest.approx(loss, rel=1e-5)
    other, _ = evaluate(make_objective(text_weight=0.5, image_weight=2.0), params_of(objective, 0.0), make_batch())
    assert other == pytest.approx(np.log(TEXT_VOCAB + T) / 2 + np.log(IMAGE_VOCAB) * 2, rel=1e-5)


@pytest.mark.parametrize("mask_pads", [False, True])
def test_loss_is_the_cross_entropy_of_the_network(mask_pads):
    objective = make_objective(mask_pads=mask_pads)
    params, batch = params_of(objective), make_batch()
    text, image = np.asarray(batch["text"]), np.asarray(batch["image_tokens"])
    logits = jax.jit(objective.model.apply)({"params": params["dalle"]}, batch["text"], batch["image_tokens"])
    text_nats, image_nats = np.zeros((4, T)), np.zeros((4, N))
    for b in range(4):
        for p in range(T):
            target = text[b, p] if text[b, p] else TEXT_VOCAB + p  # a pad is a token of its position
            text_nats[b, p] = -jax.nn.log_softmax(logits.text[b, p])[target]
        for j in range(N):
            image_nats[b, j] = -jax.nn.log_softmax(logits.image[b, j])[image[b, j]]
    counted = text > 0 if mask_pads else np.ones_like(text, bool)
    per_example = np.sum(text_nats * counted, 1) / np.sum(counted, 1) / 8 + np.mean(image_nats, 1) * 7 / 8
    loss, metrics = evaluate(objective, params, batch)
    assert loss == pytest.approx(np.mean(per_example), rel=1e-5)
    assert metrics["text_loss"] == pytest.approx((np.sum(text_nats * counted), np.sum(counted)), rel=1e-5)
    right = np.sum(np.argmax(logits.image, axis=-1) == image)
    assert metrics["image_accuracy"] == (right, 4 * N)


def test_pictures_become_tokens_inside_the_step():
    objective = make_objective()
    batch = make_batch(tokens=False)
    dvae = {"params": frozen()["dvae"]["params"]}
    tokens: jax.Array = objective.image_tokens.model.apply(dvae, from_uint8(batch["image"]), method="tokenize")
    assert len(np.unique(tokens)) > 2
    params = params_of(objective)
    given = {"text": batch["text"], "index": batch["index"], "image_tokens": tokens}
    assert evaluate(objective, params, batch) == evaluate(objective, params, given)


def test_dropped_captions_are_blank_and_their_text_is_not_learned():
    objective = make_objective(caption_dropout=0.999)
    params, batch = params_of(objective), make_batch()
    _, dropped = evaluate(objective, params, batch, train=True)
    _, blank = evaluate(objective, params, {**batch, "text": jnp.zeros_like(batch["text"])})
    assert dropped["image_loss"] == pytest.approx(blank["image_loss"], rel=1e-6)
    assert dropped["text_loss"] == (0, 0)
    assert dropped["loss"][0] == pytest.approx(7 / 8 * dropped["image_loss"][0] / N, rel=1e-5)
    _, kept = evaluate(objective, params, batch, train=False)
    assert kept["text_loss"][1] == 4 * T
    assert kept["image_loss"] != pytest.approx(blank["image_loss"], rel=1e-4)


def test_dropout_follows_the_example_and_losses_add_up_over_any_split():
    objective = make_objective(caption_dropout=0.5, mask_pads=True)
    params, batch = params_of(objective), make_batch(16)
    loss, whole = evaluate(objective, params, batch, train=True)
    assert 0 < whole["text_loss"][1] < np.sum(batch["text"] > 0)
    halves = [
        evaluate(objective, params, {k: v[rows] for k, v in batch.items()}, train=True)
        for rows in (slice(1, 16, 2), slice(0, 16, 2))
    ]
    assert loss == pytest.approx((halves[0][0] + halves[1][0]) / 2, rel=1e-5)
    for name, pair in whole.items():
        assert pair == pytest.approx(np.add(halves[0][1][name], halves[1][1][name]), rel=1e-5)
    _, other = evaluate(objective, params, batch, train=True, rng=jax.random.key(1))
    assert other["text_loss"] != whole["text_loss"]


def test_a_handful_of_sequences_is_learned_by_heart():
    objective = make_objective()
    batch = make_batch()
    params, variables = jax.jit(objective.init)(KEY, batch)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        gradient, aux = jax.grad(
            lambda p: objective.loss(p, variables, frozen(), batch, KEY, jnp.array(0), True), has_aux=True
        )(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, aux.metrics

    state, metrics = optimizer.init(params), {}
    for _ in range(80):
        params, state, metrics = step(params, state)
    final = means({name: (float(total), float(count)) for name, (total, count) in metrics.items()})
    assert final["image_accuracy"] == 1
    assert final["image_loss"] < 0.02
    # The first caption token cannot be foreseen: four captions differ in it, which costs ln 4 on a quarter of the text.
    assert final["text_loss"] == pytest.approx(np.log(4) / T, abs=0.02)


def test_bfloat16_gives_finite_gradients():
    objective = make_objective({"dtype": "bfloat16"})
    params = params_of(objective, 3.0)
    run = jax.value_and_grad(lambda p: objective.loss(p, {}, frozen(), make_batch(), KEY, jnp.array(0), True)[0])
    loss, gradient = jax.jit(run)(params)
    assert loss.dtype == jnp.float32 and loss > 10
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradient))


def test_preview_shows_samples_under_what_the_tokenizer_makes_of_the_truth():
    objective = make_objective()
    batch = make_batch(3, tokens=False)
    params = params_of(objective)
    preview = objective.preview(params, {}, frozen(), batch, KEY)["samples"]
    assert preview.images.shape == (6, 8, 8, 3) and preview.columns == 3
    np.testing.assert_array_equal(preview.labels, np.concatenate([batch["text"], batch["text"]]))
    tree = {"params": frozen()["dvae"]["params"]}
    tokens = objective.image_tokens.model.apply(tree, from_uint8(batch["image"]), method="tokenize")
    truth = objective.image_tokens.model.apply(tree, tokens, method="decode_tokens")
    np.testing.assert_allclose(preview.images[:3], (np.asarray(truth) + 1) * 127.5, atol=0.51)
    row_keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(KEY, batch["index"])
    drawn = objective.sampler(params, {}, frozen(), objective.sampler.request(np.asarray(batch["text"])), row_keys)
    np.testing.assert_allclose(preview.images[3:], (np.asarray(drawn["image"]) + 1) * 127.5, atol=0.51)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"image_grid": (2, 2)}}, r"image_grid is \(2, 2\), but config.frozen.dvae makes \(4, 4\) tokens"),
        ({"model": {"image_vocab_size": 8}}, "image_vocab_size is 8, but config.frozen.dvae has 7 codes"),
        ({"caption_dropout": 1.0}, "caption_dropout must be at least 0 and below 1, not 1.0"),
        ({"text_weight": -0.1}, "config.loss.text_weight must be at least 0, not -0.1"),
        ({"image_weight": float("nan")}, "config.loss.image_weight must be at least 0, not nan"),
        ({"text_weight": 0.0, "image_weight": 0.0}, "are both 0"),
    ],
)
def test_configs_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make_objective(**changes)
