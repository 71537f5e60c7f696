"""CLIP: an image tower and a text tower with one joint embedding (Radford et al. 2021, sections 2.3 and 2.4)."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from models.layers.convolution import Conv
from models.layers.dense import Dense
from models.layers.initialization import torch_bias, torch_kernel
from models.layers.normalization import layer_norm
from models.layers.partitioning import shard_rows
from models.layers.transformer import Block, BlockInitializers, apply_blocks, check_remat
from models.modified_resnet import ModifiedResNet

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the data that the published models were trained on, in 0..1
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


@struct.dataclass
class ClipOutput:
    """What the two towers make of a batch.

    Attributes:
      image: [B E], of unit length, float32.
      text: [B E], of unit length, float32.
      logit_scale: [], the factor of the cosines, 1 / temperature.
      logit_bias: [], what is added to them; 0 for a network without one.
    """

    image: Float[Array, "b e"]
    text: Float[Array, "b e"]
    logit_scale: Float[Array, ""]
    logit_bias: Float[Array, ""]


class Clip(nn.Module):
    """Both towers, their projections and the learned temperature.

    Text features are read at the first end token, image features of a ViT at the class token. Nothing else differs
    between tokenizers: what follows the end token is hidden by the causal mask.

    Initialization is that of the published code: token embeddings N(0, 0.02^2), text positions N(0, 0.01^2), text
    layers by width and depth, and the image tower as PyTorch starts its layers, with positions, class token and
    projections at N(0, 1 / width).

    Attributes:
      embed_dim: E.
      image_tower: "vit" or "resnet".
      image_size: height and width of a picture, pixels.
      image_width: D of a ViT; channels behind the stem of a ResNet.
      image_layers: layers of a ViT; bottlenecks of each stage of a ResNet.
      image_heads: None for width / 64, and 32 width / 64 in a ResNet's pool.
      image_mlp_ratio: hidden width of a ViT's feed-forward block over D.
      patch_size: side of a ViT's patches, pixels; a ResNet has none.
      text_vocab_size: ids of the tokenizer, ends included.
      text_length: L, the context: start, caption, end.
      text_end_id: the end token's id.
      text_width: D.
      text_layers: number of layers.
      text_heads: None for width / 64.
      activation: see `models.layers.mlp.ACTIVATIONS`: "quick_gelu" in OpenAI's networks, "gelu" in most others. Weights
        that were trained with one give wrong features with the other, and nothing else tells.
      logit_scale_init: ln of the first factor of the cosines; ln(1 / 0.07) where published, ln 10 for SigLIP.
      logit_bias_init: a learned bias starts here; None for none. -10 for SigLIP (Zhai et al. 2023).
      image_mean: of a channel, in 0..1.
      image_std: of a channel, in 0..1.
      implementation: of attention, see `models.layers.attention.attend`. This and the next two do not
        apply to a last layer that is read at one position alone.
      scan: of both transformers, see `models.layers.transformer.apply_blocks`.
      remat: of both transformers, see there.
      dtype: of the computation; norms, softmax, features and temperature are float32 in any case.
      param_dtype: of the parameters.
    """

    embed_dim: int
    image_tower: str
    image_size: int
    image_width: int
    image_layers: int | tuple[int, ...]
    text_vocab_size: int
    text_length: int
    text_end_id: int
    text_width: int
    text_layers: int
    image_heads: int | None = None
    image_mlp_ratio: int | float = 4
    patch_size: int | None = None
    text_heads: int | None = None
    activation: str = "quick_gelu"
    logit_scale_init: int | float = math.log(1 / 0.07)
    logit_bias_init: int | float | None = None
    image_mean: tuple[float, ...] = IMAGE_MEAN
    image_std: tuple[float, ...] = IMAGE_STD
    implementation: str = "auto"
    scan: bool = False
    remat: str = "none"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        # Filled in, so that equal networks have equal fields.
        if self.image_heads is None:
            self.image_heads = self.image_width * (32 if self.image_tower == "resnet" else 1) // 64
        if self.text_heads is None:
            self.text_heads = self.text_width // 64
        super().__post_init__()

    # What a network that is trained further may have of its own; see `adapt`.
    ADAPTABLE: ClassVar[tuple[str, ...]] = ("image_size",)
    # Rows of captions may be shorter than its context: their features do not see what comes after the end token.
    TAKES_SHORTER_TEXT: ClassVar[bool] = True

    def adapt(self, params: Mapping[str, Any], trained: "Clip") -> dict[str, Any]:
        """Parameters to start from, of a network that was trained at another `image_size`: positions are interpolated.

        Args:
          params: of `trained`, which differs in nothing else.
          trained: says how large its pictures were.
        """
        vit = self.image_tower == "vit"
        cells = self.patch_size if vit else 2 ** (len(self.image_layers) + 1)  # pixels of a position
        before, after = trained.image_size // cells, self.image_size // cells
        path = ("position", "embedding") if vit else ("pool", "position", "embedding")
        leaves = flatten_dict(dict(params["image"]))
        leaves[path] = resize_positions(jnp.asarray(leaves[path]), before, after)
        return {**params, "image": unflatten_dict(leaves)}

    def example_inputs(self, batch_size: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        images = jax.ShapeDtypeStruct((batch_size, self.image_size, self.image_size, 3), jnp.float32)
        return images, jax.ShapeDtypeStruct((batch_size, self.text_length), jnp.int32)

    def setup(self) -> None:
        check_remat(self.remat)
        if not 0 <= self.text_end_id < self.text_vocab_size:
            raise ValueError(f"text_end_id={self.text_end_id} is not one of the text_vocab_size={self.text_vocab_size}")
        for tower in ("image", "text"):
            width, heads = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_heads")
            if heads < 1 or (width % heads and self.image_tower == "vit"):
                raise ValueError(f"{tower}_heads={heads} must be at least 1 and divide {tower}_width={width}")
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        stack = {"features": self.embed_dim, "activation": self.activation, "implementation": self.implementation}
        stack |= {"scan": self.scan, "remat": self.remat, **types}
        if self.image_tower == "vit":
            if self.patch_size is None or self.image_size % self.patch_size:
                raise ValueError(f"patch_size={self.patch_size} must divide image_size={self.image_size}")
            self.image = VisionTransformer(
                width=self.image_width,
                depth=self.image_layers,
                heads=self.image_heads,
                mlp_ratio=self.image_mlp_ratio,
                image_size=self.image_size,
                patch_size=self.patch_size,
                **stack,
            )
        elif self.image_tower == "resnet":
            self.image = ModifiedResNet(
                layers=self.image_layers,
                width=self.image_width,
                heads=self.image_heads,
                features=self.embed_dim,
                **types,
            )
        else:
            raise ValueError(f"unknown image_tower {self.image_tower!r}; choose vit or resnet")
        self.text = TextTransformer(
            vocab_size=self.text_vocab_size,
            length=self.text_length,
            end_id=self.text_end_id,
            width=self.text_width,
            depth=self.text_layers,
            heads=self.text_heads,
            **stack,
        )
        # Parameters of their own, not of a tower: the temperature has a bound, and no weight decay.
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(self.logit_scale_init), (), jnp.float32)
        if self.logit_bias_init is not None:
            self.logit_bias = self.param("logit_bias", nn.initializers.constant(self.logit_bias_init), (), jnp.float32)

    def __call__(self, images: Float[Array, "b h w 3"], text: Int[Array, "b l"], train: bool = False) -> ClipOutput:
        """Embeds pictures and captions.

        Args:
          images: in [-1, 1], as large as the network's.
          text: caption ids with an end token; a row without one gives NaN.
          train: take batch statistics from this batch; only a ResNet has them.
        """
        bias = self.logit_bias if self.logit_bias_init is not None else jnp.zeros(())
        return ClipOutput(
            image=self.embed_images(images, train),
            text=self.embed_text(text),
            logit_scale=jnp.exp(self.logit_scale),
            logit_bias=bias,
        )

    def embed_images(self, images: Float[Array, "b h w 3"], train: bool = False) -> Float[Array, "b e"]:
        """Features of pictures, of unit length.

        Raises:
          ValueError: if they are not as large as the network's.
        """
        return normalize(self.project_images(images, train))

    def embed_text(self, text: Int[Array, "b l"]) -> Float[Array, "b e"]:
        """Features of captions, of unit length.

        Raises:
          ValueError: if captions are longer than the network's context.
        """
        return normalize(self.project_text(text))

    def project_images(self, images: Float[Array, "b h w 3"], train: bool = False) -> Float[Array, "b e"]:
        """As `embed_images`, not normalized: what UniDiffuser diffuses, for example."""
        if images.shape[1:3] != (self.image_size, self.image_size):
            raise ValueError(f"pictures are {images.shape[1:3]}, the network's image_size is {self.image_size}")
        mean, std = np.array(self.image_mean, np.float32), np.array(self.image_std, np.float32)
        return self.image(((images + 1) / 2 - mean) / std, train)

    def project_text(self, text: Int[Array, "b l"]) -> Float[Array, "b e"]:
        """As `embed_text`, not normalized."""
        self._check_length(text)
        return self.text(text)

    def encode_text(self, text: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        """The normalized last states of the text tower: what latent diffusion is conditioned on."""
        self._check_length(text)
        return self.text.states(text)

    def _check_length(self, text: Array) -> None:
        if text.shape[1] > self.text_length:
            raise ValueError(f"captions have {text.shape[1]} tokens, the network's text_length is {self.text_length}")


class Transformer(nn.Module):
    """What both transformers share: layers, a normalization behind them, and a projection to the joint embedding.

    Attributes:
      width: D.
      depth: number of layers.
      heads: number of heads.
      features: output width E.
      activation, implementation, scan, remat, dtype, param_dtype: as in `Clip`.
    """

    width: int
    depth: int
    heads: int
    features: int
    activation: str
    implementation: str
    scan: bool
    remat: str
    dtype: DTypeLike
    param_dtype: DTypeLike

    def add_layers(self, mlp_hidden: int, initializers: BlockInitializers) -> None:
        """Makes what is shared; to be called by `setup`."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.blocks = [
            Block(
                width=self.width,
                heads=self.heads,
                head_dim=self.width // self.heads,
                mlp_hidden=mlp_hidden,
                activation=self.activation,
                initializers=initializers,
                implementation=self.implementation,
                **types,
            )
            for _ in range(self.depth)
        ]
        self.final_norm = layer_norm(**types)
        init = nn.initializers.normal(self.width**-0.5)
        self.projection = Dense(self.features, use_bias=False, kernel_init=init, **types)

    def apply_layers(
        self, x: Float[Array, "b l d"], mask: np.ndarray | None, depth: int | None = None
    ) -> Float[Array, "b l d"]:
        """Applies the layers, or the first so many; `mask` as in `models.layers.attention.attend`."""
        blocks = self.blocks[:depth]
        return apply_blocks(blocks, shard_rows(x), (mask,), (0,) * len(blocks), scan=self.scan, remat=self.remat)

    def read_layers(
        self, x: Float[Array, "b l d"], mask: np.ndarray | None, position: Int[Array, "b"]
    ) -> Float[Array, "b {self.features}"]:
        """Applies the layers and projects the state of one position of each row, normalized.

        Of the last layer no other position's output is computed.
        """

        def at_position(x: Array) -> Array:
            return jnp.take_along_axis(x, position[:, None, None], axis=1)[:, 0]

        if self.is_initializing():  # every layer makes its parameters
            state = at_position(self.apply_layers(x, mask))
        else:
            x = self.apply_layers(x, mask, self.depth - 1)
            state = self.blocks[-1].read(at_position(x), x, None if mask is None else jnp.asarray(mask)[position])
        return self.projection(self.final_norm(state))


