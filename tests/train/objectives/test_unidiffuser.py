"""UniDiffuser's loss: its parts' shares, independent times, and what its config must be."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cli.config import load_config
from cli.errors import UserError
from configs.scenes import unidiffuser
from models.unidiffuser import UniDiffuser
from train.objectives import create_objective
from weights.sources import load_frozen, load_part

from ...models.random_parameters import random_parameters

CONFIG = "configs/scenes/unidiffuser.py:debug"
ASKED = []


class Zeros(UniDiffuser):
    """A network that predicts nothing; what it is asked is in `ASKED`."""

    def apply(self, variables, x, t_image, t_text, data_type):
        assert data_type is None
        ASKED.append((x, t_image, t_text))
        return jax.tree.map(jnp.zeros_like, x)


@functools.cache
def asked_once():
    """(objective, metrics, loss by reduction, what the network was asked) of one batch of sixteen."""
    objective, frozen = create_objective(unidiffuser.get_config("debug")), load_frozen(unidiffuser.get_config("debug"))
    rng, names = np.random.default_rng(0), {field.name for field in dataclasses.fields(objective.model)}
    fields = names - {"parent", "name"}
    network = Zeros(**{name: getattr(objective.model, name) for name in fields})
    text = np.zeros((16, 24), np.int32)
    text[:, :4] = [351, 5, 6, 352]
    image = rng.integers(0, 255, (16, 32, 32, 3), np.uint8)
    batch = {"image": jnp.asarray(image), "text": jnp.asarray(text), "index": jnp.arange(16)}
    losses = {}
    for reduction in ("elements", "parts"):
        process = dataclasses.replace(objective.sampler.process, prediction="eps", weighting="uniform")
        sampler = dataclasses.replace(objective.sampler, model=network, process=process)
        tried = dataclasses.replace(objective, sampler=sampler, reduction=reduction, clip_weight=3.0)

        def loss(frozen, batch, tried=tried):
            variables = {"unidiffuser": {"statistics": tried.sampler.statistics}}
            value, aux = tried.loss(
                {"unidiffuser": {}}, variables, frozen, batch, jax.random.key(0), jnp.array(0), True
            )
            return value, aux.metrics, ASKED[-1]

        value, metrics, asked = jax.jit(loss)(frozen, batch)
        losses[reduction] = float(value), {name: float(a / b) for name, (a, b) in metrics.items()}, asked
    return objective, losses


def test_entries_count_alike_or_parts_do():
    objective, losses = asked_once()
    sizes = {name: int(np.prod(shape)) for name, shape in objective.sampler.shapes.items()}
    weights = {"image": 1.0, "clip": 3.0, "text": 1.0}
    for reduction, (loss, metrics, _) in losses.items():
        shares = sizes if reduction == "elements" else dict.fromkeys(sizes, 1)
        total = sum(shares[name] * weights[name] * metrics[f"mse_{name}"] for name in sizes)
        assert loss == pytest.approx(total / sum(shares.values()), rel=1e-5)
        assert metrics["mse_image"] == pytest.approx(1, abs=0.1)  # of noise alone


def test_times_of_both_sides_are_drawn_independently_from_1_to_1000():
    _, losses = asked_once()
    x, t_image, t_text = losses["elements"][2]
    times = np.stack([t_image, t_text])
    assert times.min() >= 1 and times.max() <= 1000 and np.all(times == np.round(times))
    assert np.count_nonzero(t_image == t_text) <= 1 and np.abs(np.corrcoef(times)[0, 1]) < 0.8
    assert len({float(value) for value in t_image}) > 12
    assert np.isfinite(np.asarray(x.text)).all()


def test_training_tells_the_kind_of_data():
    frozen, losses = {"first_stage": load_part(unidiffuser.get_config("debug").frozen.first_stage).trees()}, {}
    for kind in (-1, 0, 1):
        overrides = ("models.unidiffuser.data_types=2", f"data.data_type={kind}", "scales.clip=1.0", "scales.text=1.0")
        config = load_config([f"--config={CONFIG}", *(f"--config.{each}" for each in overrides)])
        objective = create_objective(config)
        height, width, channels = objective.sampler.shapes["image"]
        batch = {
            "latent_moments": jnp.ones((2, height, width, 2 * channels)),
            "image_features": jnp.ones((2, *objective.sampler.shapes["clip"])),
            "caption_latents": jnp.ones((2, *objective.sampler.shapes["text"])),
            "index": jnp.arange(2),
        }
        params = {"unidiffuser": random_parameters(objective.model)}
        told = jax.jit(lambda params, batch, objective=objective: objective.loss(
            params, {}, frozen, batch, jax.random.key(0), jnp.array(0), True
        )[0])  # fmt: skip
        losses[kind] = float(told(params, batch))
    assert losses[-1] == losses[1] and abs(losses[0] - losses[1]) > 1e-4


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("models.unidiffuser.text_width=5", "text_width 5, not 16"),
        ("process.time_shift=0", "UniDiffuser's time 0 is that of data"),
        ("loss.reduction=sum", "config.loss.reduction='sum' is unknown"),
        ("sample.mode=both", "mode='both' is unknown; choose one of '' for what is given, text_to_image"),
        ("sample.steps=0", "with 0 steps"),
        ("scales.clip=-1.0", "factors are above 0"),
        ("scales.examples=0", "to be measured of 1 example or more"),
        ("data.data_type=0", "config.data.data_type=0 is of a UniDiffuser that tells kinds of data apart"),
        ("sample.data_type=1", "config.sample.data_type=1 is of a UniDiffuser that tells kinds of data apart"),
    ],
)
def test_what_does_not_go_together_is_one_line(override, said):
    config = load_config([f"--config={CONFIG}", f"--config.{override}"])
    with pytest.raises(UserError, match=said):
        create_objective(config)


def test_a_mode_reads_what_it_is_of_and_is_inferred_from_what_is_given():
    sampler = create_objective(unidiffuser.get_config("debug")).sampler
    text = np.zeros((1, 24), np.int32)
    text[:, :3] = [351, 5, 352]
    image = np.zeros((1, 32, 32, 3), np.uint8)
    assert sampler.request()["modes"] == ("joint",)
    assert sampler.request(text)["modes"] == ("text_to_image",)
    assert sampler.request(image=image)["modes"] == ("image_to_text",)
    assert sampler.request(text, image)["modes"] == ("text_to_image", "image_to_text")
    assert sampler.request(image=image, mode="image_variation")["modes"] == ("image_variation",)
    with pytest.raises(UserError, match="mode text_variation reads --prompt, and --image is given"):
        sampler.request(image=image, mode="text_variation")
    with pytest.raises(UserError, match="mode joint reads neither --prompt nor --image, and --prompt is given"):
        sampler.request(text, mode="joint")
