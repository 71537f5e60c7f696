"""The VQGAN of Esser et al. 2021 with a categorical bottleneck, as public DALL-Es have it at 8 pixels a token.

Training relaxes the choice of a code (Jang et al. 2016, "Categorical Reparameterization with Gumbel-Softmax"); what is
trained takes the most likely code. No objective here trains one: it comes in with weights of others.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.autoencoder import VQAutoencoder
from models.layers.convolution import Conv
from models.layers.group_norm_resnet import start_of


class GumbelAutoencoder(VQAutoencoder):
    """An autoencoder whose encoder says how likely each code is; the codebook is read by the decoder alone."""

    def setup(self) -> None:
        """Builds the trunk, the codebook and the logits."""
        super().setup()
        self.logits = Conv(
            self.vocab_size,
            (1, 1),
            **start_of(self.latent_channels, zero_init=False),
            dtype=jnp.float32,
            param_dtype=self.param_dtype,
            precision=jax.lax.Precision.HIGHEST,  # bfloat16 passes would pick another of two codes that are close
        )

    def quantize(self, z: Float[Array, "b h w e"]) -> Int[Array, "b h w"]:
        """Tokens: the most likely code of each vector, without Gumbel noise, the first of equals."""
        return jnp.argmax(self.logits(z), axis=-1).astype(jnp.int32)
