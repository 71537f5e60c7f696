"""The denoising objective: its value, what is dropped, what examples share, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from cli.errors import UserError
from configs.paper import uvit
from configs.scenes import clip, ddpm_uvit
from configs.toy import swiss_roll
from train.metric_writer import means
from train.objectives import create_objective
from weights.sources import load_frozen


def points_objective(**process):
    config = swiss_roll.get_config("debug")
    with config.unlocked():
        config.process.update(process)
    return create_objective(config)


def pixels_objective(**loss):
    config = ddpm_uvit.get_config("debug")
    with config.unlocked():
        config.loss.update(loss)
        config.models.denoiser.update({"width": 16, "heads": 2, "image_size": 8})
        config.models.text.update({"width": 16, "text_vocab_size": 20})
        config.models.denoiser.context_width = 16
    return create_objective(config)


def points(count=256):
    rng = np.random.default_rng(0)
    return {"point": jnp.asarray(rng.normal(size=(count, 2)), jnp.float32), "index": jnp.arange(count)}


def pictures(count=6):
    rng = np.random.default_rng(0)
    return {
        "image": jnp.asarray(rng.integers(0, 256, (count, 8, 8, 3)), jnp.uint8),
        "text": jnp.asarray(rng.integers(1, 20, (count, 12)), jnp.int32),
        "index": jnp.arange(count),
    }


@pytest.fixture(scope="module")
def pixels():
    objective = pixels_objective(dropout=0.0)
    params, variables = jax.jit(objective.init)(jax.random.key(0), pictures())
    # What starts at zero would hide what it multiplies.
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return objective, jax.tree.unflatten(structure, noise), variables


def evaluate(objective, params, batch, train=True, step=0):
    loss = jax.jit(objective.loss, static_argnums=6)
    return loss(params, {}, {}, batch, jax.random.key(7), jnp.int32(step), train)


def test_a_network_that_predicts_nothing_loses_the_noise():
    objective, batch = points_objective(), points(2000)
    params, variables = jax.jit(objective.init)(jax.random.key(0), batch)  # its last layer starts at 0
    assert variables == {}
    loss, aux = evaluate(objective, params, batch)
    assert float(loss) == pytest.approx(1, abs=0.1)  # E eps^2
    sums = {name: float(total) for name, (total, _) in aux.metrics.items()}
    counts = {name: float(count) for name, (_, count) in aux.metrics.items()}
    quarters = [f"mse_q{number}" for number in (1, 2, 3, 4)]
    assert sum(sums[name] for name in quarters) == pytest.approx(sums["mse"], rel=1e-5)
    assert sum(counts[name] for name in quarters) == 2000
    # A chain of five times: two of them in the first quarter, one in each other.
    assert counts["mse_q2"] == pytest.approx(400, abs=4 * 400**0.5)


def test_weights_scale_the_loss_and_not_the_error():
    batch = points()
    plain, weighted = points_objective(), points_objective(weighting="min_snr", gamma=1e-3)
    params, _ = jax.jit(plain.init)(jax.random.key(0), batch)
    (_, plain_aux), (loss, aux) = evaluate(plain, params, batch), evaluate(weighted, params, batch)
    assert float(aux.metrics["mse"][0]) == pytest.approx(float(plain_aux.metrics["mse"][0]), rel=1e-6)
    assert float(loss) < 0.5 * float(aux.metrics["mse"][0]) / 256


def test_an_example_s_noise_is_its_own(pixels):
    objective, params, _ = pixels
    batch = pictures()
    _, whole = evaluate(objective, params, batch)
    _, first = evaluate(objective, params, jax.tree.map(lambda leaf: leaf[:2], batch))
    _, rest = evaluate(objective, params, jax.tree.map(lambda leaf: leaf[2:], batch))
    parts = float(first.metrics["loss"][0] + rest.metrics["loss"][0])
    assert float(whole.metrics["loss"][0]) == pytest.approx(parts, rel=1e-4)


def test_captions_matter_and_are_dropped_in_training_alone(pixels):
    objective, params, _ = pixels
    batch, blank = pictures(), {**pictures(), "text": jnp.zeros((6, 12), jnp.int32)}
    told, untold = (float(evaluate(objective, params, rows)[0]) for rows in (batch, blank))
    assert told != pytest.approx(untold, rel=1e-4)
    dropping = pixels_objective(dropout=0.999999)
    assert float(evaluate(dropping, params, batch)[0]) == pytest.approx(untold, rel=1e-5)
    assert float(evaluate(dropping, params, batch, train=False)[0]) == pytest.approx(told, rel=1e-5)


def test_both_networks_are_trained(pixels):
    objective, params, _ = pixels
    batch = pictures()
    gradient = jax.jit(jax.grad(lambda p: objective.loss(p, {}, {}, batch, jax.random.key(7), jnp.int32(0), True)[0]))(
        params
    )
    assert set(gradient) == {"denoiser", "text"}
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient["text"]["token"]))


def test_learned_variances_add_the_bound_and_move_nothing_else():
    config = ddpm_uvit.get_config("debug")
    with config.unlocked():
        config.models.denoiser.update({"width": 16, "heads": 2, "image_size": 8, "context_width": 16})
        config.models.text.update({"width": 16, "text_vocab_size": 20})
        config.process.update({"variance": "learned", "prediction": "eps", "weighting": "uniform"})
        config.models.denoiser.out_channels = 6
        config.sample.sampler = "ddpm"
    objective, batch = create_objective(config), pictures()
    params, _ = jax.jit(objective.init)(jax.random.key(0), batch)
    loss, aux = evaluate(objective, params, batch)
    metrics = {name: float(total / count) for name, (total, count) in aux.metrics.items()}
    assert float(loss) == pytest.approx(metrics["mse"] + metrics["bound"], rel=1e-4)  # T = 1000

    def bound_alone(p):
        _, aux = objective.loss(p, {}, {}, batch, jax.random.key(7), jnp.int32(0), True)
        return aux.metrics["bound"][0]

    kernel = jax.jit(jax.grad(bound_alone))(params)["denoiser"]["image_conv"]["kernel"]
    assert float(jnp.abs(kernel[..., :3]).max()) == 0
    assert float(jnp.abs(kernel[..., 3:]).max()) > 0


def test_previews_are_pictures(pixels):
    objective, params, _ = pixels
    preview = objective.preview(params, {}, {}, pictures(3), jax.random.key(0))["samples"]
    assert preview.images.shape == (3, 8, 8, 3)
    assert preview.labels.shape == (3, 12)
    toy = points_objective()
    toy_params, _ = jax.jit(toy.init)(jax.random.key(0), points(4))
    picture = toy.preview(toy_params, {}, {}, points(4), jax.random.key(0))["samples"].images
    assert picture.dtype == np.uint8
    assert picture.min() < 250  # something is drawn


def test_a_frozen_clip_reads_captions_and_is_not_trained():
    reader, config = clip.get_config("debug"), ddpm_uvit.get_config("debug")
    with config.unlocked():
        del config.models.text
        config.data.text_length = length = reader.data.text_length
        config.models.denoiser.update({"width": 16, "heads": 2, "image_size": 8})
        config.models.denoiser.update({"context_length": length, "context_width": reader.models.clip.text_width})
        config.frozen.clip = ConfigDict({**reader.models.clip.to_dict(), "source": "random", "part": "clip"})
        config.loss.dropout = 0.999999
    objective, frozen = create_objective(config), jax.jit(lambda: load_frozen(config))()
    end = reader.models.clip.text_end_id
    text, blank = np.zeros((2, 6, length), np.int32)
    text[:, 0], text[:, 1], text[:, 2] = end - 1, range(5, 11), end
    blank[:, 0], blank[:, 1] = end - 1, end
    batch = {**pictures(), "text": jnp.asarray(text)}
    params, _ = jax.jit(objective.init)(jax.random.key(0), batch)
    assert set(params) == {"denoiser"}
    loss = jax.jit(objective.loss, static_argnums=6)

    def value(text, train):
        return float(loss(params, {}, frozen, {**batch, "text": text}, jax.random.key(7), jnp.int32(0), train)[0])

    told, untold = value(batch["text"], False), value(jnp.asarray(blank), False)
    assert abs(told - untold) > 1e-6
    # What training drops is the caption between the ends, not the ends.
    assert value(batch["text"], True) == pytest.approx(untold, abs=1e-7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss.dropout": 1.0}, "config.loss.dropout must be at least 0 and below 1, not 1.0"),
        ({"data.text_length": 0}, "config.data.text_length is 0"),
        ({"process.prediction": "score"}, "config.process is impossible: unknown prediction 'score'"),
        ({"process.schedule.kind": "sqrt"}, "config.process is impossible: unknown betas 'sqrt'"),
        ({"sample.sampler": "euler_a"}, "unknown sampler 'euler_a'; choose one of ddpm"),
        ({"sample.steps": 5000}, "5000 steps are not between 1 and"),
        ({"sample.guidance": -1.0}, "guidance=-1.0 is impossible"),
        ({"sample.eta": 0.5}, "eta=0.5 belongs to the sampler ddim"),
    ],
)
def test_an_impossible_config_is_refused(changes, message):
    config = ddpm_uvit.get_config("debug")
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        create_objective(config)


@pytest.mark.parametrize(
    ("channels", "variance", "numbers"),
    [
        (3, "small", ()),
        (6, "learned", ()),
        (1, "small", (1, 3)),
        (2, "learned", (2, 6)),
        (6, "small", (6, 3)),
        (3, "learned", (3, 6)),
    ],
)
def test_the_network_makes_the_channels_that_the_process_needs(channels, variance, numbers):
    config = ddpm_uvit.get_config("debug")
    with config.unlocked():
        config.models.denoiser.update({"width": 16, "heads": 2, "image_size": 8, "out_channels": channels})
        config.models.text.update({"width": 16, "text_vocab_size": 20})
        config.models.denoiser.context_width = 16
        config.process.update({"variance": variance})
    objective = create_objective(config)

    def trace():
        params, _ = jax.eval_shape(objective.init, jax.random.key(0), pictures())
        arguments = params, {}, {}, pictures(), jax.random.key(0), jnp.int32(0)
        return jax.eval_shape(lambda *values: objective.loss(*values, True)[0], *arguments)

    if not numbers:
        trace()
        return
    with pytest.raises(UserError, match="the denoiser makes {} channels, and the process needs {}".format(*numbers)):
        trace()


def test_points_have_no_variance_to_learn():
    objective = points_objective(variance="learned")
    params, _ = objective.init(jax.random.key(0), points())
    with pytest.raises(UserError, match="the denoiser makes 2 channels, and the process needs 4"):
        objective.loss(params, {}, {}, points(), jax.random.key(0), jnp.int32(0), True)
    with pytest.raises(UserError, match="the denoiser makes 2 channels"):
        objective.sampler(params, {}, {}, objective.sampler.request(), jax.random.split(jax.random.key(0), 4))


def test_a_quarter_without_examples_counts_none():
    objective = points_objective()
    params, _ = objective.init(jax.random.key(0), points(1))
    _, aux = objective.loss(params, {}, {}, points(1), jax.random.key(0), jnp.int32(0), True)
    counts = [float(aux.metrics[f"mse_q{number}"][1]) for number in range(1, 5)]
    assert sorted(counts) == [0, 0, 0, 1]
    assert sum(name.startswith("mse_q") for name in means(aux.metrics)) == 1


def classes_objective(label_field="background", classes=4, **loss):
    config = uvit.get_config("debug")
    with config.unlocked():
        config.loss.update(loss)
        config.data.label_field = label_field
        config.models.denoiser.update({"width": 16, "image_size": 8, "num_classes": classes, "dtype": "float32"})
    return create_objective(config)


def test_classes_reach_the_loss_and_are_dropped_for_the_last():
    objective = classes_objective()
    batch = {key: value for key, value in pictures().items() if key != "text"}
    params, _ = jax.jit(objective.init)(jax.random.key(0), batch)

    def loss(objective, labels, train=True):
        return float(evaluate(objective, params, {**batch, "label": jnp.asarray(labels, jnp.int32)}, train)[0])

    told = loss(objective, [0, 1, 2, 0, 1, 2])
    assert told != pytest.approx(loss(objective, [0, 1, 2, 0, 1, 1]), rel=1e-5)  # one class is wrong
    none = loss(objective, [3] * 6)
    dropping = classes_objective(dropout=0.999999)
    assert loss(dropping, [0, 1, 2, 0, 1, 2]) == pytest.approx(none, rel=1e-5)
    assert loss(dropping, [0, 1, 2, 0, 1, 2], train=False) == pytest.approx(told, rel=1e-5)


def test_classes_and_their_field_belong_together():
    with pytest.raises(UserError, match="one of 4 classes, and config.data.label_field is empty"):
        classes_objective(label_field="")
    with pytest.raises(UserError, match="label_field='background' has no use: the denoiser has no classes"):
        classes_objective(classes=0)


def test_dropout_needs_something_to_drop():
    config = swiss_roll.get_config("debug")
    with config.unlocked():
        config.loss.dropout = 0.1
    with pytest.raises(UserError, match="nothing to drop"):
        create_objective(config)
