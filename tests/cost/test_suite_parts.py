"""Parts of a suite that are no rows, with commands of our own in place of pytest, train and evaluation."""

import json
from pathlib import Path

import pytest

from cli.errors import UserError
from cost import suite_parts
from cost.commands import OutOfTime
from cost.suite_parts import read_report, run_scenes, run_tests

CASE = '<testcase name="{name}">{inside}</testcase>'


def report(**cases):
    found = "".join(CASE.format(name=name, inside=inside) for name, inside in cases.items())
    return f"<testsuites><testsuite>{found}</testsuite></testsuites>"


def test_a_report_of_tests_becomes_words_and_reasons():
    found = read_report(report(a="", b='<skipped message="no TPU"/>', c='<failure message="off by 1&#10;more"/>', d=""))
    assert found["result"] == "2 passed, 1 failed, 1 skipped"
    assert found["failed"] == {"c": "off by 1 more"} and found["figures"] == {"passed": 2, "failed": 1, "skipped": 1}
    # A machine whose tests are all left out has shown nothing.
    assert read_report(report(b='<skipped message="no GPU"/>'))["failed"] == {"tests": "none ran"}


@pytest.mark.parametrize(("toy", "mode"), [(True, "rehearsal"), (False, "1")])
def test_tests_are_told_where_they_run(toy, mode, monkeypatch):
    def command(arguments, seconds, environment, codes):
        assert environment["TESSERA_TESTS_ACCELERATOR"] == mode and seconds == 40.0 and 1 in codes
        path = next(each for each in arguments if each.startswith("--junitxml=")).removeprefix("--junitxml=")
        Path(path).write_text(report(a=""))
        return 0

    monkeypatch.setattr(suite_parts, "run_command", command)
    assert run_tests(toy, 40.0)["result"] == "1 passed"
    monkeypatch.setattr(suite_parts, "run_command", lambda *_, **__: 1)
    with pytest.raises(UserError, match="pytest wrote no report"):
        run_tests(toy, 40.0)


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """Each command takes 100 s or what it may, and writes what it is asked for; `called` are [name, limit]."""

    class Commands:
        called, now, saves = [], 0.0, True

        def run(self, arguments, seconds=None, environment=None, *, patience=0.0, codes=(0,)):
            flags = dict(each.removeprefix("--").partition("=")[::2] for each in arguments[3:])
            name = f"{arguments[2]} {Path(flags.get('workdir', '')).name}".strip()
            self.called.append((name, seconds))
            self.now += 100.0 if seconds is None else min(100.0, seconds)
            if name.startswith("train"):
                assert patience > 0 and 75 in codes
                if self.saves:
                    (Path(flags["workdir"]) / "checkpoints" / "40" / "params").mkdir(parents=True)
                    (Path(flags["workdir"]) / "config.json").write_text('{"steps": 50}')
            if name.startswith("evaluation"):
                records = [
                    {"metric": "caption_accuracy", "split": split, "values": {"all": share}}
                    for split, share in (("validation", 0.5), ("held_out", 0.25))
                ]
                (Path(flags["run"]) / "evaluation.json").write_text(json.dumps(records))
            return 0

    found = Commands()
    found.called = []
    monkeypatch.setattr(suite_parts, "ROOT", tmp_path)
    monkeypatch.setattr(suite_parts, "run_command", found.run)
    monkeypatch.setattr(suite_parts.time, "monotonic", lambda: found.now)
    return found


def test_a_training_is_limited_graded_and_told(commands):
    found = run_scenes(False, None)
    assert commands.called == [
        ("scripts.prepare", None),
        ("train autoencoder", 300.0),
        ("train latent_unet", 200.0),
        ("evaluation", None),
    ]
    assert found["figures"]["caption_accuracy"] == {"validation": 0.5, "held_out": 0.25}
    assert found["result"] == (
        "autoencoder 40 of 50 updates in 100 s, latent_unet 40 of 50 updates in 100 s; captions of which all is right, "
        "of 500: validation 50.0%, held_out 25.0%"
    )


def test_a_training_leaves_time_for_its_grades_or_says_that_there_was_none(commands):
    run_scenes(False, 360.0)  # 100 for the dataset, then 170 for training before the minute and a half of grading
    assert commands.called[1:3] == [("train autoencoder", 170.0), ("train latent_unet", 70.0)]
    commands.now = 0.0
    with pytest.raises(OutOfTime, match="no time was left to train latent_unet"):
        run_scenes(False, 290.0)
    commands.saves = False
    with pytest.raises(OutOfTime, match="autoencoder saved nothing in 300 s"):
        run_scenes(False, None)
