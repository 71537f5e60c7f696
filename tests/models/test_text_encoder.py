"""The text encoder that is trained with a denoiser."""

import jax

import models


def test_the_published_size():
    """That of latent diffusion from text (1.45 billion), without the logits that its code has and does not use."""
    fields = {"text_vocab_size": 30_522, "text_length": 77, "width": 1280, "layers": 32, "heads": 8, "head_dim": 64}
    model = models.create_model("text_encoder", **fields, attention_bias=False)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs(1))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 542_895_360
