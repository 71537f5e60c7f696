"""What language models that read pictures share: the language model, the image encoder, and a picture's token."""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from models.clip import IMAGE_MEAN, IMAGE_STD, Clip
from models.clip_to_tiles import encoder_from_clip
from models.layers.tile_positions import tiles_of_canvases
from models.llama import INIT_STD, Llama
from models.tiled_image_encoder import TiledImageEncoder


class PictureReader(nn.Module, kw_only=True):
    """A `Llama`, `language`, and an image encoder, `encoder`; networks differ in how the one is told of the other.

    Attributes:
      text_vocab_size: of the language model, as the fields down to `tied` and the next three; see `models.llama.Llama`.
      width: see there.
      depth: see there; of its own layers.
      heads: see there, as the next eight.
      kv_heads: see there.
      mlp_hidden: see there.
      head_dim: see there.
      rope_theta: see there.
      rope_factor: see there.
      rope_low_factor: see there.
      rope_high_factor: see there.
      rope_original_length: see there.
      tied: see there.
      text_end_id: see there.
      text_stop_ids: see there.
      text_pad_id: see there.
      image_token: the id that stands for a picture.
      extra_tokens: ids behind the language model's, with embeddings of their own, and no score.
      tile_size: side of a tile, pixels; as the next nine see `models.tiled_image_encoder.TiledImageEncoder`.
      patch_size: see there.
      image_width: its width.
      image_heads: its heads.
      image_layers: its layers.
      global_layers: see there.
      image_mlp_ratio: its mlp_ratio.
      max_tiles: see there.
      feature_layers: see there.
      tile_tables: see there.
      image_mean: see there.
      image_std: see there.
      implementation: see `models.layers.attention.attend`.
      scan: see `models.layers.transformer.apply_blocks`.
      remat: see there.
      dtype: of the computation; statistics, angles, scores, softmax and logits are float32 in any case.
      param_dtype: of the parameters.
    """

    ADAPTABLE: ClassVar[tuple[str, ...]] = Llama.ADAPTABLE

    text_vocab_size: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    mlp_hidden: int
    image_token: int
    tile_size: int
    patch_size: int
    image_width: int
    image_heads: int
    image_layers: int
    global_layers: int
    head_dim: int | None = None
    rope_theta: float = 500000.0
    rope_factor: float = 1.0
    rope_low_factor: float = 1.0
    rope_high_factor: float = 4.0
    rope_original_length: int = 8192
    tied: bool = False
    text_end_id: int | None = None
    text_stop_ids: tuple[int, ...] = ()
    text_pad_id: int = 0
    extra_tokens: int = 8
    image_mlp_ratio: int | float = 4
    max_tiles: int = 4
    feature_layers: tuple[int, ...] = ()
    tile_tables: str = "canvases"
    image_mean: tuple[float, ...] = IMAGE_MEAN
    image_std: tuple[float, ...] = IMAGE_STD
    implementation: str = "auto"
    scan: bool = False
    remat: str = "none"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    # Places within that start from a part of another network's weights; see `adopt`.
    ADOPTS: ClassVar[tuple[str, ...]] = ("encoder",)

    def adopt(self, place: str, params: Any, theirs: Any) -> Any:
        """Some of the parameters at a place within, made of another network's: of `encoder` what a CLIP has of it.

        Raises:
          ValueError: if that is another network, or of other widths.
        """
        del place
        if not isinstance(theirs, Clip):
            raise ValueError("the encoder starts from a CLIP's tower")
        return encoder_from_clip(params, theirs, self)

    def adapt(self, params: Any, theirs: "PictureReader") -> Any:
        """Parameters of a network that differs in `ADAPTABLE`, as they are."""
        del theirs
        return params

    def example_inputs(
        self, batch_size: int
    ) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Shapes of the first arguments of `__call__`: a picture and two tokens; more do as well."""
        size = (batch_size, 1, self.max_tiles, self.tile_size, self.tile_size, 3)
        return (
            jax.ShapeDtypeStruct((batch_size, 2), jnp.int32),
            jax.ShapeDtypeStruct(size, jnp.float32),
            jax.ShapeDtypeStruct((batch_size, 1), jnp.int32),
        )

    def network_at(self, path: str) -> dict[str, Any]:
        """The arguments of `models.create_model` of a network within this one, whose parameters are its own there.

        Raises:
          KeyError: if there is none; names those that there are.
        """
        if path != "language":
            raise KeyError(f"a network that reads pictures has no network {path!r} within it; it has language")
        names = {field.name for field in dataclasses.fields(Llama)} - {"parent", "name"}
        fields = {name: getattr(self, name) for name in sorted(names)}
        return {"name": "llama", **fields}

    @property
    def features_behind(self) -> bool:
        """See `models.tiled_image_encoder.TiledImageEncoder`."""
        return False

    @property
    def picture_tokens(self) -> int:
        """Tokens in a row that stand for one picture in a text."""
        return 1

    def setup(self) -> None:
        if not 0 <= self.image_token < self.text_vocab_size + self.extra_tokens:
            raise ValueError(
                f"image_token={self.image_token} must be one of {self.text_vocab_size + self.extra_tokens} ids"
            )
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        computed = {"implementation": self.implementation, "scan": self.scan, "remat": self.remat, **types}
        fields = self.network_at("language")
        self.language = Llama(**{name: value for name, value in fields.items() if name != "name"})
        init = nn.initializers.normal(INIT_STD)
        if self.extra_tokens:
            self.extra_embedding = nn.Embed(self.extra_tokens, self.width, embedding_init=init, **types)
        self.encoder = TiledImageEncoder(
            image_size=self.tile_size,
            patch_size=self.patch_size,
            width=self.image_width,
            heads=self.image_heads,
            layers=self.image_layers,
            global_layers=self.global_layers,
            mlp_ratio=self.image_mlp_ratio,
            max_tiles=self.max_tiles,
            feature_layers=self.feature_layers,
            features_behind=self.features_behind,
            tile_tables=self.tile_tables,
            image_mean=self.image_mean,
            image_std=self.image_std,
            **computed,
        )

    def embed(self, tokens: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        """The first state of each token."""
        if not self.extra_tokens:
            return self.language.embed(tokens)
        own = tokens < self.text_vocab_size
        x = self.language.embed(jnp.where(own, tokens, 0))
        extra = self.extra_embedding(jnp.clip(tokens - self.text_vocab_size, 0, self.extra_tokens - 1))
        return jnp.where(own[..., None], x, extra)

    def tiles_there(self, canvas: Int[Array, "b i"]) -> Bool[Array, "b i t"]:
        """Which tiles of pictures there are."""
        count = jnp.asarray(tiles_of_canvases(self.max_tiles))[canvas]
        return (jnp.arange(self.max_tiles) < count[..., None]) & (canvas > 0)[..., None]
