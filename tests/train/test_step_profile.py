"""`--profile`: what the trace of a run holds, and that the run is the same with it."""

from pathlib import Path
from typing import Any

import pytest
from jax.profiler import ProfileData
from ml_collections import ConfigDict

from cli.config import load_config
from cli.errors import EXIT_OK, EXIT_PREEMPTED, UserError
from train.distributed.preemption import StopSignal
from train.health import HealthCheck
from train.loop import train
from weights.run import read_metrics

ROOT = Path(__file__).resolve().parents[2]


# jaxlib 0.12 makes a type as it reads a trace, of which Python 3.13 warns; as an error that would abort the process.
pytestmark = pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute:DeprecationWarning")


@pytest.fixture
def config(scenes_dir: Path) -> ConfigDict:
    """A run of four updates without an evaluation or a checkpoint between them."""
    rare = [f"--config.{group}.every=1000" for group in ("evaluate", "checkpoint")]
    return load_config([f"--config={ROOT}/configs/scenes/dvae.py:debug", f"--config.data.data_dir={scenes_dir}", *rare])


def events(workdir: Path) -> list[tuple[str, dict[str, Any]]]:
    """(name, {statistic: value}) of what the host did while it was traced, in order, over all traces of a run."""
    found = []
    for path in sorted((workdir / "profile").rglob("*.xplane.pb")):
        planes = [plane for plane in ProfileData.from_file(str(path)).planes if plane.name == "/host:CPU"]
        traced = [event for plane in planes for line in plane.lines for event in line.events]
        traced.sort(key=lambda event: event.start_ns)
        found += [(event.name, {str(name): value for name, value in event.stats}) for event in traced]
    return found


def traced_updates(workdir: Path) -> list[int]:
    return [statistics["step_num"] for name, statistics in events(workdir) if name == "train"]


def metrics(workdir: Path) -> list[dict[str, float]]:
    rows = [row for row in read_metrics(workdir) if "loss" in row]
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


def test_a_trace_holds_whole_updates_after_the_first_and_changes_nothing(config, debug_run, tmp_path, capsys):
    assert train(config, tmp_path, profile=2) == EXIT_OK
    assert traced_updates(tmp_path) == [2, 3]
    assert "traced updates 2 to 3; see" in capsys.readouterr().out
    names = [name for name, _ in events(tmp_path)]
    assert names.count("next_batch") == 2 and "PjitFunction(train_step)" in names
    assert any("fusion" in name for name in names)  # what the device did
    assert not any("compile" in name.lower() for name in names)
    assert metrics(tmp_path) == metrics(debug_run("scenes/dvae.py")) != []


def test_a_preempted_run_writes_its_trace_and_may_be_traced_again(config, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "is_due", lambda stop, step: step == 2)
        assert train(config, tmp_path, profile=3) == EXIT_PREEMPTED
    assert traced_updates(tmp_path) == [2]
    assert "ended before all updates were traced" in capsys.readouterr().out
    assert train(config, tmp_path, profile=3) == EXIT_OK
    assert traced_updates(tmp_path) == [2, 4]
    assert "warning: --profile=3: after its first the run has 1 updates left" in capsys.readouterr().out


def test_a_run_that_fails_stops_its_trace(config, tmp_path, monkeypatch):
    def fail(check: HealthCheck, step: int, *rest: Any) -> None:
        if step == 2:
            raise UserError("no")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="no"):
        patch.setattr(HealthCheck, "add", fail)
        train(config, tmp_path / "failed", profile=2)
    assert traced_updates(tmp_path / "failed") == [2]
    assert train(config, tmp_path / "next", profile=2) == EXIT_OK  # JAX makes one trace at a time


def test_more_updates_than_a_run_has_are_refused(config, tmp_path):
    with pytest.raises(UserError, match="--profile=4 needs config.steps to be at least 5, not 4"):
        train(config, tmp_path / "run", profile=4)
    assert not (tmp_path / "run").exists()
