"""UniDiffuser's network of diffusers computes what ours does with the same weights, both versions of it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.deprecated.unidiffuser import UniDiffuserModel

import models
from models.unidiffuser import PictureAndText, UniDiffuser
from scripts.convert import main as convert
from weights.run import Run

SIZES = {"text_dim": 6, "clip_img_dim": 10, "num_text_tokens": 5, "num_attention_heads": 4, "attention_head_dim": 8}
SIZES |= {"in_channels": 4, "out_channels": 4, "num_layers": 4, "sample_size": 8, "patch_size": 2}
SIZES |= {"activation_fn": "gelu", "norm_num_groups": 4}


@pytest.mark.parametrize("kinds", [False, True], ids=["v0", "v1"])
def test_tiny_unidiffuser_through_the_command_and_back(kinds, tmp_path):
    torch.manual_seed(0)
    network = UniDiffuserModel(**SIZES, use_data_type_embedding=kinds).eval()
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            tensor.copy_(1 + 0.1 * torch.randn_like(tensor) if "norm" in name else 0.3 * torch.randn_like(tensor))
    network.save_pretrained(tmp_path / "theirs")
    convert([f"--input={tmp_path}/theirs", f"--output={tmp_path}/ours"])
    run = Run.open(tmp_path / "ours")
    model, params = models.create_model(**run.config.models.unidiffuser), run.load().params["unidiffuser"]
    rng = np.random.default_rng(0)
    image, clip, text = (rng.normal(size=(3, *shape)).astype(np.float32) for shape in ((8, 8, 4), (10,), (5, 6)))
    t_image, t_text, kind = np.float32([0, 511.3, 1000]), np.float32([1000, 20.02, 0]), np.array([0, 1, 1])
    with torch.no_grad():
        theirs = network(
            torch.from_numpy(image.transpose(0, 3, 1, 2)),
            torch.from_numpy(clip[:, None]),
            torch.from_numpy(text),
            timestep_img=torch.from_numpy(t_image),
            timestep_text=torch.from_numpy(t_text),
            data_type=torch.from_numpy(kind),
        )
    expected = (theirs[0].numpy().transpose(0, 2, 3, 1), theirs[1].numpy()[:, 0], theirs[2].numpy())
    x = PictureAndText(*map(jnp.asarray, (image, clip, text)))
    told = (jnp.asarray(kind, jnp.int32),) if kinds else ()
    out = jax.jit(model.apply)({"params": params}, x, jnp.asarray(t_image), jnp.asarray(t_text), *told)
    for ours, wanted in zip((out.image, out.clip, out.text), expected, strict=True):
        difference = float(np.abs(ours - wanted).max())
        print(f"largest difference: {difference:.1e} of values up to {np.abs(wanted).max():.1f}")
        assert difference < 1e-4

    convert(["--to=diffusers", f"--run={tmp_path}/ours", f"--output={tmp_path}/back"])
    loaded: Any = UniDiffuserModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    back, report = loaded
    assert not any(report.values()), report
    unread = "transformer.pos_embed"  # written as a copy of what is read
    for name, tensor in network.state_dict().items():
        wanted = network.state_dict()[name.replace(unread, "vae_img_in")] if name.startswith(unread) else tensor
        np.testing.assert_array_equal(back.state_dict()[name].numpy(), wanted.numpy())


@pytest.mark.parametrize("grid", [(16, 16), (4, 12)])
def test_positions_of_other_grids_are_pytorch_s_bilinear_ones(grid):
    model = UniDiffuser(
        image_size=8, patch_size=1, width=8, depth=2, heads=2, in_channels=2, clip_width=3, text_length=2, text_width=3
    )
    table = np.random.default_rng(0).normal(size=(2 + 2 + 1 + 64, 8)).astype(np.float32)
    bound = model.bind({"params": {"position": {"embedding": jnp.asarray(table)}}})
    square = torch.from_numpy(table[5:].reshape(1, 8, 8, 8)).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(square, grid, mode="bilinear", align_corners=False)
    expected = resized.permute(0, 2, 3, 1).reshape(-1, 8).numpy()
    np.testing.assert_allclose(bound._positions(grid)[5:], expected, atol=1e-5)
