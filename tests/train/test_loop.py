"""The loop on real configs: what a run leaves behind, and that an interrupted run equals an uninterrupted one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from cli.config import load_config
from cli.errors import EXIT_OK, EXIT_PREEMPTED, EXIT_USER_ERROR, UserError
from train import loop
from train.distributed.preemption import StopSignal
from train.loop import train
from train.metric_writer import RunLog
from train.objectives.vqvae import VectorQuantizedVAEObjective
from weights.checkpoint import CheckpointStore
from weights.run import Run, read_metrics

ROOT = Path(__file__).resolve().parents[2]


def config(scenes_dir, *overrides, name="scenes/dvae.py:debug"):
    return load_config([f"--config={ROOT}/configs/{name}", f"--config.data.data_dir={scenes_dir}", *overrides])


def losses(workdir):
    return [(row["step"], row["loss"]) for row in read_metrics(workdir) if "loss" in row]


def trees(workdir, step):
    return CheckpointStore(workdir / "checkpoints").load(step, ("params", "ema_params", "variables", "opt_state"))


def assert_same_trees(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def whole(scenes_dir, tmp_path_factory):
    """An uninterrupted run of six steps."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    assert train(config(scenes_dir, "--config.steps=6"), workdir) == EXIT_OK
    return workdir


def test_a_run_folder_explains_itself(whole):
    names = {path.name for path in whole.iterdir()}
    assert {"config.json", "environment.json", "checkpoints", "metrics.jsonl", "samples", "DONE"} <= names
    environment = json.loads((whole / "environment.json").read_text())
    assert environment["packages"]["jax"] == jax.__version__ and environment["devices"]
    run = Run.open(whole)
    assert run.config.objective == "vqvae" and run.latest_step() == 6
    assert [step for step, _ in losses(whole)] == [1, 2, 3, 4, 5, 6]
    assert {path.name for path in (whole / "samples").iterdir()} == {
        f"{step:08d}_reconstruction.png" for step in (0, 2, 4, 6)
    }


