"""UniDiffuser's text decoder of diffusers scores and searches as ours does with the same weights."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.deprecated.unidiffuser import UniDiffuserTextDecoder

import models
from sample.decoding import Decoding, decode
from scripts.convert import main as convert
from weights.run import Run

SIZES = {"prefix_length": 4, "prefix_inner_dim": 12, "prefix_hidden_dim": 6, "vocab_size": 9, "n_positions": 16}
SIZES |= {"n_embd": 32, "n_layer": 2, "n_head": 4}
END, LONGEST = 3, 10


@pytest.fixture(scope="module", params=["gelu", "gelu_new"])
def pair(request, tmp_path_factory):
    """(their network, our network, our parameters, the folder that ours were read from)."""
    torch.manual_seed(0)
    network = UniDiffuserTextDecoder(**SIZES, activation_function=request.param).eval()
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            tensor.copy_(1 + 0.1 * torch.randn_like(tensor) if "ln" in name else 0.25 * torch.randn_like(tensor))
        network.transformer.transformer.wte.weight[END] *= 6  # some captions end, others are cut
        network.transformer.transformer.wpe.weight *= 3
    folder = tmp_path_factory.mktemp("text_decoder")
    network.save_config(folder / "theirs")
    torch.save(network.state_dict(), folder / "theirs" / "diffusion_pytorch_model.bin")
    convert([f"--input={folder}/theirs", f"--output={folder}/ours"])
    run = Run.open(folder / "ours")
    return network, models.create_model(**run.config.models.captioner), run.load().params["captioner"], folder


def test_logits_and_latents_are_theirs(pair):
    network, model, params, _ = pair
    rng = np.random.default_rng(0)
    tokens, features = rng.integers(0, 9, (3, 6)), rng.normal(size=(3, 4, 12)).astype(np.float32)
    with torch.no_grad():
        theirs, latents = network(torch.from_numpy(tokens), torch.from_numpy(features))
    ours = jax.jit(model.apply)({"params": params}, jnp.asarray(tokens, jnp.int32), jnp.asarray(features))
    difference = float(np.abs(ours - theirs.logits.numpy()[:, 3:]).max())
    print(f"largest difference: {difference:.1e} of values up to {theirs.logits.abs().max():.1f}")
    assert difference < 1e-4
    encoded = model.apply({"params": params}, jnp.asarray(features), method="encode")
    np.testing.assert_allclose(encoded, latents.numpy(), atol=1e-5)


def test_beam_search_finds_their_tokens(pair):
    network, model, params, _ = pair
    latents = np.random.default_rng(1).normal(size=(12, 4, 6)).astype(np.float32)
    expected, lengths = [], []
    with torch.no_grad():
        for row in torch.from_numpy(latents):
            prefix = network.decode_prefix(row[None])
            tokens, count = network.generate_beam(input_embeds=prefix, eos_token_id=END, entry_length=LONGEST)
            expected.append(tokens[0].numpy())
            lengths.append(int(count[0]))
    step = functools.partial(model.apply, {"params": params}, method="decode_step")
    logits, cache = model.apply({"params": params}, jnp.asarray(latents), LONGEST, method="prefill_latents")
    settings = Decoding(beams=5, finished_beams="within", stop_tokens=(END,))
    made = decode(step, logits, cache, jax.random.split(jax.random.key(0), 12), LONGEST, settings)
    np.testing.assert_array_equal(made.lengths, lengths)
    for ours, theirs, count in zip(np.asarray(made.tokens), expected, lengths, strict=True):
        np.testing.assert_array_equal(ours[:count], theirs[:count])
    assert len(set(lengths)) > 2 and min(lengths) < LONGEST  # captions that end at different places


def test_what_is_written_is_loaded_and_keeps_its_activation(pair):
    network, model, params, folder = pair
    convert(["--to=diffusers", f"--run={folder}/ours", f"--output={folder}/back"])
    loaded: Any = UniDiffuserTextDecoder.from_pretrained(folder / "back", output_loading_info=True)
    back, report = loaded
    assert not any(report.values()), report
    assert back.config.activation_function == network.config.activation_function
    for name, tensor in network.state_dict().items():
        np.testing.assert_array_equal(back.state_dict()[name].numpy(), tensor.numpy())
