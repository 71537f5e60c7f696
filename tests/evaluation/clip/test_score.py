"""The three conventions on known cosines."""

import numpy as np
import pytest

from evaluation.clip.score import CONVENTIONS, clip_score


def test_conventions():
    cosine = np.array([0.6, -0.2])
    values = {name: clip_score(cosine, name) for name in CONVENTIONS}
    assert values == pytest.approx({"cosine": 0.2, "hessel": 0.75, "torchmetrics": 20.0})
    assert clip_score(-cosine, "torchmetrics") == 0
