"""Attention against JAX's own, its masks and precision, the fused kernels, and decoding from a cache."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from models.layers.attention import KeyLengths, MaskChoice, attend, attend_from_one
from models.layers.attention_masks import attention_mask
from models.layers.self_attention import SelfAttention

ROOT = Path(__file__).resolve().parents[3]
KEY = jax.random.key(0)
CAUSAL = np.tri(6, dtype=bool)
LENGTHS = "key_value_seq_lengths"  # an argument of JAX


def inputs(dtype=jnp.float32, scale=1.0, length=6, width=8):
    """q, k, v of shape [2 length 3 width]."""
    q, k, v = np.random.default_rng(0).normal(scale=scale, size=(3, 2, length, 3, width))
    return jnp.asarray(q, dtype), jnp.asarray(k, dtype), jnp.asarray(v, dtype)


@pytest.mark.parametrize("mask", [None, CAUSAL, np.array([True, False, True, True, False, True])[None, None, None]])
def test_attention_and_its_gradients_are_those_of_jax(mask):
    def reference(q, k, v):
        full = None if mask is None else jnp.asarray(mask)[(None,) * (4 - mask.ndim)]
        return jax.nn.dot_product_attention(q, k, v, mask=full)

    def gradients(function):
        return jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(function(*x))), argnums=(0, 1, 2)))(*inputs())

    np.testing.assert_allclose(attend(*inputs(), mask), reference(*inputs()), atol=2e-6)
    for ours, theirs in zip(gradients(lambda q, k, v: attend(q, k, v, mask)), gradients(reference), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


def test_masks_may_differ_in_the_batch():
    q, k, v = inputs()
    mask = jnp.stack([jnp.ones((1, 1, 6), bool), jnp.array([[[True] * 2 + [False] * 4]])])
    out = attend(q, k, v, mask)
    np.testing.assert_allclose(out[0], attend(q, k, v)[0], atol=1e-6)
    np.testing.assert_allclose(out[1], attend(q, k[:, :2], v[:, :2])[1], atol=1e-6)


def test_hidden_positions_get_no_gradient():
    mask = np.ones((6, 6), bool)
    mask[:, 4] = False
    q, k, v = inputs()
    for gradient in jax.jit(jax.grad(lambda k, v: jnp.sum(attend(q, k, v, mask) ** 2), argnums=(0, 1)))(k, v):
        assert jnp.all(gradient[:, 4] == 0)
        assert jnp.any(gradient[:, 3] != 0)


def test_bfloat16_scores_are_summed_in_float32():
    q, k, v = inputs(jnp.bfloat16)
    out = attend(q, k, v, CAUSAL)
    assert out.dtype == jnp.bfloat16
    exact = attend(q.astype(jnp.float32), k.astype(jnp.float32), v.astype(jnp.float32), CAUSAL)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.03)
    text = str(jax.make_jaxpr(lambda q, k, v: attend(q, k, v, CAUSAL))(q, k, v))
    assert [line for line in text.splitlines() if " exp " in line and "f32" in line]


def test_large_bfloat16_scores_stay_finite():
    out = attend(*inputs(jnp.bfloat16, scale=1e4), CAUSAL)
    assert jnp.all(jnp.isfinite(out.astype(jnp.float32)))


@pytest.mark.parametrize("masked", [False, True])
def test_one_query_reads_what_it_would_read_among_all(masked):
    """Values and gradients, of everything but the keys' bias, which has none."""
    rng = np.random.default_rng(0)
    x, query = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 6, 8), (2, 3, 4)))
    key, value = (jnp.asarray(rng.normal(size=(8, 3, 4)), jnp.float32) for _ in range(2))
    mask = jnp.asarray([[True] * 4 + [False] * 2, [True] * 6]) if masked else None

    def among_all(query, x, key, value):
        k, v = (jnp.einsum("bmd,dnk->bmnk", x, kernel) for kernel in (key, value))
        return attend(query[:, None], k, v, None if mask is None else mask[:, None, None])[:, 0]

    def alone(query, x, key, value):
        return attend_from_one(query, x, key, value, mask)

    def gradients(function):
        return jax.grad(lambda *x: jnp.sum(jnp.sin(function(*x))), (0, 1, 2, 3))(query, x, key, value)

    np.testing.assert_allclose(alone(query, x, key, value), among_all(query, x, key, value), atol=1e-5)
    for mine, expected in zip(gradients(alone), gradients(among_all), strict=True):
        np.testing.assert_allclose(mine, expected, atol=1e-5)


