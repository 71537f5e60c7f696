"""DALL-E's sampler: the cached loop against the network, guidance, filters, seeds, priming and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from cli.errors import UserError
from models.dvae import DiscreteVAE
from sample.image_tokens import ImageTokens
from sample.samplers.contract import besides
from sample.samplers.dalle import DalleSampler

T, N, TEXT_VOCAB, IMAGE_VOCAB = 4, 16, 11, 7
GOLDEN = ["6660060666605000", "6606066660066000", "6006000660055000"]  # before sample/decoding.py was there


def make_config(model=None, sample=None, dvae=None):
    """A tiny system over 4 x 4 tokens."""
    return ConfigDict(
        {
            "models": {
                "dalle": {
                    "name": "dalle",
                    "text_vocab_size": TEXT_VOCAB,
                    "text_length": T,
                    "image_vocab_size": IMAGE_VOCAB,
                    "image_grid": (4, 4),
                    "width": 16,
                    "depth": 1,
                    "heads": 2,
                    "conv_kernel": 3,
                    **(model or {}),
                }
            },
            "frozen": {
                "dvae": {
                    "name": "dvae",
                    "image_size": 8,
                    "vocab_size": IMAGE_VOCAB,
                    "encoder_hidden": 8,
                    "decoder_hidden": 8,
                    "decoder_init": 4,
                    "width_multipliers": (1,),
                    "patch_size": 2,
                    "blocks_per_group": 1,
                    "input_kernel": 1,
                    "source": "random",
                    "part": "dvae",
                    **(dvae or {}),
                }
            },
            "sample": {"guidance": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, **(sample or {})},
        }
    )


def random_params(module, seed=0):
    """Large random parameters."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *module.example_inputs(1))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map_with_path(
        lambda path, x: jnp.asarray((path[-1].key == "scale") + rng.normal(scale=0.3, size=x.shape), x.dtype), shapes
    )


@functools.cache
def system(attention="published", depth=3):
    """(sampler, a function of request and keys that draws)."""
    sampler = DalleSampler.from_config(make_config({"attention": attention, "depth": depth}))
    params = {"dalle": random_params(sampler.model)}
    frozen = {"dvae": {"params": random_params(sampler.image_tokens.model), "variables": {}}}
    return sampler, functools.partial(sampler, params, {}, frozen), params, frozen


def captions(size, seed=0):
    """Captions with pads at the end of the first."""
    text = np.random.default_rng(seed).integers(1, TEXT_VOCAB, (size, T))
    text[0, T - 1] = 0
    return text


