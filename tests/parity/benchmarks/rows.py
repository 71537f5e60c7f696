"""Which rows the suites have: a name, what is measured, the function that makes both sides, and sizes, real and toy.

A toy size is for tests and rehearsals: every row then runs in a second or two, and its figures mean nothing.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from updates import Case, Peers

from cost.side_by_side import Effort

USUAL = Effort()
ONCE = Effort(windows=5, steps=1, warmup=1)


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
      name: of the row, on the command line and in the file of results.
      what: says in the table what is measured, and of how much.
      make: "module:function", which returns a `Case` for `Peers` and the sizes.
      sizes: arguments of that.
      toy: those that differ at toy size.
      effort: how much is measured.
      seconds: about what it takes on one H100, without torch.compile: a guess, of which a suite with little time asks.
      compiles: whether torch.compile has something to do in it.
    """

    name: str
    what: str
    make: str
    sizes: Mapping[str, Any]
    toy: Mapping[str, Any]
    effort: Effort = USUAL
    seconds: float = 60.0
    compiles: bool = True

    def case(self, peers: Peers, toy: bool) -> Case:
        """Both sides, ready to run."""
        module, function = self.make.split(":")
        return getattr(importlib.import_module(module), function)(peers, **{**self.sizes, **(self.toy if toy else {})})


_TOY_UNET = {"network": "toy_unet", "batch_size": 2, "length": 3}
_TOY_UVIT = {"network": "toy_uvit", "batch_size": 2, "length": 0}
_TOY_DIT = {"network": "toy_dit", "batch_size": 2}
_TOY_CLIP = {"config": "configs/paper/clip_vit.py:debug", "batch_size": 2, "overrides": ()}


def _denoiser(name: str, what: str, toy: Mapping[str, Any], effort: Effort = USUAL, **sizes: Any) -> Row:
    kind = "sampling" if "steps" in sizes else "training"
    toy = {**toy, **({"steps": 2} if kind == "sampling" else {})}
    return Row(name, what, f"denoiser_rows:{kind}", sizes, toy, effort, compiles="attention" not in sizes)


