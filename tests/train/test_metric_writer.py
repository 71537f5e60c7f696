"""metrics.jsonl, and a logging service that may fail."""

import json
import math
import sys
import time
import types

import numpy as np
import pytest

from cli.locations import locate
from configs.common import get_defaults
from train.metric_writer import MetricLog, WandbLog, means
from weights.run import read_metrics


def test_rows_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    log = MetricLog(tmp_path, 0)
    for step in range(1, 8):
        log.write(step, {"loss": step / 2})
    log.close()
    log = MetricLog(tmp_path, 4)
    log.write(5, {"loss": 9.0})
    log.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [
        (1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0), (5, 9.0),
    ]  # fmt: skip


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + '\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]
    MetricLog(tmp_path, 1).close()
    assert (tmp_path / "metrics.jsonl").read_text().endswith("}\n")


def test_a_new_run_starts_an_empty_log(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n')
    MetricLog(tmp_path, 0).close()
    assert read_metrics(tmp_path) == []


def test_in_a_store_rows_are_there_before_a_checkpoint_and_once_a_minute(object_store, bucket, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("train.metric_writer.time", types.SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep))
    workdir = locate(f"gs://{bucket}/run")

    def steps():
        return [row["step"] for row in read_metrics(workdir)]

    log = MetricLog(workdir, 0)
    log.write(1, {"loss": 1.0})
    assert steps() == []
    log.sync()
    assert steps() == [1]
    log.write(2, {"loss": 1.0})
    now[0] += 61
    log.write(3, {"loss": math.nan})
    assert steps() == [1, 2, 3]
    object_store.forbidden = "POST"  # an outage: rows wait for the next minute, or for a checkpoint, which says so
    now[0] += 61
    log.write(4, {"loss": 1.0})
    with pytest.raises(OSError, match="Forbidden"):
        log.sync()
    object_store.forbidden = ""
    log.write(5, {"loss": 1.0})
    assert steps() == [1, 2, 3]
    log.sync()
    assert steps() == [1, 2, 3, 4, 5]
    object_store.requests.clear()
    log.sync()
    assert not object_store.requests  # nothing is new
    log = MetricLog(workdir, 2)
    log.write(3, {"loss": 9.0})
    log.close()
    assert [row["loss"] for row in read_metrics(workdir)] == [1.0, 1.0, 9.0]


def test_means_add_up_sums_and_counts():
    assert means({"a": (np.float32(6), np.float32(4)), "n": (np.int32(2**30 + 1), np.int32(1))}) == {
        "a": 1.5,
        "n": 2**30 + 1,
    }


def wandb_config(mode="offline"):
    config = get_defaults().wandb
    with config.unlocked():
        config.mode = mode
    return config


def fake_wandb(monkeypatch, **functions):
    module = types.ModuleType("wandb")
    module.Settings = lambda **values: values
    for name, function in functions.items():
        setattr(module, name, function)
    monkeypatch.setitem(sys.modules, "wandb", module)


def test_rows_reach_wandb_under_a_constant_id(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self, exit_code):
            calls.append(f"finished with {exit_code}")

    def init(**settings):
        calls.append((settings["id"], settings["mode"], settings["resume"]))
        return Run()

    fake_wandb(monkeypatch, init=init)
    log = WandbLog(wandb_config(), tmp_path, "abc", {})
    log.write(1, {"loss": 2.0})
    log.write(2, {"loss": 1.0})
    log.close()
    assert calls == [("abc", "offline", "allow"), (1, {"loss": 2.0}), (2, {"loss": 1.0}), "finished with 0"]


def test_a_sweep_is_told_of_a_preemption(tmp_path, monkeypatch):
    calls = []

    class Run:
        def mark_preempting(self):
            calls.append("preempting")

        def finish(self, exit_code):
            calls.append(f"finished with {exit_code}")

    fake_wandb(monkeypatch, init=lambda **settings: Run())
    log = WandbLog(wandb_config(), tmp_path, "abc", {})
    log.mark_preempting()
    log.close(exit_code=75)
    assert calls == ["preempting", "finished with 75"]  # a sweep takes 0 for done, and does not start it again


def test_a_wandb_that_fails_neither_stops_nor_delays(tmp_path, monkeypatch, caplog):
    def init(**settings):
        raise RuntimeError("no network")

    fake_wandb(monkeypatch, init=init)
    log = WandbLog(wandb_config(), tmp_path, "abc", {})
    for step in range(3000):
        log.write(step, {"loss": 1.0})
    log.close()
    assert "no network" in caplog.text


def test_a_wandb_that_fails_at_the_end_is_not_waited_for(tmp_path, monkeypatch, caplog):
    class Run:
        def finish(self, exit_code):
            raise RuntimeError("no network")

    fake_wandb(monkeypatch, init=lambda **settings: Run())
    log = WandbLog(wandb_config(), tmp_path, "abc", {})
    log.close(seconds=2.0)
    assert "no network" in caplog.text and "left behind" not in caplog.text


def test_a_wandb_that_hangs_does_not_delay(tmp_path, monkeypatch):
    fake_wandb(monkeypatch, init=lambda **settings: time.sleep(3))
    log = WandbLog(wandb_config(), tmp_path, "abc", {})
    start = time.monotonic()
    for step in range(3000):  # more than the queue holds
        log.write(step, {"loss": 1.0})
    log.close(seconds=0.1)
    assert time.monotonic() - start < 1.5


def test_disabled_means_no_import(tmp_path, monkeypatch):
    fake_wandb(monkeypatch)  # without `init`, any use would fail
    log = WandbLog(wandb_config("disabled"), tmp_path, "abc", {})
    log.write(1, {"loss": 1.0})
    log.close()


def test_what_counted_nothing_has_no_mean():
    metrics = {"loss": (np.float32(6), np.float32(4)), "mse_q2": (np.float32(0), np.float32(0))}
    assert means(metrics) == {"loss": 1.5}


def test_values_that_are_not_finite_are_null(tmp_path):
    log = MetricLog(tmp_path, 0)
    log.write(1, {"loss": float("nan"), "norm": float("inf"), "rate": 0.1})
    log.close()
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert read_metrics(tmp_path) == [{"step": 1, "loss": None, "norm": None, "rate": 0.1}]
