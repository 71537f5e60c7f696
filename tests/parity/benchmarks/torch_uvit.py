"""U-ViT of torch's own layers, to measure beside ours: no library has it.

Bao et al. 2023, "All are Worth Words", section 3.1, with time as a token and concatenating long skips. Parameters are
called as in the published state dicts, so that `weights.formats.uvit.LAYOUT` fills them.
"""

import math

import torch
from torch import nn
from torch.nn import functional

from models.uvit import UViT


class Attention(nn.Module):
    """Self-attention by torch's fused kernel."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B L D] -> [B L D]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two dense layers with the exact GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B L D] -> [B L D]."""
        return self.fc2(functional.gelu(self.fc1(x)))


class Layer(nn.Module):
    """A pre-normalization transformer layer, in the second half with a long skip before it."""

    def __init__(self, width: int, heads: int, hidden: int, skip: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.mlp = FeedForward(width, hidden)
        if skip:
            self.skip_linear = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        """[B L D] -> [B L D]."""
        if skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Patches(nn.Module):
    """A dense layer on each patch of the picture."""

    def __init__(self, channels: int, width: int, side: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, side, stride=side)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B C H W] -> [B L D]."""
        return self.proj(x).flatten(2).transpose(1, 2)


class TorchUViT(nn.Module):
    """The network that `models.uvit.UViT` is with these fields.

    Args:
      model: ours.
      grid: [L D], fixed positions of the patches; None where positions are learned.

    Raises:
      ValueError: if ours has what this one lacks.
    """

    def __init__(self, model: UViT, grid: torch.Tensor | None) -> None:
        super().__init__()
        if (model.long_skip, model.time, model.convolution) != ("concat", "token", "image") or model.num_classes:
            raise ValueError("only U-ViT without classes as published has a counterpart here")
        self.patch_size, self.width = model.patch_size, model.width
        self.extra = model.extra_tokens
        self.patch_embed = Patches(model.in_channels, model.width, model.patch_size)
        if model.context_length:
            self.context_embed = nn.Linear(model.context_width, model.width)
        patches = (model.image_size // model.patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extra + (patches if grid is None else 0), model.width))
        self.register_buffer("grid", grid, persistent=False)
        fields = (model.width, model.heads, int(model.width * model.mlp_ratio))
        self.in_blocks = nn.ModuleList(Layer(*fields, skip=False) for _ in range(model.depth // 2))
        self.mid_block = Layer(*fields, skip=False)
        self.out_blocks = nn.ModuleList(Layer(*fields, skip=True) for _ in range(model.depth // 2))
        self.norm = nn.LayerNorm(model.width)
        self.decoder_pred = nn.Linear(model.width, model.patch_size**2 * model.out_channels)
        self.final_layer = nn.Conv2d(model.out_channels, model.out_channels, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """[B C H W], [B], [B L D] -> [B C H W]."""
        rows = x.shape[2] // self.patch_size
        half = self.width // 2
        frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, device=t.device))
        angles = t[:, None] * frequencies
        sequence = [torch.cat([angles.cos(), angles.sin()], dim=-1)[:, None]]
        if tokens is not None:
            sequence.append(self.context_embed(tokens))
        sequence.append(self.patch_embed(x))
        positions = self.pos_embed if self.grid is None else torch.cat([self.pos_embed, self.grid[None]], dim=1)
        y = torch.cat(sequence, dim=1) + positions
        states = []
        for block in self.in_blocks:
            y = block(y)
            states.append(y)
        y = self.mid_block(y)
        for block in self.out_blocks:
            y = block(y, states.pop())
        y = self.decoder_pred(self.norm(y))[:, self.extra :]
        side = self.patch_size
        y = y.unflatten(1, (rows, rows)).unflatten(-1, (side, side, -1))  # [B h w p q C]
        return self.final_layer(y.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3))
