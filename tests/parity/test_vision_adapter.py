"""Llama Vision of transformers computes what ours computes with the same weights: one tile, four, several pictures.

Where the library differs from the published code, ours follows the latter; `as_transformers` has both computed alike.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import MllamaConfig, MllamaForConditionalGeneration, MllamaImageProcessor
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

import models
from data.preprocess import center_square
from data.tiles import picture_fields
from models.layers.tile_positions import canvases, tiles_of_canvases
from models.vision_adapter import pictures_seen
from sample.samplers.vision_adapter import tiles_of
from scripts.convert import main as convert
from weights.formats.transformers_mllama import mllama_fields, mllama_params
from weights.run import Run

VOCABULARY, IMAGE = 40, 40
TEXT = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "intermediate_size": 48, "cross_attention_layers": [1, 3], "pad_token_id": 0}
TEXT |= {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "bos_token_id": 1, "eos_token_id": 2}
VISION = {"hidden_size": 16, "num_hidden_layers": 3, "num_global_layers": 2, "attention_heads": 2}
VISION |= {"intermediate_size": 32, "vision_output_dim": 48, "image_size": 28, "patch_size": 7, "max_num_tiles": 4}
VISION |= {"intermediate_layers_indices": [0, 1], "supported_aspect_ratios": [list(each) for each in canvases(4)]}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    config = MllamaConfig(
        vision_config=MllamaVisionConfig(**VISION), text_config=MllamaTextConfig(**TEXT), image_token_index=IMAGE
    )
    config._attn_implementation = "eager"
    network = MllamaForConditionalGeneration._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            if "gate" in name and tensor.numel() == 1:
                tensor.fill_(0.5)
            elif tensor.ndim > 1:
                tensor.mul_(5)
            else:
                tensor.add_(0.1 * torch.randn_like(tensor))
    return network.eval()


def ours_of(network, **fields):
    """(model, params) with the weights of theirs."""
    model = models.create_model(**{**mllama_fields(json.loads(network.config.to_json_string())), **fields})
    tensors = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    return model, jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), mllama_params(model, tensors))


def pictures(model, ids, seed=0):
    """Tiles in [-1, 1] [B I T H W 3] and canvases [B I]; and what transformers takes for them."""
    canvas = np.array(ids, np.int32)
    shape = (*canvas.shape, model.max_tiles, model.tile_size, model.tile_size, 3)
    tiles = np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)
    there = np.arange(model.max_tiles) < tiles_of_canvases(model.max_tiles)[canvas][..., None]
    pixels = ((tiles + 1) / 2 - np.array(model.image_mean)) / np.array(model.image_std)
    pixels = np.where(there[..., None, None, None], pixels, 0).astype(np.float32).transpose(0, 1, 2, 5, 3, 4)
    theirs = {"pixel_values": torch.from_numpy(np.ascontiguousarray(pixels))}
    theirs |= {"aspect_ratio_ids": torch.from_numpy(canvas).long()}
    theirs |= {"aspect_ratio_mask": torch.from_numpy(there.astype(np.int64))}
    return tiles, canvas, theirs


def run_theirs(network, tokens, theirs):
    """Logits, with the mask that the library's processor makes."""
    seen = np.asarray(pictures_seen(jnp.asarray(tokens), IMAGE, theirs["pixel_values"].shape[1]))
    there = theirs["aspect_ratio_mask"].numpy().astype(bool)
    mask = torch.from_numpy((seen[..., None] & there[:, None]).astype(np.int64))
    with torch.no_grad():
        return network(torch.from_numpy(tokens), cross_attention_mask=mask, **theirs).logits.numpy()


def text(*first, length=9, seed=1):
    """A row of ids that begins with some and has pictures where they are said to be."""
    row = np.random.default_rng(seed).integers(3, VOCABULARY, length)
    row[: len(first)] = first
    return row


CASES = {
    "one tile": ([[1]], [text(IMAGE, 1)]),
    "four tiles": ([[6], [8]], [text(IMAGE, 1), text(IMAGE, 1, seed=2)]),
    "two pictures": ([[2, 4], [7, 0]], [text(IMAGE, 1, 5, 6, IMAGE, 7), text(IMAGE, 1)]),
    "two in a row": ([[5, 1]], [text(IMAGE, IMAGE, 1)]),
}
ANY = {**CASES, "text before": ([[3], [1]], [text(1, 5, 6, IMAGE), text(1, 7, IMAGE)])}


