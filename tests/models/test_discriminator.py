"""The discriminator of patches: its sizes, how it starts, and how its statistics move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models

BIASED = ["conv_0", "norm_1", "norm_2", "output"]
LAYERS = ("conv_0", "conv_1", "conv_2", "output")


def count(tree) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("layers", "parameters", "sides"),
    [(3, 2_765_633, {256: 30, 128: 14, 64: 6, 24: 1}), (2, 663_361, {256: 62, 12: 1})],
)
def test_published_sizes(layers, parameters, sides):
    model = models.create_model("discriminator", layers=layers)
    tree = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs(1))
    assert count(tree["params"]) == parameters
    for size, side in sides.items():
        assert jax.eval_shape(model.apply, tree, jnp.zeros((2, size, size, 3))).shape == (2, side, side, 1)
    with pytest.raises(ValueError, match=f"{layers} layers needs {min(sides)} or more"):
        jax.eval_shape(model.apply, tree, jnp.zeros((2, min(sides) - 1, 256, 3)))


def test_how_it_starts_and_how_statistics_move():
    model = models.create_model("discriminator", layers=2, width=16)
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)), jnp.float32)
    tree = jax.jit(model.init)(jax.random.key(0), x)
    kernels = np.concatenate([np.ravel(tree["params"][name]["kernel"]) for name in LAYERS])
    gains = np.concatenate([tree["params"][f"norm_{i}"]["scale"] for i in (1, 2)])
    assert kernels.std() == pytest.approx(0.02, rel=0.05) and abs(kernels.mean()) < 1e-3
    assert gains.std() == pytest.approx(0.02, rel=0.3) and gains.mean() == pytest.approx(1, abs=0.01)
    bias = np.abs(tree["params"]["conv_0"]["bias"])
    assert 0.05 < bias.max() <= 48**-0.5
    assert [name for name in sorted(tree["params"]) if "bias" in tree["params"][name]] == BIASED

    @jax.jit
    def run(tree, x):
        return model.apply(tree, x), model.apply(tree, x, train=True, mutable=["batch_stats"])

    still, (moved, variables) = run(tree, x)
    before, after = tree["batch_stats"]["norm_1"], variables["batch_stats"]["norm_1"]
    first = jax.lax.conv_general_dilated(
        x, tree["params"]["conv_0"]["kernel"], (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    first = first + tree["params"]["conv_0"]["bias"]
    second = jax.lax.conv_general_dilated(
        jnp.where(first > 0, first, 0.2 * first),
        tree["params"]["conv_1"]["kernel"],
        *((2, 2), ((1, 1), (1, 1))),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    mean, var = second.mean(axis=(0, 1, 2)), second.var(axis=(0, 1, 2))
    np.testing.assert_allclose(after["mean"], 0.9 * before["mean"] + 0.1 * mean, atol=1e-6)
    np.testing.assert_allclose(after["var"], 0.9 * before["var"] + 0.1 * var, rtol=1e-4)
    assert np.abs(still - moved).max() > 1e-3
