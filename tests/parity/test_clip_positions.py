"""Interpolated position embeddings are those of OpenCLIP, which PyTorch computes."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from open_clip.model import resize_pos_embed

from models.clip import resize_positions


class Tower(torch.nn.Module):
    """As much of a model as OpenCLIP's function looks at."""

    def __init__(self, side):
        super().__init__()
        self.visual = torch.nn.Module()
        self.visual.grid_size = (side, side)
        self.visual.positional_embedding = torch.nn.Parameter(torch.zeros(1 + side * side, 8))


@pytest.mark.parametrize(("before", "after"), [(7, 12), (16, 24), (4, 5), (6, 3)])
def test_positions(before, after):
    embedding = np.random.default_rng(0).normal(size=(1 + before * before, 8)).astype(np.float32)
    state = {"visual.positional_embedding": torch.from_numpy(embedding.copy())}
    resize_pos_embed(state, Tower(after), interpolation="bicubic", antialias=True)
    ours = resize_positions(jnp.asarray(embedding), before, after)
    np.testing.assert_allclose(ours, state["visual.positional_embedding"].numpy(), atol=1e-5)
