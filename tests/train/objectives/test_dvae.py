"""The discrete VAE's loss: the density, the KL and the schedules of the paper, and what training relies on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.integrate
from ml_collections import ConfigDict

from cli.errors import UserError
from train.objectives import dvae
from train.objectives.dvae import DiscreteVAEObjective

KEY = jax.random.key(0)


def objective(model=None, **loss):
    """A tiny objective; keywords override its loss and model."""
    return DiscreteVAEObjective.from_config(
        ConfigDict(
            {
                "models": {
                    "dvae": {
                        "name": "dvae",
                        "image_size": 8,
                        "vocab_size": 16,
                        "encoder_hidden": 16,
                        "decoder_hidden": 16,
                        "decoder_init": 8,
                        "width_multipliers": (1,),
                        "patch_size": 4,
                        "input_kernel": 1,
                        **(model or {}),
                    }
                },
                "loss": {
                    "reconstruction": "logit_laplace",
                    "kl_weight_start": 0.0,
                    "kl_weight": 6.6,
                    "kl_weight_steps": 10,
                    "temperature_start": 1.0,
                    "temperature": 0.0625,
                    "temperature_steps": 10,
                    "straight_through": False,
                    **loss,
                },
            }
        )
    )


@pytest.fixture
def batch():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8)
    return {"image": jnp.asarray(image), "index": jnp.arange(100, 108)}


def init(tiny, batch):
    """Parameters of the shapes of `tiny.init`, drawn by numpy, which saves compiling that."""
    params, variables = jax.eval_shape(tiny.init, KEY, batch)
    rng = np.random.default_rng(0)

    def draw(x):
        scale = 0.1 if x.ndim == 1 else np.prod(x.shape[:-1]) ** -0.5
        return jnp.asarray(rng.normal(size=x.shape, scale=scale), x.dtype)

    return jax.tree.map(draw, params), variables


# Compiled as a whole, which is much sooner than one operation at a time.
@functools.partial(jax.jit, static_argnums=0, static_argnames="train")
def run(tiny, params, variables, batch, step, rng=KEY, train=True):
    return tiny.loss(params, variables, {}, batch, rng, step, train)


@functools.partial(jax.jit, static_argnums=0)
def run_with_gradient(tiny, params, variables, batch, step):
    return jax.value_and_grad(tiny.loss, has_aux=True)(params, variables, {}, batch, KEY, step, True)


def mean(metric):
    return float(metric[0] / metric[1])


@pytest.mark.parametrize(("mu", "ln_b"), [(0.0, 0.0), (1.5, -1.0), (-2.0, 0.5), (0.3, -2.5)])
def test_density_integrates_to_one(mu, ln_b):
    @jax.jit
    def density(u):  # x = sigmoid(u) spreads the steep ends; dx = x (1 - x) du
        x = jax.nn.sigmoid(u)
        return jnp.exp(dvae.logit_laplace_log_density(x, jnp.float32(mu), jnp.float32(ln_b))) * x * (1 - x)

    b = np.exp(ln_b)
    total, _ = scipy.integrate.quad(
        density, max(mu - 14 * b, -12), min(mu + 14 * b, 12), points=[mu], epsabs=1e-5, limit=60
    )
    assert total == pytest.approx(1, abs=2e-3)


def test_density_at_a_point():
    """By hand: f = exp(-|logit(0.8) - 1| / 0.5) / (2 * 0.5 * 0.8 * 0.2)."""
    value = dvae.logit_laplace_log_density(jnp.float32(0.8), jnp.float32(1.0), jnp.log(jnp.float32(0.5)))
    assert float(jnp.exp(value)) == pytest.approx(np.exp(-abs(np.log(4) - 1) / 0.5) / 0.16, rel=1e-5)


def test_kl_is_zero_at_uniform_and_ln_v_per_position_at_one_hot():
    logits = jnp.full((2, 4, 4, 8192), 3.0)
    np.testing.assert_allclose(dvae.kl_to_uniform(logits), 0, atol=1e-3)
    one_hot = logits.at[:, :, :, 7].set(1e4)
    np.testing.assert_allclose(dvae.kl_to_uniform(one_hot), 16 * np.log(8192), rtol=1e-5)
    assert np.log(8192) == pytest.approx(9.01, abs=0.01)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.0), (1250, 6.6 * (1 - np.sqrt(0.5)) / 2), (2500, 3.3), (5000, 6.6), (90_000, 6.6)],
)
def test_published_kl_weight(step, expected):
    assert float(dvae.cosine_schedule(step, 0.0, 6.6, 5000)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("step", "expected"), [(0, 1.0), (75_000, 0.53125), (150_000, 0.0625), (3_000_000, 0.0625)])
def test_published_temperature(step, expected):
    assert float(dvae.cosine_schedule(jnp.int32(step), 1.0, 1 / 16, 150_000)) == pytest.approx(expected, abs=1e-5)


def test_loss_is_the_published_sum(batch):
    """Mean reconstruction + beta / 192 * mean KL per position at the published 192 pixel-channels per token."""
    tiny = objective({"patch_size": 8})  # 8 x 8 x 3 = 192 pixel-channels, one token
    params, variables = init(tiny, batch)
    loss, aux = run(tiny, params, variables, batch, 5)
    kl_weight = mean(aux.metrics["kl_weight"])
    assert kl_weight == pytest.approx(3.3)
    assert mean(aux.metrics["temperature"]) == pytest.approx(0.53125)
    expected = mean(aux.metrics["reconstruction"]) + kl_weight / 192 * mean(aux.metrics["kl"])
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert mean(aux.metrics["reconstruction_bits"]) == pytest.approx(mean(aux.metrics["reconstruction"]) / np.log(2))


def test_noise_of_an_example_does_not_depend_on_the_batch_split(batch):
    tiny = objective()
    params, variables = init(tiny, batch)

    def mse(part):
        _, aux = run(tiny, params, variables, part, 3)
        return np.array([float(x) for x in aux.metrics["mse255_soft"]])

    halves = [jax.tree.map(lambda x, s=s: x[s], batch) for s in (slice(0, 3), slice(3, 8))]
    np.testing.assert_allclose(mse(halves[0]) + mse(halves[1]), mse(batch), rtol=1e-5)
    other = mse({**batch, "index": batch["index"] + 1})
    assert abs(other[0] - mse(batch)[0]) > 1e-3


def test_evaluation_has_no_noise_and_scores_what_stage_two_sees(batch):
    tiny = objective()
    params, variables = init(tiny, batch)
    first, aux = run(tiny, params, variables, batch, 0, train=False)
    second, _ = run(tiny, params, variables, batch, 0, jax.random.key(9), train=False)
    assert float(first) == float(second)
    tree = {"params": params["dvae"]}
    images = batch["image"] / 127.5 - 1
    tokens = jax.jit(functools.partial(tiny.model.apply, method="tokenize"))(tree, images)
    decoded = np.asarray(jax.jit(functools.partial(tiny.model.apply, method="decode_tokens"))(tree, tokens))
    error = np.mean(((decoded + 1) * 127.5 - np.asarray(batch["image"], np.float32)) ** 2)
    assert mean(aux.metrics["mse255_hard"]) == pytest.approx(error, rel=1e-4)
    p = np.bincount(np.asarray(tokens).ravel(), minlength=16) / tokens.size
    assert mean(aux.metrics["code_usage"]) == pytest.approx(np.mean(p > 0))
    assert mean(aux.metrics["perplexity"]) == pytest.approx(np.exp(-np.sum(p[p > 0] * np.log(p[p > 0]))), rel=1e-4)


def test_straight_through_decodes_one_hot_codes_and_trains_the_encoder(batch):
    """At temperature 1 soft and hard codes differ; with beta 0 all of the encoder's gradient comes through them."""
    hard, soft = (objective(straight_through=x, kl_weight=0.0, temperature=1.0) for x in (True, False))
    params, variables = init(hard, batch)
    kernel = params["dvae"]["decoder"]["input"]["kernel"]
    params["dvae"]["decoder"]["input"]["kernel"] = kernel * 8  # so that the code matters at initialization
    values = []
    for each in (hard, soft):
        (value, _), grads = run_with_gradient(each, params, variables, batch, 0)
        values.append(float(value))
        for leaf in jax.tree.leaves(grads):
            assert np.all(np.isfinite(leaf))
        assert np.any(grads["dvae"]["encoder"]["output"]["kernel"] != 0)
    assert abs(values[0] - values[1]) > 1e-4


