"""Every config can be described, and every debug variant trains and is sampled from, on the real entry points."""

from pathlib import Path

import jax
import numpy as np
import pytest

from cli.config import from_json, load_config, to_json
from sample.trained import TrainedSampler
from scripts.describe import describe

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").glob("*/[a-z]*.py"))


def test_there_are_configs():
    assert {"configs/scenes/dvae.py", "configs/paper/dalle_12b.py"} <= set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_locked_documented_and_survives_json(name):
    config = load_config([f"--config={ROOT / name}"])
    assert config.is_locked
    assert to_json(from_json(to_json(config))) == to_json(config)
    docstring = (ROOT / name).read_text().split('"""')[1]
    assert f"python -m train --config={name}" in docstring and "Paper:" in docstring


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if "/paper/" in name else []) for name in CONFIGS]
)
def test_the_debug_variant_runs_without_any_other_run(name, debug_run):
    trained = TrainedSampler.open(debug_run(name.removeprefix("configs/")), chunk=2)
    if trained.tokenizer is not None:
        rows = trained.encode(["a small red circle"] * 3)
    elif trained.config.objective == "diffusion":
        rows = {}
    else:
        rows = {"image": np.zeros((3, 32, 32, 3), np.uint8)}
    outputs = trained(rows, seed=0, indices=range(3))
    assert outputs and all(len(rows) == 3 and np.isfinite(rows).all() for rows in outputs.values())
    assert "image" not in outputs or outputs["image"].shape == (3, 32, 32, 3)


def test_published_sizes_have_the_published_parameter_counts():
    stage1 = describe(load_config([f"--config={ROOT}/configs/paper/dvae.py"]), depth=1)
    assert stage1["trained"]["dvae"]["modules"] == {"encoder": 53_786_240, "decoder": 43_829_766}
    # Three quarters of a training step's work is... the forward pass alone is a third of it.
    ratio = stage1["matrix_flops_per_step"] / stage1["matrix_flops_forward"]
    assert 2.9 < ratio < 3.0  # the first convolution needs no gradient of its input


def test_the_12_billion_transformer_is_described_without_memory():
    before = sum(array.nbytes for array in jax.live_arrays())
    config = load_config([f"--config={ROOT}/configs/paper/dalle_12b.py"])
    description = describe(config, depth=1)
    parameters = description["trained"]["dalle"]["parameters"]
    assert 12.285e9 < parameters < 12.30e9
    assert description["frozen"]["dvae"]["parameters"] == 97_616_006
    assert sum(array.nbytes for array in jax.live_arrays()) - before < 1e6
