"""UniDiffuser: one network that estimates the noise of a picture and of its caption, each at a time of its own.

Bao et al. 2023, "One Transformer Fits All Distributions in Multi-Modal Diffusion at Scale", sections 3.1 and 4: a U-ViT
whose layers have their norms behind, over the tokens

    [time of the picture, time of the text, (kind of data), caption 1 ... caption L, CLIP, patch 1 ... patch HW / P^2]

At time 0 a side is given, at the last time it is noise alone and says nothing, so that the one network draws both, one
for the other, or one alone.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from models.layers.convolution import Conv
from models.layers.dense import Dense
from models.layers.embeddings import sinusoidal_embedding
from models.layers.initialization import torch_bias, torch_kernel
from models.layers.long_skip import LongSkip, apply_with_long_skips
from models.layers.mlp import ACTIVATIONS
from models.layers.normalization import layer_norm
from models.layers.partitioning import shard_rows
from models.layers.transformer import Block, BlockInitializers, check_remat

# Shapes alone where a network is described and not run; `Any` to type checkers, as whoever computes has arrays.
_ArrayOrShape: Any = Array | jax.ShapeDtypeStruct


@struct.dataclass
class PictureAndText:
    """A picture and its caption as UniDiffuser diffuses them, or noise, or estimates of either.

    Attributes:
      image: [B H W C], latents of a first stage.
      clip: [B E], the picture's CLIP embedding, not normalized; it belongs to the picture and shares its time.
      text: [B L Z], the captioner's latents of each token of the caption.
    """

    image: Float[_ArrayOrShape, "b h w c"]
    clip: Float[_ArrayOrShape, "b e"]
    text: Float[_ArrayOrShape, "b l z"]


def _resized(patches: Float[Array, "l d"], side: int, grid: tuple[int, int]) -> Float[Array, "m d"]:
    """Positions of a square grid for another one, bilinearly, as the authors do."""
    width = patches.shape[1]
    square = patches.reshape(side, side, width)
    return jax.image.resize(square, (*grid, width), "linear", antialias=False).reshape(-1, width)


class UniDiffuser(nn.Module):
    """The network.

    Initialization is that of the published code: dense layers and positions N(0, 0.02^2), kinds of data N(0, 1) and
    their position 0, convolutions as PyTorch starts them.

    Attributes:
      image_size: height and width of the latents that positions were learned for; others, not square ones too, read
        them interpolated.
      patch_size: side P of a patch.
      width: D.
      depth: layers beside the middle one; 30 in the published network, 15 on each side of it.
      heads: number of attention heads.
      in_channels: C.
      clip_width: E.
      text_length: L.
      text_width: Z.
      data_types: kinds of data that are told apart: 0 in the authors' first version; 2 in the second, 0 for pairs of
        the web and 1 for others.
      mlp_ratio: hidden width of the feed-forward block over D.
      activation: see `models.layers.mlp.ACTIVATIONS`.
      implementation: see `models.layers.attention.attend`.
      scan: see `models.layers.long_skip.apply_with_long_skips`.
      remat: see there.
      dtype: of the computation; norms' statistics, softmax and the heads are float32.
      param_dtype: of the parameters.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    in_channels: int
    clip_width: int
    text_length: int
    text_width: int
    data_types: int = 0
    mlp_ratio: int | float = 4
    activation: str = "gelu"
    implementation: str = "auto"
    scan: bool = False
    remat: str = "none"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def example_inputs(self, batch_size: int) -> tuple[Any, ...]:
        """Shapes of the arguments of `__call__`."""

        def floats(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((batch_size, *shape), jnp.float32)

        x = PictureAndText(
            image=floats(self.image_size, self.image_size, self.in_channels),
            clip=floats(self.clip_width),
            text=floats(self.text_length, self.text_width),
        )
        kind = jax.ShapeDtypeStruct((batch_size,), jnp.int32) if self.data_types else None
        return x, floats(), floats(), kind

    # What a network that is trained further may have of its own; see `adapt`.
    ADAPTABLE: ClassVar[tuple[str, ...]] = ("image_size",)

    def adapt(self, params: Mapping[str, Any], trained: "UniDiffuser") -> dict[str, Any]:
        """Parameters to start from, of a network of another `image_size`: positions are interpolated as when called.

        Args:
          params: of `trained`, which differs in nothing else.
          trained: says for which grid its positions were learned.
        """
        before, patches = jnp.split(jnp.asarray(params["position"]["embedding"]), (2 + self.text_length + 1,))
        patches = _resized(patches, trained._patches, (self._patches, self._patches))
        return {**params, "position": {"embedding": jnp.concatenate([before, patches])}}

    def setup(self) -> None:
        self._check_fields()
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        normal = nn.initializers.normal(0.02)
        side = (self.patch_size, self.patch_size)
        conv = {"kernel_init": torch_kernel, "bias_init": torch_bias(self.in_channels * self.patch_size**2)}
        self.patch = Conv(self.width, side, side, padding="VALID", **conv, **types)
        self.clip_in = Dense(self.width, kernel_init=normal, **types)
        self.text_in = Dense(self.width, kernel_init=normal, **types)
        positions = 2 + self.text_length + 1 + self._patches**2
        self.position = nn.Embed(positions, self.width, embedding_init=normal, **types)
        if self.data_types:
            self.data_type = nn.Embed(self.data_types, self.width, embedding_init=nn.initializers.normal(1.0), **types)
            self.data_type_position = self.param(
                "data_type_position", nn.initializers.zeros_init(), (self.width,), self.param_dtype
            )
        block = {
            "width": self.width,
            "heads": self.heads,
            "head_dim": self.width // self.heads,
            "mlp_hidden": int(self.width * self.mlp_ratio),
            "activation": self.activation,
            "initializers": BlockInitializers(normal, normal, normal, normal),
            "attention_bias": False,
            "post_norm": True,
            "implementation": self.implementation,
            **types,
        }
        half = self.depth // 2
        self.in_blocks = [Block(**block) for _ in range(half)]
        self.mid_block = Block(**block)
        self.out_blocks = [Block(**block) for _ in range(half)]
        self.skips = [LongSkip("concat", norm=True, kernel_init=normal, **types) for _ in range(half)]
        self.final_norm = layer_norm(**types)
        # In float32 whatever the blocks compute in: a prediction is of noise, whose small values matter.
        head = {"kernel_init": normal, "dtype": jnp.float32, "param_dtype": self.param_dtype}
        self.pixel_head = Dense(self.patch_size**2 * self.in_channels, **head)
        self.clip_head = Dense(self.clip_width, **head)
        self.text_head = Dense(self.text_width, **head)

    def __call__(
        self,
        x: PictureAndText,
        t_image: Float[Array, "b"],
        t_text: Float[Array, "b"],
        data_type: Int[Array, "b"] | None = None,
    ) -> PictureAndText:
        """Predicts the noise in both.

        Args:
          x: a noisy picture and a noisy caption.
          t_image: time of the picture, from 0 (given) to 1000 (noise alone) in the published network.
          t_text: time of the caption.
          data_type: which kind of data, if they are told apart; None for the last.

        Returns:
          float32.

        Raises:
          ValueError: if shapes or what it is told are not the network's.
        """
        self._check_inputs(x, data_type)
        patches = self.patch(x.image.astype(self.dtype))
        grid = patches.shape[1:3]
        times = [sinusoidal_embedding(t, self.width).astype(self.dtype)[:, None] for t in (t_image, t_text)]
        texts = [self.text_in(x.text), self.clip_in(x.clip)[:, None], rearrange(patches, "b h w d -> b (h w) d")]
        kinds = []
        if self.data_types:
            kind = jnp.full(len(x.clip), self.data_types - 1) if data_type is None else data_type
            kinds = [self.data_type(kind)[:, None]]
        tokens = jnp.concatenate([*times, *kinds, *texts], axis=1) + self._positions(grid)
        states = apply_with_long_skips(
            self.in_blocks,
            self.mid_block,
            self.out_blocks,
            self.skips,
            shard_rows(tokens),
            scan=self.scan,
            remat=self.remat,
        )
        states = self.final_norm(states)[:, 2 + len(kinds) :]
        text, clip, pixels = jnp.split(states, (self.text_length, self.text_length + 1), axis=1)
        side = {"h": grid[0], "p": self.patch_size, "q": self.patch_size}
        image = rearrange(self.pixel_head(pixels), "b (h w) (p q c) -> b (h p) (w q) c", **side)
        return PictureAndText(
            image=shard_rows(image),
            clip=shard_rows(self.clip_head(clip)[:, 0]),
            text=shard_rows(self.text_head(text)),
        )

    @property
    def _patches(self) -> int:
        """Patches on a side of the grid that positions were learned for."""
        return self.image_size // self.patch_size

    def _positions(self, grid: tuple[int, int]) -> Float[Array, "l d"]:
        """Positions of all tokens; those of another grid than the learned one bilinearly, as the authors do."""
        learned = self.position(jnp.arange(2 + self.text_length + 1 + self._patches**2))
        before, patches = jnp.split(learned, (2 + self.text_length + 1,))
        if grid != (self._patches, self._patches):
            patches = _resized(patches, self._patches, grid)
        kinds = [self.data_type_position.astype(learned.dtype)[None]] if self.data_types else []
        return jnp.concatenate([before[:2], *kinds, before[2:], patches])

    def _check_fields(self) -> None:
        """Raises ValueError for fields that make no network."""
        check_remat(self.remat)
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}; choose one of {', '.join(ACTIVATIONS)}")
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size={self.patch_size} must divide image_size={self.image_size}")
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"heads={self.heads} must be at least 1 and divide width={self.width}")
        if self.depth < 2 or self.depth % 2:
            raise ValueError(f"depth={self.depth} must be even and at least 2 (the middle layer is not counted)")

    def _check_inputs(self, x: PictureAndText, data_type: Array | None) -> None:
        """Raises ValueError for arguments that are not this network's."""
        given = (x.image.shape[-1], x.clip.shape[-1], *x.text.shape[1:])
        wanted = (self.in_channels, self.clip_width, self.text_length, self.text_width)
        if given != wanted or any(side % self.patch_size for side in x.image.shape[1:3]):
            raise ValueError(
                f"x is {x.image.shape[1:]}, {x.clip.shape[1:]} and {x.text.shape[1:]}; the network's in_channels, "
                f"clip_width, text_length and text_width are {wanted}, its patch_size {self.patch_size}"
            )
        if data_type is not None and not self.data_types:
            raise ValueError("the network was built without kinds of data: its data_types is 0")
