"""The vision adapter: published sizes, gates of 0, what sees which picture, and cached decoding with pictures."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.layers.tile_positions import canvases, spread_grid
from models.llama import Llama
from models.vision_adapter import VisionAdapter, pictures_seen
from sample.decoding import Decoding, decode

from .random_parameters import random_parameters

IMAGE = 13
PUBLISHED = {"text_vocab_size": 128256, "kv_heads": 8, "image_token": 128256, "rope_factor": 8.0, "patch_size": 14}
PUBLISHED |= {"image_width": 1280, "image_heads": 16, "image_layers": 32, "global_layers": 8, "tile_size": 560}
PUBLISHED |= {"feature_layers": (3, 7, 15, 23, 30), "cross_layers": tuple(range(3, 32, 4))}
PUBLISHED |= {"width": 4096, "depth": 32, "heads": 32, "mlp_hidden": 14336}


@functools.cache
def tiny(**fields):
    """A network of two layers, its random parameters, and its compiled pass."""
    language = {"text_vocab_size": 13, "width": 16, "depth": 2, "heads": 4, "kv_heads": 2, "mlp_hidden": 24}
    image = {"tile_size": 8, "patch_size": 4, "image_width": 8, "image_heads": 2, "image_layers": 2}
    image |= {"global_layers": 1, "max_tiles": 2, "feature_layers": (0, 1), "image_token": IMAGE}
    model = VisionAdapter(**{**language, **image, "cross_layers": (0, 1), "extra_tokens": 2, **fields})
    return model, random_parameters(model), jax.jit(model.apply)


def inputs(seed=0):
    """A text of nothing before two pictures, and one of a picture behind three tokens; tiles and canvases."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 13, (2, 8))
    tokens[0, [1, 5]] = tokens[1, 3] = IMAGE
    tiles = rng.uniform(-1, 1, (2, 2, 2, 8, 8, 3))
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(tiles, jnp.float32), jnp.array([[2, 1], [3, 0]])


def test_the_published_size_with_a_grid_of_tiles_has_its_number_of_parameters():
    """With tables of canvases: tests/configs/test_vision_adapter_papers.py."""
    model = VisionAdapter(**PUBLISHED, tile_tables="grid")
    params = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs(1))["params"]
    counts = {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in params.items()}
    assert sum(counts.values()) == 10_629_184_035
    assert counts["cross_blocks_0"] == 218_112_258
    assert counts["encoder"] == 863_567_379 - 41_036_800


def test_with_gates_of_0_the_logits_are_the_language_model_s_to_the_bit():
    model, params, apply = tiny()
    tokens, tiles, canvas = inputs()
    tokens = jnp.where(tokens == IMAGE, 7, tokens)  # the picture's own embedding is no word of the language model
    tokens = tokens.at[:, 0].set(IMAGE)
    shut = {
        name: {**tree, "attention_gate": jnp.zeros(1), "mlp_gate": jnp.zeros(1)} if name.startswith("cross") else tree
        for name, tree in params.items()
    }
    shut["extra_embedding"] = {"embedding": params["language"]["embedding"]["embedding"][:2]}
    language = Llama(**{name: value for name, value in model.network_at("language").items() if name != "name"})
    expected = jax.jit(language.apply)({"params": params["language"]}, tokens.at[:, 0].set(0))
    np.testing.assert_array_equal(apply({"params": shut}, tokens, tiles, canvas), expected)
    assert np.abs(apply({"params": params}, tokens, tiles, canvas) - expected).max() > 1e-2


@pytest.mark.parametrize("published", [True, False])
def test_what_is_said_before_a_picture_does_not_depend_on_it(published):
    model, params, _ = tiny(as_transformers=not published)
    tokens, tiles, canvas = inputs()

    def logits(tiles, place):
        return jnp.sum(model.apply({"params": params}, tokens, tiles, canvas)[1, place] ** 2)

    slope = jax.jit(jax.vmap(jax.grad(logits), in_axes=(None, 0)))(tiles, jnp.arange(8))[:, 1, 0]
    moved = np.abs(slope).max(axis=(1, 2, 3, 4))
    assert (moved[3:] > 1e-4).all()
    assert (moved[:3] == 0).all() if published else (moved[:3] > 1e-4).all()


