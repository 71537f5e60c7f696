"""GPT-2 of transformers computes what ours computes with the same weights, and loads what is written."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import models
from scripts.convert import main as convert
from weights.files.tensors import read_tensors, write_tensors
from weights.run import Run


@pytest.mark.parametrize(("activation", "bare"), [("gelu_new", False), ("gelu", True)])
def test_tiny_gpt2_through_the_command_and_back(activation, bare, tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=4, n_inner=48, activation_function=activation
    )
    network = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            tensor.copy_(1 + 0.1 * torch.randn_like(tensor) if "ln" in name else 5 * torch.randn_like(tensor) / 25)
    network.save_pretrained(tmp_path / "theirs")
    if bare:  # as the published files are: no prefix, each layer's mask
        file = tmp_path / "theirs" / "model.safetensors"
        tensors = {name.removeprefix("transformer."): array for name, array in read_tensors(file).items()}
        masks = {f"h.{layer}.attn.bias": np.tri(16, dtype=np.float32)[None, None] for layer in range(2)}
        write_tensors(file, {name: np.array(array) for name, array in (tensors | masks).items()})
    convert([f"--input={tmp_path}/theirs", f"--output={tmp_path}/ours"])
    run = Run.open(tmp_path / "ours")
    model, params = models.create_model(**run.config.models.gpt2), run.load().params["gpt2"]
    tokens = np.random.default_rng(0).integers(0, 40, (2, 16))
    with torch.no_grad():
        theirs = network(torch.from_numpy(tokens)).logits.numpy()
    ours = jax.jit(model.apply)({"params": params}, jnp.asarray(tokens, jnp.int32))
    difference = float(np.abs(ours - theirs).max())
    print(f"largest difference: {difference:.1e} of values up to {np.abs(theirs).max():.1f}")
    assert difference < 1e-4

    convert(["--to=transformers", f"--run={tmp_path}/ours", f"--output={tmp_path}/back"])
    loaded: Any = GPT2LMHeadModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    back, report = loaded
    assert not any(report.values()), report
    with torch.no_grad():
        again = back.eval()(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(again, theirs, atol=1e-6)
