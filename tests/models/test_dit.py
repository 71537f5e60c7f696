"""DiT: published sizes, how it starts, where its patches are, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from cost.flops import matrix_flops
from models.conditioning import Conditioning
from models.dit import DiT
from models.layers.embeddings import grid_embedding

KEY = jax.random.key(0)
TINY = {"image_size": 8, "patch_size": 2, "width": 16, "depth": 2, "heads": 2, "num_classes": 5, "context_width": 6}
LATENT = {"image_size": 32, "in_channels": 4, "out_channels": 8, "num_classes": 1001}
SIZES = {
    "S": {"width": 384, "depth": 12, "heads": 6},
    "B": {"width": 768, "depth": 12, "heads": 12},
    "L": {"width": 1024, "depth": 24, "heads": 16},
    "XL": {"width": 1152, "depth": 28, "heads": 16},
}


def shapes(model):
    return jax.eval_shape(model.init, KEY, *model.example_inputs(1))["params"]


@pytest.mark.parametrize(
    ("size", "patch_size", "parameters", "gmacs"),
    [
        ("S", 2, 32_963_360, 6.06),
        ("B", 2, 130_512_416, 23.01),
        ("L", 2, 458_102_816, 80.70),
        ("XL", 2, 675_129_632, 118.62),
        ("S", 4, None, 1.41),
        ("B", 4, None, 5.57),
        ("L", 4, None, 19.70),
        ("XL", 4, None, 29.04),
        ("S", 8, None, 0.358),
        ("B", 8, None, 1.418),
        ("L", 8, None, 5.011),
        ("XL", 8, None, 7.392),
    ],
)
def test_published_sizes(size, patch_size, parameters, gmacs):
    """Parameters, counted with the fixed positions of the published code, and multiplications of a prediction."""
    # Layers are alike: two of them say what all cost.
    depth = SIZES[size]["depth"]
    counts, products = {}, {}
    for layers in (1, 2):
        model = DiT(patch_size=patch_size, **{**LATENT, **SIZES[size], "depth": layers})
        params = shapes(model)
        counts[layers] = sum(leaf.size for leaf in jax.tree.leaves(params))
        apply = lambda params, *inputs, model=model: model.apply({"params": params}, *inputs)  # noqa: E731
        products[layers] = matrix_flops(apply, params, *model.example_inputs(1)) / 2e9
    trained = counts[1] + (depth - 1) * (counts[2] - counts[1])
    fixed = grid_embedding(1, 1, model.width).size * model.grid[0] * model.grid[1]
    if parameters is not None:
        assert trained + fixed == parameters
    if (size, patch_size) == ("XL", 2):
        assert trained == 674_834_720
    assert products[1] + (depth - 1) * (products[2] - products[1]) == pytest.approx(gmacs, rel=2e-3)


def test_a_new_network_predicts_zeros_and_starts_as_published():
    model = models.create_model("dit", **{**TINY, "width": 64, "num_classes": 50, "context_width": 100})
    inputs = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), model.example_inputs(1))

    def init(key):
        params = model.init(key, *inputs)["params"]
        return params, model.apply({"params": params}, *inputs)

    params, prediction = jax.jit(init)(KEY)
    assert not np.any(prediction)
    zero = {
        jax.tree_util.keystr(path[:-1], simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if path[-1].key == "kernel" and not np.any(leaf)
    }
    layers = [f"blocks_{i}/{layer}" for i in range(2) for layer in ("modulation", "context_attention/out")]
    assert zero == {"final_modulation", "pixel_head", *layers}
    for kernel in (params["time_1"]["kernel"], params["context_2"]["kernel"], params["label"]["embedding"]):
        assert np.std(kernel) == pytest.approx(0.02, rel=0.1)
    block = params["blocks_0"]
    for kernel, fan_in, fan_out in (
        (params["patch"]["kernel"], 12, 64),
        (block["attention"]["query_key_value"]["kernel"], 64, 3 * 64),
        (block["attention"]["out"]["kernel"], 64, 64),
        (block["mlp"]["up"]["kernel"], 64, 256),
    ):
        limit = (6 / (fan_in + fan_out)) ** 0.5
        assert 0.98 * limit < np.abs(kernel).max() <= limit


def test_positions_are_those_of_the_published_code():
    """Of a patch in column x: sin(x w), cos(x w), then the row's, at w = 10000^(-i / (D / 4))."""
    grid = np.asarray(grid_embedding(3, 2, 8, column_first=True, sine_first=True))
    for place, (row, column) in enumerate(np.ndindex(3, 2)):
        expected = [f(n * w) for n in (column, row) for f in (np.sin, np.cos) for w in (1.0, 0.01)]
        np.testing.assert_allclose(grid[place], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 3}, "patch_size=3 must divide image_size=8"),
        ({"heads": 3}, "heads=3 must be at least 1 and divide width=16"),
        ({"depth": 0}, "depth=0 must be at least 1"),
        ({"width": 18}, "width=18 must be a multiple of 4"),
        ({"remat": "some"}, "unknown remat 'some'"),
    ],
    ids=str,
)
def test_fields_that_make_no_network_are_refused(change, message):
    model = DiT(**{**TINY, **change})
    with pytest.raises(ValueError, match=message):
        shapes(model)


def test_arguments_of_another_network_are_refused():
    model = DiT(**TINY)
    x_t, t, both = model.example_inputs(1)
    wide = jax.ShapeDtypeStruct((1, 4, 7), jnp.float32)
    for changed, told, message in (
        (x_t, both.replace(label=None), "needs conditioning.label: its num_classes is 5"),
        (x_t, Conditioning(label=both.label), "needs conditioning.tokens: its context_width is 6"),
        (x_t, both.replace(tokens=wide), "tokens are 7 wide, the network's context_width is 6"),
        (jax.ShapeDtypeStruct((1, 7, 8, 3), jnp.float32), both, r"x_t is \(7, 8, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(model.init, KEY, changed, t, told)
    wide = jax.ShapeDtypeStruct((1, 6, 10, 3), jnp.float32)
    assert jax.eval_shape(model.init_with_output, KEY, wide, t, both)[0].shape == (1, 6, 10, 3)
