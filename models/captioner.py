"""GPT-2 behind a prefix of vectors that are made of features: it writes a caption of what they say.

Three ways of making the prefix:

    bottleneck    features of each token of a caption [B P F] -> Dense -> latents [B P Z] -> Dense -> [B P D]; the
                  latents are what UniDiffuser diffuses and this network reads back (Bao et al. 2023, "One Transformer
                  Fits All Distributions in Multi-Modal Diffusion at Scale", section 4 and appendix)
    mlp           one vector [B F] -> Dense, tanh, Dense -> [B P D] (Mokady et al. 2021, "ClipCap", section 3.1)
    transformer   one vector [B F] -> Dense -> M states beside P learned ones, through a transformer, whose last P
                  states are the prefix (section 3.2)
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from models.gpt2 import GPT2
from models.layers.dense import Dense
from models.layers.initialization import torch_bias, torch_kernel
from models.layers.prompt_cache import PromptCache
from models.layers.transformer import Block, BlockInitializers, apply_blocks

MAPPERS = ("bottleneck", "mlp", "transformer")


class Captioner(nn.Module):
    """The mapper of features, and the language model within, `language`.

    Dense layers of the mapper start as PyTorch starts them, the learned states at N(0, 1), as published.

    Attributes:
      text_vocab_size: see `models.gpt2.GPT2`, as the next six.
      length: see there; the prefix and a caption share it.
      width: see there.
      depth: see there.
      heads: see there.
      mlp_hidden: see there.
      activation: see there. The authors of UniDiffuser use GPT-2's, "gelu_tanh"; diffusers has "gelu" for the same
        weights.
      feature_width: F.
      prefix_length: P; of a bottleneck, also the tokens of the features.
      mapper: one of the three above.
      latent_width: Z, of a bottleneck; 0 without one.
      mapper_states: M, of a transformer; 0 without one.
      mapper_depth: its layers.
      mapper_heads: its heads.
      text_end_id: the id that ends captions; None where it is not known.
      dropout: see `models.gpt2.GPT2`; the mapper drops nothing.
      implementation: see `models.layers.attention.attend`.
      scan: see `models.layers.transformer.apply_blocks`.
      remat: see there.
      dtype: of the computation; see `models.gpt2.GPT2`.
      param_dtype: of the parameters.
    """

    text_vocab_size: int
    length: int
    width: int
    depth: int
    heads: int
    feature_width: int
    prefix_length: int
    mapper: str
    mlp_hidden: int | None = None
    activation: str = "gelu_tanh"
    latent_width: int = 0
    mapper_states: int = 0
    mapper_depth: int = 0
    mapper_heads: int = 8
    text_end_id: int | None = None
    dropout: float = 0.0
    implementation: str = "auto"
    scan: bool = False
    remat: str = "none"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        # Filled in, so that equal networks have equal fields.
        if self.mlp_hidden is None:
            self.mlp_hidden = 4 * self.width
        super().__post_init__()

    def example_inputs(self, batch_size: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`; captions of another length do as well."""
        shape = (self.prefix_length, self.feature_width) if self.mapper == "bottleneck" else (self.feature_width,)
        tokens = jax.ShapeDtypeStruct((batch_size, 1), jnp.int32)
        return tokens, jax.ShapeDtypeStruct((batch_size, *shape), jnp.float32)

    def network_at(self, path: str) -> dict[str, Any]:
        """The arguments of `models.create_model` of a network within this one, whose parameters are its own there.

        Raises:
          KeyError: if there is none; names those that there are.
        """
        if path != "language":
            raise KeyError(f"captioner has no network {path!r} within it; it has language")
        names = (field.name for field in dataclasses.fields(GPT2))
        fields = {name: getattr(self, name) for name in names if name not in ("parent", "name")}
        return {"name": "gpt2", **fields}

    def setup(self) -> None:
        self._check_fields()
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        fields = self.network_at("language")
        self.language = GPT2(**{name: value for name, value in fields.items() if name != "name"})

        def dense(features: int, inputs: int) -> nn.Module:
            return Dense(features, kernel_init=torch_kernel, bias_init=torch_bias(inputs), **types)

        features, prefix = self.feature_width, self.prefix_length * self.width
        if self.mapper == "bottleneck":
            self.encode_prefix = dense(self.latent_width, features)
            self.decode_prefix = dense(self.width, self.latent_width)
        elif self.mapper == "mlp":
            self.mapper_up = dense(prefix // 2, features)
            self.mapper_down = dense(prefix, prefix // 2)
        else:
            self.mapper_input = dense(self.mapper_states * self.width, features)
            shape = (self.prefix_length, self.width)
            self.mapper_prefix = self.param("mapper_prefix", nn.initializers.normal(1.0), shape, self.param_dtype)
            self.mapper_blocks = [
                Block(
                    width=self.width,
                    heads=self.mapper_heads,
                    head_dim=self.width // self.mapper_heads,
                    mlp_hidden=2 * self.width,
                    activation="relu",
                    initializers=BlockInitializers(
                        torch_kernel,
                        torch_kernel,
                        torch_kernel,
                        torch_kernel,
                        mlp_bias=torch_bias(self.width),
                        mlp_out_bias=torch_bias(2 * self.width),
                    ),
                    attention_bias=False,
                    **types,
                )
                for _ in range(self.mapper_depth)
            ]

    def __call__(
        self,
        tokens: Int[Array, "b l"],
        features: Float[Array, "b *f"],
        dropout_keys: Key[Array, "b"] | None = None,
    ) -> Float[Array, "b m {self.text_vocab_size}"]:
        """Scores each token of captions and the one behind the last; float32.

        Args:
          tokens: ids of captions; pads go behind.
          features: what they are about, [B P F] for a bottleneck, else [B F].
          dropout_keys: one an example, in training; None drops nothing.

        Returns:
          [B L + 1 V]; entry i scores token i.
        """
        prefix = self.prefix_of(features)
        return self.language(tokens, prefix, dropout_keys)[:, self.prefix_length - 1 :]

    def encode(self, features: Float[Array, "b p f"]) -> Float[Array, "b p {self.latent_width}"]:
        """Latents of a bottleneck."""
        return self.encode_prefix(features)

    def prefix_of(self, features: Float[Array, "b *f"]) -> Float[Array, "b p {self.width}"]:
        """The vectors that GPT-2 reads."""
        if self.mapper == "bottleneck":
            return self.decode_prefix(self.encode_prefix(features))
        if self.mapper == "mlp":
            x = self.mapper_down(jnp.tanh(self.mapper_up(features)))
            return x.reshape(len(x), self.prefix_length, self.width)
        x = self.mapper_input(features).reshape(len(features), self.mapper_states, self.width)
        own = jnp.broadcast_to(self.mapper_prefix.astype(x.dtype), (len(x), *self.mapper_prefix.shape))
        x = jnp.concatenate([x, own], axis=1)
        if self.mapper_depth:
            x = apply_blocks(self.mapper_blocks, x, [None], [0] * self.mapper_depth, scan=self.scan, remat=self.remat)
        return x[:, self.mapper_states :]

    def prefill(self, features: Float[Array, "b *f"], length: int) -> tuple[Float[Array, "b v"], PromptCache]:
        """Reads features in one pass; see `models.gpt2.GPT2.prefill`.

        Args:
          features: as in `__call__`.
          length: how many tokens will be made at most.
        """
        return self._prefill(self.prefix_of(features), length)

    def prefill_latents(self, latents: Float[Array, "b p z"], length: int) -> tuple[Float[Array, "b v"], PromptCache]:
        """As `prefill`, of what `encode` makes, or a diffusion."""
        return self._prefill(self.decode_prefix(latents), length)

    def decode_step(
        self, token: Int[Array, "r"], position: Int[Array, ""] | int, cache: PromptCache
    ) -> tuple[Float[Array, "r v"], PromptCache]:
        """Reads a token that was made and scores the next one; see `models.gpt2.GPT2.decode_step`."""
        return self.language.decode_step(token, position, cache)

    def _prefill(self, prefix: Array, length: int) -> tuple[Array, PromptCache]:
        return self.language.prefill(jnp.zeros((len(prefix), 0), jnp.int32), length, None, prefix)

    def _check_fields(self) -> None:
        """Raises ValueError for fields that make no network."""
        if self.mapper not in MAPPERS:
            raise ValueError(f"unknown mapper {self.mapper!r}; choose one of {', '.join(MAPPERS)}")
        if not 1 <= self.prefix_length < self.length:
            raise ValueError(f"prefix_length={self.prefix_length} must be at least 1 and below length={self.length}")
        if (self.latent_width > 0) != (self.mapper == "bottleneck"):
            raise ValueError(
                f"latent_width={self.latent_width} is of mapper 'bottleneck', which needs it, and no other"
            )
        if (self.mapper_states > 0) != (self.mapper == "transformer"):
            raise ValueError(
                f"mapper_states={self.mapper_states} is of mapper 'transformer', which needs it, and no other"
            )
        if self.mapper == "transformer" and (self.mapper_heads < 1 or self.width % self.mapper_heads):
            raise ValueError(f"mapper_heads={self.mapper_heads} must divide width={self.width}")