class VisionTransformer(Transformer):
    """A ViT (Dosovitskiy et al. 2021) with a normalization before the layers and one of the class token behind them.

    Attributes:
      image_size: pixels.
      patch_size: pixels; divides it.
      mlp_ratio: hidden width of the feed-forward block over D.
    """

    image_size: int
    patch_size: int
    mlp_ratio: int | float

    def setup(self) -> None:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init, side = nn.initializers.normal(self.width**-0.5), (self.patch_size, self.patch_size)
        self.patch = Conv(self.width, side, side, use_bias=False, kernel_init=torch_kernel, **types)
        self.class_embedding = self.param("class_embedding", init, (self.width,), self.param_dtype)
        positions = (self.image_size // self.patch_size) ** 2 + 1
        self.position = nn.Embed(positions, self.width, embedding_init=init, **types)
        self.first_norm = layer_norm(**types)
        hidden = int(self.width * self.mlp_ratio)
        initializers = BlockInitializers(
            attention=nn.initializers.xavier_uniform(),
            attention_out=torch_kernel,
            mlp=torch_kernel,
            mlp_out=torch_kernel,
            mlp_bias=torch_bias(self.width),
            mlp_out_bias=torch_bias(hidden),
        )
        self.add_layers(hidden, initializers)

    def __call__(self, images: Float[Array, "b h w 3"], train: bool) -> Float[Array, "b {self.features}"]:
        """Embeds normalized pictures; training differs in nothing."""
        del train
        x = self.patch(images.astype(self.dtype)).reshape(len(images), -1, self.width)
        first = jnp.broadcast_to(self.class_embedding.astype(self.dtype), (len(x), 1, self.width))
        x = jnp.concatenate([first, x], axis=1)
        x = self.first_norm(x + self.position(jnp.arange(x.shape[1])))
        return self.read_layers(x, None, jnp.zeros(len(x), jnp.int32))


class TextTransformer(Transformer):
    """A causal transformer over caption ids.

    Attributes:
      vocab_size: number of ids.
      length: L.
      end_id: of the end token.
    """

    vocab_size: int
    length: int
    end_id: int

    def setup(self) -> None:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        normal, scale = nn.initializers.normal, self.width**-0.5
        residual = normal(scale * (2 * self.depth) ** -0.5)
        self.embedding = nn.Embed(self.vocab_size, self.width, embedding_init=normal(0.02), **types)
        self.position = nn.Embed(self.length, self.width, embedding_init=normal(0.01), **types)
        initializers = BlockInitializers(
            attention=normal(scale), attention_out=residual, mlp=normal(2**-0.5 * scale), mlp_out=residual
        )
        self.add_layers(4 * self.width, initializers)

    def __call__(self, text: Int[Array, "b l"]) -> Float[Array, "b {self.features}"]:
        """Embeds captions: the state of each row's first end token; NaN where there is none, so that it shows."""
        is_end = text == self.end_id
        features = self.read_layers(*self._inputs(text), jnp.argmax(is_end, axis=1))
        return jnp.where(jnp.any(is_end, axis=1)[:, None], features, jnp.nan)

    def states(self, text: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        """States of every position, normalized."""
        return self.final_norm(self.apply_layers(*self._inputs(text)))

    def _inputs(self, text: Array) -> tuple[Array, np.ndarray]:
        """Embedded tokens, and the causal mask."""
        length = text.shape[1]
        x = self.embedding(text) + self.position(jnp.arange(length))
        return x, np.tril(np.ones((length, length), bool))


def resize_positions(embedding: Float[Array, "l d"], before: int, after: int) -> Float[Array, "m d"]:
    """Interpolates position embeddings bicubically (Dosovitskiy et al. 2021, section 3.2), but for the first.

    Args:
      embedding: of one position apart, then of a square grid in raster order.
      before: side of that grid.
      after: side of the grid wanted.
    """
    first, grid = embedding[:1], embedding[1:].reshape(before, before, -1)
    grid = jax.image.resize(grid, (after, after, grid.shape[-1]), "cubic")
    return jnp.concatenate([first, grid.reshape(after * after, -1)])


def normalize(features: Float[Array, "b e"]) -> Float[Array, "b e"]:
    """Features of unit length, float32."""
    features = features.astype(jnp.float32)
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)
