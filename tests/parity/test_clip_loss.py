"""OpenCLIP's losses on the same float32 features: values, and gradients of features and temperature."""

import jax
import jax.numpy as jnp
import numpy as np
import open_clip.loss
import pytest
import torch

from models.clip import ClipOutput, normalize
from train.objectives.clip import contrastive_logits, contrastive_loss, sigmoid_loss

BATCH, WIDTH = 48, 32


@pytest.fixture(scope="module")
def features():
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(2, BATCH, WIDTH)).astype(np.float32)
    return np.asarray(normalize(jnp.asarray(image))), np.asarray(normalize(jnp.asarray(text)))


@pytest.mark.parametrize(("kind", "scale", "bias"), [("contrastive", 2.6593, 0.0), ("sigmoid", 2.3026, -10.0)])
def test_value_and_gradients(features, kind, scale, bias):
    def loss(image, text, logit_scale, logit_bias):
        logits = contrastive_logits(ClipOutput(image, text, jnp.exp(logit_scale), logit_bias))
        return jnp.mean(contrastive_loss(*logits) if kind == "contrastive" else sigmoid_loss(logits[0]))

    inputs = (*map(jnp.asarray, features), jnp.float32(scale), jnp.float32(bias))
    value, gradients = jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(*inputs)

    tensors = [torch.tensor(np.asarray(x), requires_grad=True) for x in inputs]
    image, text, logit_scale, logit_bias = tensors
    if kind == "contrastive":
        theirs = open_clip.loss.ClipLoss()(image, text, logit_scale.exp())
    else:
        theirs = open_clip.loss.SigLipLoss()(image, text, logit_scale.exp(), logit_bias)
    theirs.backward()
    assert float(value) == pytest.approx(theirs.item(), rel=1e-5)
    for ours, tensor in zip(gradients, tensors, strict=True):
        if tensor.grad is not None:
            grad = tensor.grad.numpy()
            np.testing.assert_allclose(ours, grad, atol=1e-5 * np.abs(grad).max())
    assert logit_scale.grad is not None