def check(network, model, params, case):
    canvas, rows = ANY[case]
    tokens = np.stack(rows).astype(np.int64)
    tiles, canvas, theirs = pictures(model, canvas)
    expected = run_theirs(network, tokens, theirs)
    logits = jax.jit(model.apply)({"params": params}, jnp.asarray(tokens, jnp.int32), jnp.asarray(tiles), canvas)
    difference = float(np.abs(logits - expected).max())
    print(f"{case}: {difference:.1e} of logits up to {np.abs(expected).max():.1f}")
    return difference


@pytest.mark.parametrize("case", CASES)
def test_prompts_that_begin_with_their_pictures(network, case):
    # The library takes features behind layers 0 and 1, the published code before 1 and 2.
    model, params = ours_of(network, feature_layers=(1, 2))
    assert check(network, model, params, case) < 1e-4


def test_pictures_of_any_shape_through_the_door_of_each(network):
    """The first answer's scores: pixels are our tiles here and their image processor's there."""
    model, params = ours_of(network, feature_layers=(1, 2))
    side = {"height": model.tile_size, "width": model.tile_size}
    processor = MllamaImageProcessor(size=side, image_mean=model.image_mean, image_std=model.image_std)
    tokens = np.stack([text(IMAGE, 1)]).astype(np.int64)

    @jax.jit
    def prefill(tiles, canvas):
        inputs = jnp.asarray(tokens, jnp.int32), 1, None, tiles, canvas
        return model.apply({"params": params}, *inputs, method="prefill")[0]

    for size, canvas in {(20, 100): 4, (80, 30): 7, (50, 50): 6, (9, 9): 1}.items():
        rows, columns = (np.linspace(0, 255, extent) for extent in size)  # smooth, where bilinear filters round alike
        channels = rows[:, None] + 0 * columns, columns + 0 * rows[:, None], (rows[:, None] + columns) / 2
        picture = np.stack(channels, axis=-1).astype(np.uint8)
        made = processor(picture, input_data_format="channels_last", return_tensors="pt")
        theirs = {name: made[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
        expected = run_theirs(network, tokens, theirs)[:, -1]
        fields = picture_fields(picture, model.tile_size, center_square, model.max_tiles)
        assert fields["canvas"] == canvas
        logits = prefill(*tiles_of({name: value[None] for name, value in fields.items()}))
        difference = np.abs(logits - expected).max()
        print(f"{size}: {difference:.1e} of logits up to {np.abs(expected).max():.1f}")
        assert difference < 1e-4


def test_any_prompt_as_transformers(network):
    model, params = ours_of(network, as_transformers=True)
    assert check(network, model, params, "text before") < 1e-4
    published, params = ours_of(network, feature_layers=(1, 2))
    assert check(network, published, params, "text before") > 1e-3  # which it is there that they differ


def test_the_image_encoder(network):
    model, params = ours_of(network, as_transformers=True)
    tiles, canvas, theirs = pictures(model, [[6, 2]])
    with torch.no_grad():
        features = network.model.vision_model(**theirs).last_hidden_state
        expected = network.model.multi_modal_projector(features).reshape(1, -1, 32).numpy()
    ours = jax.jit(lambda *args: model.apply({"params": params}, *args, method="encode"))(jnp.asarray(tiles), canvas)
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_through_the_command_and_back(network, tmp_path):
    network.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    convert([f"--input={tmp_path}/theirs", f"--output={tmp_path}/ours"])
    run = Run.open(tmp_path / "ours")
    model, params = ours_of(network)
    assert models.create_model(**run.config.models.vision_adapter) == model
    jax.tree.map(np.testing.assert_array_equal, run.load().params["vision_adapter"], params)
    convert(["--to=transformers", f"--run={tmp_path}/ours", f"--output={tmp_path}/back"])
    loaded: Any = MllamaForConditionalGeneration.from_pretrained(
        tmp_path / "back", output_loading_info=True, attn_implementation="eager"
    )
    back, report = loaded
    assert not any(report.values()), report
    tokens = np.stack([text(IMAGE, 1)])
    theirs = pictures(model, [[6]])[2]
    np.testing.assert_allclose(run_theirs(back.eval(), tokens, theirs), run_theirs(network, tokens, theirs), atol=1e-6)
