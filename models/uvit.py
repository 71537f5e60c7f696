"""U-ViT: a vision transformer with long skip connections that predicts noise (Bao et al. 2023, "All are Worth Words").

Time, condition and patches of the noisy picture are all tokens of one sequence, in the published order

    [label, time, context 1 ... context L, patch 1 ... patch HW / P^2]

of which a network has the label, the context, both or neither. Section 3.1 compares what is a field here.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from models.conditioning import Conditioning, check_conditioning
from models.layers.attention import KeyLengths
from models.layers.convolution import Conv
from models.layers.dense import Dense
from models.layers.embeddings import grid_embedding, sinusoidal_embedding
from models.layers.initialization import torch_bias, torch_kernel
from models.layers.long_skip import LONG_SKIPS, LongSkip, apply_with_long_skips
from models.layers.mlp import ACTIVATIONS, MLP
from models.layers.normalization import layer_norm
from models.layers.partitioning import shard_rows
from models.layers.transformer import Block, BlockInitializers, check_remat

CHOICES = {
    "long_skip": LONG_SKIPS,
    "time": ("token", "adaln"),
    "convolution": ("image", "tokens", "none"),
    "positions": ("learned", "sincos_2d", "none"),
    "activation": tuple(ACTIVATIONS),
}


class UViT(nn.Module):
    """The network; a diffusion backbone, `backbone(x_t, t, conditioning, train) -> prediction`.

    Initialization is that of the published code: dense layers and learned positions N(0, 0.02^2) (its truncation, at 2
    and not at 2 standard deviations, cuts nothing off), classes N(0, 1), convolutions as PyTorch starts them.

    Attributes:
      image_size: height and width of what is diffused: pixels or latents. Others work where patches divide them and
        no position of a patch is learned.
      patch_size: side P of a patch.
      width: D.
      depth: layers beside the middle one, as published: 12 is 13 layers, 6 on each side of it.
      heads: number of attention heads.
      in_channels: of x_t.
      out_channels: of the prediction; None for as many. More, where a variance is predicted too.
      mlp_ratio: hidden width of the feed-forward block over D.
      activation: see `models.layers.mlp.ACTIVATIONS`.
      num_classes: labels, the one that stands for none included; 0 for a network without them.
      context_length: tokens L of the context; 0 for a network without them.
      context_width: their width.
      long_skip: how a layer of the second half joins its mirror image's output with its input, see
        `models.layers.long_skip.LongSkip`; "none" for not at all.
      time: "token", or "adaln" for no such token and norms whose scale and shift are projections of it.
      mlp_time_embed: a perceptron between the sinusoids of the time and the token.
      convolution: a last 3x3 convolution: of the "image", behind the patches; of the patches' "tokens", before the
        projection to pixels; or "none".
      positions: "learned", one for each token; "sincos_2d", fixed ones of amplitude 1 for the patches, from row and
        column, and learned ones for the other tokens; or "none".
      implementation: see `models.layers.attention.attend`.
      scan: see `models.layers.long_skip.apply_with_long_skips`.
      remat: see there.
      dtype: of the computation; norms' statistics, softmax, the projection to pixels and what follows are float32.
      param_dtype: of the parameters.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    in_channels: int = 3
    out_channels: int | None = None
    mlp_ratio: int | float = 4
    activation: str = "gelu"
    num_classes: int = 0
    context_length: int = 0
    context_width: int = 0
    long_skip: str = "concat"
    time: str = "token"
    mlp_time_embed: bool = False
    convolution: str = "image"
    positions: str = "learned"
    implementation: str = "auto"
    scan: bool = False
    remat: str = "none"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        # Filled in, so that equal networks have equal fields.
        if self.out_channels is None:
            self.out_channels = self.in_channels
        super().__post_init__()

    @property
    def extra_tokens(self) -> int:
        """Tokens before the patches."""
        return (self.num_classes > 0) + (self.time == "token") + self.context_length

    def example_inputs(self, batch_size: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, Conditioning]:
        """Shapes of the arguments of `__call__`; without a mask."""
        tokens, label = None, None
        if self.context_length:
            shape = (batch_size, self.context_length, self.context_width)
            tokens = jax.ShapeDtypeStruct(shape, jnp.float32)
        if self.num_classes:
            label = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
        x_t = jax.ShapeDtypeStruct((batch_size, self.image_size, self.image_size, self.in_channels), jnp.float32)
        return x_t, jax.ShapeDtypeStruct((batch_size,), jnp.float32), Conditioning(tokens=tokens, label=label)

    def setup(self) -> None:
        self._check_fields()
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        normal = nn.initializers.normal(0.02)

        def conv(features: int, side: int, inputs: int, dtype: DTypeLike, **fields: Any) -> nn.Conv:
            bias = torch_bias(inputs * side**2)
            inits = {"kernel_init": torch_kernel, "bias_init": bias}
            return Conv(features, (side, side), dtype=dtype, param_dtype=self.param_dtype, **inits, **fields)

        stride = (self.patch_size, self.patch_size)
        self.patch = conv(self.width, self.patch_size, self.in_channels, self.dtype, strides=stride, padding="VALID")
        if self.mlp_time_embed:
            self.time_mlp = MLP(4 * self.width, "silu", **types)
        if self.num_classes:
            self.label = nn.Embed(self.num_classes, self.width, embedding_init=nn.initializers.normal(1.0), **types)
        if self.context_length:
            self.context = Dense(self.width, kernel_init=normal, **types)
        if self._learned_positions:
            self.position = nn.Embed(self._learned_positions, self.width, embedding_init=normal, **types)
        block = {
            "width": self.width,
            "heads": self.heads,
            "head_dim": self.width // self.heads,
            "mlp_hidden": int(self.width * self.mlp_ratio),
            "activation": self.activation,
            "initializers": BlockInitializers(normal, normal, normal, normal),
            "attention_bias": False,
            "adaptive": self.time == "adaln",
            "implementation": self.implementation,
            **types,
        }
        half = self.depth // 2
        self.in_blocks = [Block(**block) for _ in range(half)]
        self.mid_block = Block(**block)
        self.out_blocks = [Block(**block) for _ in range(self.depth - half)]
        joins = 0 if self.long_skip == "none" else half
        self.skips = [LongSkip(self.long_skip, kernel_init=normal, **types) for _ in range(joins)]
        self.final_norm = layer_norm(**types)
        if self.convolution == "tokens":
            self.token_conv = conv(self.width, 3, self.width, self.dtype)
        # In float32 whatever the blocks compute in: a prediction is of noise, whose small values matter.
        outputs = self.patch_size**2 * self.out_channels
        self.pixel_head = Dense(outputs, kernel_init=normal, dtype=jnp.float32, param_dtype=self.param_dtype)
        if self.convolution == "image":
            self.image_conv = conv(self.out_channels, 3, self.out_channels, jnp.float32)

    def __call__(
        self, x_t: Float[Array, "b h w c"], t: Float[Array, "b"], conditioning: Conditioning, train: bool = False
    ) -> Float[Array, "b h w {self.out_channels}"]:
        """Predicts what the objective asks for: noise, the clean picture, velocity.

        Args:
          x_t: noisy pictures.
          t: times as the network is to see them; the published ones saw 0 to 999 (continuous time) or 1 to 1000.
          conditioning: a label if there are classes, tokens if there is a context; a mask hides some of these.
          train: training differs in nothing; the published network has no dropout.

        Returns:
          float32.

        Raises:
          ValueError: if shapes or conditions are not the network's.
        """
        del train
        self._check_inputs(x_t, conditioning)
        patches = self.patch(x_t.astype(self.dtype))
        grid = patches.shape[1:3]
        embedded = sinusoidal_embedding(t, self.width).astype(self.dtype)
        if self.mlp_time_embed:
            embedded = self.time_mlp(embedded)
        tokens = [rearrange(patches, "b h w d -> b (h w) d")]
        if conditioning.tokens is not None:
            tokens.insert(0, self.context(conditioning.tokens))
        if self.time == "token":
            tokens.insert(0, embedded[:, None])
        if conditioning.label is not None:
            tokens.insert(0, self.label(conditioning.label)[:, None])
        x = self._add_positions(jnp.concatenate(tokens, axis=1), grid)
        first = self.extra_tokens
        if isinstance(conditioning.mask, KeyLengths):
            # The context goes last, where lengths can hide its end: behind positions, layers do not know an order.
            first -= self.context_length
            x = jnp.concatenate([x[:, :first], x[:, self.extra_tokens :], x[:, first : self.extra_tokens]], axis=1)
        x = shard_rows(x)
        x = apply_with_long_skips(
            self.in_blocks,
            self.mid_block,
            self.out_blocks,
            self.skips,
            x,
            self._mask(conditioning, grid),
            embedded if self.time == "adaln" else None,
            scan=self.scan,
            remat=self.remat,
        )
        x = self.final_norm(x)[:, first : first + grid[0] * grid[1]]
        if self.convolution == "tokens":
            x = self.token_conv(rearrange(x, "b (h w) d -> b h w d", h=grid[0]))
            x = rearrange(x, "b h w d -> b (h w) d")
        side = {"h": grid[0], "p": self.patch_size, "q": self.patch_size}
        image = rearrange(self.pixel_head(x), "b (h w) (p q c) -> b (h p) (w q) c", **side)
        return shard_rows(self.image_conv(image) if self.convolution == "image" else image)

    def caption_attention(
        self, kept: Mapping[str, Any], height: int, width: int
    ) -> tuple[Float[Array, "b _h _w m"], ...]:
        """What patches read of the context in each layer: rows of patches over columns of context, made to sum to 1.

        What a patch reads of time, label and patches is left out, itself included.

        Args:
          kept: the collection "intermediates" of a call without `KeyLengths`.
          height: of x_t.
          width: of x_t.
        """
        first, grid = self.extra_tokens, (height // self.patch_size, width // self.patch_size)
        read = [weights[:, first:, first - self.context_length : first] for weights in jax.tree.leaves(kept)]
        shares = [weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), 1e-30) for weights in read]
        return tuple(share.reshape(len(share), *grid, -1) for share in shares)

    @property
    def _learned_positions(self) -> int:
        """How many tokens have one."""
        patches = (self.image_size // self.patch_size) ** 2
        return {"learned": self.extra_tokens + patches, "sincos_2d": self.extra_tokens, "none": 0}[self.positions]

    def _add_positions(self, x: Array, grid: tuple[int, int]) -> Array:
        """Adds to each token [B L D] its position; patches have a grid of (height, width)."""
        if self._learned_positions:
            learned = self.position(jnp.arange(self._learned_positions))
            x = x.at[:, : self._learned_positions].add(learned)
        if self.positions == "sincos_2d":
            x = x.at[:, self.extra_tokens :].add(grid_embedding(*grid, self.width).astype(x.dtype))
        return x

    def _mask(self, conditioning: Conditioning, grid: tuple[int, int]) -> Array | KeyLengths | None:
        """Which tokens all others may see, [B 1 1 L], or how many; None for all."""
        if conditioning.mask is None:
            return None
        before = self.extra_tokens - self.context_length
        behind = grid[0] * grid[1]
        if isinstance(conditioning.mask, KeyLengths):
            return KeyLengths(before + behind + conditioning.mask.lengths)
        seen = jnp.pad(conditioning.mask, ((0, 0), (before, behind)), constant_values=True)
        return seen[:, None, None]

    def _check_fields(self) -> None:
        """Raises ValueError for fields that make no network."""
        check_remat(self.remat)
        for field, choices in CHOICES.items():
            if getattr(self, field) not in choices:
                raise ValueError(f"unknown {field} {getattr(self, field)!r}; choose one of {', '.join(choices)}")
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size={self.patch_size} must divide image_size={self.image_size}")
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"heads={self.heads} must be at least 1 and divide width={self.width}")
        if self.depth < 2 or (self.depth % 2 and self.long_skip != "none"):
            raise ValueError(
                f"depth={self.depth} must be at least 2, and even for the two halves that long skips connect "
                "(the middle layer is not counted)"
            )
        if (self.context_length > 0) != (self.context_width > 0):
            raise ValueError(
                f"context_length={self.context_length} and context_width={self.context_width}: give both, or 0 for "
                "a network without a context"
            )
        if self.positions == "sincos_2d" and self.width % 4:
            raise ValueError(f"width={self.width} must be a multiple of 4 where positions are sincos_2d")

    def _check_inputs(self, x_t: Array, conditioning: Conditioning) -> None:
        """Raises ValueError for arguments that are not this network's."""
        shape = (self.image_size, self.image_size, self.in_channels)
        if self.positions == "learned" and x_t.shape[1:] != shape:
            raise ValueError(
                f"x_t is {x_t.shape[1:]}, the network's image_size and in_channels are {shape}, and its positions are "
                "learned"
            )
        if any(side % self.patch_size for side in x_t.shape[1:3]) or x_t.shape[-1] != self.in_channels:
            raise ValueError(
                f"x_t is {x_t.shape[1:]}, the network's patch_size and in_channels are {self.patch_size}, "
                f"{self.in_channels}"
            )
        check_conditioning(
            conditioning,
            tokens=("context_length", self.context_length),
            label=("num_classes", self.num_classes),
        )
        if conditioning.tokens is not None:
            given, context = conditioning.tokens.shape[1:], (self.context_length, self.context_width)
            if given != context:
                raise ValueError(
                    f"conditioning.tokens are {given}, the network's context_length and width are {context}"
                )
