"""DiT: a vision transformer whose layers are modulated by time and class (Peebles & Xie 2023, section 3).

"Scalable Diffusion Models with Transformers". Patches of the noisy picture are the only tokens of the sequence. Time
and class scale, shift and gate what every layer does (adaLN-Zero); all gates start at 0, so that a new layer passes its
input on. Captions are attended to by a cross-attention between self-attention and feed-forward block, without norm or
gate and with an output that starts at 0, as in PixArt-alpha (Chen et al. 2024, section 2.3).
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from models.conditioning import Conditioning, check_conditioning
from models.layers.convolution import Conv
from models.layers.dense import Dense, DenseGeneral
from models.layers.embeddings import grid_embedding, sinusoidal_embedding
from models.layers.mlp import MLP
from models.layers.normalization import layer_norm
from models.layers.partitioning import shard_rows
from models.layers.self_attention import SelfAttention
from models.layers.spatial_transformer import ContextAttention, ContextMask, caption_attention
from models.layers.transformer import apply_blocks, check_remat

EPSILON = 1e-6  # of norms
TIME_WAVES = 256  # sines and cosines of the time
EXAMPLE_TOKENS = 8  # any number can be attended to

_XAVIER = nn.initializers.xavier_uniform()
_NORMAL = nn.initializers.normal(0.02)
_ZEROS = nn.initializers.zeros_init()


class DiTBlock(nn.Module):
    """A transformer layer whose two branches are scaled, shifted and gated by a condition (adaLN-Zero).

        x + g_1 attention((1 + c_1) norm(x) + s_1),  then likewise with the feed-forward block,

    where one dense layer, which starts at 0, makes s_1, c_1, g_1, s_2, c_2, g_2 of the condition. Norms have no gain or
    bias of their own.

    Attributes:
      width: D.
      heads: number of heads N.
      mlp_hidden: hidden width of the feed-forward block.
      reads_tokens: whether there is a cross-attention.
      mlp_norm_epsilon: of the second norm.
      implementation: see `models.layers.attention.attend`.
      dtype: of the computation; statistics, scores and softmax are float32 in any case.
      param_dtype: of the parameters.
    """

    width: int
    heads: int
    mlp_hidden: int
    reads_tokens: bool = False
    mlp_norm_epsilon: float = EPSILON
    implementation: str = "auto"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        mask: ContextMask | None,
        condition: Float[Array, "b d"],
        tokens: Float[Array, "b m e"] | None = None,
    ) -> Float[Array, "b l d"]:
        """Applies the layer; `mask` is of the tokens, see `models.layers.spatial_transformer.ContextAttention`."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        modulation = DenseGeneral((6, self.width), kernel_init=_ZEROS, name="modulation", **types)(condition)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (modulation[:, i, None] for i in range(6))
        attention = SelfAttention(
            self.width,
            self.heads,
            self.width // self.heads,
            kernel_init=_XAVIER,
            out_init=_XAVIER,
            implementation=self.implementation,
            name="attention",
            **types,
        )
        y = _plain_norm(EPSILON, self.dtype, "attention_norm")(x) * (1 + scale_1) + shift_1
        x = shard_rows(x + gate_1 * attention(y))
        if self.reads_tokens:
            read = ContextAttention(
                self.heads,
                kernel_init=_XAVIER,
                out_init=_ZEROS,
                use_bias=True,
                implementation=self.implementation,
                name="context_attention",
                **types,
            )
            x = shard_rows(x + read(x, tokens, mask))
        mlp = MLP(self.mlp_hidden, "gelu_tanh", kernel_init=_XAVIER, out_init=_XAVIER, name="mlp", **types)
        y = _plain_norm(self.mlp_norm_epsilon, self.dtype, "mlp_norm")(x) * (1 + scale_2) + shift_2
        return shard_rows(x + gate_2 * mlp(y))