def test_a_token_sees_the_last_run_of_pictures():
    tokens = jnp.array([[IMAGE, 1, IMAGE, IMAGE, 2, IMAGE]])
    expected = [[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    np.testing.assert_array_equal(pictures_seen(tokens, IMAGE, 4)[0], np.array(expected, bool))
    packed = pictures_seen(jnp.array([[1, IMAGE, IMAGE, 1, 2, 2]]), IMAGE, 2, jnp.array([[0, 0, 1, 1, 2, 2]]))
    np.testing.assert_array_equal(packed[0], np.array([[0, 0], [1, 0], [0, 1], [0, 1], [0, 0], [0, 0]], bool))


def test_tiles_that_a_canvas_lacks_and_pictures_that_are_not_there_change_nothing():
    _, params, apply = tiny()
    tokens, tiles, canvas = inputs()
    changed = tiles.at[0, 1, 1].add(1.0).at[1, 1].add(1.0)  # canvas 1 has one tile, canvas 0 is no picture
    np.testing.assert_array_equal(*(apply({"params": params}, tokens, each, canvas) for each in (tiles, changed)))
    seen = tiles.at[0, 1, 0].add(1.0)
    assert (
        np.abs(apply({"params": params}, tokens, seen, canvas) - apply({"params": params}, tokens, tiles, canvas)).max()
        > 1e-3
    )


def test_a_grid_of_positions_is_the_tables_of_its_canvases():
    _, params, apply = tiny()
    model, own, grid_apply = tiny(tile_tables="grid")
    encoder = dict(own["encoder"])
    for name in ("tile_position", "first_tile", "last_tile"):
        encoder[name] = {"embedding": spread_grid(encoder[name]["grid"])}
    expected = grid_apply({"params": own}, *inputs())
    np.testing.assert_allclose(apply({"params": {**own, "encoder": encoder}}, *inputs()), expected, atol=1e-5)
    assert canvases(4) == ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)) and params is not None


def test_cached_decoding_looks_at_pictures_once_and_scores_as_one_pass():
    model, params, apply = tiny()
    tokens, tiles, canvas = inputs()
    variables, lengths = {"params": params}, np.array([6, 4])
    padded = jnp.where(jnp.arange(6) < lengths[:, None], tokens[:, :6], 0)
    read = jax.jit(functools.partial(model.apply, method="prefill"), static_argnums=2)
    logits, cache, sight = read(variables, padded, 2, jnp.asarray(lengths), tiles, canvas)
    step = jax.jit(functools.partial(model.apply, method="decode_step"))
    for made in range(2):
        # What stands behind a prompt is what was made, no picture.
        rows = np.array(jnp.where(tokens == IMAGE, 5, tokens))
        for row, length in enumerate(lengths):
            whole = np.concatenate([padded[row, :length], rows[row, :made], np.zeros(8 - length - made, int)])
            expected = apply(
                variables, jnp.asarray(whole[None], jnp.int32), tiles[row : row + 1], canvas[row : row + 1]
            )
            np.testing.assert_allclose(logits[row], expected[0, length - 1 + made], atol=1e-5)
        logits, cache = step(variables, jnp.asarray(rows[:, made], jnp.int32), made, cache, sight)


@pytest.mark.slow
def test_beams_share_the_pictures_of_their_example():
    model, params, _ = tiny()
    tokens, tiles, canvas = inputs()
    variables = {"params": params}
    keys = jax.random.split(jax.random.key(0), 2)

    @functools.partial(jax.jit, static_argnums=0)
    def make(settings, tokens, tiles, canvas):
        logits, cache, sight = model.apply(variables, tokens, 3, None, tiles, canvas, method="prefill")
        step = functools.partial(model.apply, variables, method="decode_step")
        loop = lambda token, position, cache: step(token, position, cache, sight)  # noqa: E731
        return decode(loop, logits, cache, keys[: len(tokens)], 3, settings).tokens

    together = make(Decoding(beams=3), tokens, tiles, canvas)
    alone = [make(Decoding(beams=3), tokens[i : i + 1], tiles[i : i + 1], canvas[i : i + 1])[0] for i in range(2)]
    np.testing.assert_array_equal(together, np.stack(alone))


@pytest.mark.slow
def test_recomputed_and_scanned_layers_are_the_same():
    _, params, apply = tiny()
    _, _, other = tiny(scan=True, remat="full")
    np.testing.assert_allclose(other({"params": params}, *inputs()), apply({"params": params}, *inputs()), atol=1e-5)
