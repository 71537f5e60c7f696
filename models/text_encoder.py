"""A bidirectional transformer over caption ids, trained with the network that reads it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from models.layers.normalization import layer_norm
from models.layers.transformer import Block, BlockInitializers, apply_blocks, check_remat


class TextEncoder(nn.Module):
    """Features of every token of a caption (as the text transformer of Rombach et al. 2022, section 4.3.1).

    Attributes:
      text_vocab_size: ids of the tokenizer.
      text_length: L, tokens of a caption.
      width: D.
      layers: number of layers.
      heads: number of attention heads N.
      head_dim: width K of one; None for D / N.
      attention_bias: whether queries, keys and values have one; not in the paper's code, which has heads of 64, too.
      activation: see `models.layers.mlp.ACTIVATIONS`.
      implementation: of attention, see `models.layers.attention.attend`.
      scan: see `models.layers.transformer.apply_blocks`.
      remat: see there.
      dtype: of the computation; norms and softmax are float32 in any case.
      param_dtype: of the parameters.
    """

    text_vocab_size: int
    text_length: int
    width: int
    layers: int
    heads: int
    head_dim: int | None = None
    attention_bias: bool = True
    activation: str = "gelu"
    implementation: str = "auto"
    scan: bool = False
    remat: str = "none"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def example_inputs(self, batch_size: int) -> tuple[jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        return (jax.ShapeDtypeStruct((batch_size, self.text_length), jnp.int32),)

    def setup(self) -> None:
        check_remat(self.remat)
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"heads={self.heads} must divide width={self.width}")
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init = nn.initializers.normal(0.02)
        self.token = nn.Embed(self.text_vocab_size, self.width, embedding_init=init, **types)
        self.position = nn.Embed(self.text_length, self.width, embedding_init=init, **types)
        self.blocks = [
            Block(
                width=self.width,
                heads=self.heads,
                head_dim=self.head_dim or self.width // self.heads,
                mlp_hidden=4 * self.width,
                activation=self.activation,
                attention_bias=self.attention_bias,
                initializers=BlockInitializers.scaled(0.02, self.layers),
                implementation=self.implementation,
                **types,
            )
            for _ in range(self.layers)
        ]
        self.norm = layer_norm(**types)

    def __call__(self, text: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        """Features of the tokens, of unit scale; pads are tokens like others."""
        x = self.token(text) + self.position(jnp.arange(self.text_length))
        if self.layers:
            x = apply_blocks(self.blocks, x, [None], [0] * self.layers, scan=self.scan, remat=self.remat)
        return self.norm(x)