class DiT(nn.Module):
    """The network; a diffusion backbone, `backbone(x_t, t, conditioning, train) -> prediction`.

    Initialization is that of the paper and its code: Xavier's uniform in dense layers and patches, N(0, 0.02^2) in the
    embeddings of time, class and captions, 0 in all modulations and the last layer, so that a new network predicts 0.
    Positions are fixed: sines and cosines of column and row, no parameters.

    Attributes:
      image_size: height and width of what is diffused: pixels or latents. Others work where patches divide them.
      patch_size: side P of a patch.
      width: D.
      depth: number of layers.
      heads: number of attention heads.
      in_channels: of x_t.
      out_channels: of the prediction; None for as many. The published networks predict a variance too, in as many more.
      mlp_ratio: hidden width of the feed-forward block over D.
      num_classes: labels, the one that stands for none included; 0 for a network without them.
      context_width: width of the tokens that are attended to; 0 for a network without.
      last_period: see `sinusoidal_embedding`; True in diffusers' copy, whose waves of the time are not the authors'.
      mlp_norm_epsilon: of each layer's second norm; 1e-5 in diffusers' copy, 1e-6 in the authors' code.
      implementation: see `models.layers.attention.attend`.
      scan: see `models.layers.transformer.apply_blocks`.
      remat: see there.
      dtype: of the computation; the embedding of time, norms' statistics, softmax and the last layer are float32.
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
    num_classes: int = 0
    context_width: int = 0
    last_period: bool = False
    mlp_norm_epsilon: float = EPSILON
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
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patches of a picture of `image_size`."""
        return (self.image_size // self.patch_size,) * 2

    def example_inputs(self, batch_size: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, Conditioning]:
        """Shapes of the arguments of `__call__`; without a mask."""
        tokens, label = None, None
        if self.context_width:
            tokens = jax.ShapeDtypeStruct((batch_size, EXAMPLE_TOKENS, self.context_width), jnp.float32)
        if self.num_classes:
            label = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
        x_t = jax.ShapeDtypeStruct((batch_size, self.image_size, self.image_size, self.in_channels), jnp.float32)
        return x_t, jax.ShapeDtypeStruct((batch_size,), jnp.float32), Conditioning(tokens=tokens, label=label)

    def setup(self) -> None:
        self._check_fields()
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        exact = {"dtype": jnp.float32, "param_dtype": self.param_dtype}
        side = (self.patch_size, self.patch_size)
        self.patch = Conv(self.width, side, strides=side, padding="VALID", kernel_init=_flat_xavier, **types)
        self.time_1 = Dense(self.width, kernel_init=_NORMAL, **exact)
        self.time_2 = Dense(self.width, kernel_init=_NORMAL, **exact)
        if self.num_classes:
            self.label = nn.Embed(self.num_classes, self.width, embedding_init=_NORMAL, **exact)
        if self.context_width:
            self.context_1 = Dense(self.width, kernel_init=_NORMAL, **types)
            self.context_2 = Dense(self.width, kernel_init=_NORMAL, **types)
        self.blocks = [
            DiTBlock(
                self.width,
                self.heads,
                int(self.width * self.mlp_ratio),
                reads_tokens=self.context_width > 0,
                mlp_norm_epsilon=self.mlp_norm_epsilon,
                implementation=self.implementation,
                **types,
            )
            for _ in range(self.depth)
        ]
        # In float32 whatever the layers compute in: a prediction is of noise, whose small values matter.
        self.final_norm = _plain_norm(EPSILON, jnp.float32, None)
        self.final_modulation = DenseGeneral((2, self.width), kernel_init=_ZEROS, **exact)
        self.pixel_head = Dense(self.patch_size**2 * self.out_channels, kernel_init=_ZEROS, **exact)

    def __call__(
        self, x_t: Float[Array, "b h w c"], t: Float[Array, "b"], conditioning: Conditioning, train: bool = False
    ) -> Float[Array, "b h w {self.out_channels}"]:
        """Predicts what the objective asks for: noise, the clean picture, velocity.

        Args:
          x_t: noisy pictures.
          t: times as the network is to see them; the published ones saw 0 to 999.
          conditioning: a label if there are classes, tokens if there is a context; a mask hides some of these.
          train: training differs in nothing.

        Returns:
          float32.

        Raises:
          ValueError: if shapes or conditions are not the network's.
        """
        del train
        self._check_inputs(x_t, conditioning)
        waves = sinusoidal_embedding(t, TIME_WAVES, last_period=self.last_period)
        condition = self.time_2(nn.silu(self.time_1(waves)))
        if conditioning.label is not None:
            condition = condition + self.label(conditioning.label)
        condition = shard_rows(nn.silu(condition), whole=True)
        tokens = conditioning.tokens
        if tokens is not None:
            tokens = shard_rows(self.context_2(nn.gelu(self.context_1(tokens), approximate=True)))
        patches = self.patch(x_t.astype(self.dtype))
        height, width = patches.shape[1:3]
        positions = grid_embedding(height, width, self.width, column_first=True, sine_first=True)
        x = shard_rows(rearrange(patches, "b h w d -> b (h w) d") + positions.astype(self.dtype))
        masks, kinds = (conditioning.mask,), (0,) * self.depth
        x = apply_blocks(self.blocks, x, masks, kinds, condition, tokens, scan=self.scan, remat=self.remat)
        modulation = self.final_modulation(condition)
        shift, scale = modulation[:, 0, None], modulation[:, 1, None]
        pixels = self.pixel_head(self.final_norm(x) * (1 + scale) + shift)
        side = {"h": height, "p": self.patch_size, "q": self.patch_size}
        return shard_rows(rearrange(pixels, "b (h w) (p q c) -> b (h p) (w q) c", **side))

    def caption_attention(
        self, kept: Mapping[str, Any], height: int, width: int
    ) -> tuple[Float[Array, "b _h _w m"], ...]:
        """What pixels read of the tokens in each cross-attention; see `models.layers.spatial_transformer`."""
        return caption_attention(kept, height, width)

    def _check_fields(self) -> None:
        """Raises ValueError for fields that make no network."""
        check_remat(self.remat)
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size={self.patch_size} must divide image_size={self.image_size}")
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"heads={self.heads} must be at least 1 and divide width={self.width}")
        if self.depth < 1:
            raise ValueError(f"depth={self.depth} must be at least 1")
        if self.width % 4:
            raise ValueError(f"width={self.width} must be a multiple of 4, for the positions")

    def _check_inputs(self, x_t: Array, conditioning: Conditioning) -> None:
        """Raises ValueError for arguments that are not this network's."""
        if any(side % self.patch_size for side in x_t.shape[1:3]) or x_t.shape[-1] != self.in_channels:
            needed = f"{self.patch_size} and {self.in_channels}"
            raise ValueError(f"x_t is {x_t.shape[1:]}, the network's patch_size and in_channels are {needed}")
        check_conditioning(
            conditioning, tokens=("context_width", self.context_width), label=("num_classes", self.num_classes)
        )
        if conditioning.tokens is not None and conditioning.tokens.shape[-1] != self.context_width:
            given = conditioning.tokens.shape[-1]
            raise ValueError(f"tokens are {given} wide, the network's context_width is {self.context_width}")


def _plain_norm(epsilon: float, dtype: DTypeLike, name: str | None) -> nn.LayerNorm:
    """A LayerNorm without gain and bias."""
    return layer_norm(epsilon=epsilon, use_scale=False, use_bias=False, dtype=dtype, name=name)


def _flat_xavier(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Xavier's uniform of a kernel [P, P, C, D] as the dense layer of a patch that it is."""
    return _XAVIER(key, (math.prod(shape[:-1]), shape[-1]), dtype).reshape(shape)
