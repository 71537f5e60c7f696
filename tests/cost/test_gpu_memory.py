"""Whether a step fits GPUs: arguments by shapes, estimates named as such, the smallest number of them."""

import dataclasses
from pathlib import Path

import pytest

from cli.config import load_config
from cli.errors import UserError
from configs.common import get_defaults
from cost import gpu_memory
from cost.chips import GIB, GPU_USABLE, gpu_of
from cost.gpu_memory import GpuFit, describe_gpu_fit, fit_gpus, format_gpu_fit, smallest_fit

ROOT = Path(__file__).resolve().parents[2]


def test_a_gpu_is_told_by_memory_or_name():
    assert gpu_of("24") == gpu_of("24GiB") == gpu_of("24gb")
    assert (gpu_of("24").memory_bytes, gpu_of("24").count) == (24 * GIB, 0)
    assert (gpu_of("a100:8").memory_bytes, gpu_of("A100:8").count) == (80 * GIB, 8)
    assert gpu_of("a100-40").memory_bytes == 40 * GIB and gpu_of("h200").memory_bytes == 141 * GIB
    assert gpu_of("80").usable_bytes == int(80 * GIB * GPU_USABLE)
    for text in ("h300", "24:0", "0", "24:x", "v5e:2x2"):
        with pytest.raises(UserError, match="unknown GPU .* 24, 80 or 141, or one of rtx3090, "):
            gpu_of(text)


def fit_of(argument_gib, temporary_gib, count=1, seconds=None):
    return GpuFit(
        gpu=dataclasses.replace(gpu_of("24"), count=count),
        mesh={"data": 1, "fsdp": count, "tensor": 1, "microbatches": 1},
        batch_size=8,
        parameters={"trained": 5, "held": 0, "frozen": 0},
        arguments={"parameters": int(argument_gib * GIB), "frozen": 0},
        temporary_bytes=int(temporary_gib * GIB),
        compiled_seconds=seconds,
    )


def test_an_estimate_says_that_it_is_one_and_when_it_is_close():
    text = format_gpu_fit(describe_gpu_fit("a.py", fit_of(4, 2), []))
    assert "6.00 GiB of 22.08 GiB: fits, 16.08 GiB left, by an estimate" in text and "close" not in text
    assert "ESTIMATE" in text and "XLA_PYTHON_CLIENT_MEM_FRACTION" not in text and "frozen 0" not in text
    text = format_gpu_fit(describe_gpu_fit("a.py", fit_of(4, 15), []))
    assert "fits" in text and "too close to be sure" in text and "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92" in text
    text = format_gpu_fit(describe_gpu_fit("a.py", fit_of(4, 20), []))
    assert "does not fit: 1.92 GiB over, by an estimate that is too close" in text
    assert not fit_of(23, 0.1).is_close and not fit_of(23, 0.1).fits
    text = format_gpu_fit(describe_gpu_fit("a.py", fit_of(4, 15, seconds=9.0), []))
    assert "estimate" not in text.lower() and "compiler made in 9 s" in text


def test_the_fewest_that_hold_it_are_named(monkeypatch):
    asked = []

    def fit(config, gpu):
        asked.append((gpu.count, (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)))
        if gpu.count == 2:
            raise UserError("config.batch_size=3 does not divide")
        return fit_of(40 / gpu.count, 1, gpu.count)

    monkeypatch.setattr(gpu_memory, "fit_gpus", fit)
    config = get_defaults()
    config.mesh.tensor = 2
    fitted, tried = smallest_fit(config, gpu_of("24"))
    assert fitted.fits and fitted.gpu.count == 4 and asked == [(1, (1, 1, 1)), (2, (1, 2, 1)), (4, (1, 4, 1))]
    assert tried == ["2 x: config.batch_size=3 does not divide", "1 x: 41.00 GiB of each, which does not fit"]


def test_pairs_beside_frozen_and_held_networks_are_counted():
    """Arguments are the bytes of what a run holds: 4 of a held parameter, 12 of a trained one with two moments."""
    config = load_config([f"--config={ROOT}/configs/paper/dalle_12b.py:debug", "--config.lora.rank=2"])
    config.ema.decay = 0.0
    fitted = fit_gpus(gpu_memory.on_gpus(config, 1), dataclasses.replace(gpu_of("24"), count=1))
    trained, held, frozen = (fitted.parameters[kind] for kind in ("trained", "held", "frozen"))
    assert 0 < trained < 0.2 * held and frozen > 0
    assert fitted.arguments["parameters"] == pytest.approx(4 * (trained + held), abs=64)
    assert fitted.arguments["optimizer"] == pytest.approx(8 * trained, abs=64)
    assert fitted.arguments["frozen"] == pytest.approx(4 * frozen, abs=4096) and fitted.arguments["averages"] == 0
    assert fitted.fits and fitted.compiled_seconds is None and fitted.temporary_bytes > 0
