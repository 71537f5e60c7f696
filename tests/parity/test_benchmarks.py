"""Every kind of row runs at toy size, so that benchmarks do not rot; what the figures are, nobody looks at here.

Both sides of a row are compared by it before they are timed, if they have the same weights.
"""

import gc
import importlib
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from models import create_model
from models.layers import attention

BENCHMARKS = Path(__file__).with_name("benchmarks")

# One row of each function that makes rows; the cheapest.
KINDS = (
    *("uvit_s_step", "ddpm_uvit_sampling", "autoencoder_step", "stable_diffusion_sampling", "unidiffuser_step"),
    *("unidiffuser_sampling", "llama_step", "vision_adapter_decoding", "clip_vit_b32_step", "dalle_step"),
    *("dalle_decoding", "attention_dalle"),
)
ELSEWHERE = "first_stage_rows:moments"  # two steps that compile for half a minute; a test below has what it gives them


@pytest.fixture(scope="module")
def one_row():
    """The program, whose modules stand beside it and not in a package."""
    before = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("one_row")
    sys.path[:] = before


@pytest.fixture
def suites(one_row):
    return importlib.import_module("rows").SUITES


def rows_by_name(suites):
    return {row.name: row for suite in ("gpu", "cpu") for row in suites[suite]}


@pytest.mark.parametrize("name", KINDS)
def test_a_row(name, one_row, suites, monkeypatch):
    row = rows_by_name(suites)[name]
    case = row.case(importlib.import_module("updates").Peers(), True)
    built = SimpleNamespace(name=row.name, what=row.what, effort=row.effort, case=lambda *_: case)
    record = one_row.measure(built, "cpu", True, "processor", False)
    assert record["toy"] and record["row"] == name and len(record["commit"]) == 40
    assert {"jax", "torch"} <= record["versions"].keys()
    (ours, figures), (peer, _), *_ = record["sides"].items()
    assert ours == "jax" and peer in record["ratios"]
    assert 0 < figures["seconds"]["low"] <= figures["seconds"]["high"]
    assert record["failed"].keys() <= {"tokamax"}, record["failed"]  # which is installed where a GPU is measured
    reads = case.sides["jax"].reads
    assert reads is None or reads() > 0
    flops = case.sides["jax"].flops
    if flops is not None and row.make in {row.make for row in suites["gpu"]}:
        monkeypatch.setattr(attention, "choose_attention", lambda *_: pytest.fail("inside a kernel nobody can count"))
        assert flops() > 0


@pytest.mark.parametrize("name", ["llama_decoding", "vision_adapter_decoding"])
def test_what_is_called_compiled_is(name, one_row, suites, monkeypatch):
    """By itself transformers compiles nothing on a CPU, and says nothing."""
    torch, graphs = importlib.import_module("torch"), []
    compile_by = torch.compile

    def keep(graph, _, **__):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda what, **told: compile_by(what, **{**told, "backend": keep}))
    case = rows_by_name(suites)[name].case(importlib.import_module("updates").Peers(compiled=True), True)
    case.sides["transformers, torch.compile"].run(1)  # raises where its answers are others
    assert graphs


def test_every_row_of_both_suites_has_a_network_and_a_function(suites):
    networks, kinds = importlib.import_module("denoiser_rows").NETWORKS, set()
    for rows in suites.values():
        assert len({row.name for row in rows}) == len(rows)
        for row in rows:
            module, function = row.make.split(":")
            assert callable(getattr(importlib.import_module(module), function))
            kinds.add(row.make)
            for sizes in (row.sizes, {**row.sizes, **row.toy}):
                network = sizes.get("network", "toy_unet")
                assert network in networks or Path(network).is_file()
    tried = [row.make for name, row in rows_by_name(suites).items() if name in KINDS]
    assert sorted(tried) == sorted(kinds - {ELSEWHERE})
    for fields in networks.values():
        create_model(**fields)


def test_stored_moments_are_beside_the_same_step_with_the_first_stage_in_it(one_row, suites, monkeypatch):
    monkeypatch.setattr(importlib.import_module("first_stage_rows"), "config_step", lambda config: config)
    row = next(row for row in suites["cpu"] if row.name == "latent_moments_wide")
    stored, live = row.case(importlib.import_module("updates").Peers(), False).sides.values()
    assert (stored.data.latent_moments, live.data.latent_moments) == ("auto", "")
    for config in (stored, live):
        assert config.frozen.first_stage.width == 128 and config.batch_size == row.sizes["batch_size"]


def test_a_side_that_cannot_be_made_keeps_its_message_and_no_memory(one_row):
    kept = []

    def make(_):
        weights = np.zeros(3)
        kept.append(weakref.ref(weights))
        raise MemoryError("too large")

    side = importlib.import_module("updates").Peers().sides("torch", make)["torch"]
    gc.collect()
    assert kept[0]() is None
    with pytest.raises(RuntimeError, match="MemoryError: too large"):
        side.run(1)


def test_memory_of_a_torch_side_is_its_own(one_row, monkeypatch):
    cuda, updates = importlib.import_module("torch").cuda, importlib.import_module("updates")
    held = {"now": 100, "peak": 100}
    monkeypatch.setattr(cuda, "memory_allocated", lambda: held["now"])
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda: held["peak"])
    monkeypatch.setattr(cuda, "reset_peak_memory_stats", lambda: held.update(peak=held["now"]))
    before = updates.torch_bytes("cuda")
    held["now"] += 10  # its parameters
    optimizer = [20]

    def run(_):
        held["now"] += optimizer.pop() if optimizer else 0
        held["peak"] = max(held["peak"], held["now"] + 5)

    memory = updates.torch_memory(run, "cuda", before)
    held.update(now=1000, peak=9999)  # another side
    assert memory() == 35 and updates.torch_memory(run, "cpu") is None


def test_a_gpu_suite_needs_a_gpu(one_row, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["one_row", "--suite=gpu", "--list", f"--out={tmp_path}/out.json"])
    with pytest.raises(SystemExit, match="JAX sees no GPU"):
        one_row.main()


def test_reading_pictures():
    """In a process of its own: its workers are forks, and JAX, which other tests import, has threads."""
    small = ["--width=64", "--num=8", "--size=16", "--batch_size=2", "--workers=1", "--windows=1", "--steps=1"]
    command = [sys.executable, str(BENCHMARKS / "pictures.py"), *small]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[-5:]] == [
        "processes",
        "processes, draft",
        "threads",
        "threads, draft",
        "torch",
    ]