@pytest.mark.parametrize("reconstruction", ["logit_laplace", "l2"])
def test_a_few_steps_reduce_the_loss(reconstruction, batch):
    tiny = objective(reconstruction=reconstruction, kl_weight=0.01)
    params, variables = init(tiny, batch)
    optimizer = optax.adam(3e-3)
    state = optimizer.init(params)

    @jax.jit
    def train(params, state, step):
        (loss, _), grads = run_with_gradient(tiny, params, variables, batch, step)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for step in range(40):
        params, state, loss = train(params, state, jnp.int32(step))
        losses.append(float(loss))
    assert losses[-1] < losses[0] - (0.01 if reconstruction == "l2" else 0.1)


def test_preview_shows_originals_soft_and_hard(batch):
    tiny = objective()
    params, variables = init(tiny, batch)
    preview = tiny.preview(params, variables, {}, batch, KEY)["reconstruction"]
    assert preview.images.shape == (24, 8, 8, 3)
    assert preview.images.dtype == np.uint8
    assert preview.columns == 8
    np.testing.assert_array_equal(preview.images[:8], batch["image"])
    hard = tiny.model.apply({"params": params["dvae"]}, batch["image"] / 127.5 - 1, method="tokenize")
    decoded = tiny.model.apply({"params": params["dvae"]}, hard, method="decode_tokens")
    np.testing.assert_allclose(preview.images[16:], np.asarray((decoded + 1) * 127.5), atol=0.51)
    assert np.any(preview.images[8:16] != preview.images[16:])


def test_a_wrong_setting_is_a_user_error():
    with pytest.raises(UserError, match="reconstruction='l1' is unknown; choose one of logit_laplace, l2"):
        objective(reconstruction="l1")
    with pytest.raises(UserError, match="config.loss.temperature must be above 0"):
        objective(temperature=0.0)