def test_a_resumed_run_equals_an_uninterrupted_one(scenes_dir, whole, tmp_path):
    workdir = tmp_path / "run"
    train(config(scenes_dir, "--config.steps=6"), workdir)
    # As if the process had been killed after step 5, two steps past the checkpoint of step 4.
    store = CheckpointStore(workdir / "checkpoints")
    for path in sorted((store.folder / "6").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (store.folder / "6").rmdir()
    (workdir / "DONE").unlink()
    assert train(config(scenes_dir, "--config.steps=6"), workdir) == EXIT_OK
    assert losses(workdir) == losses(whole)
    assert_same_trees(trees(workdir, 6), trees(whole, 6))


def test_a_finished_run_says_so_and_a_longer_one_goes_on(scenes_dir, tmp_path, capsys):
    workdir = tmp_path / "run"
    train(config(scenes_dir, "--config.steps=2"), workdir)
    train(config(scenes_dir, "--config.steps=2"), workdir)
    assert "is complete" in capsys.readouterr().out
    train(config(scenes_dir, "--config.steps=3"), workdir)
    assert [step for step, _ in losses(workdir)] == [1, 2, 3]


def test_another_batch_size_continues_the_stream(scenes_dir, tmp_path):
    workdir = tmp_path / "run"
    train(config(scenes_dir, "--config.steps=2"), workdir)
    train(config(scenes_dir, "--config.steps=4", "--config.batch_size=4"), workdir)
    assert [row["examples_seen"] for row in read_metrics(workdir) if "loss" in row] == [8, 16, 20, 24]


def test_a_changed_config_is_refused_with_the_keys(scenes_dir, whole):
    changed = ("--config.optimizer.schedule.peak=0.5", "--config.group=other", "--config.evaluate.batches=2")
    message = r"evaluate.batches: 1 -> 2, group: '' -> 'other', optimizer.schedule.peak: 0.004 -> 0.5\)"
    with pytest.raises(UserError, match=message):
        train(config(scenes_dir, "--config.steps=6", *changed), whole)


def test_what_no_update_depends_on_may_change(scenes_dir, whole):
    changed = [
        "mesh.microbatches=2",
        "log.every=7",
        "checkpoint.keep=5",
        "data.workers=2",
        "data.processes=True",
        "data.read_ahead=2",
        "batch_size=4",
    ]
    assert train(config(scenes_dir, "--config.steps=6", *[f"--config.{key}" for key in changed]), whole) == EXIT_OK
    train(config(scenes_dir, "--config.steps=6"), whole)  # and back, for the tests that follow


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_loses_nothing(scenes_dir, tmp_path):
    """A limit on the size of files stands for the disk: no checkpoint can be written, small files can."""
    workdir = tmp_path / "run"
    command = ["-m", "train", f"--config={ROOT}/configs/scenes/dvae.py:debug", f"--workdir={workdir}"]
    command += [f"--config.data.data_dir={scenes_dir}"]
    limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); "
    limit += "sys.argv = sys.argv[1:]; runpy.run_module('train', run_name='__main__', alter_sys=True)"
    for steps, code in ((2, EXIT_OK), (4, EXIT_USER_ERROR), (4, EXIT_OK)):
        prefix = ["-c", limit, "train", *command[2:]] if code == EXIT_USER_ERROR else command
        result = subprocess.run(
            [sys.executable, *prefix, f"--config.steps={steps}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == code, result.stderr
        if code == EXIT_USER_ERROR:
            assert "Traceback" not in result.stderr and "cannot" in result.stderr.splitlines()[-1], result.stderr
            assert "File too large" in result.stderr.splitlines()[-1]
            assert Run.open(workdir).latest_step() == 2
    assert [step for step, _ in losses(workdir)] == [1, 2, 3, 4]


def test_a_broken_newest_checkpoint_is_reported_and_the_one_before_used(scenes_dir, whole, tmp_path, capsys):
    workdir = tmp_path / "run"
    train(config(scenes_dir, "--config.steps=6"), workdir)
    for path in (workdir / "checkpoints" / "6").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    assert train(config(scenes_dir, "--config.steps=6"), workdir) == EXIT_OK
    assert "cannot be read" in capsys.readouterr().out
    assert losses(workdir) == losses(whole)


def test_an_update_that_is_not_finite_is_named_and_never_saved_or_else_skipped(
    scenes_dir, tmp_path, monkeypatch, capsys
):
    workdir = tmp_path / "run"
    settings = ("--config.steps=6", "--config.log.every=100")
    train(config(scenes_dir, *settings, "--config.steps=2"), workdir)
    loss = VectorQuantizedVAEObjective.loss

    def broken(self, params, variables, frozen, batch, rng, step, train):
        value, aux = loss(self, params, variables, frozen, batch, rng, step, train)
        factor = jax.numpy.where(step == 3, jax.numpy.nan, 1)  # the fourth update
        total, count = aux.metrics["loss"]
        return value * factor, aux.replace(metrics={**aux.metrics, "loss": (total * factor, count)})

    monkeypatch.setattr(VectorQuantizedVAEObjective, "loss", broken)
    with pytest.raises(UserError, match=r"step 4 is not finite: .*the gradient is not finite at dvae/.*is intact"):
        train(config(scenes_dir, *settings), workdir)
    # No metrics were due, and yet nothing of it was saved.
    assert Run.open(workdir).latest_step() == 2
    skipping = ("--config.nonfinite=skip", "--config.log.every=1")
    assert train(config(scenes_dir, *settings, *skipping), workdir) == EXIT_OK
    assert "warning: step 4 is not finite" in capsys.readouterr().out
    assert [step for step, loss in losses(workdir) if loss is None] == [4]
    assert [step for step, _ in losses(workdir)] == [2, 3, 4, 5, 6]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trees(workdir, 6)["params"]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.steps=0"], "config.steps must be at least 1"),
        (["--config.log.every=0"], "config.log.every must be at least 1"),
        (["--config.objective=gan"], "choose one of autoencoder, captioner"),
        (["--config.data.split=tests"], "has no split 'tests'"),
        (["--config.mesh.data=5"], "does not fit"),
        (["--config.steps=3000000000"], "config.steps must be at least 1 and below 2147483648"),
        (["--config.batch_size=1500000000"], "2\\^30"),
        (["--config.seed=-1"], "config.seed=-1 is impossible"),
        (["--config.seed=4294967296"], "config.seed=4294967296 is impossible"),
        (["--config.ema.decay=1.0"], "config.ema.decay must be at least 0 and below 1, not 1.0"),
        (["--config.ema.decay=-0.5"], "config.ema.decay must be"),
        (["--config.data.bpe_dropout=1.5"], "config.data.bpe_dropout must be at least 0 and at most 1"),
        (["--config.optimizer.b1=1.5"], "config.optimizer.b1 must be"),
        (["--config.evaluate.batches=0"], "config.evaluate.batches must be at least 1"),
        (["--config.evaluate.previews=0"], "previews must be at least 1"),
        (["--config.data.image_size=64"], "config.data.image_size is 64; they must be equal"),
        (["--config.models.dvae.name=gan"], "no model is called 'gan'"),
        (["--config.loss.reconstruction=l7"], "choose one of"),
    ],
)
def test_mistakes_are_found_before_training(scenes_dir, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        train(config(scenes_dir, *overrides), tmp_path / "run")


def test_a_missing_frozen_stage_is_named(scenes_dir, tmp_path):
    settings = ("--config.frozen.dvae.source=runs/nowhere",)
    with pytest.raises(UserError, match="source runs/nowhere is missing"):
        train(config(scenes_dir, *settings, name="scenes/dalle.py:debug"), tmp_path / "run")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.data.text_length=16"], "config.data.text_length is 16; they must be equal"),
        (["--config.models.dalle.text_vocab_size=300"], "the tokenizer has 351 ids"),
        (["--config.models.dalle.activation=softest"], "softest"),
        (["--config.models.dalle.image_vocab_size=77"], "has 256 codes"),
    ],
)
def test_parts_that_do_not_fit_together_are_named(scenes_dir, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        train(config(scenes_dir, *overrides, name="scenes/dalle.py:debug"), tmp_path / "run")


def test_clip_takes_rows_shorter_than_its_context(scenes_dir, tmp_path):
    """The same captions have the same losses in rows of either length."""
    runs = [tmp_path / "24", tmp_path / "16"]
    for run in runs:
        train(config(scenes_dir, f"--config.data.text_length={run.name}", name="scenes/clip.py:debug"), run)
    long, short = (np.array(losses(run)) for run in runs)
    assert len(long) >= 4
    np.testing.assert_allclose(short, long, rtol=1e-5)
    with pytest.raises(UserError, match="text_length is 24, but config.data.text_length is 25; set it to that or less"):
        train(config(scenes_dir, "--config.data.text_length=25", name="scenes/clip.py:debug"), tmp_path / "25")


@pytest.mark.parametrize(("override", "end"), [("models.clip.text_end_id=9", 352), ("data.text_ends=False", None)])
def test_captions_that_end_otherwise_are_refused(scenes_dir, tmp_path, override, end):
    with pytest.raises(UserError, match=f"text_end_id is .* ends captions with {end}"):
        train(config(scenes_dir, f"--config.{override}", name="scenes/clip.py:debug"), tmp_path / "run")


def test_a_run_that_is_stopped_leaves_its_evaluation_to_the_next_start(scenes_dir, whole, tmp_path, monkeypatch):
    def rows(workdir):
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(workdir)]

    workdir, evaluate = tmp_path / "run", loop._evaluate
    with monkeypatch.context() as patch:  # during the first evaluation
        patch.setattr(loop, "_evaluate", lambda *given: os.kill(os.getpid(), signal.SIGTERM) or evaluate(*given))
        assert train(config(scenes_dir, "--config.steps=6"), workdir) == EXIT_PREEMPTED
        assert not rows(workdir) and not CheckpointStore(workdir / "checkpoints").steps()
    with monkeypatch.context() as patch:  # before one
        patch.setattr(StopSignal, "is_due", lambda stop, step: step == 2)
        assert train(config(scenes_dir, "--config.steps=6"), workdir) == EXIT_PREEMPTED
    assert CheckpointStore(workdir / "checkpoints").steps() == [2] and rows(workdir)[-1]["examples_seen"] == 16
    assert train(config(scenes_dir, "--config.steps=6"), workdir) == EXIT_OK
    assert rows(workdir) == rows(whole)
    assert sorted((workdir / "samples").iterdir())[1].name == "00000002_reconstruction.png"


