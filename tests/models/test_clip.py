"""CLIP's towers: published sizes, what the text tower may see, where features are read."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models.clip import normalize
from models.modified_resnet import AttentionPool

TINY = {
    "embed_dim": 16,
    "image_tower": "vit",
    "image_size": 16,
    "image_width": 32,
    "image_layers": 2,
    "image_heads": 2,
    "patch_size": 8,
    "text_vocab_size": 40,
    "text_length": 8,
    "text_end_id": 39,
    "text_width": 32,
    "text_layers": 2,
    "text_heads": 2,
}
TINY_RESNET = {**TINY, "image_tower": "resnet", "image_size": 32, "image_width": 8, "image_layers": (1, 1)}


def build(**fields):
    model = models.create_model("clip", **fields)
    images, text = model.example_inputs(3)
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, images.shape).astype(np.float32)
    text = rng.integers(1, 30, text.shape).astype(np.int32)
    text[:, 5:] = [fields["text_end_id"], 0, 0]
    images, text = jnp.asarray(images), jnp.asarray(text)
    return model, jax.jit(model.init)(jax.random.key(0), images, text), images, text


@pytest.fixture(scope="module")
def tiny():
    return build(**TINY)


def test_features_have_unit_length_and_the_published_temperature(tiny):
    model, variables, images, text = tiny
    out = model.apply(variables, images, text)
    np.testing.assert_allclose(np.linalg.norm(out.image, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(out.text, axis=1), 1, rtol=1e-6)
    assert out.logit_scale == pytest.approx(1 / 0.07) and out.logit_bias == 0
    np.testing.assert_allclose(out.image, normalize(model.apply(variables, images, method="project_images")), atol=1e-6)


def test_text_is_read_at_its_first_end_and_sees_nothing_behind_it(tiny):
    model, variables, _, text = tiny
    features = model.apply(variables, text, method="embed_text")
    padded_with_ends = jnp.where(np.arange(8) > 5, TINY["text_end_id"], text)  # as some tokenizers pad
    np.testing.assert_array_equal(model.apply(variables, padded_with_ends, method="embed_text"), features)
    other = text.at[:, 4].set(31)
    assert np.abs(model.apply(variables, other, method="embed_text") - features).max(axis=1).min() > 1e-3
    states = model.apply(variables, text, method="encode_text")
    changed = model.apply(variables, other, method="encode_text")
    np.testing.assert_array_equal(states[:, :4], changed[:, :4])


def test_features_are_the_projected_state_of_the_end(tiny):
    """The last layer is computed there alone, so `encode_text` has it another way."""
    model, variables, _, text = tiny
    states = model.apply(variables, text, method="encode_text")
    expected = states[:, 5] @ variables["params"]["text"]["projection"]["kernel"]
    np.testing.assert_allclose(model.apply(variables, text, method="project_text"), expected, atol=1e-5)


@pytest.mark.parametrize("layers", [1, 3])
def test_features_take_each_layer_once(tiny, layers):
    """By hand, from all states of every layer."""
    _, _, images, _ = tiny
    model = models.create_model("clip", **{**TINY, "image_layers": layers})
    variables = jax.jit(model.init)(jax.random.key(0), *(jnp.ones(x.shape, x.dtype) for x in model.example_inputs(1)))

    def by_hand(model, images):
        tower = model.image
        x = tower.patch((images + 1) / 2).reshape(len(images), -1, 32)
        first = jnp.broadcast_to(tower.class_embedding, (len(images), 1, 32))
        x = tower.first_norm(jnp.concatenate([first, x], axis=1) + tower.position(jnp.arange(5)))
        for block in tower.blocks:
            x = block(x)
        return tower.projection(tower.final_norm(x)[:, 0])

    bare = model.clone(image_mean=(0.0,) * 3, image_std=(1.0,) * 3)
    expected = bare.apply(variables, images, method=by_hand)
    np.testing.assert_allclose(bare.apply(variables, images, method="project_images"), expected, atol=1e-5)


def test_shorter_rows_are_the_same_captions(tiny):
    model, variables, images, text = tiny

    def loss(params, text):
        out = model.apply({"params": params}, images, text)
        return jnp.sum(out.image @ out.text.T * jnp.arange(9).reshape(3, 3))

    with_gradient = jax.jit(jax.value_and_grad(loss))
    value, gradient = with_gradient(variables["params"], text)
    same, same_gradient = with_gradient(variables["params"], text[:, :6])
    assert float(same) == pytest.approx(float(value), rel=1e-5)
    for one, two in zip(jax.tree.leaves(gradient), jax.tree.leaves(same_gradient), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5 * max(np.abs(one).max(), 1))


def test_a_caption_without_an_end_is_no_number(tiny):
    model, variables, _, text = tiny
    features = np.asarray(model.apply(variables, text.at[1, 5].set(7), method="embed_text"))
    assert np.isnan(features[1]).all() and np.isfinite(features[[0, 2]]).all()


@pytest.mark.parametrize("change", [{"remat": "full"}, {"scan": True, "remat": "dots"}])
def test_scan_and_remat_change_nothing(change):
    """Two layers of three: the last is read at one position."""
    layers = {**TINY, "image_layers": 3, "text_layers": 3}
    model, variables, images, text = build(**layers)
    other = models.create_model("clip", **layers, **change)

    def loss(params, model):
        out = model.apply({"params": params}, images, text)
        return jnp.sum(out.image @ out.text.T * jnp.arange(9).reshape(3, 3))

    gradient_of = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    value, gradient = gradient_of(variables["params"], model)
    same, same_gradient = gradient_of(variables["params"], other)
    assert float(same) == pytest.approx(float(value), rel=1e-5)
    for one, two in zip(jax.tree.leaves(gradient), jax.tree.leaves(same_gradient), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5 * max(np.abs(one).max(), 1))


# (tower arguments) -> (parameters of the image tower, the text tower, and both with the temperature), as published.
TEXT = {"text_vocab_size": 49408, "text_length": 77, "text_end_id": 49407, "text_layers": 12}
PUBLISHED = {
    "ViT-B/32": ((512, 224, 768, 12, 32, 512), (87_849_216, 63_428_096, 151_277_313)),
    "ViT-B/16": ((512, 224, 768, 12, 16, 512), (86_192_640, 63_428_096, 149_620_737)),
    "ViT-L/14": ((768, 224, 1024, 24, 14, 768), (303_966_208, 123_650_304, 427_616_513)),
    "ViT-L/14@336": ((768, 336, 1024, 24, 14, 768), (304_293_888, 123_650_304, 427_944_193)),
    "RN50": ((1024, 224, 64, (3, 4, 6, 3), None, 512), (38_316_896, 63_690_240, 102_007_137)),
    "RN101": ((512, 224, 64, (3, 4, 23, 3), None, 512), (56_259_936, 63_428_096, 119_688_033)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    (embed, size, width, layers, patch, text_width), expected = PUBLISHED[name]
    model = models.create_model(
        "clip",
        embed_dim=embed,
        image_tower="vit" if patch else "resnet",
        image_size=size,
        image_width=width,
        image_layers=layers,
        patch_size=patch,
        text_width=text_width,
        **TEXT,
    )
    params = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs(1))["params"]
    counts = [
        sum(math.prod(x.shape) for x in jax.tree.leaves(tree)) for tree in (params["image"], params["text"], params)
    ]
    assert tuple(counts) == expected


def test_quick_gelu_and_gelu_are_not_the_same(tiny):
    model, variables, images, text = tiny
    plain = models.create_model("clip", **TINY, activation="gelu")
    difference = plain.apply(variables, images, text).image - model.apply(variables, images, text).image
    assert np.abs(difference).max() > 1e-4


def test_a_resnet_keeps_statistics_of_what_it_is_trained_on():
    model, variables, images, text = build(**TINY_RESNET)
    assert set(variables) == {"params", "batch_stats"}
    embed = functools.partial(model.apply, method="embed_images")
    still = jax.jit(embed)(variables, images)
    out, moved = jax.jit(functools.partial(embed, train=True, mutable=["batch_stats"]))(variables, images)
    assert np.abs(out - still).max() > 1e-3
    before = variables["batch_stats"]["image"]["stem_1"]["norm"]
    after = moved["batch_stats"]["image"]["stem_1"]["norm"]
    params = variables["params"]["image"]["stem_1"]["conv"]["kernel"]
    # The first convolution by hand: 10 % of the way to the mean of the batch.
    normalized = ((images + 1) / 2 - np.array(model.image_mean)) / np.array(model.image_std)
    y = jax.lax.conv_general_dilated(
        normalized.astype(np.float32), params, (2, 2), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(after["mean"], 0.9 * before["mean"] + 0.1 * y.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(after["var"], 0.9 * before["var"] + 0.1 * y.var((0, 1, 2)), rtol=1e-4)


def test_initialization_is_the_published_one():
    sizes = {"text_width": 128, "image_width": 128, "text_vocab_size": 999, "image_layers": 1, "text_layers": 1}
    model = models.create_model("clip", **{**TINY, **sizes})
    inputs = [jnp.ones(x.shape, x.dtype) for x in model.example_inputs(1)]
    params = jax.jit(model.init)(jax.random.key(1), *inputs)["params"]
    text, image = params["text"], params["image"]

    def std(tree, *path):
        for name in path:
            tree = tree[name]
        return float(np.std(tree))

    block, depth = text["blocks_0"], 1
    expected = {
        ("attention", "query_key_value", "kernel"): 128**-0.5,
        ("attention", "out", "kernel"): (128 * 2 * depth) ** -0.5,
        ("mlp", "up", "kernel"): (2 * 128) ** -0.5,
        ("mlp", "down", "kernel"): (128 * 2 * depth) ** -0.5,
    }
    for path, value in expected.items():
        assert std(block, *path) == pytest.approx(value, rel=0.03), path
    assert std(text, "embedding", "embedding") == pytest.approx(0.02, rel=0.03)
    assert std(text, "position", "embedding") == pytest.approx(0.01, rel=0.1)
    assert std(text, "projection", "kernel") == pytest.approx(128**-0.5, rel=0.05)
    assert std(image, "class_embedding") == pytest.approx(128**-0.5, rel=0.2)
    # PyTorch's own: uniform, within 1 / sqrt(fan in), and Glorot's for the joint projection.
    up = np.asarray(image["blocks_0"]["mlp"]["up"]["kernel"])
    assert np.abs(up).max() <= 128**-0.5 and up.std() == pytest.approx((128 * 3) ** -0.5, rel=0.03)
    assert np.abs(image["blocks_0"]["mlp"]["down"]["bias"]).max() == pytest.approx(512**-0.5, rel=0.05)
    joint = image["blocks_0"]["attention"]["query_key_value"]["kernel"]
    assert np.std(joint) == pytest.approx((2 / (128 + 3 * 128)) ** 0.5, rel=0.03)


def test_the_attention_pool_starts_as_published():
    pool = AttentionPool(heads=4, features=16).init(jax.random.key(0), jnp.ones((1, 2, 2, 64)))["params"]
    for name in ("query", "key", "value", "out"):
        bias = np.asarray(pool[name]["bias"])
        assert np.abs(bias).max() <= 64**-0.5 and bias.std() == pytest.approx((64 * 3) ** -0.5, rel=0.3), name
        assert pool[name]["kernel"].std() == pytest.approx(64**-0.5, rel=0.1), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 5}, "patch_size=5 must divide"),
        ({"image_tower": "mlp"}, "unknown image_tower 'mlp'"),
        ({"text_end_id": 40}, "text_end_id=40"),
        ({"text_heads": None}, "text_heads=0 must be at least 1"),
        ({"image_heads": 3}, "image_heads=3 must be at least 1 and divide image_width=32"),
        ({"remat": "some"}, "unknown remat"),
        ({"activation": "softest"}, "unknown activation"),
    ],
)
def test_impossible_fields_are_named(change, message):
    model = models.create_model("clip", **{**TINY, **change})
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs(1))


def test_inputs_of_another_size_are_named(tiny):
    model, variables, images, text = tiny
    with pytest.raises(ValueError, match="image_size is 16"):
        model.apply(variables, images[:, :8], text)
    with pytest.raises(ValueError, match="text_length is 8"):
        model.apply(variables, images, jnp.pad(text, ((0, 0), (0, 1))))


def test_siglip_has_a_bias_too(tiny):
    fields = {**TINY, "logit_scale_init": math.log(10), "logit_bias_init": -10.0}
    model, variables, images, text = build(**fields)
    out = model.apply(variables, images, text)
    assert out.logit_scale == pytest.approx(10) and out.logit_bias == -10
    extra = set(variables["params"]) - set(tiny[1]["params"])
    assert extra == {"logit_bias"}


def test_positions_are_interpolated_for_pictures_of_another_size(tiny):
    """A linear ramp stays one, the class token's position stays, and what is not position is untouched."""
    model, variables, _, _ = tiny
    larger = models.create_model("clip", **{**TINY, "image_size": 32})
    rows, columns = np.divmod(np.arange(4), 2)
    ramp = np.stack([rows, columns], axis=1).astype(np.float32)
    embedding = np.zeros((5, 32), np.float32)
    embedding[0], embedding[1:, :2] = 7, ramp
    params = {**variables["params"], "image": {**variables["params"]["image"], "position": {"embedding": embedding}}}
    adapted = larger.adapt(params, model)
    positions = np.asarray(adapted["image"]["position"]["embedding"])
    assert positions.shape == (17, 32) and (positions[0] == 7).all()
    grid = positions[1:].reshape(4, 4, 32)
    np.testing.assert_allclose(grid[:, :, 1], grid[:, :, 0].T, atol=1e-6)
    assert (np.diff(grid[:, 0, 0]) > 0).all() and np.ptp(grid[1, :, 0]) < 1e-6
    rest = jax.tree.map(np.array_equal, adapted["image"]["blocks_0"], params["image"]["blocks_0"])
    assert jax.tree.all(rest) and adapted["text"] is params["text"]
    shapes = jax.eval_shape(larger.init, jax.random.key(0), *larger.example_inputs(1))["params"]
    assert jax.tree.map(jnp.shape, adapted) == jax.tree.map(jnp.shape, shapes)


