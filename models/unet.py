"""The UNet of diffusion: DDPM's, ADM's, and the one of latent diffusion and Stable Diffusion, by their fields.

Ho et al. 2020, "Denoising Diffusion Probabilistic Models", appendix B; Dhariwal & Nichol 2021, "Diffusion Models Beat
GANs on Image Synthesis", section 3; Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion
Models", appendix E.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from models.conditioning import Conditioning
from models.layers.convolution import Conv
from models.layers.dense import Dense
from models.layers.embeddings import sinusoidal_embedding
from models.layers.group_norm_resnet import (
    KERNEL_INITS,
    AttentionBlock,
    Downsample,
    ResidualBlock,
    Upsample,
    check_kernel_init,
    group_norm,
)
from models.layers.partitioning import shard_rows
from models.layers.spatial_transformer import ContextMask, SpatialTransformer, caption_attention
from models.layers.transformer import REMAT, check_remat

ATTENTIONS = ("plain", "transformer")
RESAMPLERS = ("convolution", "residual")
CLASS_EMBEDDINGS = ("time", "token")
EXAMPLE_TOKENS = 8  # any number can be attended to


class UNet(nn.Module):
    """A noisy picture, its time and a description to a prediction as large as the picture.

    Level i has 2^i `patch_size` times smaller pictures of `width * multipliers[i]` channels. On the way down each level
    has `blocks` residual blocks, on the way up one more, each with what the way down left at its place; between them
    are two blocks with attention between. Parameters are called after levels: `down_0_residual_0`, `up_0_residual_2`.

    The last layer of each block and of the network starts at 0, kernels as `kernel_init` says, biases at 0, classes at
    N(0, 1).

    Attributes:
      image_size: height and width of the pictures it is made for; others work where they divide.
      in_channels: of x_t.
      width: of the sine and cosine embedding of time, and what `multipliers` multiply.
      multipliers: of each level, the finest first.
      attention_levels: indices of levels with attention behind each residual block.
      blocks: residual blocks of a level on the way down.
      out_channels: of the prediction; None for `in_channels`. ADM and DiT predict a variance in as many more.
      patch_size: side of the squares of pixels that are folded into channels first and unfolded last (Luhman & Luhman
        2022, "Improving Diffusion Model Efficiency Through Patching"), so that level 0 is that much coarser; 1 in what
        the papers above publish.
      attention: "plain" for one self-attention (DDPM, ADM, latent diffusion without context), "transformer" for layers
        of `models.layers.spatial_transformer`.
      heads: number of heads at every level; or
      head_width: channels of a head at every level. One of the two.
      context_width: D of `conditioning.tokens`, which a transformer then needs; 0 for a network without.
      transformer_depth: layers of a transformer.
      linear_projection: see `SpatialTransformer`.
      num_classes: labels, the one that stands for none included; 0 for a network without them.
      class_embedding: "time" adds the class to the embedding of time (ADM), "token" makes it the context's only token
        (latent diffusion, whose code keeps that table beside the network).
      time_width: of the embedding of time; None for 4 `width`.
      sine_first, last_period: see `sinusoidal_embedding`; both True in DDPM alone.
      scale_shift: see `ResidualBlock`; True in ADM.
      resampler: between levels, "convolution" or "residual" blocks that resample (ADM).
      downsample_padding: see `Downsample`.
      dropout: in residual blocks, in training.
      groups: of group normalization.
      norm_epsilon: of group normalization, but those of transformers; 1e-6 in DDPM.
      kernel_init: "fan_in" as in PyTorch, in which most were published; "fan_avg" in DDPM.
      implementation: of attention, see `models.layers.attention.attend`.
      remat: what each residual block and each attention recomputes in the backward pass, for memory; see
        `models.layers.transformer.REMAT`. "dots" recomputes convolutions, on a CPU but those of single pixels.
      dtype: of the computation; the embedding of time, statistics, scores, softmax and the last convolution are float32
        in any case.
      param_dtype: of the parameters.
    """

    # Training may go on with larger pictures; see `adapt`.
    ADAPTABLE: ClassVar[tuple[str, ...]] = ("image_size",)

    image_size: int
    in_channels: int
    width: int
    multipliers: tuple[int | float, ...]
    attention_levels: tuple[int, ...]
    blocks: int = 2
    out_channels: int | None = None
    patch_size: int = 1
    attention: str = "plain"
    heads: int | None = None
    head_width: int | None = None
    context_width: int = 0
    transformer_depth: int = 1
    linear_projection: bool = False
    num_classes: int = 0
    class_embedding: str = "time"
    time_width: int | None = None
    sine_first: bool = False
    last_period: bool = False
    scale_shift: bool = False
    resampler: str = "convolution"
    downsample_padding: tuple[int, int] = (1, 1)
    dropout: int | float = 0.0
    groups: int = 32
    norm_epsilon: float = 1e-5
    kernel_init: str = "fan_in"
    implementation: str = "auto"
    remat: str = "none"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        # Filled in, so that equal networks have equal fields.
        if self.out_channels is None:
            self.out_channels = self.in_channels
        if self.time_width is None:
            self.time_width = 4 * self.width
        super().__post_init__()

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(round(self.width * multiplier) for multiplier in self.multipliers)

    @property
    def downsampling(self) -> int:
        """Pixels of a picture over those of the coarsest level, along a side."""
        return self.patch_size * 2 ** (len(self.multipliers) - 1)

    def heads_of(self, width: int) -> int:
        """Number of heads of an attention over so many channels."""
        return self.heads or width // self.head_width

    def adapt(self, params: Any, theirs: "UNet") -> Any:
        """Parameters of a network that differs in `ADAPTABLE`, as they are: none depends on the size of a picture."""
        del theirs
        return params

    def example_inputs(self, batch_size: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, Conditioning]:
        """Shapes of the first arguments of `__call__`."""
        x_t = jax.ShapeDtypeStruct((batch_size, self.image_size, self.image_size, self.in_channels), jnp.float32)
        tokens = label = None
        if self.num_classes:
            label = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
        if self.reads_tokens:
            tokens = jax.ShapeDtypeStruct((batch_size, EXAMPLE_TOKENS, self.context_width), jnp.float32)
        t = jax.ShapeDtypeStruct((batch_size,), jnp.float32)
        return x_t, t, Conditioning(tokens=tokens, label=label)

    @nn.compact
    def __call__(
        self,
        x_t: Float[Array, "b h w c"],
        t: Float[Array, "b"],
        conditioning: Conditioning,
        train: bool = False,
        dropout_keys: Key[Array, "b"] | None = None,
    ) -> Float[Array, "b h w {self.out_channels}"]:
        """Predicts from a noisy picture what the network was trained to.

        Args:
          x_t: noisy pictures or latents.
          t: times, as the published network was fed them.
          conditioning: what the network was built for, and nothing else.
          train: apply dropout.
          dropout_keys: one key an example, such as `example_keys` of an objective gives, so that what an example loses
            does not depend on the batch; needed where `train` and `dropout` are.

        Returns:
          float32.

        Raises:
          ValueError: if fields contradict each other, or inputs are not those of the network.
        """
        self._check_fields()
        self._check_inputs(x_t, conditioning, train, dropout_keys)
        keys = _layer_keys(dropout_keys if train and self.dropout else None)
        time, context = self._embed(t, conditioning)
        mask = conditioning.mask

        side = {"p": self.patch_size, "q": self.patch_size}
        x = shard_rows(rearrange(x_t.astype(self.dtype), "b (h p) (w q) c -> b h w (p q c)", **side))
        x = Conv(self.widths[0], (3, 3), kernel_init=KERNEL_INITS[self.kernel_init], name="input", **self._types)(x)
        skips = [x]
        levels = range(len(self.widths))
        for level in levels:
            for i in range(self.blocks):
                x = self._residual(f"down_{level}_residual_{i}", level)(x, time, next(keys))
                if level in self.attention_levels:
                    x = self._attend(f"down_{level}_attention_{i}", x, context, mask)
                skips.append(x)
            if level < levels[-1]:
                x = self._resample("down", level, x, time, next(keys))
                skips.append(x)

        x = self._residual("mid_residual_0", levels[-1])(x, time, next(keys))
        x = self._attend("mid_attention", x, context, mask)
        x = self._residual("mid_residual_1", levels[-1])(x, time, next(keys))

        for level in reversed(levels):
            for i in range(self.blocks + 1):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = self._residual(f"up_{level}_residual_{i}", level)(x, time, next(keys))
                if level in self.attention_levels:
                    x = self._attend(f"up_{level}_attention_{i}", x, context, mask)
            if level > 0:
                x = self._resample("up", level, x, time, next(keys))

        last = {"dtype": jnp.float32, "param_dtype": self.param_dtype}
        x = nn.silu(group_norm(self.groups, self.norm_epsilon, name="output_norm", **last)(x))
        zeros = nn.initializers.zeros_init()
        channels = self.patch_size**2 * self.out_channels
        x = Conv(channels, (3, 3), kernel_init=zeros, name="output", **last)(x)
        return shard_rows(rearrange(x, "b h w (p q c) -> b (h p) (w q) c", **side))

    def _embed(self, t: Array, conditioning: Conditioning) -> tuple[Array, Array | None]:
        """The embedding of time (and class), float32 [B D], and the context."""
        dense = {"kernel_init": KERNEL_INITS[self.kernel_init], "dtype": jnp.float32, "param_dtype": self.param_dtype}
        time = sinusoidal_embedding(t, self.width, sine_first=self.sine_first, last_period=self.last_period)
        time = nn.silu(Dense(self.time_width, name="time_1", **dense)(time))
        time = Dense(self.time_width, name="time_2", **dense)(time)
        context = conditioning.tokens
        if self.num_classes:
            width = self.time_width if self.class_embedding == "time" else self.context_width
            table = nn.Embed(
                self.num_classes,
                width,
                embedding_init=nn.initializers.normal(1.0),
                dtype=jnp.float32,
                param_dtype=self.param_dtype,
                name="class",
            )
            embedded = table(conditioning.label)
            if self.class_embedding == "time":
                time = time + embedded
            else:
                context = embedded[:, None]
        return shard_rows(time), None if context is None else shard_rows(context.astype(self.dtype))

    def _residual(self, name: str, level: int, resampling: str = "none") -> nn.Module:
        """A residual block to the channels of a level."""
        return self._rematerialized(ResidualBlock)(
            self.widths[level],
            scale_shift=self.scale_shift,
            resampling=resampling,
            dropout=self.dropout,
            groups=self.groups,
            norm_epsilon=self.norm_epsilon,
            kernel_init=self.kernel_init,
            name=name,
            **self._types,
        )

    def _attend(self, name: str, x: Array, context: Array | None, mask: ContextMask | None) -> Array:
        """Attention of x, to the context too if the network has one."""
        fields: dict[str, Any] = {
            "heads": self.heads_of(x.shape[-1]),
            "groups": self.groups,
            "kernel_init": self.kernel_init,
            "implementation": self.implementation,
            "name": name,
            **self._types,
        }
        if self.attention == "plain":
            return self._rematerialized(AttentionBlock)(norm_epsilon=self.norm_epsilon, **fields)(x)
        block = self._rematerialized(SpatialTransformer)(
            depth=self.transformer_depth, linear_projection=self.linear_projection, **fields
        )
        return block(x, context, mask)

    def _resample(self, way: str, level: int, x: Array, time: Array, keys: Array | None) -> Array:
        """To half or twice the height and width, channels kept."""
        name = f"{way}_{level}_resample"
        if self.resampler == "residual":
            return self._residual(name, level, resampling=way)(x, time, keys)
        fields = {"kernel_init": self.kernel_init, "name": name, **self._types}
        layer = Upsample(**fields) if way == "up" else Downsample(self.downsample_padding, **fields)
        return shard_rows(layer(x))

    def _rematerialized(self, block: type[nn.Module]) -> Any:
        return block if self.remat == "none" else nn.remat(block, policy=REMAT[self.remat])

    def caption_attention(
        self, kept: Mapping[str, Any], height: int, width: int
    ) -> tuple[Float[Array, "b _h _w m"], ...]:
        """What pixels read of the tokens in each cross-attention; see `models.layers.spatial_transformer`."""
        return caption_attention(kept, height, width)

    @property
    def _types(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    @property
    def reads_tokens(self) -> bool:
        """Whether `conditioning.tokens` is needed."""
        return self.context_width > 0 and not (self.num_classes and self.class_embedding == "token")

    def _check_fields(self) -> None:
        """Raises ValueError if the network cannot be built."""
        check_remat(self.remat)
        check_kernel_init(self.kernel_init)
        for field, choices in (
            ("attention", ATTENTIONS),
            ("resampler", RESAMPLERS),
            ("class_embedding", CLASS_EMBEDDINGS),
        ):
            if getattr(self, field) not in choices:
                raise ValueError(f"unknown {field} {getattr(self, field)!r}; choose one of {', '.join(choices)}")
        levels = len(self.multipliers)
        if unknown := [level for level in self.attention_levels if not 0 <= level < levels]:
            raise ValueError(f"attention_levels has {unknown[0]}; the levels of multipliers are 0 to {levels - 1}")
        if self.patch_size < 1:
            raise ValueError(f"patch_size={self.patch_size} must be at least 1, one pixel")
        if self.image_size % self.downsampling:
            raise ValueError(f"image_size={self.image_size} is not a multiple of {self.downsampling}")
        if wrong := [width for width in self.widths if width % self.groups]:
            raise ValueError(f"groups={self.groups} does not divide the {wrong[0]} channels of a level")
        if (self.heads is None) == (self.head_width is None):
            raise ValueError(f"set one of heads={self.heads} and head_width={self.head_width}")
        size = self.heads or self.head_width
        for level in {*self.attention_levels, levels - 1}:  # the last one's middle has attention too
            if self.widths[level] % size:
                field = "heads" if self.heads else "head_width"
                raise ValueError(f"{field}={size} does not divide the {self.widths[level]} channels of level {level}")
        if self.context_width > 0 and self.attention == "plain":
            raise ValueError(f"context_width={self.context_width} needs attention='transformer'")
        if self.num_classes and self.class_embedding == "token" and not self.context_width:
            raise ValueError("class_embedding='token' needs a context_width")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")

    def _check_inputs(self, x_t: Array, conditioning: Conditioning, train: bool, dropout_keys: Array | None) -> None:
        """Raises ValueError unless the arguments are those that the network is built for."""
        height, width, channels = x_t.shape[1:]
        if channels != self.in_channels:
            raise ValueError(f"pictures have {channels} channels, the network's in_channels are {self.in_channels}")
        if math.gcd(height, width) % self.downsampling:
            raise ValueError(f"pictures are {height} x {width}; both must be multiples of {self.downsampling}")
        tokens, mask, label = conditioning.tokens, conditioning.mask, conditioning.label
        if (tokens is not None) != self.reads_tokens:
            raise ValueError(
                f"the network needs conditioning.tokens [B L {self.context_width}]"
                if self.reads_tokens
                else "the network does not read conditioning.tokens; leave them out"
            )
        if tokens is not None and tokens.shape[-1] != self.context_width:
            raise ValueError(f"tokens are {tokens.shape[-1]} wide, the network's context_width is {self.context_width}")
        if mask is not None and tokens is None:
            raise ValueError("conditioning.mask is of tokens, which the network does not read; leave it out")
        if (label is not None) != (self.num_classes > 0):
            raise ValueError(
                "the network needs conditioning.label [B]"
                if self.num_classes
                else "the network has no classes; leave conditioning.label out"
            )
        if train and self.dropout and dropout_keys is None:
            raise ValueError(f"training with dropout={self.dropout} needs dropout_keys [B], one key an example")


def _layer_keys(keys: Key[Array, "b"] | None) -> Iterator[Key[Array, "b"] | None]:
    """Keys of the examples for one layer after another, or None for each."""
    layer = 0
    while True:
        yield None if keys is None else jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, layer)
        layer += 1