@pytest.mark.parametrize("use_bias", [True, False])
def test_a_layer_read_at_one_position_gives_its_output_there(use_bias):
    layer = SelfAttention(8, 2, 4, use_bias=use_bias)
    x = jax.random.normal(KEY, (2, 6, 8))
    params = layer.init(KEY, x)
    params = jax.tree.map(lambda leaf: leaf + jax.random.normal(KEY, leaf.shape), params)  # biases start at 0
    expected = layer.apply(params, x, CAUSAL)[:, 3]
    mask = jnp.broadcast_to(CAUSAL[3], (2, 6))
    np.testing.assert_allclose(layer.apply(params, x[:, 3], x, mask, method="read"), expected, atol=1e-5)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="choose one of auto, xla, cudnn, splash"):
        attend(*inputs(), None, "flash")


def on(platform):
    """Tracing for one device of a platform that this host may lack."""
    device = AbstractDevice(f"some {platform}", 1, platform)
    axes = ("data", "fsdp", "tensor")
    return use_abstract_mesh(AbstractMesh((1, 1, 1), axes, axis_types=(AxisType.Auto,) * 3, abstract_device=device))


def assert_same_attention(ours, theirs, *arguments):
    """Outputs agree to 1e-6 of the largest, and gradients of a function of them to 2e-6."""

    def run(function):
        gradients = jax.grad(lambda *x: jnp.sum(jnp.sin(function(*x))), argnums=(0, 1, 2))
        return jax.jit(lambda *x: (function(*x), *gradients(*x)))(*arguments)

    for name, tolerance, x, y in zip("oqkv", (1e-6, 2e-6, 2e-6, 2e-6), run(ours), run(theirs), strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance * np.max(np.abs(y)), rtol=0, err_msg=name)


# 84 positions are one padded block, 606 are five blocks a side, of which "column" and "conv" masks hide some.
@pytest.mark.parametrize(
    ("layer_type", "text_length", "grid"),
    [("full", 20, (8, 8)), ("row", 20, (8, 8)), ("column", 30, (24, 24)), ("conv", 30, (24, 24))],
)
def test_block_sparse_attention_and_its_gradients_are_the_plain_ones(layer_type, text_length, grid):
    mask = attention_mask(layer_type, text_length, grid)
    arguments = inputs(length=len(mask), width=16)
    sparse, plain = (
        functools.partial(attend, mask=mask, implementation=name) for name in ("splash_interpreted", "xla")
    )
    assert_same_attention(sparse, plain, *arguments)


@pytest.mark.parametrize("implementation", ["xla", "splash_interpreted"])
def test_a_mask_can_be_chosen_while_the_program_runs(implementation):
    masks = tuple(attention_mask(layer_type, 2, (2, 3)) for layer_type in ("row", "column"))
    arguments = inputs(length=8)
    for index, mask in enumerate(masks):
        chosen = jax.jit(lambda i, *x: attend(*x, MaskChoice(masks, i), implementation))(index, *arguments)
        np.testing.assert_allclose(chosen, attend(*arguments, mask), atol=1e-6)


def test_block_sparse_bfloat16_is_as_exact_as_the_plain_one():
    mask = attention_mask("row", 20, (8, 8))
    low = inputs(jnp.bfloat16, length=len(mask))
    out = jax.jit(lambda *x: attend(*x, mask, "splash_interpreted"))(*low)
    assert out.dtype == jnp.bfloat16
    exact = attend(*(x.astype(jnp.float32) for x in low), mask)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.03)


def test_the_tpu_kernel_is_refused_elsewhere_in_one_line():
    for platform, message in (("cpu", "needs a TPU .* program is for cpu"), ("gpu", "program is for gpu")):
        with on(platform), pytest.raises(ValueError, match=message) as error:
            attend(*inputs(), CAUSAL, "splash")
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="needs a TPU"):
        attend(*inputs(), CAUSAL, "splash")
    with on("tpu"):  # this host has none, but can trace for one
        assert jax.eval_shape(lambda *x: attend(*x, CAUSAL, "splash"), *inputs()).shape == (2, 6, 3, 8)


