"""Stable Diffusion pipelines of diffusers, of small widths and with random weights, for tests."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from data.clip_vocabulary import END, END_OF_WORD, START, byte_pieces

LENGTH = 16  # tokens of a caption
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_MERGES = [("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]


def write_tokenizer(folder: Path, pad: str) -> CLIPTokenizer:
    """A vocabulary of CLIP's form with few merges, as a folder of transformers."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = byte_pieces()
    pieces = [*pieces, *(piece + END_OF_WORD for piece in pieces), *("".join(pair) for pair in _MERGES), START, END]
    (folder / "vocab.json").write_text(json.dumps({piece: place for place, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in _MERGES))
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token=pad, model_max_length=LENGTH)


def randomized(network: torch.nn.Module, seed: int) -> Any:
    """Random values everywhere, features kept at scale; of transformers' networks those that they start with."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim > 1:
                tensor.copy_(noise / np.prod(tensor.shape[1:]) ** 0.5)
            else:
                tensor.copy_(0.1 * noise + ("norm" in name and name.endswith("weight")))
    return network.eval()


def make_pipeline(
    folder: Path, version: int, widths: tuple[int, int] = (32, 64), side: int = 8
) -> StableDiffusionPipeline:
    """Stable Diffusion 1, or 2 (linear projections, heads of one width, v-prediction), tiny; writes a tokenizer.

    Args:
      folder: of the tokenizer.
      version: 1 or 2.
      widths: channels of the UNet's levels; the first stage has half as many.
      side: of the latents; pictures have twice as many pixels.
    """
    second = version == 2
    words = write_tokenizer(folder, "!" if second else END)
    unet = UNet2DConditionModel(
        **{"sample_size": side, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "norm_num_groups": 8},
        block_out_channels=widths,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=(2, 4) if second else 4,
        use_linear_projection=second,
    )
    vae = AutoencoderKL(
        **{"block_out_channels": tuple(width // 2 for width in widths), "norm_num_groups": 8, "latent_channels": 4},
        sample_size=2 * side,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.18215,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            **{"vocab_size": len(words), "hidden_size": 24, "intermediate_size": 96, "num_attention_heads": 3},
            num_hidden_layers=2,
            max_position_embeddings=LENGTH,
            hidden_act="gelu" if second else "quick_gelu",
            eos_token_id=2,
        )
    )
    if second:
        scheduler: Any = DDIMScheduler(
            **_BETAS,
            **{"prediction_type": "v_prediction", "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False},
            rescale_betas_zero_snr=True,
        )
    else:
        scheduler = PNDMScheduler(**_BETAS, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
    with contextlib.redirect_stderr(io.StringIO()):
        pipeline = StableDiffusionPipeline(
            vae=randomized(vae, 1),
            text_encoder=randomized(text, 2),
            tokenizer=words,
            unet=randomized(unet, 3),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def first_noise(sampler: Any, count: int, seed: int = 0) -> torch.Tensor:
    """What our sampler's first so many samples of a seed begin with, channels first."""
    keys = [jax.random.fold_in(jax.random.key(seed), i) for i in range(count)]
    noise = [jax.random.normal(jax.random.fold_in(key, 0), sampler.sample_shape) for key in keys]
    return torch.from_numpy(np.stack(noise)).permute(0, 3, 1, 2)
