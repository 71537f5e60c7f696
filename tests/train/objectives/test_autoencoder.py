"""First stages: terms in closed form, who receives which gradient, and what moves in a step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from cli.config import load_config
from cli.errors import UserError
from models.autoencoder import posterior
from train.objectives.autoencoder import (
    AutoencoderObjective,
    adaptive_weight,
    codebook_loss,
    hinge_loss,
    kl_to_standard_normal,
)
from train.objectives.contract import example_keys

from ...models.random_parameters import random_parameters

KEY = jax.random.key(0)
SIZE = 16
FIRST_STAGE = {"image_size": SIZE, "width": 4, "multipliers": (1,), "blocks": 1, "groups": 2, "latent_channels": 2}
KL_LOSS = {"perceptual_weight": 0.0, "discriminator_start": 2}
VQ_LOSS = {**KL_LOSS, "reduction": "mean", "output_variance": False}


def config(kind="kl", adversary=True, lpips=False, fields=None, **loss):
    first_stage = {"name": f"autoencoder_{kind}", **FIRST_STAGE, **({"vocab_size": 8} if kind == "vq" else {})}
    judge = {"name": "discriminator", "layers": 1, "width": 4, "image_size": SIZE}
    return ConfigDict(
        {
            "objective": "autoencoder",
            "models": {
                "autoencoder": {**first_stage, **(fields or {})},
                **({"discriminator": judge} if adversary else {}),
            },
            "frozen": {"lpips": {"name": "lpips", "widths": (2, 2, 2, 2, 2), "image_size": SIZE}} if lpips else {},
            "loss": {**(KL_LOSS if kind == "kl" else VQ_LOSS), **loss},
        }
    )


def random_batch(size=3):
    image = np.random.default_rng(0).integers(0, 256, (size, SIZE, SIZE, 3), np.uint8)
    return {"image": jnp.asarray(image), "index": jnp.arange(size)}


def init(objective, batch):
    """Parameters drawn by numpy, which saves compiling what draws them, and variables as they start."""
    _, variables = jax.eval_shape(objective.init, KEY, batch)
    starts = {"var": 1.0, "square": 1.0}
    variables = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.full(leaf.shape, starts.get(path[-1].key, 0.0)), variables
    )
    params = {"autoencoder": random_parameters(objective.model)}
    if objective.discriminator is not None:
        params["discriminator"] = random_parameters(objective.discriminator, seed=1)
    if objective.output_variance:
        params["output"] = {"log_variance": jnp.asarray(0.3)}
    return params, variables


# Compiled as a whole, which is much sooner than one operation at a time.
@functools.partial(jax.jit, static_argnums=0)
def run(objective, params, variables, frozen, batch, step):
    def loss(params):
        return objective.loss(params, variables, frozen, batch, KEY, step, True)

    return jax.value_and_grad(loss, has_aux=True)(params)


def values(aux):
    return {name: float(total / count) for name, (total, count) in aux.metrics.items()}


def assert_trees_close(one, other, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), one, other)


@pytest.mark.parametrize(("mean", "variance", "expected"), [(1, 1, 32), (0, 4, 51.6386), (0, 1, 0)])
def test_kl_in_closed_form(mean, variance, expected):
    shape = (2, 4, 4, 4)
    kl = kl_to_standard_normal(jnp.full(shape, float(mean)), jnp.full(shape, np.log(variance)))
    np.testing.assert_allclose(kl, [expected] * 2, atol=1e-4)


def test_both_forms_of_commitment():
    z, codes = jnp.array([[0.3, 0.6]]), jnp.array([[0.0, 1.0]])

    def loss(z, codes, legacy):
        return jnp.sum(codebook_loss(z, codes, 0.25, legacy))

    for legacy, to_outputs, to_codes in ((True, [0.3, -0.4], [-0.075, 0.1]), (False, [0.075, -0.1], [-0.3, 0.4])):
        value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(z, codes, legacy)
        assert float(value) == pytest.approx(0.15625)
        np.testing.assert_allclose(gradients, [[to_outputs], [to_codes]], atol=1e-6)


def test_hinge_and_weight_in_closed_form():
    real, fake = jnp.array([2.0, 0.5, -1.0]), jnp.array([-3.0, 0.0, 1.0])
    assert float(hinge_loss(real, fake)) == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3))
    assert float(adaptive_weight(jnp.asarray(3.0), jnp.asarray(0.4999))) == pytest.approx(6)
    assert float(adaptive_weight(jnp.asarray(3.0), jnp.asarray(0.0))) == 1e4
    assert jax.grad(lambda x: adaptive_weight(x, 2 * x))(1.0) == 0


@pytest.fixture(scope="module")
def step():
    """One step after the start and one before it, of a KL model."""
    objective = AutoencoderObjective.from_config(config(kl_weight=1e-3))
    batch = random_batch()
    params, variables = init(objective, batch)
    after, before = (run(objective, params, variables, {}, batch, step) for step in (2, 1))
    return objective, batch, params, variables, after, before


def reconstruct(objective, own, batch):
    """(x', its features, KL, latents) with the step's noise."""
    tree = {"params": own}
    mean, log_variance = posterior(objective.model.apply(tree, batch["image"] / 127.5 - 1, method="encode"))
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(example_keys(KEY, batch))
    z = mean + jnp.exp(log_variance / 2) * noise
    features = objective.model.apply(tree, z, method="features")
    return (
        objective.model.apply(tree, features, method="pixels"),
        *(features, kl_to_standard_normal(mean, log_variance), z),
    )


def test_each_side_receives_its_own_gradient(step):
    """Against a plain differentiation of the published lines, the weight a number in them."""
    objective, batch, params, variables, ((loss, aux), gradients), _ = step
    images = batch["image"] / 127.5 - 1
    found = values(aux)

    def judge(tree, images):
        tree = {"params": tree, **variables["discriminator"]}
        return objective.discriminator.apply(tree, images, train=True, mutable=["batch_stats"])[0]

    def nll(outputs, s):
        return jnp.sum(jnp.abs(images - outputs) / jnp.exp(s) + s) / len(images)

    @jax.jit
    def reference(params, weight):
        def lines(own, s):
            outputs, features, kl, _ = reconstruct(objective, own, batch)
            side = nll(outputs, s) + 1e-3 * jnp.mean(kl) - weight * jnp.mean(judge(params["discriminator"], outputs))
            return side, (features, outputs)

        own, s = params["autoencoder"], params["output"]["log_variance"]
        (side, (features, outputs)), to_own = jax.value_and_grad(lines, argnums=(0, 1), has_aux=True)(own, s)
        other, to_judge = jax.value_and_grad(lambda tree: hinge_loss(judge(tree, images), judge(tree, outputs)))(
            params["discriminator"]
        )
        return side, other, (*to_own, to_judge), features

    side, other, (own, s, judged), features = reference(params, found["adaptive_weight"])
    assert float(loss) == pytest.approx(float(side + other), rel=1e-5) == found["loss"]
    assert_trees_close(gradients["autoencoder"], own, 1e-5 * float(jnp.abs(own["decoder"]["output"]["kernel"]).max()))
    assert_trees_close(gradients["discriminator"], judged, 1e-5)
    assert float(gradients["output"]["log_variance"]) == pytest.approx(float(s), rel=1e-5)

    @jax.jit
    def norms(last):
        def pixels(kernel):
            tree = {"params": {"decoder": {"output": {**last, "kernel": kernel}}}}
            return objective.model.apply(tree, features, method="pixels")

        def g(kernel):
            return -jnp.mean(judge(params["discriminator"], pixels(kernel)))

        log_variance = params["output"]["log_variance"]
        terms = (lambda kernel: nll(pixels(kernel), log_variance), g)
        return [jnp.linalg.norm(jnp.ravel(jax.grad(term)(last["kernel"]))) for term in terms]

    one, two = (float(norm) for norm in norms(params["autoencoder"]["decoder"]["output"]))
    assert [found["nll_gradient_norm"], found["generator_gradient_norm"]] == pytest.approx([one, two], rel=1e-4)
    assert found["adaptive_weight"] == pytest.approx(0.5 * one / (two + 1e-4), rel=1e-4)


def test_nothing_of_the_other_side_before_the_start(step):
    *_, ((_, aux), gradients), ((loss, before), early) = step
    found, first = values(aux), values(before)
    assert loss == pytest.approx(first["nll"] + 1e-3 * first["kl"], rel=1e-5)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(early["discriminator"]))
    assert first["adaptive_weight"] == found["adaptive_weight"] > 0  # computed all the same
    assert first["discriminator"] == found["discriminator"] > 0
    differs = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), early["autoencoder"], gradients["autoencoder"])
    assert min(jax.tree.leaves(differs)) > 0


def test_batch_statistics_move_once_a_step(step):
    """By momentum 0.9, towards the mean of those of pictures and those of reconstructions."""
    objective, batch, params, variables, ((_, aux), _), _ = step
    before = variables["discriminator"]

    @jax.jit
    def statistics_of_both(params):
        tree = {"params": params["discriminator"], **jax.tree.map(jnp.zeros_like, before)}
        both = (batch["image"] / 127.5 - 1, reconstruct(objective, params["autoencoder"], batch)[0])
        passes = [objective.discriminator.apply(tree, x, train=True, mutable=["batch_stats"])[1] for x in both]
        return jax.tree.map(lambda tenth: 10 * tenth, passes)

    real, fake = statistics_of_both(params)
    expected = jax.tree.map(lambda old, one, other: 0.9 * old + 0.1 * (one + other) / 2, before, real, fake)
    assert_trees_close(aux.variables["discriminator"], expected, 1e-5)
    assert jax.tree.structure(aux.variables) == jax.tree.structure(variables)


def test_latents_are_measured_anew_over_all_batches(step):
    objective, batch, params, variables, _, _ = step
    other = {**batch, "image": batch["image"] // 2}
    assert objective.measured == 10_000

    @jax.jit
    def run(params, stale):
        moved = stale
        for number, each in enumerate((batch, other)):
            moved = objective.measure(params, moved, {}, each, KEY, jnp.asarray(number))
        return moved, [reconstruct(objective, params["autoencoder"], each)[-1] for each in (batch, other)]

    stale = jax.tree.map(lambda leaf: leaf + 3, variables)  # of other weights
    moved, drawn = run(params, stale)
    found, z = moved["autoencoder"]["statistics"]["latents"], jnp.stack(drawn)
    np.testing.assert_allclose(
        [found["mean"], found["square"], found["count"]], [z.mean(), (z**2).mean(), 2], rtol=1e-5
    )
    assert_trees_close(moved["discriminator"], stale["discriminator"], 0)
    assert objective.has_measured(moved) and not objective.has_measured(variables)


def test_lpips_stands_beside_every_pixel():
    objective = AutoencoderObjective.from_config(config(adversary=False, lpips=True, perceptual_weight=0.7))
    images, outputs = (
        jnp.asarray(np.random.default_rng(i).uniform(-1, 1, (2, 16, 16, 3)), jnp.float32) for i in (0, 1)
    )
    tree = {"params": jax.tree.map(jnp.abs, random_parameters(objective.perceptual))}
    nll, terms = jax.jit(objective._likelihood)({"lpips": tree}, images, outputs, jnp.asarray(0.3))
    distance = jax.jit(objective.perceptual.apply)(tree, images, outputs)
    errors = jnp.abs(images - outputs) + 0.7 * distance[:, None, None, None]
    assert float(nll) == pytest.approx(float(jnp.sum(errors / np.exp(0.3) + 0.3) / 2), rel=1e-5)
    np.testing.assert_allclose(terms["perceptual"], distance, rtol=1e-5)


def test_published_factors_and_the_number_of_measured_pictures_can_be_given():
    for more, scale, measured in (([], None, 64), (["--config.models.autoencoder.latent_scale=0.3"], 0.3, 0)):
        options = ["--config=configs/scenes/autoencoder.py", "--config.loss.measured_examples=64", *more]
        objective = AutoencoderObjective.from_config(load_config(options))
        assert (objective.model.latent_scale, objective.measured) == (scale, measured)


def test_a_quantized_one_means_over_pixels_and_draws_its_codes():
    fields = {"latent_scale": 1.0}  # nothing is measured
    objective = AutoencoderObjective.from_config(config("vq", fields=fields, adversary=False))
    batch = random_batch()
    params, variables = init(objective, batch)
    assert variables == {}
    (loss, aux), gradients = run(objective, params, variables, {}, batch, 0)
    tree, images = {"params": params["autoencoder"]}, batch["image"] / 127.5 - 1
    embedding = tree["params"]["codebook"]["embedding"]

    @jax.jit
    def reference(tree):
        z = objective.model.apply(tree, images, method="encode")
        tokens = jnp.argmin(jnp.sum(jnp.square(z[..., None, :] - embedding), axis=-1), axis=-1)
        return z, tokens, objective.model.apply(tree, embedding[tokens], method="decode")

    z, tokens, outputs = reference(tree)
    q = 1.25 * jnp.mean(jnp.square(embedding[tokens] - z))
    assert float(loss) == pytest.approx(float(jnp.mean(jnp.abs(images - outputs)) + q), rel=1e-5)
    found = values(aux)
    assert found["codebook"] == pytest.approx(float(q), rel=1e-5)
    assert found["code_usage"] == len(np.unique(tokens)) / 8
    # The codebook has the gradient of its own term alone.
    pulled = jnp.zeros_like(embedding).at[tokens].add(0.25 * 2 * (embedding[tokens] - z) / z.size)
    np.testing.assert_allclose(gradients["autoencoder"]["codebook"]["embedding"], pulled, atol=1e-6)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients["autoencoder"]["encoder"]["output"]))


def test_evaluation_moves_nothing_and_draws_nothing(step):
    objective, batch, params, variables, *_ = step
    evaluate = jax.jit(lambda key: objective.loss(params, variables, {}, batch, key, jnp.asarray(5), False))
    (one, aux), (other, _) = evaluate(KEY), evaluate(jax.random.key(1))
    assert one == other
    assert_trees_close(aux.variables, variables, 0)
    found = values(aux)
    assert "adaptive_weight" not in found
    expected = found["nll"] + 1e-3 * found["kl"] + found["discriminator"]
    assert float(one) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reduction": "none"}, "reduction='none' is unknown; choose one of sum, mean"),
        ({"commitment": 0.25}, "config.loss.commitment has no use beside an 'autoencoder_kl'"),
        ({"kind": "vq", "kl_weight": 1e-6}, "config.loss.kl_weight has no use beside an 'autoencoder_vq'"),
        ({"perceptual_weight": 1.0}, "perceptual_weight is 1.0, and config.frozen.lpips names no network"),
        ({"discriminator_weight": -1.0}, "discriminator_weight must be at least 0"),
        (
            {"fields": {"multipliers": (1, 1), "image_size": 15}},
            "image_size is 15, and reconstructions are of 14 pixels",
        ),
    ],
)
def test_a_wrong_setting_is_a_user_error(changes, message):
    with pytest.raises(UserError, match=message):
        AutoencoderObjective.from_config(config(**changes))