def test_a_mask_that_is_not_known_while_tracing_is_refused_by_the_tpu_kernel():
    for mask in (jnp.asarray(CAUSAL), CAUSAL[None], CAUSAL[:, :5], KeyLengths(jnp.array([2, 6]))):
        with pytest.raises(ValueError, match=r"needs a numpy mask \[6, 6\]"):
            attend(*inputs(), mask, "splash_interpreted")


@pytest.fixture
def cudnn(monkeypatch):
    """JAX's plain attention in place of its kernel; the masks that each call was given."""
    given = []

    def record(q, k, v, *, implementation, **masks):
        assert implementation == "cudnn"
        # JAX 0.10 differentiates even lengths only.
        assert q.shape[1] % 2 == k.shape[1] % 2 == v.shape[1] % 2 == 0
        given.append({name: value for name, value in masks.items() if value is not False})
        return reference(q, k, v, implementation="xla", **masks)

    reference = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    return given


@pytest.mark.parametrize("queries", [6, 7])
@pytest.mark.parametrize("keys", [6, 7])
@pytest.mark.parametrize("kind", ["none", "causal", "lengths", "dense"])
def test_what_is_given_to_cudnn_means_plain_attention(cudnn, queries, keys, kind):
    q, k, v = inputs(jnp.bfloat16, length=7)
    q, k, v = q[:, :queries], k[:, :keys], v[:, :keys]
    dense = np.tri(queries, keys, k=1, dtype=bool)
    mask = {"none": None, "causal": np.tri(queries, keys, dtype=bool), "lengths": KeyLengths(jnp.array([3, keys]))}
    mask = mask.get(kind, dense)

    def run(implementation, *inputs):
        def loss(*inputs):
            return jnp.sum(jnp.sin(attend(*inputs, mask, implementation).astype(jnp.float32)))

        return attend(*inputs, mask, implementation), *jax.grad(loss, (0, 1, 2))(*inputs)

    with on("gpu"):
        outputs = jax.jit(functools.partial(run, "cudnn"))(q, k, v)
    assert [x.shape for x in outputs] == [q.shape, q.shape, k.shape, v.shape]
    for mine, exact in zip(outputs, run("xla", *(x.astype(jnp.float32) for x in (q, k, v))), strict=True):
        np.testing.assert_allclose(mine.astype(jnp.float32), exact, atol=0.05)
    names = {name for masks in cudnn for name in masks}
    if kind == "causal" and queries != keys:
        kind = "dense"
    if kind == "none" and keys % 2:
        kind = "lengths"  # they hide the key that makes it even
    assert names == {"none": set(), "causal": {"is_causal"}, "lengths": {LENGTHS}, "dense": {"mask"}}[kind]


def test_an_example_without_keys_harms_nobody_in_cudnn(cudnn):
    arguments = inputs(jnp.bfloat16)
    with on("gpu"):
        out = jax.jit(lambda *x: attend(*x, KeyLengths(jnp.array([0, 6])), "cudnn"))(*arguments)
        assert cudnn
    np.testing.assert_array_equal(out[0], jnp.broadcast_to(arguments[2][0, :1], out[0].shape))  # as if it had one
    np.testing.assert_allclose(out[1].astype(float), attend(*arguments)[1].astype(float), atol=0.03)


