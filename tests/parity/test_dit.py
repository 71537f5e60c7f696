"""DiT of diffusers computes what ours computes with the same weights, both ways; and its authors' checkpoints."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel

import models
from models.conditioning import Conditioning
from scripts.convert import main as convert
from weights.formats.dit import to_dit
from weights.run import Run

SMALL = {"num_attention_heads": 3, "attention_head_dim": 8, "num_layers": 3, "sample_size": 8, "num_embeds_ada_norm": 7}
SMALL |= {"in_channels": 4, "out_channels": 8}


@pytest.fixture
def network():
    """One of the library's with random values everywhere, features kept at scale; all layers embed time alike."""
    network = DiTTransformer2DModel(**SMALL).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            matrix = tensor.ndim > 1 and "embedding_table" not in name
            tensor.copy_(noise / np.prod(tensor.shape[1:]) ** 0.5 if matrix else 0.1 * noise)
        for block in network.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(network.transformer_blocks[0].norm1.emb.state_dict())
    return network


def run_theirs(network, x_t, t, label):
    with torch.no_grad():
        x_t = torch.from_numpy(np.array(x_t)).permute(0, 3, 1, 2)
        out = network(x_t, torch.from_numpy(np.array(t)), torch.from_numpy(np.array(label))).sample
    return out.permute(0, 2, 3, 1).numpy()


def test_a_network_through_the_command_and_back(network, tmp_path):
    network.save_pretrained(tmp_path / "theirs" / "transformer")
    DDIMScheduler(clip_sample=False).save_pretrained(tmp_path / "theirs" / "scheduler")
    convert([f"--input={tmp_path}/theirs", f"--output={tmp_path}/ours"])
    run = Run.open(tmp_path / "ours")
    assert run.config.process.variance == "learned"
    params, model = run.load().params["denoiser"], models.create_model(**run.config.models.denoiser)
    rng = np.random.default_rng(0)
    x_t, t = jnp.asarray(rng.normal(size=(2, 8, 8, 4)), jnp.float32), jnp.array([721.0, 3.0])
    label = jnp.array([7, 2])  # 7 is the class for none
    theirs = run_theirs(network, x_t, t, label)
    ours = np.asarray(jax.jit(model.apply)({"params": params}, x_t, t, Conditioning(label=label)))
    difference = np.abs(ours - theirs).max()
    print(f"largest difference {difference:.1e} of values up to {np.abs(theirs).max():.1f}")
    assert difference < 1e-4 and theirs.std() > 0.1 and np.abs(theirs[0] - theirs[1]).max() > 0.1

    kind: Any = DiTTransformer2DModel
    convert(["--to=diffusers", f"--run={tmp_path}/ours", f"--output={tmp_path}/back"])
    back, report = kind.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report.values()), report
    for name, tensor in network.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_of_a_training_checkpoint_the_moving_average_is_read(tmp_path):
    fields = {"image_size": 4, "patch_size": 2, "in_channels": 4, "out_channels": 8, "width": 384, "depth": 1}
    model = models.create_model("dit", **fields, heads=6, num_classes=3)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs(1))["params"]
    average, current = (
        {name: torch.from_numpy(np.array(array)) for name, array in to_dit(model, jax.tree.map(fill, shapes)).items()}
        for fill in (lambda leaf: np.full(leaf.shape, 2.0), lambda leaf: np.full(leaf.shape, 1.0))
    )
    torch.save({"model": current, "ema": average, "opt": {"state": {}}, "args": None}, tmp_path / "DiT-0050000.pt")
    convert([f"--input={tmp_path}/DiT-0050000.pt", f"--output={tmp_path}/ours"])
    run = Run.open(tmp_path / "ours")
    assert models.create_model(**run.config.models.denoiser) == model
    assert {float(leaf.ravel()[0]) for leaf in jax.tree.leaves(run.load().params["denoiser"])} == {2.0}
