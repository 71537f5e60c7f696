"""The UNet: published sizes to the unit, what its fields change, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from cost.flops import matrix_flops
from models.conditioning import Conditioning
from models.layers.dropout import drop as drop_values
from models.layers.group_norm_resnet import AttentionBlock, ResidualBlock
from models.layers.spatial_transformer import ContextAttention

from .random_parameters import random_parameters

DDPM_CIFAR10 = {
    **{"image_size": 32, "in_channels": 3, "width": 128, "multipliers": (1, 2, 2, 2), "attention_levels": (1,)},
    **{"heads": 1, "sine_first": True, "last_period": True, "norm_epsilon": 1e-6, "downsample_padding": (0, 1)},
    **{"dropout": 0.1, "kernel_init": "fan_avg"},
}
ADM = {
    **{"in_channels": 3, "out_channels": 6, "width": 256, "head_width": 64, "num_classes": 1000},
    **{"scale_shift": True, "resampler": "residual"},
}
ADM_64 = {**ADM, "image_size": 64, "width": 192, "multipliers": (1, 2, 3, 4), "attention_levels": (1, 2, 3)}
ADM_64 |= {"blocks": 3, "dropout": 0.1}
ADM_128 = {**ADM, "image_size": 128, "multipliers": (1, 1, 2, 3, 4), "attention_levels": (2, 3, 4)}
ADM_128 |= {"heads": 4, "head_width": None}
ADM_256 = {**ADM, "image_size": 256, "multipliers": (1, 1, 2, 2, 4, 4), "attention_levels": (3, 4, 5)}
ADM_512 = {**ADM, "image_size": 512, "multipliers": (0.5, 1, 1, 2, 2, 4, 4), "attention_levels": (4, 5, 6)}
STABLE_DIFFUSION = {
    **{"image_size": 64, "in_channels": 4, "width": 320, "multipliers": (1, 2, 4, 4), "attention_levels": (0, 1, 2)},
    **{"attention": "transformer"},
}
STABLE_DIFFUSION_1 = {**STABLE_DIFFUSION, "heads": 8, "context_width": 768}
STABLE_DIFFUSION_2 = {**STABLE_DIFFUSION, "head_width": 64, "context_width": 1024, "linear_projection": True}
LDM_TEXT = {**STABLE_DIFFUSION, "image_size": 32, "heads": 8, "context_width": 1280}
LDM_4_IMAGENET = {
    **{"image_size": 64, "in_channels": 3, "width": 192, "multipliers": (1, 2, 3, 5), "attention_levels": (1, 2, 3)},
    **{"attention": "transformer", "heads": 1, "context_width": 512},
}
LDM_8_IMAGENET = {
    **{"image_size": 32, "in_channels": 4, "width": 256, "multipliers": (1, 2, 4), "attention_levels": (0, 1, 2)},
    **{"attention": "transformer", "head_width": 32, "context_width": 512},
}
LDM_8_CHURCHES = {
    **{"image_size": 32, "in_channels": 4, "width": 192, "multipliers": (1, 2, 2, 4, 4)},
    **{"attention_levels": (0, 1, 2, 3), "heads": 8, "scale_shift": True, "resampler": "residual"},
}
LDM_4_FFHQ = {
    **{"image_size": 64, "in_channels": 3, "width": 224, "multipliers": (1, 2, 3, 4), "attention_levels": (1, 2, 3)},
    **{"head_width": 32},
}

TINY = {"image_size": 8, "in_channels": 3, "width": 8, "multipliers": (1, 2), "attention_levels": (1,), "blocks": 1}
TINY |= {"heads": 2, "groups": 4}
TINY_TRANSFORMER = {**TINY, "attention": "transformer", "context_width": 6}


def abstract(**fields):
    model = models.create_model("unet", **fields)
    return model, jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs(1))["params"]


def count(tree) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        pytest.param(DDPM_CIFAR10, 35_746_307, id="DDPM CIFAR-10"),
        pytest.param(ADM_64, 295_904_454, id="ADM 64", marks=pytest.mark.slow),
        pytest.param(ADM_128, 421_529_606, id="ADM 128", marks=pytest.mark.slow),
        pytest.param(ADM_256, 553_838_086, id="ADM 256", marks=pytest.mark.slow),
        pytest.param(ADM_512, 558_997_638, id="ADM 512", marks=pytest.mark.slow),
        # Its table of classes is counted apart where it was published.
        pytest.param(
            {**LDM_4_IMAGENET, "num_classes": 1001, "class_embedding": "token"},
            400_920_579 + 1001 * 512,
            id="LDM-4 ImageNet with its classes",
            marks=pytest.mark.slow,
        ),
        pytest.param(LDM_8_IMAGENET, 394_984_196, id="LDM-8 ImageNet", marks=pytest.mark.slow),
        pytest.param(LDM_8_CHURCHES, 294_966_916, id="LDM-8 LSUN churches", marks=pytest.mark.slow),
        pytest.param(LDM_4_FFHQ, 274_056_163, id="LDM-4 FFHQ", marks=pytest.mark.slow),
        pytest.param(LDM_TEXT, 872_300_484, id="LDM text to image", marks=pytest.mark.slow),
        pytest.param(STABLE_DIFFUSION_1, 859_520_964, id="Stable Diffusion 1"),
        pytest.param(STABLE_DIFFUSION_2, 865_910_724, id="Stable Diffusion 2", marks=pytest.mark.slow),
    ],
)
def test_published_sizes(fields, parameters):
    assert count(abstract(**fields)[1]) == parameters


@pytest.mark.slow
def test_latent_diffusion_on_imagenet():
    """Parameters, and 104.2 billion multiplications as counted with the published code at 64 x 64 and one token."""
    model, params = abstract(**LDM_4_IMAGENET)
    assert count(params) == 400_920_579
    x_t, t, _ = model.example_inputs(1)
    conditioning = Conditioning(tokens=jax.ShapeDtypeStruct((1, 1, 512), jnp.float32))
    flops = matrix_flops(lambda params, *inputs: model.apply({"params": params}, *inputs), params, x_t, t, conditioning)
    assert flops / 2e9 == pytest.approx(104.2, abs=0.05)


@pytest.fixture(scope="module")
def tiny():
    model = models.create_model("unet", **TINY, dropout=0.5)
    rng = np.random.default_rng(0)
    x_t = jnp.asarray(rng.normal(size=(3, 8, 8, 3)), jnp.float32)
    return model, random_parameters(model), x_t, jnp.array([1.0, 20.0, 300.0])


@pytest.fixture(scope="module")
def drop(tiny):
    """The tiny network in training, compiled once."""
    model, params, *_ = tiny
    return jax.jit(lambda x_t, t, keys: model.apply({"params": params}, x_t, t, Conditioning(), True, keys))


def test_an_example_s_dropout_is_its_own(tiny, drop):
    _, _, x_t, t = tiny
    keys = jax.random.split(jax.random.key(1), 3)
    before = drop(x_t, t, keys)
    moved = drop(x_t[::-1], t[::-1], keys[::-1])
    np.testing.assert_allclose(moved[::-1], before, atol=1e-5)
    others = drop(x_t, t, keys.at[1].set(jax.random.key(9)))
    np.testing.assert_allclose(others[::2], before[::2], atol=1e-6)
    assert np.abs(others[1] - before[1]).max() > 1e-2


def test_dropout_is_off_outside_training(tiny):
    model, params, x_t, t = tiny
    keys = jax.random.split(jax.random.key(1), 3)
    trace = jax.make_jaxpr(lambda keys: model.apply({"params": params}, x_t, t, Conditioning(), False, keys))(keys)
    assert "random_bits" not in str(trace)
    with pytest.raises(ValueError, match="dropout=0.5 needs dropout_keys"):
        model.apply({"params": params}, x_t, t, Conditioning(), True)


def test_drop_keeps_the_mean_and_the_rate():
    x = jnp.ones((4, 100, 50))
    y = drop_values(x, 0.3, jax.random.split(jax.random.key(0), 4))
    assert np.asarray(y == 0).mean(axis=(1, 2)) == pytest.approx(0.3, abs=0.03)
    np.testing.assert_allclose(y[y > 0], 1 / 0.7, rtol=1e-6)
    assert np.abs(y[0] - y[1]).max() > 1


def test_a_new_network_predicts_zeros_and_its_blocks_pass_their_input_on():
    model = models.create_model("unet", **{**TINY_TRANSFORMER, "multipliers": (1,), "attention_levels": ()})
    inputs = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), model.example_inputs(1))
    params = jax.jit(model.init)(jax.random.key(0), *inputs)["params"]
    zero = {
        jax.tree_util.keystr(path[:-1], simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if path[-1].key == "kernel" and not np.any(leaf)
    }
    residual = ("down_0_residual_0", "mid_residual_0", "mid_residual_1", "up_0_residual_0", "up_0_residual_1")
    assert zero == {"output", "mid_attention/output", *(f"{block}/conv_2" for block in residual)}


def test_kernels_start_as_published():
    x, time = jnp.ones((1, 2, 2, 16)), jnp.ones((1, 4))
    for kernel_init, width in (("fan_in", 1), ("fan_avg", 3**0.5)):  # PyTorch's and Glorot's uniform
        params = ResidualBlock(16, groups=4, kernel_init=kernel_init).init(jax.random.key(0), x, time)["params"]
        limit = width * (9 * 16) ** -0.5
        assert 0.98 * limit < np.abs(params["conv_1"]["kernel"]).max() <= limit
        params = AttentionBlock(2, groups=4, kernel_init=kernel_init).init(jax.random.key(0), x)["params"]["attention"]
        limit = width * 16**-0.5  # query, key and value as if they were apart
        assert 0.98 * limit < np.abs(params["query_key_value"]["kernel"]).max() <= limit
        assert not np.any(params["out"]["kernel"])


@pytest.mark.slow
def test_a_class_may_be_the_only_token():
    fields = {**TINY_TRANSFORMER, "multipliers": (1,), "attention_levels": ()}
    reads = models.create_model("unet", **fields)
    labelled = reads.clone(num_classes=3, class_embedding="token")
    params = random_parameters(labelled)
    table = params["class"]["embedding"]
    x_t, t, label = jnp.ones((2, 8, 8, 3)), jnp.array([1.0, 2.0]), jnp.array([2, 0])
    out = jax.jit(labelled.apply)({"params": params}, x_t, t, Conditioning(label=label))
    tokens = Conditioning(tokens=table[label][:, None])
    same = jax.jit(reads.apply)({"params": {k: v for k, v in params.items() if k != "class"}}, x_t, t, tokens)
    np.testing.assert_allclose(out, same, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "remat"), [(TINY_TRANSFORMER, "dots"), ({**TINY, "dropout": 0.5, "resampler": "residual"}, "full")]
)
def test_recomputing_gives_the_same_gradient(fields, remat):
    plain = models.create_model("unet", **fields)
    params = random_parameters(plain)
    rng = np.random.default_rng(0)
    inputs = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), plain.example_inputs(2))
    keys = jax.random.split(jax.random.key(1), 2)

    def gradient(model):
        return jax.grad(lambda params: jnp.sum(model.apply({"params": params}, *inputs, True, keys) ** 2))

    recomputed = plain.clone(remat=remat)
    assert matrix_flops(gradient(recomputed), params) > 1.1 * matrix_flops(gradient(plain), params)
    same = jax.jit(gradient(recomputed))(params), jax.jit(gradient(plain))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), *same)


def test_an_example_that_sees_no_token_reads_zeros():
    attention = ContextAttention(heads=2)
    x, context = jnp.ones((2, 3, 4)), jax.random.normal(jax.random.key(0), (2, 5, 6))
    mask = jnp.array([[False] * 5, [True] * 5])
    params = attention.init(jax.random.key(1), x, context)
    params["params"]["out"]["bias"] = jnp.arange(4.0)
    y = attention.apply(params, x, context, mask)
    np.testing.assert_allclose(y[0], np.tile(np.arange(4.0), (3, 1)))
    assert np.abs(y[1] - np.arange(4.0)).max() > 0.01


def test_other_sizes_of_pictures_work_where_they_divide(tiny):
    model, params, _, t = tiny

    def shape(height, width):
        x_t = jnp.zeros((3, height, width, 3))
        return jax.eval_shape(model.apply, {"params": params}, x_t, t, Conditioning()).shape

    assert shape(6, 10) == (3, 6, 10, 3)
    with pytest.raises(ValueError, match="pictures are 6 x 9; both must be multiples of 2"):
        shape(6, 9)


def test_folded_patches_are_channels(tiny):
    """A network of 2 x 2 patches is that of pictures half as large whose channels hold them."""
    _, _, x_t, t = tiny
    patched = models.create_model("unet", **TINY, patch_size=2)
    plain = models.create_model("unet", **{**TINY, "image_size": 4, "in_channels": 12})
    params = random_parameters(plain)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, random_parameters(patched))
    folded = np.stack([x_t[:, p::2, q::2] for p in range(2) for q in range(2)], axis=3).reshape(3, 4, 4, 12)
    expected = plain.apply({"params": params}, jnp.asarray(folded), t, Conditioning()).reshape(3, 4, 4, 2, 2, 3)
    output = patched.apply({"params": params}, x_t, t, Conditioning())
    np.testing.assert_allclose(output, np.moveaxis(expected, 3, 2).reshape(3, 8, 8, 3), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 0}, "patch_size=0 must be at least 1"),
        ({"patch_size": 8}, "image_size=8 is not a multiple of 16"),
        ({"image_size": 9}, "image_size=9 is not a multiple of 2"),
        ({"heads": 3}, "heads=3 does not divide the 16 channels of level 1"),
        ({"heads": None, "head_width": 6}, "head_width=6 does not divide the 16 channels of level 1"),
        ({"heads": None}, "set one of heads=None and head_width=None"),
        ({"head_width": 8}, "set one of heads=2 and head_width=8"),
        ({"groups": 3}, "groups=3 does not divide the 8 channels"),
        ({"attention_levels": (2,)}, "attention_levels has 2; the levels of multipliers are 0 to 1"),
        ({"attention": "linear"}, "unknown attention 'linear'; choose one of plain, transformer"),
        ({"resampler": "fir"}, "unknown resampler 'fir'"),
        ({"class_embedding": "both"}, "unknown class_embedding 'both'"),
        ({"class_embedding": "token", "num_classes": 3}, "class_embedding='token' needs a context_width"),
        ({"context_width": 6}, "context_width=6 needs attention='transformer'"),
        ({"dropout": 1.0}, "dropout=1.0 must be"),
        ({"remat": "some"}, "unknown remat 'some'"),
        ({"kernel_init": "zeros"}, "unknown kernel_init 'zeros'"),
        ({"attention": "transformer", "implementation": "fused"}, None),
    ],
)
def test_impossible_fields_are_named(change, message):
    model = models.create_model("unet", **{**TINY, **change})
    inputs = model.example_inputs(1)
    if message is None:  # parameters can be made where a kernel cannot run
        params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
        with pytest.raises(ValueError, match="unknown attention 'fused'"):
            jax.eval_shape(model.apply, params, *inputs)
        return
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), *inputs)


CLASS_TOKEN = {"num_classes": 3, "class_embedding": "token"}
TOKENS, LABEL, MASK = jnp.zeros((1, 4, 6)), jnp.zeros((1,), jnp.int32), jnp.ones((1, 4), bool)


@pytest.mark.parametrize(
    ("fields", "conditioning", "message"),
    [
        (TINY, {"tokens": TOKENS}, "does not read conditioning.tokens"),
        (TINY, {"mask": MASK}, "conditioning.mask is of tokens, which the network does not read"),
        (TINY, {"label": LABEL}, "has no classes; leave conditioning.label out"),
        ({**TINY, "num_classes": 3}, {}, "needs conditioning.label"),
        (TINY_TRANSFORMER, {}, r"needs conditioning.tokens \[B L 6\]"),
        (TINY_TRANSFORMER, {"tokens": TOKENS[..., :5]}, "tokens are 5 wide, the network's context_width is 6"),
        (
            {**TINY_TRANSFORMER, "num_classes": 3, "class_embedding": "token"},
            {"label": LABEL, "tokens": TOKENS},
            "not read",
        ),
        ({**TINY, "in_channels": 4}, {}, "pictures have 3 channels, the network's in_channels are 4"),
    ],
)
def test_a_description_that_the_network_was_not_built_for_is_refused(fields, conditioning, message):
    model, params = abstract(**fields)
    inputs = jnp.zeros((1, 8, 8, 3)), jnp.zeros((1,)), Conditioning(**conditioning)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.apply, {"params": params}, *inputs)


def test_without_a_context_transformers_read_pixels_twice():
    model, params = abstract(**{**TINY_TRANSFORMER, "context_width": 0})
    kernel = params["mid_attention"]["blocks_0"]["context_attention"]["key_value"]["kernel"]
    assert kernel.shape == (16, 2, 2, 8)
    jax.eval_shape(model.apply, {"params": params}, *model.example_inputs(2))


def test_projections_are_dense_or_convolutions():
    for linear, shape in ((True, (16, 16)), (False, (1, 1, 16, 16))):
        fields = {**TINY_TRANSFORMER, "multipliers": (2,), "attention_levels": ()}
        _, params = abstract(**fields, linear_projection=linear)
        assert params["mid_attention"]["input"]["kernel"].shape == shape