CPU = (
    _denoiser(
        "ddpm_unet_step", "`configs/scenes/ddpm_unet.py`, batch 16, a training step", _TOY_UNET,
        network="configs/scenes/ddpm_unet.py", batch_size=16, length=12,
    ),
    _denoiser(
        "ddpm_unet_sampling", "... DPM-Solver++ 2M, 5 steps, guided, a picture of 16", _TOY_UNET, ONCE,
        network="configs/scenes/ddpm_unet.py", batch_size=16, length=12, steps=5,
    ),
    _denoiser(
        "ddpm_uvit_step", "`configs/scenes/ddpm_uvit.py`, batch 32, a training step", _TOY_UVIT,
        network="configs/scenes/ddpm_uvit.py", batch_size=32, length=12,
    ),
    _denoiser(
        "ddpm_uvit_sampling", "... DPM-Solver++ 2M, 5 steps, guided, a picture of 32", _TOY_UVIT, ONCE,
        network="configs/scenes/ddpm_uvit.py", batch_size=32, length=12, steps=5,
    ),
    _denoiser(
        "cifar10_unet_step", "DDPM of CIFAR-10, 35.7 M, batch 1, a training step", _TOY_UNET | {"length": 3}, ONCE,
        network="ddpm", batch_size=1,
    ),
    _denoiser(
        "uvit_s_step", "U-ViT-S/2 of CIFAR-10, batch 2, a training step", _TOY_UVIT, ONCE,
        network="uvit_s", batch_size=2,
    ),
    Row(
        "autoencoder_step", "KL autoencoder, 32 x 32 pixels, widths 32 and 64, batch 8, a training step",
        "first_stage_rows:training", {"batch_size": 8, "image_size": 32, "width": 32},
        {"batch_size": 2, "image_size": 8, "width": 8, "multipliers": (1,), "groups": 4},
    ),
    _denoiser(
        "latent_unet_step", "UNet of `configs/scenes/latent_unet.py`, batch 32, a training step", _TOY_UNET,
        network="latent_unet", batch_size=32, length=12,
    ),
    _denoiser(
        "latent_unet_sampling", "... DPM-Solver++ 2M, 5 steps, guided, a picture of 32", _TOY_UNET, ONCE,
        network="latent_unet", batch_size=32, length=12, steps=5,
    ),
    _denoiser(
        "dit_step", "DiT of classes, 8 x 8 x 4, 64 tokens, 5 layers of 128, batch 32, a training step", _TOY_DIT,
        network="dit_small", batch_size=32,
    ),
    Row(
        "stable_diffusion_sampling", "a small Stable Diffusion, 32 x 32 pixels, DDIM, 10 steps, guided, a picture of 4",
        "pipeline_rows:sampling", {"batch_size": 4, "steps": 10, "widths": (64, 128), "side": 16},
        {"batch_size": 2, "steps": 2, "widths": (32, 64), "side": 8}, ONCE,
    ),
    Row(
        "unidiffuser_step", "UniDiffuser, 5 layers of 128, 79 tokens, batch 32, a training step",
        "unidiffuser_rows:training", {"size": "scenes", "batch_size": 32}, {"size": "toy", "batch_size": 2},
    ),
    Row(
        "unidiffuser_sampling", "... text to latents, DPM-Solver++ 2M, 5 steps, guided, a picture of 8",
        "unidiffuser_rows:sampling", {"size": "scenes", "batch_size": 8, "steps": 5},
        {"size": "toy", "batch_size": 2, "steps": 2}, ONCE,
    ),
    Row(
        "llama_step", "Llama, 4 layers of 96, 28 tokens, batch 64, a training step", "language_rows:training",
        {"size": "scenes", "batch_size": 64, "length": 28}, {"size": "toy", "batch_size": 2, "length": 4},
    ),
    Row(
        "llama_decoding", "... greedy answers of 16 tokens to 12, batch 8, a token", "language_rows:decoding",
        {"size": "scenes", "batch_size": 8, "prompt": 12, "answer": 16},
        {"size": "toy", "batch_size": 2, "prompt": 3, "answer": 3}, ONCE,
    ),
    Row(
        "vision_adapter_step",
        "vision adapter of that, 64 patches, language model frozen, batch 64, a training step",
        "language_rows:training", {"size": "scenes", "batch_size": 64, "length": 28, "sees": True},
        {"size": "toy", "batch_size": 2, "length": 4},
    ),
    Row(
        "vision_adapter_decoding", "... greedy answers of 16 tokens to a picture and 12, batch 8, a token",
        "language_rows:decoding",
        # Not the first: of that layer transformers takes the length of a cache of fixed size, which it can compile.
        {"size": "scenes", "batch_size": 8, "prompt": 12, "answer": 16, "sees": True, "cross_layers": (1, 3)},
        {"size": "toy", "batch_size": 2, "prompt": 3, "answer": 3, "cross_layers": (1,)}, ONCE,
    ),
    Row(
        "clip_small_vit_step", "`configs/scenes/clip.py:vit`, batch 32, a training step", "clip_rows:training",
        {"config": "configs/scenes/clip.py:vit", "batch_size": 32}, _TOY_CLIP,
    ),
    Row(
        "clip_small_resnet_step", "`configs/scenes/clip.py` at 64 pixels, four stages, batch 16, a training step",
        "clip_rows:training",
        {"config": "configs/scenes/clip.py", "batch_size": 16}
        | {"overrides": ("image_layers=(1,1,1,1)", "image_size=64")},
        {"config": "configs/scenes/clip.py:debug", "batch_size": 2, "overrides": ()},
    ),
    Row(
        "clip_vit_b32_step", "CLIP ViT-B/32, captions of 77 tokens, batch 4, a training step", "clip_rows:training",
        {"config": "configs/paper/clip_vit.py", "batch_size": 4}, _TOY_CLIP, ONCE,
    ),
    Row(
        "dalle_step", "DALL-E, 4 layers of 160, 12 + 64 tokens, batch 16, a training step", "dalle_rows:training",
        {"size": "scenes", "batch_size": 16}, {"size": "toy", "batch_size": 2},
    ),
    Row(
        "dalle_decoding", "... drawing with the cache, a picture of 16", "dalle_rows:decoding",
        {"size": "scenes", "batch_size": 16}, {"size": "toy", "batch_size": 2}, ONCE,
    ),
    Row(
        "dalle_medium_step", "DALL-E, 8 layers of 512, 64 + 256 tokens, batch 2, a training step",
        "dalle_rows:training", {"size": "medium", "batch_size": 2}, {"size": "toy"}, ONCE,
    ),
    Row(
        "latent_moments", "`configs/scenes/latent_unet.py`, batch 32, a training step from stored moments",
        "first_stage_rows:moments", {"config": "configs/scenes/latent_unet.py", "batch_size": 32},
        {"config": "configs/scenes/latent_unet.py:debug", "batch_size": 2},
    ),
    Row(
        "latent_moments_wide", "... a first stage of four times the width", "first_stage_rows:moments",
        {"config": "configs/scenes/latent_unet.py", "batch_size": 32, "stage": ("width=128",)},
        {"config": "configs/scenes/latent_unet.py:debug", "batch_size": 2, "stage": ("width=16",)}, ONCE,
    ),
)  # fmt: skip

