"""U-ViT: published sizes and outputs, what its fields change, what reaches the prediction, and precision.

`uvit_golden.npz` holds what the published code (github.com/baofff/U-ViT, commit ce55170) computes on a CPU in float32
from weights and inputs of numpy's `default_rng(0)`: for each network of `GOLDEN` its weights by their published names
(N(0, 0.2^2), gains of norms around 1, rounded to float16), inputs in its layout [B C H W], and output.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx

import models
from models.conditioning import Conditioning
from models.layers.embeddings import grid_embedding
from models.uvit import UViT
from weights.formats.uvit import from_uvit

KEY = jax.random.key(0)
TINY = {"image_size": 8, "patch_size": 2, "width": 16, "depth": 4, "heads": 2}
BOTH = {**TINY, "num_classes": 5, "context_length": 3, "context_width": 6}
PATCHES = 16


@functools.cache
def random_params(model):
    """Parameters of which every one matters."""
    shapes = jax.eval_shape(model.init, KEY, *model.example_inputs(1))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map_with_path(
        lambda path, x: jnp.asarray((path[-1].key == "scale") + rng.normal(scale=0.3, size=x.shape), x.dtype), shapes
    )


def inputs_of(model, size=4, mask=None):
    """(x_t, t, conditioning): examples of which each differs from the others in everything."""
    rng = np.random.default_rng(1)
    x_t, _, conditioning = model.example_inputs(size)
    tokens, label = conditioning.tokens, conditioning.label
    conditioning = Conditioning(
        tokens=None if tokens is None else jnp.asarray(rng.normal(size=tokens.shape), jnp.float32),
        mask=mask,
        label=None if label is None else jnp.arange(size) % model.num_classes,
    )
    return jnp.asarray(rng.normal(size=x_t.shape), jnp.float32), 100.0 * jnp.arange(1, size + 1), conditioning


@functools.cache
def compiled(model):
    """The network as a function that is compiled once for each shape of its arguments."""
    return jax.jit(model.apply)


def apply(model, *inputs):
    """The prediction under `random_params`."""
    return compiled(model)({"params": random_params(model)}, *inputs)


def count(**fields):
    """Number of parameters."""
    model = UViT(**fields)
    return sum(x.size for x in jax.tree.leaves(jax.eval_shape(model.init, KEY, *model.example_inputs(1))))


LATENT = {"image_size": 32, "patch_size": 2, "in_channels": 4}
COCO = {**LATENT, "width": 512, "heads": 8, "context_length": 77, "context_width": 768}
S = {"width": 512, "depth": 12, "heads": 8}
M = {"width": 768, "depth": 16, "heads": 12}
L = {"width": 1024, "depth": 20, "heads": 16}
H = {"width": 1152, "depth": 28, "heads": 16, "num_classes": 1001, "convolution": "none"}


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        pytest.param({"image_size": 32, "patch_size": 2, **S}, 44_255_328, id="S/2 CIFAR-10"),
        pytest.param({"image_size": 64, "patch_size": 4, **S}, 44_292_228, id="S/4 CelebA 64"),
        pytest.param({**COCO, "depth": 12}, 44_692_644, id="S/2 COCO"),
        pytest.param({**COCO, "depth": 16}, 58_345_636, id="S/2-Deep COCO"),
        pytest.param({"image_size": 64, "patch_size": 4, **M, "num_classes": 1000}, 130_940_292, id="M/4 ImageNet 64"),
        pytest.param({"image_size": 64, "patch_size": 4, **L, "num_classes": 1000}, 286_827_652, id="L/4 ImageNet 64"),
        pytest.param({**LATENT, **L, "num_classes": 1001}, 286_763_172, id="L/2 ImageNet 256"),
        pytest.param({**LATENT, **H}, 500_832_016, id="H/2 ImageNet 256"),
        pytest.param({**LATENT, **H, "image_size": 64, "patch_size": 4}, 500_942_656, id="H/4 ImageNet 512"),
    ],
)
def test_published_sizes(fields, parameters):
    assert count(**fields) == parameters


GOLDEN = {
    "class": {**TINY, "num_classes": 5},
    "text": {
        **TINY,
        **{"depth": 2, "in_channels": 4, "context_length": 7, "context_width": 10, "convolution": "none"},
    },
    "time_mlp": {**TINY, "depth": 2, "mlp_time_embed": True, "long_skip": "none"},
}


@pytest.mark.parametrize(
    ("name", "change"),
    [("class", {}), ("class", {"scan": True, "remat": "full"}), ("text", {}), ("time_mlp", {})],
    ids=str,
)
def test_published_outputs(name, change):
    with np.load(Path(__file__).parent / "uvit_golden.npz") as file:
        arrays = {key.removeprefix(f"{name}/"): file[key] for key in file.files if key.startswith(f"{name}/")}
    model = models.create_model("uvit", **GOLDEN[name], **change)
    weights = {key.removeprefix("weights/"): arrays[key] for key in arrays if key.startswith("weights/")}
    params = from_uvit(model, weights)
    given = {
        key: jnp.asarray(arrays[f"inputs/{key}"]) for key in ("x", "t", "y", "context") if f"inputs/{key}" in arrays
    }
    conditioning = Conditioning(tokens=given.get("context"), label=given.get("y"))
    x_t = given["x"].transpose(0, 2, 3, 1)
    prediction = jax.jit(model.apply)({"params": params}, x_t, given["t"], conditioning)
    np.testing.assert_allclose(prediction, arrays["output"].transpose(0, 2, 3, 1), atol=1e-5)


D, BLOCKS, HALF = 16, 5, 2


@pytest.mark.parametrize(
    ("change", "more"),
    [
        ({"long_skip": "add"}, -HALF * (2 * D * D + D)),
        ({"long_skip": "none"}, -HALF * (2 * D * D + D)),
        ({"long_skip": "none", "depth": 5}, -HALF * (2 * D * D + D) + 12 * D * D + 10 * D),
        ({"long_skip": "project_skip"}, -HALF * D * D),
        ({"long_skip": "project_sum"}, -HALF * D * D),
        ({"time": "adaln"}, BLOCKS * 4 * D * D - D),
        ({"mlp_time_embed": True}, 8 * D * D + 5 * D),
        ({"convolution": "tokens"}, 9 * D * D + D - (81 + 3)),
        ({"convolution": "none"}, -(81 + 3)),
        ({"positions": "sincos_2d"}, -PATCHES * D),
        ({"positions": "none"}, -(PATCHES + 5) * D),
        ({"patch_size": 4}, (48 - 12) * D + 36 * D + 36 - 12 * D),
        ({"out_channels": 6}, 12 * (D + 1) + 9 * 36 + 6 - (81 + 3)),
        ({"num_classes": 0}, -6 * D),
        ({"context_length": 0, "context_width": 0}, -(6 + 1 + 3) * D),
    ],
    ids=str,
)
def test_parameters_of_what_the_paper_compares(change, more):
    assert count(**{**BOTH, **change}) == count(**BOTH) + more


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"long_skip": "add", "time": "adaln", "convolution": "none"},
        {"long_skip": "project_skip", "positions": "sincos_2d", "convolution": "tokens", "mlp_time_embed": True},
    ],
    ids=str,
)
def test_an_example_is_its_own_picture_time_label_and_tokens(change):
    model = UViT(**{**BOTH, "depth": 2, **change})
    x_t, t, conditioning = inputs_of(model, 5)
    # The same example five times, the last four with something else of another one.
    x_t, first = x_t.at[1:].set(x_t[0]).at[4, 3, 5].add(1), jnp.zeros_like(t).at[1].set(1)
    tokens, label = conditioning.tokens, conditioning.label
    conditioning = Conditioning(
        tokens=jnp.where(jnp.arange(5)[:, None, None] == 3, tokens, tokens[0]),
        label=jnp.where(jnp.arange(5) == 2, label, label[0]),
    )
    prediction = apply(model, x_t, t[0] + first, conditioning)
    others = np.abs(prediction[1:] - prediction[0]).max(axis=(1, 2, 3))
    assert others.min() > 1e-2, others
    order = np.array([2, 4, 0, 1, 3])
    shuffled = jax.tree.map(lambda leaf: leaf[order], (x_t, t[0] + first, conditioning))
    np.testing.assert_allclose(apply(model, *shuffled), prediction[order], atol=1e-5)


def test_a_masked_token_has_no_influence():
    model = UViT(**{**BOTH, "depth": 2})
    x_t, t, conditioning = inputs_of(model, 2)
    predict = functools.partial(apply, model, x_t, t)
    mask = jnp.array([[True, False, True], [True, True, True]])
    masked = predict(conditioning.replace(mask=mask))
    other = conditioning.replace(mask=mask, tokens=conditioning.tokens.at[:, 1].add(1))
    changed = np.abs(predict(other) - masked).max(axis=(1, 2, 3))
    assert changed[0] == 0 and changed[1] > 1e-2
    seen = predict(conditioning.replace(mask=jnp.ones((2, 3), bool)))
    np.testing.assert_allclose(seen[1], masked[1], atol=1e-5)
    assert np.abs(seen[0] - masked[0]).max() > 1e-2


def loss_and_gradient(model):
    """Of a function of a prediction with a masked token."""
    inputs = inputs_of(model, 2, jnp.array([[True, False, True], [True, True, True]]))

    def score(params):
        return jnp.mean(jnp.sin(model.apply({"params": params}, *inputs)))

    return jax.jit(jax.value_and_grad(score))(random_params(model))


@functools.cache
def plain_loss_and_gradient(**fields):
    """Of layers one after the other."""
    return loss_and_gradient(UViT(**{**BOTH, **fields}))


@pytest.mark.parametrize(
    ("fields", "change"),
    [
        ({"depth": 2}, {"remat": "full"}),
        pytest.param({}, {"remat": "full"}, marks=pytest.mark.slow),
        pytest.param({}, {"scan": True}, marks=pytest.mark.slow),
        pytest.param({}, {"scan": True, "remat": "dots"}, marks=pytest.mark.slow),
        pytest.param({"time": "adaln", "long_skip": "add"}, {"scan": True, "remat": "full"}, marks=pytest.mark.slow),
        pytest.param({"time": "adaln", "long_skip": "add"}, {"remat": "dots"}, marks=pytest.mark.slow),
        pytest.param({"long_skip": "none"}, {"scan": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_how_layers_are_run_changes_no_prediction_and_no_gradient(fields, change):
    loss, gradient = plain_loss_and_gradient(**fields)
    value, ours = loss_and_gradient(UViT(**{**BOTH, **fields, **change}))
    assert value == pytest.approx(float(loss), abs=1e-6)
    assert jax.tree.structure(gradient) == jax.tree.structure(ours)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(ours), strict=True):
        np.testing.assert_allclose(y, x, atol=1e-5 * max(np.abs(x).max(), 0.1), err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("long_skip", ["concat", "none"])
def test_a_scanned_network_traces_one_layer_for_each_half(long_skip):
    traced = {}
    for scan in (False, True):
        model = UViT(**{**BOTH, "depth": 4, "scan": scan, "long_skip": long_skip})
        program = jax.make_jaxpr(functools.partial(model.apply, {"params": random_params(model)}))(*inputs_of(model))
        traced[scan] = str(program).count("prevent_cse=")  # of an activation, see `activate`
    assert traced == {False: 5, True: 3}


def test_positions_of_patches_are_as_large_as_a_normalized_state():
    grid = grid_embedding(4, 4, 16)
    np.testing.assert_allclose(np.square(grid).sum(axis=1), 16 / 2, rtol=1e-6)  # pairs of a sine and a cosine
    assert np.abs(grid).max() == 1
    assert len(np.unique(np.round(grid, 4), axis=0)) == 16
    np.testing.assert_array_equal(grid[4:8, :8], np.broadcast_to(grid[4, :8], (4, 8)))  # one row of the grid


def test_only_positions_tell_where_a_patch_is():
    for positions in ("sincos_2d", "none"):
        model = UViT(**{**TINY, "depth": 2, "convolution": "none", "positions": positions})
        x_t, t, conditioning = inputs_of(model, 1)
        prediction, moved = (apply(model, x, t, conditioning) for x in (x_t, jnp.roll(x_t, 2, axis=2)))  # by a patch
        difference = np.abs(jnp.roll(prediction, 2, axis=2) - moved).max()
        assert difference > 1e-2 if positions == "sincos_2d" else difference < 1e-5


def test_bfloat16_predicts_float32():
    model, rounded = (UViT(**{**BOTH, "depth": 2}, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    inputs = inputs_of(model, 2)
    exact, prediction = apply(model, *inputs), apply(rounded, *inputs)
    assert prediction.dtype == jnp.float32
    assert 0 < np.abs(prediction - exact).max() < 0.1 * np.abs(exact).max()


def test_initial_values_are_those_of_the_published_code():
    model = UViT(**{**BOTH, "width": 64, "depth": 2, "num_classes": 50, "context_width": 100})
    inputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), model.example_inputs(1))

    def init(key):  # of what is not returned, nothing is computed
        params = model.init(key, *inputs)["params"]
        block = params["in_blocks_0"]
        dense = block["attention"]["query_key_value"], block["mlp"]["down"], params["skips_0"]["projection"]
        kernels = [each["kernel"] for each in (*dense, params["context"], params["pixel_head"])]
        tables = params["position"]["embedding"], params["label"]["embedding"]
        return kernels, *tables, block["attention"]["out"]["bias"], params["patch"], params["image_conv"]

    kernels, position, label, bias, patch, image_conv = jax.jit(init)(KEY)
    for array in (*kernels, position):
        assert np.std(array) == pytest.approx(0.02, rel=0.1)
    assert np.std(label) == pytest.approx(1, rel=0.1) and not np.any(bias)
    for leaf in patch.values():
        assert np.abs(leaf).max() < 12**-0.5 and np.std(leaf) > 0.4 * 12**-0.5
    for leaf in image_conv.values():
        assert np.abs(leaf).max() < 27**-0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 3}, "depth=3 must be at least 2, and even"),
        ({"depth": 1, "long_skip": "none"}, "depth=1 must be at least 2"),
        ({"patch_size": 3}, "patch_size=3 must divide image_size=8"),
        ({"heads": 3}, "heads=3 must be at least 1 and divide width=16"),
        ({"context_width": 0}, "context_length=3 and context_width=0: give both"),
        ({"positions": "sincos_2d", "width": 18}, "width=18 must be a multiple of 4"),
        ({"long_skip": "cat"}, "unknown long_skip 'cat'; choose one of concat, add"),
        ({"time": "film"}, "unknown time 'film'; choose one of token, adaln"),
        ({"convolution": "conv"}, "unknown convolution 'conv'; choose one of image, tokens, none"),
        ({"remat": "some"}, "unknown remat 'some'"),
    ],
    ids=str,
)
def test_fields_that_make_no_network_are_refused(change, message):
    model = UViT(**{**BOTH, **change})
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, KEY, *model.example_inputs(1))


def test_arguments_of_another_network_are_refused():
    model, plain = UViT(**{**BOTH, "depth": 2}), UViT(**{**TINY, "depth": 2})
    x_t, t, both = inputs_of(model, 2)
    tokens, label = both.tokens, both.label

    def refused(network, x_t, conditioning, message):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(network.init, KEY, x_t, t, conditioning)

    refused(model, x_t, Conditioning(tokens=tokens), "needs conditioning.label: its num_classes is 5")
    refused(model, x_t, Conditioning(label=label), "needs conditioning.tokens: its context_length is 3")
    refused(plain, x_t, Conditioning(label=label), "was built without conditioning.label: its num_classes is 0")
    refused(plain, x_t, Conditioning(tokens=tokens), "was built without conditioning.tokens")
    refused(plain, x_t, Conditioning(mask=jnp.ones((2, 3), bool)), "conditioning.mask hides tokens, and there are none")
    refused(model, x_t, both.replace(tokens=tokens[:, :2]), r"tokens are \(2, 6\), the network's .* \(3, 6\)")
    refused(model, x_t[:, :6], both, r"x_t is \(6, 8, 3\)")


def test_a_picture_of_another_shape_is_read_and_written_patch_by_patch():
    """Without positions layers know no order: 2 x 8 patches in a row are the same as 4 x 4 of them."""
    model = UViT(**{**TINY, "depth": 2, "positions": "none", "convolution": "none"})

    def patches_of(x, height):
        return rearrange(x, "b (h p) (w q) c -> b (h w) p q c", h=height, p=2, q=2)

    wide = jax.random.normal(KEY, (1, 4, 16, 3))
    square = rearrange(patches_of(wide, 2), "b (h w) p q c -> b (h p) (w q) c", h=4)
    outputs = [apply(model, x, jnp.array([7.0]), Conditioning()) for x in (wide, square)]
    np.testing.assert_allclose(patches_of(outputs[0], 2), patches_of(outputs[1], 4), atol=1e-5, rtol=1e-5)
    fixed = UViT(**{**TINY, "depth": 2, "positions": "sincos_2d"})
    output = jax.eval_shape(fixed.init_with_output, KEY, wide, jnp.array([7.0]), Conditioning())[0]
    assert output.shape == wide.shape


def test_a_linen_network_computes_the_same_inside_flax_nnx():
    """Through `flax.nnx.bridge`, with the same parameters put in, and its own taken out: one tree of the same names."""
    model = UViT(**TINY, num_classes=5)
    inputs = inputs_of(model)
    wrapped = nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0))
    nnx.bridge.lazy_init(wrapped, *inputs)
    own = nnx.to_pure_dict(nnx.state(wrapped, nnx.Param))
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, random_params(model))
    nnx.update(wrapped, random_params(model))
    graph, state = nnx.split(wrapped)
    output = jax.jit(lambda state, *inputs: nnx.merge(graph, state)(*inputs))(state, *inputs)
    np.testing.assert_array_equal(output, apply(model, *inputs))