def test_a_resnet_goes_on_at_another_resolution_too():
    model, larger = (models.create_model("clip", **{**TINY_RESNET, "image_size": size}) for size in (32, 48))
    trees = [jax.eval_shape(m.init, jax.random.key(0), *m.example_inputs(1))["params"] for m in (model, larger)]
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), trees[0])
    assert jax.tree.map(jnp.shape, larger.adapt(params, model)) == jax.tree.map(jnp.shape, trees[1])


def test_a_text_tower_alone_has_the_states_of_the_whole(tiny):
    model, variables, _, text = tiny
    fields = {name: value for name, value in TINY.items() if name.startswith("text_")}
    tower = models.create_model("clip_text", **fields)
    params = {"text": {name: leaf for name, leaf in variables["params"]["text"].items() if name != "projection"}}
    abstract = jax.eval_shape(tower.init, jax.random.key(0), text)["params"]
    assert jax.tree.structure(abstract) == jax.tree.structure(params)
    states = model.apply(variables, text, method="encode_text")
    np.testing.assert_array_equal(tower.apply({"params": params}, text), states)
    without_last = models.create_model("clip_text", **{**fields, "text_layers": 1})
    params["text"].pop("blocks_1")
    assert np.abs(without_last.apply({"params": params}, text) - states).max() > 1e-2
    with pytest.raises(ValueError, match="text_pad_id=40"):
        models.create_model("clip_text", **fields, text_pad_id=40).init(jax.random.key(0), text)


@pytest.mark.parametrize(
    ("width", "layers", "activation", "count"),
    [(768, 12, "quick_gelu", 123_060_480), (1024, 23, "gelu", 340_387_840)],
)
def test_published_text_towers(width, layers, activation, count):
    """Of Stable Diffusion 1, and of 2, which leaves the last layer out."""
    fields = {"text_vocab_size": 49408, "text_length": 77, "text_end_id": 49407, "activation": activation}
    model = models.create_model("clip_text", **fields, text_width=width, text_layers=layers)
    tree = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs(1))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) == count