_GPU = Effort(windows=5, steps=5, warmup=3, attempts=2)
_GPU_ONCE = Effort(windows=3, steps=1, warmup=1, attempts=2)
_TOY_ATTENTION = {"batch_size": 1, "length": 8, "heads": 2, "width": 8}


def _attention(name: str, what: str, **sizes: Any) -> Row:
    """Of kernels, none of which torch.compile changes."""
    return Row(name, what, "attention_rows:training", sizes, _TOY_ATTENTION, _GPU, seconds=35.0, compiles=False)


# In order of what is missed most if a machine goes away. Sizes are of one GPU with 80 GB.
GPU = (
    _denoiser(
        "sd_unet_step", "Stable Diffusion 1's UNet, 64 x 64 x 4, batch 8, a training step", _TOY_UNET, _GPU,
        network="sd", batch_size=8, length=77,
    ),
    _denoiser("dit_xl_step", "DiT-XL/2, batch 32, a training step", _TOY_DIT, _GPU, network="dit_xl", batch_size=32),
    _denoiser("uvit_l_step", "U-ViT-L/2, batch 32, a training step", _TOY_UVIT, _GPU, network="uvit_l", batch_size=32),
    Row(
        "clip_vit_b32_step", "CLIP ViT-B/32, batch 512, a training step", "clip_rows:training",
        {"config": "configs/paper/clip_vit.py", "batch_size": 512}, _TOY_CLIP, _GPU, seconds=40.0,
    ),
    Row(
        "dalle_1b_step", "DALL-E 1.3 B, 24 layers of 2048, 256 + 1024 tokens, batch 4, a training step",
        "dalle_rows:training", {"size": "1.3b", "batch_size": 4}, {"size": "toy", "batch_size": 2}, _GPU_ONCE,
    ),
    Row(
        "dalle_1b_decoding_1", "... drawing with the cache, a picture of 1", "dalle_rows:decoding",
        {"size": "1.3b", "batch_size": 1, "measured": False}, {"size": "toy"}, _GPU_ONCE, 45.0, compiles=False,
    ),
    Row(
        "dalle_1b_decoding_32", "... drawing with the cache, a picture of 32", "dalle_rows:decoding",
        {"size": "1.3b", "batch_size": 32, "measured": False}, {"size": "toy", "batch_size": 2}, _GPU_ONCE, 60.0,
        compiles=False,
    ),
    _denoiser(
        "sd_sampling", "Stable Diffusion 1's UNet at 512 x 512 pixels, 50 steps, guided, a picture of 4", _TOY_UNET,
        _GPU_ONCE, network="sd", batch_size=4, length=77, steps=50,
    ),
    _attention(
        "attention_sd", "attention of Stable Diffusion's 4096 positions, 8 heads of 40, batch 8, with gradients",
        batch_size=8, length=4096, heads=8, width=40,
    ),
    _attention(
        "attention_dit", "... of DiT-XL/2: 256 positions, 16 heads of 72, batch 32",
        batch_size=32, length=256, heads=16, width=72,
    ),
    _attention(
        "attention_dalle", "... of DALL-E 1.3 B, causal: 1280 positions, 16 heads of 128, batch 4",
        batch_size=4, length=1280, heads=16, width=128, causal=True,
    ),
    _denoiser("uvit_h_step", "U-ViT-H/2, batch 32, a training step", _TOY_UVIT, _GPU, network="uvit_h", batch_size=32),
    Row(
        "clip_vit_l14_step", "CLIP ViT-L/14, batch 128, a training step", "clip_rows:training",
        {"config": "configs/paper/clip_vit.py:l14", "batch_size": 128}, _TOY_CLIP, _GPU,
    ),
    _denoiser(
        "dit_xl_plain_step", "DiT-XL/2, batch 32, a training step with plain attention", _TOY_DIT, _GPU,
        network="dit_xl", batch_size=32, attention="xla",
    ),
    _denoiser(
        "sd_unet_plain_step", "Stable Diffusion 1's UNet, batch 8, a training step with plain attention", _TOY_UNET,
        _GPU, network="sd", batch_size=8, length=77, attention="xla",
    ),
    Row(
        "unidiffuser_step", "UniDiffuser version 1, batch 8, a training step", "unidiffuser_rows:training",
        {"size": "v1", "batch_size": 8}, {"size": "toy", "batch_size": 2}, _GPU,
    ),
)  # fmt: skip

SUITES = {"cpu": CPU, "gpu": GPU}
