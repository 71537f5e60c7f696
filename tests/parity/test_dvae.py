"""The published DALL-E package (`pip install --no-deps DALL-E==0.1`) computes what our discrete VAE computes."""

import dall_e
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import models
from cli.errors import UserError
from sample.trained import TrainedSampler
from scripts.convert import main as convert
from weights.formats.dall_e import from_dall_e, to_dall_e


@pytest.fixture(scope="module")
def official():
    """The package's encoder and decoder with random weights, and biases that are not zero."""
    torch.manual_seed(0)
    encoder, decoder = dall_e.Encoder(), dall_e.Decoder()
    with torch.no_grad():
        for name, tensor in [*encoder.named_parameters(), *decoder.named_parameters()]:
            if name.endswith(".b"):
                tensor.normal_(std=0.1)
    return encoder, decoder


@pytest.fixture(scope="module")
def states(official):
    return tuple({name: x.detach().numpy() for name, x in network.state_dict().items()} for network in official)


def test_published_network(official, states):
    """Logits, tokens, statistics and reconstruction at the published widths; a 64 x 64 image, for speed."""
    encoder, decoder = official
    model = models.create_model("dvae", image_size=64)
    variables = {"params": from_dall_e(model, *states)}
    images = np.random.default_rng(0).uniform(-1, 1, (1, 64, 64, 3)).astype(np.float32)

    with torch.no_grad():
        x = dall_e.map_pixels(torch.from_numpy((images + 1) / 2).permute(0, 3, 1, 2))
        logits = encoder(x)
        tokens = logits.argmax(1)
        stats = decoder(torch.nn.functional.one_hot(tokens, 8192).permute(0, 3, 1, 2).float())
        reconstruction = dall_e.unmap_pixels(torch.sigmoid(stats[:, :3]))

    ours = model.apply(variables, jnp.asarray(images), method="encode")
    np.testing.assert_allclose(ours, logits.permute(0, 2, 3, 1).numpy(), atol=1e-4)
    np.testing.assert_array_equal(model.apply(variables, jnp.asarray(images), method="tokenize"), tokens.numpy())
    decoded = model.apply(variables, jnp.asarray(tokens.numpy(), jnp.int32), method="decode")
    np.testing.assert_allclose(decoded, stats.permute(0, 2, 3, 1).numpy(), atol=1e-4)
    ours = model.apply(variables, decoded, method="reconstruction")
    np.testing.assert_allclose((ours + 1) / 2, reconstruction.permute(0, 2, 3, 1).numpy(), atol=1e-4)


def test_conversion_goes_both_ways(official, states):
    model = models.create_model("dvae")
    for network, state, back in zip(official, states, to_dall_e(from_dall_e(model, *states)), strict=True):
        assert back.keys() == state.keys()
        for name, tensor in state.items():
            np.testing.assert_array_equal(back[name], tensor)
        network.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in back.items()})


def test_other_weights_are_refused_with_a_list(states):
    encoder, decoder = (dict(state) for state in states)
    del encoder["blocks.input.w"]
    decoder["blocks.extra.w"] = np.zeros(1)
    encoder["blocks.output.conv.b"] = np.zeros(16)
    with pytest.raises(UserError) as error:
        from_dall_e(models.create_model("dvae"), encoder, decoder)
    assert "missing: encoder.blocks.input.w" in str(error.value)
    assert "unexpected: decoder.blocks.extra.w" in str(error.value)
    assert "encoder.blocks.output.conv.b is (16,), expected (8192,)" in str(error.value)


def test_pickled_modules_as_openai_publishes_them(tmp_path):
    """Whole modules, not state dicts: read without running what they name."""
    torch.manual_seed(0)
    encoder = dall_e.Encoder(n_hid=8, n_blk_per_group=1, vocab_size=16)
    decoder = dall_e.Decoder(n_hid=8, n_blk_per_group=1, n_init=4, vocab_size=16)
    for side, network in (("encoder", encoder), ("decoder", decoder)):
        torch.save(network, tmp_path / f"{side}.pkl", _use_new_zipfile_serialization=side == "encoder")
    convert([f"--input={tmp_path}", f"--output={tmp_path}/ours"])
    trained = TrainedSampler.open(tmp_path / "ours", chunk=1)
    image = np.random.default_rng(0).integers(0, 256, (1, 256, 256, 3), np.uint8)
    drawn = trained.sampler(trained.weights.params, {}, {}, {"image": jnp.asarray(image)}, jax.random.key(0)[None])
    with torch.no_grad():
        tokens = encoder(dall_e.map_pixels(torch.from_numpy(image / np.float32(255)).permute(0, 3, 1, 2))).argmax(1)
        stats = decoder(torch.nn.functional.one_hot(tokens, 16).permute(0, 3, 1, 2).float())
        pixels = dall_e.unmap_pixels(torch.sigmoid(stats[:, :3])).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(drawn["tokens"], tokens.numpy())
    np.testing.assert_allclose((np.asarray(drawn["image"]) + 1) / 2, pixels, atol=1e-4)
