"""DALL-E's transformer: published sizes, causality, the sight of the text, pads, heads, cache, scan and precision."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.dalle import Dalle, DalleLogits, position_pads
from models.layers.attention_masks import LAYER_TYPES, attention_pattern

ROOT = Path(__file__).resolve().parents[2]
T, GRID, N = 4, (3, 4), 12
TEXT_VOCAB, IMAGE_VOCAB = 11, 7
KEY = jax.random.key(0)
PATTERNS = [*((layer_type, 1) for layer_type in LAYER_TYPES), ("published", 3), (("conv", "full"), 2)]


def tiny(**fields):
    """A network of two layers."""
    sizes = {"text_vocab_size": TEXT_VOCAB, "text_length": T, "image_vocab_size": IMAGE_VOCAB, "image_grid": GRID}
    return Dalle(**{**sizes, "width": 16, "depth": 2, "heads": 2, "conv_kernel": 3, **fields})


@functools.cache
def random_params(model):
    """Parameters of which every one matters: biases too are random, and the weights large."""
    shapes = jax.eval_shape(model.init, KEY, *model.example_inputs(1))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map_with_path(
        lambda path, x: jnp.asarray((path[-1].key == "scale") + rng.normal(scale=0.3, size=x.shape), x.dtype), shapes
    )


def batch(size=2, seed=0):
    """Captions with pads at the end, and image tokens."""
    rng = np.random.default_rng(seed)
    text = rng.integers(1, TEXT_VOCAB, (size, T))
    text[0, T - 2 :] = 0
    return jnp.asarray(text, jnp.int32), jnp.asarray(rng.integers(0, IMAGE_VOCAB, (size, N)), jnp.int32)


def logits_of(model, text, image):
    """(text, image) logits under `random_params`."""
    out = jax.jit(model.apply)({"params": random_params(model)}, text, image)
    return out.text, out.image


def count(tree):
    """Number of parameters."""
    return sum(x.size for x in jax.tree.leaves(tree))


def test_published_network_has_twelve_billion_parameters():
    model = Dalle(
        text_vocab_size=16384,
        text_length=256,
        image_vocab_size=8192,
        image_grid=(32, 32),
        width=3968,
        depth=64,
        heads=62,
    )
    params = jax.eval_shape(model.init, KEY, *model.example_inputs(1))["params"]
    assert {count(tree) for name, tree in params.items() if name.startswith("blocks")} == {188_991_872}
    assert params["blocks_0"]["attention"]["query_key_value"]["kernel"].shape == (3968, 3, 62, 64)
    assert round(count(params) / 1e9, 2) == 12.29
    assert model.layer_types == attention_pattern(64)


def test_layer_types_repeat_over_the_depth():
    assert tiny(depth=5, attention=("row", "conv")).layer_types == ("row", "conv", "row", "conv", "row")
    assert tiny(attention="full").layer_types == ("full", "full")


@pytest.mark.parametrize(("attention", "depth"), PATTERNS)
def test_no_token_changes_what_is_predicted_before_it(attention, depth):
    model = tiny(attention=attention, depth=depth)
    text, image = batch(1, seed=1)
    # Row s of this batch has stream token s (the caption, then the picture) changed.
    texts = jnp.where(jnp.eye(T + N, T, dtype=bool), text % (TEXT_VOCAB - 1) + 1, text)
    images = jnp.where(jnp.eye(T + N, N, -T, dtype=bool), (image + 1) % IMAGE_VOCAB, image)
    # The last row is the batch as it was.
    out = logits_of(model, jnp.concatenate([texts, text]), jnp.concatenate([images, image]))
    changed = np.concatenate([np.any(np.abs(x[:-1] - x[-1]) > 1e-4, axis=-1) for x in out], axis=1)
    s, output = np.indices(changed.shape)
    assert not changed[output <= s].any()
    assert changed[output == s + 1].all()  # but every token is read


@pytest.mark.parametrize("attention", LAYER_TYPES)
def test_one_layer_of_any_type_shows_every_image_position_all_of_the_text(attention):
    model = tiny(attention=attention, depth=1)
    text, image = batch(1, seed=1)
    texts = jnp.where(jnp.eye(T + 1, T, dtype=bool), text % (TEXT_VOCAB - 1) + 1, text)  # the last row is unchanged
    _, logits = logits_of(model, texts, jnp.repeat(image, T + 1, axis=0))
    assert np.all(np.max(np.abs(logits[:-1] - logits[-1]), axis=-1) > 1e-5)


@pytest.mark.parametrize(("attention", "depth"), PATTERNS)
def test_cached_logits_are_those_of_one_parallel_pass(attention, depth):
    model = tiny(attention=attention, depth=depth)
    text, image = batch(3)
    _, expected = logits_of(model, text, image)
    params = {"params": random_params(model)}
    step = jax.jit(functools.partial(model.apply, method="decode_step"))
    logits, cache = jax.jit(functools.partial(model.apply, method="prefill"))(params, text)
    np.testing.assert_allclose(logits, expected[:, 0], atol=1e-5)
    for j in range(N - 1):
        logits, cache = step(params, image[:, j], j, cache)
        np.testing.assert_allclose(logits, expected[:, j + 1], atol=1e-5)


def test_every_position_has_its_own_pad():
    text = jnp.array([[0, 3, 0, 0]])
    np.testing.assert_array_equal(position_pads(text, TEXT_VOCAB), [[TEXT_VOCAB, 3, TEXT_VOCAB + 2, TEXT_VOCAB + 3]])
    model = tiny(depth=1)
    _, image = batch(1)

    def score(params):
        logits: DalleLogits = model.apply({"params": params}, text, image)
        return jnp.sum(logits.image[..., 0])

    gradient = jax.jit(jax.grad(score))(random_params(model))
    used = np.flatnonzero(np.any(gradient["text_embedding"]["embedding"] != 0, axis=1))
    np.testing.assert_array_equal(used, [3, TEXT_VOCAB, TEXT_VOCAB + 2, TEXT_VOCAB + 3])
    assert logits_of(model, text, image)[0].shape == (1, T, TEXT_VOCAB + T)


def test_two_heads_are_one_untied_head_with_logits_masked_to_the_modality():
    model = tiny()
    params = {"params": random_params(model)}
    text, image = batch()
    out, state = jax.jit(functools.partial(model.apply, capture_intermediates=True))(params, text, image)
    x = state["intermediates"]["final_norm"]["__call__"][0]
    heads = [params["params"][name] for name in ("text_head", "image_head")]
    kernel = jnp.concatenate([head["kernel"] for head in heads], axis=1)
    bias = jnp.concatenate([head["bias"] for head in heads])
    is_text = np.arange(T + N)[:, None] < T
    in_text_vocab = np.arange(len(bias)) < TEXT_VOCAB + T
    joint = jax.nn.log_softmax(jnp.where(is_text == in_text_vocab, x @ kernel + bias, -jnp.inf))
    np.testing.assert_allclose(jax.nn.log_softmax(out.text), joint[:, :T, : TEXT_VOCAB + T], atol=1e-5)
    np.testing.assert_allclose(jax.nn.log_softmax(out.image), joint[:, T:, TEXT_VOCAB + T :], atol=1e-5)


def test_an_image_position_is_its_row_plus_its_column():
    model = tiny(depth=1)
    params = random_params(model)
    _, cache = jax.jit(functools.partial(model.apply, method="prefill"))({"params": params}, batch(1)[0])

    def score(params):
        token, position = jnp.array([2]), jnp.array(6)
        return model.apply({"params": params}, token, position, cache, method="decode_step")[0][0, 0]

    gradient = jax.jit(jax.grad(score))(params)
    rows, columns = (np.any(gradient[name]["embedding"] != 0, axis=1) for name in ("row_position", "column_position"))
    np.testing.assert_array_equal(rows, [False, True, False])  # 6 = row 1, column 2 of a grid that is 4 wide
    np.testing.assert_array_equal(columns, [False, False, True, False])


def test_residual_projections_start_smaller():
    model = tiny(width=64, depth=2)
    inputs = [jnp.zeros(x.shape, x.dtype) for x in model.example_inputs(1)]
    block = jax.jit(model.init)(KEY, *inputs)["params"]["blocks_0"]
    for name, kernel, std in [
        ("qkv", block["attention"]["query_key_value"]["kernel"], 0.02),
        ("up", block["mlp"]["up"]["kernel"], 0.02),
        ("out", block["attention"]["out"]["kernel"], 0.01),
        ("down", block["mlp"]["down"]["kernel"], 0.01),
    ]:
        assert np.std(kernel) == pytest.approx(std, rel=0.05), name


def loss_and_gradient(model):
    """Of a function of all logits, float32."""

    def score(params):
        logits: DalleLogits = model.apply({"params": params}, *batch())
        return jnp.mean(jnp.sin(logits.text)) + jnp.mean(jnp.sin(logits.image))

    return jax.jit(jax.value_and_grad(score))(random_params(model))


@functools.cache
def plain_loss_and_gradient(dtype):
    """Of four layers with three different masks, one after the other."""
    return loss_and_gradient(tiny(attention="published", depth=4, dtype=dtype))


@pytest.mark.parametrize(
    "fields",
    [
        {"remat": "full"},
        {"scan": True, "remat": "dots"},
        {"scan": True, "remat": "full", "implementation": "splash_interpreted"},
        {"scan": True, "dtype": jnp.bfloat16},
    ],
    ids=str,
)
def test_how_layers_are_run_changes_no_logit_and_no_gradient(fields):
    # Relative to the largest of an array: rounding, of float32 or of bfloat16 (8 bits).
    tolerance = 1e-6 if "dtype" not in fields else 0.03
    loss, gradient = plain_loss_and_gradient(fields.get("dtype", jnp.float32))
    value, ours = loss_and_gradient(tiny(attention="published", depth=4, **fields))
    assert value == pytest.approx(float(loss), abs=tolerance)
    for path, x in jax.tree_util.tree_leaves_with_path(gradient):
        y = functools.reduce(lambda tree, entry: tree[entry.key], path, ours)
        assert y.dtype == jnp.float32
        if "norm" in path[-2].key:  # of dense layers these are bfloat16 numbers where that is what they compute in
            assert np.any(y != y.astype(jnp.bfloat16))
        np.testing.assert_allclose(y, x, rtol=0, atol=tolerance * np.max(np.abs(x)), err_msg=jax.tree_util.keystr(path))


def test_a_scanned_network_traces_one_layer_for_all():
    inputs = batch()
    traced = {}
    for scan in (False, True):
        model = tiny(attention="published", depth=6, scan=scan)
        program = jax.make_jaxpr(lambda params, m=model: m.apply({"params": params}, *inputs))(random_params(model))
        traced[scan] = str(program).count("prevent_cse=")  # of an activation, see `activate`
    assert traced == {False: 6, True: 1}


def test_parameters_do_not_depend_on_how_layers_are_run():
    plain, scanned = tiny(depth=1), tiny(depth=1, scan=True, remat="full")
    inputs = [jnp.zeros(x.shape, x.dtype) for x in plain.example_inputs(1)]
    trees = [jax.jit(model.init)(KEY, *inputs) for model in (plain, scanned)]
    jax.tree.map(np.testing.assert_array_equal, *trees)
    assert "blocks_0" in trees[0]["params"]


def test_an_unknown_rematerialization_is_refused():
    model = tiny(remat="some")
    with pytest.raises(ValueError, match="unknown remat 'some'; choose one of none, full, dots"):
        jax.eval_shape(model.init, KEY, *model.example_inputs(1))


ON_EIGHT_DEVICES = """
import re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from models.dalle import Dalle

