"""VQGANs as taming-transformers has them: its names of tensors, and its class's surface on diffusers' own network."""

import numpy as np
import torch
from diffusers import VQModel
from torch import nn

SMALL = {
    **{"block_out_channels": (32, 64), "norm_num_groups": 32, "layers_per_block": 1, "latent_channels": 4},
    **{"down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), "sample_size": 16},
    **{"up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), "scaling_factor": 1.0},
}


def taming_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors of a first stage of diffusers by the names of two implementations' tables."""
    levels = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.down_blocks"))
    renamed = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if parts[1].endswith("_blocks"):
            side = "down" if parts[1] == "down_blocks" else "up"
            kind = {"resnets": "block", "attentions": "attn", f"{side}samplers": f"{side}sample"}[parts[3]]
            place = [parts[4]] if kind in ("block", "attn") else []
            level = parts[2] if side == "down" else str(levels - 1 - int(parts[2]))
            parts = [parts[0], side, level, kind, *place, *parts[5:]]
        elif parts[1] == "mid_block":
            kind = f"block_{int(parts[3]) + 1}" if parts[2] == "resnets" else "attn_1"
            parts = [parts[0], "mid", kind, *parts[4:]]
        theirs = ".".join(parts)
        for new, old in (
            *(("conv_norm_out", "norm_out"), ("conv_shortcut", "nin_shortcut"), ("group_norm", "norm")),
            *(("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")),
        ):
            theirs = theirs.replace(f".{new}.", f".{old}.")
        attention = tensor.ndim == 2 and ".attn" in theirs
        renamed[theirs] = tensor[..., None, None] if attention else tensor
    return renamed


class TamingVQGAN(nn.Module):
    """`taming.models.vqgan.VQModel`, or `GumbelVQ`, of which the quantizer is written here."""

    def __init__(self, network: VQModel, gumbel: bool):
        super().__init__()
        self.network, self.gumbel = network, gumbel
        codes = network.quantize.embedding.weight
        self.quantize = nn.Module()
        if gumbel:
            self.quantize.proj = nn.Conv2d(codes.shape[1], codes.shape[0], 1)
            self.quantize.embed = nn.Embedding(*codes.shape)
        else:
            self.quantize.embedding = network.quantize.embedding

    def encode(self, x):
        z = self.network.encode(x).latents
        if self.gumbel:
            return None, None, (None, None, self.quantize.proj(z).argmax(1))
        distances = ((z.permute(0, 2, 3, 1)[..., None, :] - self.quantize.embedding.weight) ** 2).sum(-1)
        return None, None, (None, None, distances.argmin(-1).reshape(-1))

    def decode(self, z):
        return self.network.decode(z, force_not_quantize=True).sample

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state dict of the published class."""
        trunk = {name: t.detach().numpy() for name, t in self.network.state_dict().items() if "quantize" not in name}
        codes = {f"quantize.{name}": t.detach().numpy() for name, t in self.quantize.state_dict().items()}
        state = taming_names(trunk) | codes
        return {name: torch.from_numpy(tensor) for name, tensor in state.items()}
