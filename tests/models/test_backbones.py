"""What every diffusion backbone promises: `backbone(x_t, t, conditioning, train) -> prediction`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models.conditioning import Conditioning
from models.layers.attention import KeyLengths

from .random_parameters import random_parameters

UNET = {"image_size": 8, "in_channels": 3, "width": 8, "multipliers": (1, 2), "attention_levels": (), "blocks": 1}
UNET |= {"heads": 2, "groups": 4, "out_channels": 4, "num_classes": 4}
UVIT = {"image_size": 8, "patch_size": 2, "width": 16, "depth": 2, "heads": 2, "out_channels": 4, "num_classes": 4}
DIT = {"image_size": 8, "patch_size": 2, "width": 16, "depth": 2, "heads": 2, "out_channels": 4, "num_classes": 4}
# Name of a case -> (name of a model, its fields); a case reads tokens or labels, or both.
BACKBONES = {
    "unet of tokens and labels": ("unet", {**UNET, "attention": "transformer", "context_width": 6}),
    "uvit of tokens and labels": ("uvit", {**UVIT, "context_length": 5, "context_width": 6}),
    "dit of tokens and labels": ("dit", {**DIT, "context_width": 6}),
    "uvit of labels": ("uvit", {**UVIT, "time": "adaln", "long_skip": "add"}),
    "unet of labels": ("unet", {**UNET, "scale_shift": True, "resampler": "residual"}),
}
ALL = list(BACKBONES)
READ_TOKENS = [case for case in ALL if "tokens" in case]
READ_LABELS = [case for case in ALL if "labels" in case]


@dataclasses.dataclass
class Case:
    """A network with random parameters, two examples for it, and the network compiled."""

    model: Any
    params: Any
    x_t: Any
    t: Any
    conditioning: Conditioning

    def __post_init__(self):
        self.apply = jax.jit(
            lambda x_t, t, conditioning: self.model.apply({"params": self.params}, x_t, t, conditioning)
        )

    def __call__(self, **changes):
        """The prediction, some of the inputs changed."""
        inputs = {"x_t": self.x_t, "t": self.t}
        inputs = {name: changes.pop(name, value) for name, value in inputs.items()}
        return np.asarray(self.apply(*inputs.values(), self.conditioning.replace(**changes)))


@pytest.fixture(scope="module")
def cases():
    """Cases by name, made once each."""
    made = {}

    def get(case: str) -> Case:
        if case not in made:
            name, fields = BACKBONES[case]
            model = models.create_model(name, **fields)
            rng = np.random.default_rng(0)
            x_t, _, conditioning = jax.tree.map(
                lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), model.example_inputs(2)
            )
            if conditioning.tokens is not None:
                mask = np.ones(conditioning.tokens.shape[:2], bool)
                mask[0, 2:] = False
                conditioning = conditioning.replace(mask=jnp.asarray(mask))
            if conditioning.label is not None:
                conditioning = conditioning.replace(label=jnp.array([1, 2], jnp.int32))
            made[case] = Case(model, random_parameters(model), x_t, jnp.array([3.0, 700.0]), conditioning)
        return made[case]

    return get


@pytest.mark.parametrize("case", ALL)
def test_a_prediction_is_as_large_as_the_picture_and_float32(case, cases):
    network = cases(case)
    half = network.model.clone(dtype=jnp.bfloat16)
    inputs = (network.x_t, network.t, network.conditioning)
    for model in (network.model, half):
        shape = jax.eval_shape(model.apply, {"params": network.params}, *inputs)
        assert shape.shape[:3] == network.x_t.shape[:3] and shape.dtype == jnp.float32
    out = network()
    assert np.isfinite(out).all() and out.std() > 0.01


@pytest.mark.parametrize("case", ALL)
def test_the_time_matters(case, cases):
    network = cases(case)
    apart = np.abs(network(t=network.t + 1) - network())
    assert apart.reshape(2, -1).max(axis=1).min() > 1e-3


@pytest.mark.parametrize("case", READ_LABELS)
def test_the_label_matters(case, cases):
    network = cases(case)
    apart = np.abs(network(label=jnp.array([2, 2], jnp.int32)) - network())
    assert apart[0].max() > 1e-3 and apart[1].max() < 1e-6


@pytest.mark.parametrize("case", READ_TOKENS)
def test_only_tokens_in_sight_matter(case, cases):
    network = cases(case)
    tokens, before = network.conditioning.tokens, network()
    hidden = network(tokens=tokens.at[0, 2:].add(10.0))
    np.testing.assert_allclose(hidden, before, atol=1e-6)
    seen = np.abs(network(tokens=tokens.at[0, 1].add(1.0)) - before)
    assert seen[0].max() > 1e-3 and seen[1].max() < 1e-6
    unmasked = np.abs(network(mask=jnp.ones(tokens.shape[:2], bool)) - before)
    assert unmasked[0].max() > 1e-3 and unmasked[1].max() < 1e-6


@pytest.mark.parametrize("case", READ_TOKENS)
def test_without_a_mask_all_tokens_are_in_sight(case, cases):
    network = cases(case)
    everything = network(mask=jnp.ones(network.conditioning.mask.shape, bool))
    np.testing.assert_allclose(network(mask=None), everything, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("unet of tokens and labels", {}),
        ("unet of tokens and labels", {"remat": "full"}),
        ("uvit of tokens and labels", {}),
        ("uvit of tokens and labels", {"scan": True, "remat": "full"}),
        ("dit of tokens and labels", {"scan": True, "remat": "full"}),
    ],
    ids=str,
)
def test_lengths_hide_what_a_mask_hides(case, change, cases):
    """Prediction and gradients, however layers are run; an example without a token in sight among them.

    To the bit in the UNet, where the context is all that is attended to; elsewhere lengths move it behind the patches.
    """
    network = cases(case)
    lengths = jnp.array([0, 3])
    length = network.conditioning.tokens.shape[1]

    def run(model, mask):
        def loss(params, tokens):
            told = network.conditioning.replace(tokens=tokens, mask=mask)
            prediction = model.apply({"params": params}, network.x_t, network.t, told)
            return jnp.sum(prediction**2), prediction

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(network.params, network.conditioning.tokens)

    exact = case.startswith("unet")
    by_mask = run(network.model.clone(**change) if exact else network.model, jnp.arange(length) < lengths[:, None])
    by_lengths = run(network.model.clone(**change), KeyLengths(lengths))
    for mine, expected in zip(jax.tree.leaves(by_lengths), jax.tree.leaves(by_mask), strict=True):
        np.testing.assert_allclose(
            mine, expected, rtol=0 if exact else 1e-7, atol=0 if exact else 2e-5 * np.abs(expected).max()
        )
    gradient = by_lengths[0][1]
    for row, seen in enumerate(lengths):
        assert not np.any(gradient[row, seen:]) and np.all(np.any(gradient[row, :seen], axis=-1))


@pytest.mark.parametrize("case", ALL)
def test_examples_do_not_see_each_other(case, cases):
    network = cases(case)
    swapped = network(
        x_t=network.x_t.at[1].multiply(-2.0),
        t=network.t.at[1].set(5.0),
        **({} if network.conditioning.label is None else {"label": network.conditioning.label.at[1].set(3)}),
        **({} if network.conditioning.tokens is None else {"tokens": network.conditioning.tokens.at[1].add(1.0)}),
    )
    before = network()
    np.testing.assert_allclose(swapped[0], before[0], atol=1e-6)
    assert np.abs(swapped[1] - before[1]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL)
def test_a_gradient_reaches_every_parameter(case, cases):
    network = cases(case)
    target = jnp.asarray(np.random.default_rng(1).normal(size=network().shape), jnp.float32)

    @jax.jit
    def gradient(params):
        def loss(params):
            out = network.model.apply({"params": params}, network.x_t, network.t, network.conditioning)
            return jnp.mean((out - target) ** 2)

        return jax.grad(loss)(params)

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(network.params)):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-8, jax.tree_util.keystr(path)
