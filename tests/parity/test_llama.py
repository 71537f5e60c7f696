"""Llama of transformers computes what ours computes with the same weights, far behind the first position too."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import models
from scripts.convert import main as convert
from weights.run import Run

SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
SCALING = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALING |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
FAR = (0, 4095, 8191, 20000)


def tiny(factor=8.0, **fields):
    torch.manual_seed(0)
    scaling = {**SCALING, "factor": factor} if factor != 1 else {"rope_type": "default", "rope_theta": 10000.0}
    config = LlamaConfig(**{**SIZES, **fields}, rms_norm_eps=1e-5, rope_parameters=scaling, attn_implementation="eager")
    network = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            tensor.copy_(1 + 0.1 * torch.randn_like(tensor) if "norm" in name else 5 * tensor)
    return network.eval()


@pytest.mark.parametrize(("factor", "tied"), [(8.0, False), (32.0, True), (1.0, False)])
def test_tiny_llama_through_the_command_and_back(factor, tied, tmp_path):
    network = tiny(factor, tie_word_embeddings=tied)
    network.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    convert([f"--input={tmp_path}/theirs", f"--output={tmp_path}/ours"])
    run = Run.open(tmp_path / "ours")
    model, params = models.create_model(**run.config.models.llama), run.load().params["llama"]
    tokens = np.random.default_rng(0).integers(0, 40, (2, 9))
    apply = jax.jit(model.apply)
    positions, theirs = np.zeros(0), np.zeros(0)
    for start in FAR:
        # The texts stand far behind the first token, which everything still sees.
        positions = np.concatenate([[0], start + 1 + np.arange(8)])[None].repeat(2, axis=0)
        with torch.no_grad():
            theirs = network(torch.from_numpy(tokens), position_ids=torch.from_numpy(positions)).logits.numpy()
        ours = apply({"params": params}, jnp.asarray(tokens, jnp.int32), jnp.asarray(positions, jnp.int32))
        difference = float(np.abs(ours - theirs).max())
        print(f"largest difference at {start}: {difference:.1e} of values up to {np.abs(theirs).max():.1f}")
        assert difference < 1e-4

    convert(["--to=transformers", f"--run={tmp_path}/ours", f"--output={tmp_path}/back"])
    loaded: Any = LlamaForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    back, report = loaded
    assert not any(report.values()), report
    with torch.no_grad():
        again = back.eval()(torch.from_numpy(tokens), position_ids=torch.from_numpy(positions)).logits.numpy()
    np.testing.assert_allclose(again, theirs, atol=1e-6)