def test_a_run_that_is_told_to_end_where_it_was_stopped_is_evaluated_there(scenes_dir, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "is_due", lambda stop, step: step == 2)
        assert train(config(scenes_dir, "--config.steps=6"), workdir) == EXIT_PREEMPTED
    assert "validation/loss" not in read_metrics(workdir)[-1]
    assert train(config(scenes_dir, "--config.steps=2"), workdir) == EXIT_OK
    last = read_metrics(workdir)[-1]
    assert last["step"] == 2 and "validation/loss" in last
    assert (workdir / "samples" / "00000002_reconstruction.png").is_file() and (workdir / "DONE").is_file()
    assert "is complete" not in capsys.readouterr().out
    assert train(config(scenes_dir, "--config.steps=2"), workdir) == EXIT_OK
    assert "is complete" in capsys.readouterr().out
    assert read_metrics(workdir)[-1] == last


def test_a_workdir_that_cannot_be_written_is_named(scenes_dir, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the workdir"):
        train(config(scenes_dir), tmp_path / "file" / "run")


def test_wandb_hears_of_a_preemption_and_how_the_run_ended(scenes_dir, tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(RunLog, "mark_preempting", lambda log: heard.append("preempting"))
    close = RunLog.close
    monkeypatch.setattr(RunLog, "close", lambda log: (heard.append(log.exit_code), close(log)))
    monkeypatch.setattr(StopSignal, "is_due", lambda stop, step: step == 1)
    assert train(config(scenes_dir, "--config.steps=3"), tmp_path / "run") == EXIT_PREEMPTED
    assert heard == ["preempting", EXIT_PREEMPTED]
    assert Run.open(tmp_path / "run").latest_step() == 1


def test_stage_two_trains_on_a_stage_one_run_and_is_found_after_a_move(scenes_dir, tmp_path, whole):
    from sample.trained import TrainedSampler

    shutil.copytree(whole, tmp_path / "before" / "stage1")
    settings = (f"--config.frozen.dvae.source={tmp_path}/before/stage1", "--config.steps=2")
    train(config(scenes_dir, *settings, name="scenes/dalle.py:debug"), tmp_path / "before" / "stage2")
    (tmp_path / "before").rename(tmp_path / "after")
    trained = TrainedSampler.open(tmp_path / "after" / "stage2", chunk=2)
    assert trained.config.frozen.dvae.encoder_hidden == 16  # as stage 1 was trained
    stage1 = Run.open(tmp_path / "after" / "stage1").load()
    assert_same_trees(trained.frozen["dvae"]["params"], stage1.params["dvae"])
    # Another run does not take its place, though its sizes and steps are the same.
    shutil.copytree(tmp_path / "after" / "stage1", tmp_path / "other")
    (tmp_path / "other" / "wandb" / "id").write_text("another")
    other = (f"--config.frozen.dvae.source={tmp_path}/other", "--config.steps=3")
    with pytest.raises(UserError, match="frozen.dvae.run: '.*' -> 'another'"):
        train(config(scenes_dir, *other, name="scenes/dalle.py:debug"), tmp_path / "after" / "stage2")
    # The same command, told where stage 1 is now or not, continues.
    longer = (*settings, "--config.steps=3")
    assert train(config(scenes_dir, *longer, name="scenes/dalle.py:debug"), tmp_path / "after" / "stage2") == EXIT_OK


@pytest.mark.slow
def test_a_frozen_stage_that_is_trained_further_does_not_change_who_uses_it(scenes_dir, tmp_path):
    from sample.trained import TrainedSampler

    train(config(scenes_dir, "--config.steps=2"), tmp_path / "stage1")
    settings = (f"--config.frozen.dvae.source={tmp_path}/stage1",)
    train(config(scenes_dir, *settings, "--config.steps=2", name="scenes/dalle.py:debug"), tmp_path / "stage2")
    before = TrainedSampler.open(tmp_path / "stage2").frozen
    train(config(scenes_dir, "--config.steps=4"), tmp_path / "stage1")
    assert_same_trees(TrainedSampler.open(tmp_path / "stage2").frozen, before)
    train(config(scenes_dir, *settings, "--config.steps=3", name="scenes/dalle.py:debug"), tmp_path / "stage2")
    assert Run.open(tmp_path / "stage2").config.frozen.dvae.step == 2
    # Once the checkpoint that it was trained with is gone, it says so.
    train(config(scenes_dir, "--config.steps=6"), tmp_path / "stage1")
    with pytest.raises(UserError, match="has no checkpoint 2; it has 6, 4"):
        TrainedSampler.open(tmp_path / "stage2")


def test_fine_tuning_starts_from_another_run(scenes_dir, whole, tmp_path):
    settings = (f"--config.initialize.dvae.source={whole}", "--config.steps=1")
    train(config(scenes_dir, *settings), tmp_path / "run")
    # A warm-up begins with a learning rate of zero: what it started from is what it has.
    assert_same_trees(Run.open(tmp_path / "run").load(ema=False).params, Run.open(whole).load().params)
    other = (f"--config.initialize.dvae.source={whole}", "--config.models.dvae.encoder_hidden=32")
    with pytest.raises(UserError, match="another network than config.models.dvae: encoder_hidden: 16, not 32"):
        train(config(scenes_dir, *other), tmp_path / "other")


LONG = ("--config.steps=150", "--config.checkpoint.every=10", "--config.evaluate.every=1000")


@pytest.fixture(scope="module")
def long_run(scenes_dir, tmp_path_factory):
    """An uninterrupted run of 150 steps."""
    workdir = tmp_path_factory.mktemp("runs") / "long"
    assert train(config(scenes_dir, *LONG), workdir) == EXIT_OK
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_loses_nothing(scenes_dir, start_process, tmp_path, long_run, number):
    """The real command, stopped by a signal and started again; killed, it is in tests/scripts/test_chaos.py."""
    workdir = tmp_path / "run"
    command = [sys.executable, "-m", "train", f"--config={ROOT}/configs/scenes/dvae.py:debug", f"--workdir={workdir}"]
    command += [f"--config.data.data_dir={scenes_dir}", *LONG]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    with (tmp_path / "log").open("w") as log:
        process = start_process(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while len(losses(workdir)) < 30 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        code = process.wait(60)
    output = (tmp_path / "log").read_text()
    assert code == EXIT_PREEMPTED, output
    assert "continue with: python -m train" in output and "Traceback" not in output
    assert 0 < Run.open(workdir).latest_step() < 150
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert again.returncode == EXIT_OK, again.stderr
    assert "continuing at step" in again.stdout
    assert losses(workdir) == losses(long_run)
    assert_same_trees(trees(workdir, 150), trees(long_run, 150))


def test_a_network_needs_a_class_for_each_of_the_dataset(scenes_dir, tmp_path):
    for override, message in (
        ("--config.models.denoiser.num_classes=2", "num_classes is 2, but the dataset has 3 classes; set it to 3"),
        ("--config.loss.dropout=0.1", "3 classes and config.loss.dropout needs one for none; set it to 4"),
        ("--config.data.label_field=shape", "in its field 'shape' .fields of class numbers: background, relation."),
    ):
        with pytest.raises(UserError, match=message):
            train(config(scenes_dir, override, name="paper/uvit.py:debug"), tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoints/[0-9]*"))
