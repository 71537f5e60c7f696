"""Tiny CLIPs and their variables, for the tests of formats."""

import jax
import jax.numpy as jnp
import numpy as np

import models

FIELDS = {
    **{"name": "clip", "embed_dim": 24, "image_tower": "vit", "image_size": 16, "image_width": 64},
    **{"image_layers": 2, "image_heads": 1, "image_mlp_ratio": 2, "patch_size": 8, "text_vocab_size": 40},
    **{"text_length": 8, "text_end_id": 39, "text_width": 64, "text_layers": 2, "text_heads": 1},
    **{"activation": "gelu", "logit_scale_init": 2.5, "image_mean": (0.4, 0.5, 0.6), "image_std": (0.2, 0.3, 0.3)},
}
RESNET = {key: value for key, value in FIELDS.items() if key not in ("patch_size", "image_mlp_ratio")}
RESNET |= {"image_tower": "resnet", "image_size": 32, "image_width": 8, "image_layers": (1, 2, 1, 1), "image_heads": 4}


def tiny(fields=FIELDS, seed: int = 0):
    """(network, params, variables) with random values everywhere, which no initializer would give."""
    model = models.create_model(**fields)
    abstract = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs(1))
    rng = np.random.default_rng(seed)
    tree = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype), abstract)
    return model, tree.pop("params"), tree


def assert_same_trees(one, two):
    """The same structure and bits."""
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
