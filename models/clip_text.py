"""CLIP's text tower alone, which reads captions for latent diffusion (Rombach et al. 2022; Stable Diffusion)."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from models.clip import TextTransformer
from models.layers.transformer import check_remat


class ClipText(nn.Module):
    """Normalized states of every token; parameters are called as in `models.clip.Clip`, without the projection.

    A tower whose last layers are left out, as in Stable Diffusion 2, is one of fewer layers.

    Attributes:
      text_vocab_size: ids of the tokenizer, ends included.
      text_length: L, the context: start, caption, end.
      text_end_id: the end token's id; the start token's is one less.
      text_width: D.
      text_layers: number of layers.
      text_pad_id: what captions are filled up with: the end token in Stable Diffusion 1, 0 in its version 2. Tokens
        behind the end are read like others.
      text_heads: None for width / 64.
      activation: see `models.clip.Clip`.
      implementation: of attention, see `models.layers.attention.attend`.
      scan: see `models.layers.transformer.apply_blocks`.
      remat: see there.
      dtype: of the computation; norms and softmax are float32 in any case.
      param_dtype: of the parameters.
    """

    text_vocab_size: int
    text_length: int
    text_end_id: int
    text_width: int
    text_layers: int
    text_pad_id: int = 0
    text_heads: int | None = None
    activation: str = "quick_gelu"
    implementation: str = "auto"
    scan: bool = False
    remat: str = "none"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    # Rows of captions may be shorter than its context.
    TAKES_SHORTER_TEXT: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.text_heads is None:  # filled in, so that equal networks have equal fields
            self.text_heads = self.text_width // 64
        super().__post_init__()

    def example_inputs(self, batch_size: int) -> tuple[jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`."""
        return (jax.ShapeDtypeStruct((batch_size, self.text_length), jnp.int32),)

    def setup(self) -> None:
        check_remat(self.remat)
        for name in ("text_end_id", "text_pad_id"):
            if not 0 <= getattr(self, name) < self.text_vocab_size:
                raise ValueError(f"{name}={getattr(self, name)} is not one of {self.text_vocab_size} ids")
        heads = self.text_heads or 0
        if heads < 1 or self.text_width % heads:
            raise ValueError(f"text_heads={heads} must be at least 1 and divide text_width={self.text_width}")
        self.text = TextTransformer(
            vocab_size=self.text_vocab_size,
            length=self.text_length,
            end_id=self.text_end_id,
            width=self.text_width,
            depth=self.text_layers,
            heads=heads,
            features=self.text_width,  # of a projection that is never applied, and so has no parameters
            activation=self.activation,
            implementation=self.implementation,
            scan=self.scan,
            remat=self.remat,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )

    def __call__(self, text: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        """Features of the tokens.

        Raises:
          ValueError: if captions are longer than the network's context.
        """
        if text.shape[1] > self.text_length:
            raise ValueError(f"captions have {text.shape[1]} tokens, the network's text_length is {self.text_length}")
        return self.text.states(text)

    def encode_text(self, text: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        """The same, under the name that a whole CLIP has it."""
        return self(text)
