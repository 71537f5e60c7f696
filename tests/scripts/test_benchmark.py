"""The benchmark at debug size: what its report holds, not how fast anything is."""

import json
import time
from pathlib import Path

import jax
import pytest

from cli.errors import UserError
from cost import decoding, measured
from cost.chips import Peak
from scripts import benchmark
from train.state import TrainState

CONFIG = f"--config={Path(__file__).resolve().parents[2]}/configs/scenes/dvae.py:debug"


@pytest.fixture(autouse=True)
def same_settings(monkeypatch):
    """The command switches JAX's compilation cache off, for itself."""
    before = jax.config.jax_enable_compilation_cache
    monkeypatch.setattr(measured, "peak_flops", lambda device, dtype, measure: Peak(1e9, f"a {dtype} guess"))
    yield
    jax.config.update("jax_enable_compilation_cache", before)


def test_a_report_holds_every_figure_and_its_environment(scenes_dir, capsys, monkeypatch):
    waited, wait = [], jax.block_until_ready

    def record(tree):
        waited.append(isinstance(tree, tuple) and isinstance(tree[0], TrainState))
        return wait(tree)

    monkeypatch.setattr(jax, "block_until_ready", record)
    data = f"--config.data.data_dir={scenes_dir}"
    flags = ["--measure=step,data,sample", "--windows=2", "--steps=1", "--warmup=1", "--json"]
    benchmark.main([CONFIG, data, *flags])
    report = json.loads(capsys.readouterr().out)

    assert (report["objective"], report["batch_size"], report["dtype"]) == ("vqvae", 8, "float32")
    environment = report["environment"]
    assert environment["device_kind"] == "cpu" and environment["device_count"] == 1 and environment["cores"] >= 1
    assert environment["packages"]["jax"] == jax.__version__ and "commit" in environment

    assert sum(waited) == 3  # each window, and the warm-up, ends when the devices are done
    step = report["step"]
    seconds = step["seconds"]
    assert 0 < seconds["low"] <= seconds["median"] <= seconds["high"]
    assert step["examples_per_second"]["high"] == pytest.approx(8 / seconds["low"])
    assert step["flops_per_second"]["median"] == pytest.approx(step["matrix_flops_per_step"] / seconds["median"])
    assert step["mfu"]["low"] == pytest.approx(step["matrix_flops_per_step"] / seconds["high"] / 1e9)
    assert step["peak_source"] == "a float32 guess" and "tokens_per_second" not in step
    assert step["compile_seconds"] > 0 and step["trace_seconds"] > 0
    assert step["attention"] == []  # a dVAE has none
    assert step["processor_seconds"] > 0 and step["page_faults"] >= 0
    assert step["memory"]["device_peak_bytes"] is None  # the CPU keeps no count
    assert 0 < step["memory"]["program_peak_bytes"] < step["memory"]["resident_peak_bytes"]

    rates = report["data"]
    assert rates["first_pass_share"] == 1 and rates["first_pass_examples_per_second"] > 0
    by_processor = step["processor_seconds"] / 8 / rates["first_pass_processor_seconds"]
    assert rates["first_pass_processor_ratio_to_step"] == pytest.approx(by_processor) and by_processor > 0
    assert rates["cache"] is True and rates["workers"] == 1
    ratio = rates["examples_per_second"]["median"] / step["examples_per_second"]["median"]
    assert rates["ratio_to_step"] == pytest.approx(ratio)

    assert report["sample"]["images"] == 64
    assert report["sample"]["images_per_second"]["low"] == pytest.approx(64 / report["sample"]["seconds"]["high"])

    text = benchmark.format_report(report)
    for label in (
        "compilation",
        "step",
        "examples",
        "processor",
        "matrix FLOPs",
        "MFU",
        "peak memory",
        "data",
        "sampling",
    ):
        assert f"\n{label}  " in text
    assert f"{by_processor:.1f} times by processor time)" in text
    assert "tokens" not in text and "load average" in text


def test_without_a_dataset_one_line_says_what_to_run(tmp_path, capsys):
    benchmark.main([CONFIG, f"--config.data.data_dir={tmp_path}", "--measure=data"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("data            not measured: dataset scenes/single32 is not in")
    assert "python -m scripts.prepare --dataset=scenes/single32" in lines[2]


def test_processor_seconds_are_counted_where_they_are_asked_for(capsys, monkeypatch):
    asked = {}
    for module, part in ((measured, "step"), (measured, "sample"), (decoding, "decoding")):
        monkeypatch.setattr(
            module, f"measure_{part}", lambda config, *, clock, part=part, **_: asked.update({part: clock}) or {}
        )
    for clock, function in (("processor", time.process_time), ("wall", time.perf_counter)):
        benchmark.main([CONFIG, "--measure=step,sample,decode", f"--clock={clock}", "--json"])
        assert asked == dict.fromkeys(("step", "sample", "decoding"), function)
        assert json.loads(capsys.readouterr().out)["clock"] == clock


def test_tokens_are_shown_where_there_are_some():
    spread = {"median": 0.001, "low": 0.0005, "high": 0.002}
    step = {
        **{name: spread for name in ("seconds", "examples_per_second", "tokens_per_second", "flops_per_second", "mfu")},
        **{"windows": 3, "steps_per_window": 7, "trace_seconds": 1.0, "compile_seconds": 2.0},
        **{"matrix_flops_per_step": 5, "peak_flops_per_second": 2e9, "peak_source": "a table"},
        "attention": ["cudnn", "xla"],
        **{"processor_seconds": None, "page_faults": None},
        "memory": {"device_peak_bytes": 2**30, "program_peak_bytes": None, "resident_peak_bytes": 2**20},
    }
    lines = benchmark._step_lines(step)
    assert "step            1 (0.5 to 2) ms (3 windows of 7)" in lines
    assert any(line.startswith("tokens ") for line in lines)
    assert "attention       cudnn, xla" in lines
    assert not any(line.startswith("attention") for line in benchmark._step_lines({**step, "attention": []}))
    assert "MFU             0.1 (0.05 to 0.2) % of 2 GFLOP/s (a table)" in lines
    assert lines[-1] == "peak memory     1,024 MiB on a device; 1 MiB resident in the process"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--measure=speed", "--measure=speed is not a choice of step,data,sample"),
        ("--measure=", "is not a choice of"),
        ("--windows=0", "must be at least 1"),
        ("--steps=0", "must be at least 1"),
        ("--warmup=-1", "--warmup at least 0"),
        ("--toy", "--toy does nothing without --suite"),
        ("--clock=processor", "--clock=processor is not of data, which other processes may read"),
        ("--suite=cpu --steps=10", "--steps does nothing with --suite"),
        ("--suite=cpu --json", "--json does nothing with --suite"),
        ("--suite=gpu --clock=processor", "--clock=processor does not see what a GPU does"),
        ("--measure=data --against=--config.seed=1", "--against is of the step, which --measure leaves out"),
    ],
)
def test_mistakes(flag, message):
    with pytest.raises(UserError, match=message):
        benchmark.main([CONFIG, *flag.split()])
