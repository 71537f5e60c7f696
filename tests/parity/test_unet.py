"""The UNets of diffusers compute what ours computes with the same weights, both ways, by way of the command."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

import models
from models.conditioning import Conditioning
from scripts.convert import main as convert
from weights.formats.diffusers_unet import unet_fields, unet_from_diffusers, unet_to_diffusers
from weights.run import Run

SMALL = {"sample_size": 16, "block_out_channels": (32, 64, 64), "norm_num_groups": 8, "layers_per_block": 1}
CONDITION = {
    **SMALL,
    **{"down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 24},
    **{"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")},
}
PLAIN = {
    **SMALL,
    **{"down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D")},
    **{"up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D")},
}
VARIANTS = {
    "stable diffusion 1": (UNet2DConditionModel, {**CONDITION, "attention_head_dim": 4}),
    "stable diffusion 2": (
        UNet2DConditionModel,
        {**CONDITION, "attention_head_dim": (2, 4, 4), "use_linear_projection": True, "upcast_attention": True},
    ),
    "latent diffusion of classes": (
        UNet2DConditionModel,
        {
            **{**CONDITION, "attention_head_dim": 1, "in_channels": 3, "out_channels": 3, "num_class_embeds": 5},
            **{"resnet_time_scale_shift": "scale_shift", "transformer_layers_per_block": 2, "time_embedding_dim": 48},
        },
    ),
    "DDPM": (
        UNet2DModel,
        {
            **{**PLAIN, "flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0, "norm_eps": 1e-6},
            **{"attention_head_dim": None, "dropout": 0.1, "act_fn": "swish", "layers_per_block": 2},
        },
    ),
    "latent diffusion without context": (UNet2DModel, {**PLAIN, "attention_head_dim": 16}),
    "ADM": (
        UNet2DModel,
        {
            **{**PLAIN, "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")},
            **{"up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")},
            **{"downsample_type": "resnet", "upsample_type": "resnet", "resnet_time_scale_shift": "scale_shift"},
            **{"num_class_embeds": 5, "attention_head_dim": 16, "out_channels": 6, "attn_norm_num_groups": 8},
        },
    ),
}
CIFAR10 = {
    **{"sample_size": 32, "block_out_channels": (128, 256, 256, 256), "attention_head_dim": None, "dropout": 0.1},
    **{"down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"), "norm_eps": 1e-6},
    **{"up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), "downsample_padding": 0},
    **{"flip_sin_to_cos": False, "freq_shift": 1},
}


def randomized(kind, config):
    """One of the library's networks with random values everywhere, features kept at scale."""
    network = kind(**config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if name == "class_embedding.weight":
                tensor.copy_(noise)
            elif tensor.ndim > 1:
                tensor.copy_(noise / np.prod(tensor.shape[1:]) ** 0.5)
            else:
                tensor.copy_(0.1 * noise + name.endswith("weight"))
    return network


def inputs(model):
    """Two examples, as ours takes them; a caption's end is hidden from the first."""
    rng = np.random.default_rng(0)
    x_t, _, conditioning = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), model.example_inputs(2)
    )
    if conditioning.tokens is not None:
        mask = np.ones(conditioning.tokens.shape[:2], bool)
        mask[0, 3:] = False
        conditioning = conditioning.replace(mask=jnp.asarray(mask))
    if conditioning.label is not None:
        conditioning = conditioning.replace(label=jnp.array([4, 1], jnp.int32))
    return x_t, jnp.array([721.0, 3.0]), conditioning


def run_ours(model, params, x_t, t, conditioning):
    return np.asarray(jax.jit(model.apply)({"params": params}, x_t, t, conditioning))


def run_theirs(network, x_t, t, conditioning: Conditioning):
    arguments = {}
    for name, array in (
        ("encoder_hidden_states", conditioning.tokens),
        ("encoder_attention_mask", conditioning.mask),
        ("class_labels", conditioning.label),
    ):
        if array is not None:
            arguments[name] = torch.from_numpy(np.array(array))
    x_t = torch.from_numpy(np.array(x_t)).permute(0, 3, 1, 2)
    with torch.no_grad():
        out = network(x_t, torch.from_numpy(np.array(t)), **arguments).sample
    return out.permute(0, 2, 3, 1).numpy()


def assert_close(ours, theirs):
    difference = float(np.abs(ours - theirs).max())
    print(f"largest difference {difference:.1e} of values up to {np.abs(theirs).max():.1f}")
    assert difference < 1e-4 and theirs.std() > 0.1
    assert np.abs(theirs[0] - theirs[1]).max() > 0.1  # no constants


@pytest.mark.parametrize("variant", VARIANTS)
def test_small_networks_through_the_command_and_back(variant, tmp_path):
    kind, config = VARIANTS[variant]
    network = randomized(kind, config)
    network.save_pretrained(tmp_path / "theirs" / "unet")
    convert(["--source=diffusers", f"--input={tmp_path}/theirs", f"--output={tmp_path}/ours"])
    pretrained = Run.open(tmp_path / "ours")
    params, model = pretrained.load().params["denoiser"], models.create_model(**pretrained.config.models.denoiser)
    examples = inputs(model)
    theirs = run_theirs(network, *examples)
    assert_close(run_ours(model, params, *examples), theirs)

    convert(["--to=diffusers", f"--run={tmp_path}/ours", f"--output={tmp_path}/back"])
    back, report = kind.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report.values()), report
    np.testing.assert_allclose(run_theirs(back.eval(), *examples), theirs, atol=1e-6)
    for name, tensor in network.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_ddpm_at_the_published_shape():
    network = randomized(UNet2DModel, CIFAR10)
    model = models.create_model(**unet_fields({**network.config, "_class_name": "UNet2DModel"}))
    tensors = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    params, _ = unet_from_diffusers(model, tensors)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 35_746_307
    examples = inputs(model)
    assert_close(run_ours(model, params, *examples), run_theirs(network, *examples))
    back = unet_to_diffusers(model, params)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor)