def test_lengths_are_the_mask_that_they_say():
    """To the bit, values and gradients."""
    lengths, dense = KeyLengths(jnp.array([2, 6])), jnp.array([[[[True] * 2 + [False] * 4]], [[[True] * 6]]])

    def run(mask):
        return jax.jit(jax.value_and_grad(lambda *x: jnp.sum(jnp.sin(attend(*x, mask))), (0, 1, 2)))(*inputs())

    for ours, theirs in zip(*map(jax.tree.leaves, (run(lengths), run(dense))), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_on_a_cpu_the_choice_is_the_plain_attention_to_the_bit():
    for mask in (None, CAUSAL, KeyLengths(jnp.array([2, 6]))):
        for arguments in (inputs(), inputs(jnp.bfloat16)):
            np.testing.assert_array_equal(attend(*arguments, mask, "auto"), attend(*arguments, mask, "xla"))


def test_cudnn_says_in_one_line_why_it_cannot_run():
    low = inputs(jnp.bfloat16)
    with pytest.raises(ValueError, match="needs an NVIDIA GPU, and this program is for cpu") as error:
        attend(*low, CAUSAL, "cudnn")
    assert "\n" not in str(error.value)
    with on("gpu"):
        with pytest.raises(ValueError, match="bfloat16 or float16, not float32"):
            attend(*inputs(), CAUSAL, "cudnn")
        with pytest.raises(ValueError, match="multiple of 8, at most 256, not 12"):
            attend(*inputs(jnp.bfloat16, width=12), CAUSAL, "cudnn")
        with pytest.raises(ValueError, match="cannot run here .*cuDNN is not detected"):
            jax.eval_shape(lambda *x: attend(*x, CAUSAL, "cudnn"), *low)


FOR_TPU = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from models.layers.attention import attend
from models.layers.attention_masks import attention_mask
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
mesh = Mesh(np.array(devices).reshape(1, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
for layer_type, text_length, width, dtype in (("row", 256, 64, "bfloat16"), ("conv", 20, 80, "float32")):
    mask = attention_mask(layer_type, text_length, (32, 32))
    sharding = NamedSharding(mesh, P(("data", "fsdp"), None, "tensor"))
    x = jax.ShapeDtypeStruct((4, len(mask), 2, width), jnp.dtype(dtype), sharding=sharding)
    loss = lambda *x: jnp.sum(attend(*x, mask, "splash").astype(jnp.float32))
    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile().as_text()
    # Forward, and backward for queries and for keys; every device on its own.
    assert program.count('custom_call_target="tpu_custom_call"') == 3, program.count("tpu_custom_call")
    assert "all-gather" not in program and "all-to-all" not in program
"""


@pytest.mark.slow
def test_the_tpu_kernel_compiles_for_a_tpu():
    environment = {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
    }
    command = [sys.executable, "-c", FOR_TPU]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr


def test_a_layer_made_for_a_tpu_has_its_parameters_and_decodes_anywhere():
    layer = SelfAttention(width=12, heads=3, head_dim=8, implementation="splash")
    x = jnp.zeros((2, 6, 12))
    params = jax.eval_shape(layer.init, KEY, x, CAUSAL)

    def prefill(params, x):
        y, cache = layer.apply(params, x, CAUSAL[:2, :2], 6, method="prefill")
        return y, cache.key

    assert [out.shape for out in jax.eval_shape(prefill, params, x[:, :2])] == [(2, 2, 12), (2, 6, 3, 8)]
    with pytest.raises(ValueError, match="needs a TPU"):
        jax.eval_shape(lambda p, x: layer.apply(p, x, CAUSAL), params, x)


def test_decoding_from_a_cache_is_attention_in_parallel():
    layer = SelfAttention(width=12, heads=3, head_dim=8, kernel_init=jax.nn.initializers.normal(0.5))
    x = jax.random.normal(KEY, (2, 6, 12))
    mask = CAUSAL.copy()
    mask[5, 1] = False  # not only causal
    params = jax.jit(layer.init)(KEY, x, mask)
    expected = jax.jit(layer.apply)(params, x, mask)
    y, cache = jax.jit(lambda *inputs: layer.apply(*inputs, 6, method="prefill"))(params, x[:, :2], mask[:2, :2])
    decode = jax.jit(functools.partial(layer.apply, method="decode"))
    np.testing.assert_allclose(y, expected[:, :2], atol=1e-6)
    for i in range(2, 6):
        y, cache = decode(params, x[:, i : i + 1], mask[i : i + 1], i, cache)
        np.testing.assert_allclose(y, expected[:, i : i + 1], atol=1e-6)


@pytest.mark.parametrize("mask", [None, np.tri(5, 7, dtype=bool), "heads"], ids=["none", "causal", "of each head"])
def test_grouped_queries_are_those_of_repeated_keys(mask):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, *shape, 4)), jnp.float32) for shape in ((5, 6), (7, 2), (7, 2)))
    mask = jnp.asarray(rng.random((2, 6, 5, 7)) < 0.7) if isinstance(mask, str) else mask
    expected = attend(q, jnp.repeat(k, 3, axis=2), jnp.repeat(v, 3, axis=2), mask)
    np.testing.assert_allclose(attend(q, k, v, mask), expected, atol=1e-6)