fsdp, tensor, implementation = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
model = Dalle(
    text_vocab_size=32, text_length=6, image_vocab_size=16, image_grid=(4, 4), width=32, depth=5, heads=2,
    conv_kernel=3, scan=True, remat="full", implementation=implementation,
)
rng = np.random.default_rng(0)
text, image = rng.integers(0, 32, (16, 6), np.int32), rng.integers(0, 16, (16, 16), np.int32)
shapes = jax.eval_shape(model.init, jax.random.key(0), text[:1], image[:1])["params"]
params = jax.tree.map(lambda x: rng.normal(scale=0.2, size=x.shape).astype(np.float32), shapes)

def step(params, text, image):
    def loss(params):
        logits = model.apply({"params": params}, text, image)
        return jnp.mean(jnp.sin(logits.text)) + jnp.mean(jnp.sin(logits.image))
    return jax.value_and_grad(loss)(params)

RULES = (
    ("query_key_value/kernel", P("fsdp", None, "tensor")), ("out/kernel", P("tensor", None, "fsdp")),
    ("up/kernel", P("fsdp", "tensor")), ("down/kernel", P("tensor", "fsdp")), ("", P()),
)
mesh = jax.make_mesh((8 // fsdp // tensor, fsdp, tensor), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)

def sharding(path, x):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return NamedSharding(mesh, next(spec for pattern, spec in RULES if pattern in name))

places = jax.tree_util.tree_map_with_path(sharding, shapes)
rows = NamedSharding(mesh, P(("data", "fsdp")))
with jax.set_mesh(mesh):
    program = jax.jit(step, in_shardings=(places, rows, rows), out_shardings=(None, places))
    loss, gradient = program(params, text, image)
    compiled = program.lower(params, text, image).compile().as_text()
expected, expected_gradient = jax.jit(step)(params, text, image)
np.testing.assert_allclose(loss, expected, atol=1e-6)
for x, y in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=2e-6 * np.max(np.abs(y)))

# A layer's weights are gathered in the loop over layers, one layer at a time.
gathers = {"entry": [], "loop": []}
for line in compiled.splitlines():
    if line.endswith("{"):
        where = "entry" if line.startswith("ENTRY") else "loop"
    found = re.search(r"= f32\\[([0-9,]*)\\]\\S* all-gather", line)
    if found:
        gathers[where].append(tuple(map(int, found[1].split(","))))
layer = {(32, 3, 2 // tensor, 16), (2 // tensor, 16, 32), (32, 128 // tensor), (128 // tensor, 32)}
assert layer <= set(gathers["loop"]), gathers
assert not [shape for shape in gathers["entry"] if np.prod(shape) >= 32 * 32], gathers
# Nothing has a stack of whole layers, neither of weights nor of gradients.
whole = ["5," + ",".join(map(str, shape)) for shape in layer]
assert not [shape for shape in whole if f"[{shape}]" in compiled], whole
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [("8", "1", "xla"), ("4", "2", "xla"), ("4", "2", "splash_interpreted")], ids=" ".join
)
def test_eight_devices_gather_one_layer_at_a_time(arguments):
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-c", ON_EIGHT_DEVICES, *arguments]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr


def test_bfloat16_keeps_float32_parameters_and_logits():
    model = tiny(dtype=jnp.bfloat16)
    params = random_params(model)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    text, image = logits_of(model, *batch())
    assert text.dtype == image.dtype == jnp.float32
    np.testing.assert_allclose(image, logits_of(tiny(), *batch())[1], atol=0.25)

    def nats(params):
        logits: DalleLogits = model.apply({"params": params}, *batch())
        return -jnp.sum(jax.nn.log_softmax(logits.image))

    loss, gradient = jax.jit(jax.value_and_grad(nats))(jax.tree.map(lambda x: 30 * x, params))
    assert loss > 1000  # far from any trained network
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradient))


def test_other_lengths_are_refused():
    model = tiny()
    params, (text, image) = {"params": random_params(model)}, batch()
    with pytest.raises(ValueError, match="captions have 3 tokens, the network's text_length is 4"):
        model.apply(params, text[:, :3], image)
    with pytest.raises(ValueError, match=r"pictures have 9 tokens, image_grid \(3, 4\) has 12"):
        model.apply(params, text, image[:, :9])