def keys(size, seed=0):
    """One key per picture, as the sample command makes them."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), jnp.arange(size))


def draw(size=3, attention="published", depth=3, **options):
    """Image tokens [size N] of `captions(size)`."""
    sampler, sample, _, _ = system(attention, depth)
    return np.asarray(sample(sampler.request(captions(size), **options), keys(size))["image_tokens"]).reshape(size, N)


def network_logits(text, tokens, attention="published", depth=3):
    """Image logits of one uncached pass."""
    sampler, _, params, _ = system(attention, depth)
    apply = jax.jit(sampler.model.apply)
    return np.asarray(apply({"params": params["dalle"]}, jnp.asarray(text, jnp.int32), jnp.asarray(tokens)).image)


@pytest.mark.parametrize(("attention", "depth"), [("full", 1), ("published", 3)])  # row, column, conv in the second
def test_greedy_tokens_are_the_most_likely_of_the_uncached_network_under_guidance(attention, depth):
    guidance = 3.0
    tokens = draw(3, attention, depth, guidance=guidance, temperature=0)
    conditional = network_logits(captions(3), tokens, attention, depth)
    blank = network_logits(np.zeros((3, T)), tokens, attention, depth)
    np.testing.assert_array_equal(tokens, np.argmax(blank + guidance * (conditional - blank), axis=-1))
    assert np.any(tokens != np.argmax(conditional, axis=-1))


def test_greedy_tokens_without_guidance_are_the_most_likely():
    tokens = draw(3, temperature=0)
    np.testing.assert_array_equal(tokens, np.argmax(network_logits(captions(3), tokens), axis=-1))


def test_keeping_one_token_is_greedy():
    np.testing.assert_array_equal(draw(top_k=1), draw(temperature=0))
    np.testing.assert_array_equal(draw(top_p=1e-6), draw(temperature=0))
    assert np.any(draw() != draw(temperature=0))


def test_guidance_one_is_the_conditional_model():
    sampler, sample, _, _ = system()
    # Inside jit the sampler cannot know the guidance, and runs the guided program.
    guided = jax.jit(sample)(sampler.request(captions(3)), keys(3))["image_tokens"]
    np.testing.assert_array_equal(guided.reshape(3, N), draw())
    assert np.any(draw(guidance=4.0) != draw())


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_picture_is_the_same_alone_and_among_others(guidance):
    sampler, sample, _, _ = system()
    among = draw(3, guidance=guidance)
    for i in (0, 2):
        request = sampler.request(captions(3)[i : i + 1], guidance=guidance)
        np.testing.assert_array_equal(sample(request, keys(3)[i : i + 1])["image_tokens"].reshape(N), among[i])


def test_the_key_alone_tells_pictures_of_one_caption_apart():
    sampler, sample, _, _ = system()
    request = sampler.request(np.repeat(captions(1), 3, axis=0))
    first, again, other = sample(request, keys(2)[jnp.array([0, 0, 1])])["image_tokens"]
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def test_tokens_are_drawn_from_the_softmax_at_the_temperature_and_anew_at_each_position():
    sampler, _, params, frozen = system("full", 1)
    # A network that ignores its input: every position has the logits of the head's bias.
    params = jax.tree.map(jnp.zeros_like, params)
    bias = np.linspace(-1, 1, IMAGE_VOCAB).astype(np.float32)
    params["dalle"]["image_head"]["bias"] = jnp.asarray(bias)
    request = sampler.request(captions(500), temperature=0.5)
    tokens = np.asarray(sampler(params, {}, frozen, request, keys(500))["image_tokens"]).reshape(500, N)
    expected = np.exp(bias / 0.5) / np.sum(np.exp(bias / 0.5))
    np.testing.assert_allclose(np.bincount(tokens.ravel(), minlength=IMAGE_VOCAB) / tokens.size, expected, atol=0.02)
    # Neighboring positions are independent: they agree as often as two independent draws.
    assert np.mean(tokens[:, 1:] == tokens[:, :-1]) == pytest.approx(np.sum(expected**2), abs=0.03)


def test_other_values_of_the_options_compile_nothing_new():
    sampler, _, params, frozen = system("full", 1)
    traces = []

    class CountingDecoder(DiscreteVAE):
        """Notes when it is traced."""

        def decode_tokens(self, tokens):
            traces.append(tokens.shape)
            return super().decode_tokens(tokens)

    fields = {k: v for k, v in make_config().frozen.dvae.items() if k not in ("name", "source", "part")}
    counting = DalleSampler(sampler.model, ImageTokens(CountingDecoder(**fields)))
    for options in [
        {},
        {"temperature": 0.0},
        {"top_k": 3, "temperature": 0.7},
        {"top_p": 0.9},
        {"image_prefix": np.ones((2, 5), np.int32)},
    ]:
        counting(params, {}, frozen, counting.request(captions(2), **options), keys(2))
    assert len(traces) == 1
    for guidance in (0.0, 2.0, 3.5):
        counting(params, {}, frozen, counting.request(captions(2), guidance=guidance), keys(2))
    assert len(traces) == 2


def test_a_given_beginning_is_kept_and_continued_as_before():
    tokens = draw(2, guidance=2.0)
    np.testing.assert_array_equal(draw(2, guidance=2.0, image_prefix=tokens[:, :6]), tokens)
    changed = (tokens[:, :6] + 1) % IMAGE_VOCAB
    continued = draw(2, guidance=2.0, image_prefix=changed)
    np.testing.assert_array_equal(continued[:, :6], changed)
    assert np.any(continued[:, 6:] != tokens[:, 6:])
    np.testing.assert_array_equal(draw(2, image_prefix=tokens), tokens)


def pixels(size, seed=0):
    """Random pictures, and the tokens that the frozen tokenizer makes of them."""
    sampler, _, _, frozen = system()
    images = np.random.default_rng(seed).integers(0, 256, (size, 8, 8, 3)).astype(np.uint8)
    tree = {"params": frozen["dvae"]["params"]}
    tokens = sampler.image_tokens.model.apply(tree, jnp.asarray(images) / 127.5 - 1, method="tokenize")
    return images, np.asarray(tokens).reshape(size, N)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_rows_that_are_kept_of_a_picture_are_its_tokens_and_the_rest_follows_the_caption(guidance):
    sampler, sample, _, _ = system()
    images, tokens = pixels(3)

    def complete(text, **options):
        request = sampler.request(text, images, guidance=guidance, **options)
        return np.asarray(sample(request, keys(3))["image_tokens"]).reshape(3, N)

    drawn, other = complete(captions(3), keep_rows=1), complete(captions(3, seed=1), keep_rows=1)
    np.testing.assert_array_equal(drawn[:, :4], tokens[:, :4])
    np.testing.assert_array_equal(other[:, :4], tokens[:, :4])
    assert np.all(np.any(drawn[:, 4:] != other[:, 4:], axis=1))
    np.testing.assert_array_equal(drawn, draw(3, guidance=guidance, image_prefix=tokens[:, :4]))
    half = complete(captions(3))
    np.testing.assert_array_equal(half, draw(3, guidance=guidance, image_prefix=tokens[:, :8]))
    assert np.any(half[:, 8:] != tokens[:, 8:])
    np.testing.assert_array_equal(complete(captions(3), keep_rows=0), draw(3, guidance=guidance))


def test_a_picture_is_something_that_only_a_user_gives():
    sampler, _, _, _ = system()
    assert sampler.reads == ("text",) and besides(sampler) == {"image": {"keep_rows": 2}}
    assert "keep_rows" not in sampler.settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_rows": 4}, "keep_rows=4 is impossible; a picture has 4 rows of tokens: keep 0 to 3"),
        ({"keep_rows": -1}, "keep_rows=-1 is impossible"),
        ({"keep_rows": 1.5}, "keep_rows=1.5 is impossible"),
        ({"image": None, "keep_rows": 2}, "keep_rows=2 is of a picture that is given, and there is none; give --image"),
        ({"image": np.zeros((2, 4, 4, 3), np.uint8)}, r"pictures are \[2, 8, 8, 3\], not \[2, 4, 4, 3\]"),
        ({"image_prefix": np.zeros((2, 4), np.int32)}, "both say how a picture begins"),
    ],
)
def test_impossible_completions_are_refused_in_one_line(options, message):
    with pytest.raises(UserError, match=message) as error:
        system()[0].request(captions(2), **{"image": pixels(2)[0], **options})
    assert "\n" not in str(error.value)


def test_pictures_are_the_decoded_tokens():
    sampler, sample, _, frozen = system()
    out = sample(sampler.request(captions(2)), keys(2))
    assert out["image_tokens"].shape == (2, 4, 4) and out["image_tokens"].dtype == jnp.int32
    tree = {"params": frozen["dvae"]["params"]}
    expected: jax.Array = sampler.image_tokens.model.apply(tree, out["image_tokens"], method="decode_tokens")
    np.testing.assert_allclose(out["image"], expected, atol=1e-5)
    assert out["image"].shape == (2, 8, 8, 3)
    assert np.ptp(out["image"]) > 0.1 and np.max(np.abs(out["image"])) <= 1


def test_draws_are_those_of_earlier_versions():
    drawn = draw(guidance=2.0, temperature=0.8, top_k=5, top_p=0.9)
    assert ["".join(map(str, row)) for row in drawn] == GOLDEN


def test_config_gives_the_defaults_and_overrides_win():
    sampler = DalleSampler.from_config(make_config(sample={"guidance": 2.5, "top_k": 4}))
    request = sampler.request(captions(2), top_k=2)
    assert (request["guidance"], request["temperature"], request["top_k"], request["top_p"]) == (2.5, 1.0, 2, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 is impossible"),
        ({"temperature": float("nan")}, "temperature=nan is impossible"),
        ({"guidance": -1}, "guidance=-1 is impossible"),
        ({"guidance": float("inf")}, "guidance=inf is impossible"),
        ({"top_k": -1}, "top_k=-1 is impossible"),
        ({"top_k": 2.5}, "top_k=2.5 is impossible"),
        ({"top_p": 0.0}, "top_p=0.0 is impossible"),
        ({"top_p": 1.5}, "top_p=1.5 is impossible"),
        ({"steps": 50}, "steps: no such sampling option; choose from guidance, temperature"),
        ({"image_prefix": np.zeros((3, 2), np.int32)}, r"image_prefix is \[2, at most 16\]"),
        ({"image_prefix": np.zeros((2, 17), np.int32)}, r"image_prefix is \[2, at most 16\]"),
        ({"image_prefix": np.full((2, 2), 7)}, "image_prefix has ids from 7 to 7; the vocabulary is 0 to 6"),
    ],
)
def test_impossible_requests_are_refused_in_one_line(options, message):
    with pytest.raises(UserError, match=message) as error:
        system()[0].request(captions(2), **options)
    assert "\n" not in str(error.value)


def test_captions_must_fit_the_network():
    with pytest.raises(UserError, match=r"captions are \[batch, 4\] token ids, not \[2, 5\]"):
        system()[0].request(np.ones((2, 5), np.int32))
    with pytest.raises(UserError, match="caption has ids from 1 to 11; the vocabulary is 0 to 10"):
        system()[0].request(np.array([[1, 11, 1, 1]]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"image_grid": (8, 8)}}, r"image_grid is \(8, 8\), but config.frozen.dvae makes \(4, 4\) tokens"),
        ({"dvae": {"vocab_size": 9}}, "image_vocab_size is 7, but config.frozen.dvae has 9 codes"),
        ({"sample": {"top_p": 0.0}}, "top_p=0.0 is impossible"),
    ],
)
def test_configs_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        DalleSampler.from_config(make_config(**changes))
