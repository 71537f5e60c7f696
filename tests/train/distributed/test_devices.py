"""One run on many devices, or in two processes, is the run on one device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from weights.run import Run, read_metrics

ROOT = Path(__file__).resolve().parents[3]


def run_on(devices: int, config: str, scenes_dir: Path, workdir: Path, *overrides: str) -> None:
    flags = os.environ["XLA_FLAGS"] + f" --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-m", "train", f"--config={config}", f"--workdir={workdir}", *overrides]
    result = subprocess.run(
        [*command, f"--config.data.data_dir={scenes_dir}"],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr


def losses(workdir: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(workdir) if "loss" in row]


# Widths that every axis divides.
DVAE = ("--config.models.dvae.encoder_hidden=32", "--config.models.dvae.decoder_hidden=32")
FROZEN = ("--config.frozen.dvae.encoder_hidden=32", "--config.frozen.dvae.decoder_hidden=32")
CONFIGS = {
    "dvae": ("--config=configs/scenes/dvae.py:gumbel", *DVAE, "--config.batch_size=8"),
    "vqvae": ("--config=configs/scenes/dvae.py:debug", *DVAE, "--config.batch_size=8"),
    "clip": (
        *("--config=configs/scenes/clip.py:debug", "--config.models.clip.scan=True"),
        *("--config.models.clip.image_layers=3", "--config.models.clip.text_layers=3"),
    ),
    "clip, text tower": ("--config=configs/scenes/clip.py:debug", "--config.trainable=('^clip/text/', 'logit_scale')"),
    "clip, resnet": ("--config=configs/scenes/clip.py:pair32", "--config.batch_size=8"),
    "clip, sigmoid": ("--config=configs/scenes/clip.py:sigmoid", "--config.batch_size=8"),
    "dalle": ("--config=configs/scenes/dalle.py:debug", *FROZEN, "--config.batch_size=8"),
    "dalle, scanned": (
        *("--config=configs/scenes/dalle.py:debug", *FROZEN, "--config.batch_size=8"),
        *("--config.models.dalle.scan=True", "--config.models.dalle.remat=full"),
    ),
    "diffusion, uvit": ("--config=configs/scenes/ddpm_uvit.py:debug",),
    "diffusion, unet": ("--config=configs/scenes/ddpm_unet.py:debug",),
    "diffusion, uvit of classes": (
        "--config=configs/paper/uvit.py:debug",
        "--config.models.denoiser.dtype=float32",
    ),
    "diffusion, ddpm": ("--config=configs/paper/ddpm.py:debug", "--config.models.denoiser.heads=2"),
}


@pytest.mark.slow
def test_a_step_on_every_mesh_is_that_of_one_device():
    """Loss, metrics, norms and first moments of the gradients; the same noise is a part of the same loss.

    In microbatches too, but for the VQ-VAE, whose codebook takes them in turn, and CLIP's ResNet, whose statistics are
    of the whole batch.
    """
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
    result = subprocess.run(
        [sys.executable, "tests/train/distributed/compare_meshes.py", json.dumps(list(CONFIGS.values()))],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == 6 * len(CONFIGS) - 3
    for row in rows:
        assert row.pop("split") > 0 or row["mesh"] in ("one", "data"), row
        assert row.pop("initial") == 0, row  # parameters are created alike, bit for bit
        assert max(row[key] for key in ("loss", "metrics", "gradients", "moments")) <= 1e-5, row


@pytest.mark.slow
def test_a_device_compares_its_own_pictures_with_all_captions():
    """72 / 8 of each: no device holds all similarities."""
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
    result = subprocess.run(
        [sys.executable, "tests/train/distributed/print_similarities.py"],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.stdout.split() == ["f32[9,72]"], result.stdout + result.stderr


LAYOUTS = {
    "data": ("--config.mesh.data=8",),
    "fsdp": ("--config.mesh.data=1", "--config.mesh.fsdp=8"),
    "fsdp x tensor": ("--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.tensor=4"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dvae", "dalle"])
def test_one_loss_curve_on_every_layout(name, scenes_dir, start_pair, tmp_path):
    config, *overrides = CONFIGS[name]
    overrides += ["--config.models.dalle.heads=4"] if name == "dalle" else []
    overrides += ["--config.batch_size=16", "--config.steps=20", "--config.log.every=1", "--config.wandb.mode=disabled"]
    overrides += ["--config.evaluate.every=1000", "--config.optimizer.schedule.warmup_steps=1"]
    config = config.removeprefix("--config=")
    run_on(1, config, scenes_dir, tmp_path / "one", *overrides)
    expected = losses(tmp_path / "one")
    assert len(expected) == 20
    for layout, mesh in LAYOUTS.items():
        run_on(8, config, scenes_dir, tmp_path / layout, *overrides, *mesh)
        assert losses(tmp_path / layout) == pytest.approx(expected, rel=1e-5), layout
    pair = start_pair(config, tmp_path / "pair", *overrides)
    assert pair.codes() == [0, 0], pair.output()
    assert losses(tmp_path / "pair") == pytest.approx(expected, rel=1e-5)


MOVES = [
    (8, LAYOUTS["data"], 1, ()),
    (1, (), 8, LAYOUTS["fsdp"]),
    (8, LAYOUTS["fsdp"], 8, ("--config.mesh.data=4", "--config.mesh.tensor=2")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "mesh", "devices_after", "mesh_after"), MOVES)
def test_a_checkpoint_moves_between_meshes(devices, mesh, devices_after, mesh_after, scenes_dir, tmp_path, stayed):
    config, fixed = CONFIGS["dvae"][0].removeprefix("--config="), FIXED
    run_on(devices, config, scenes_dir, tmp_path / "moved", *fixed, *mesh, "--config.steps=3")
    run_on(devices_after, config, scenes_dir, tmp_path / "moved", *fixed, *mesh_after, "--config.steps=6")
    assert Run.open(tmp_path / "moved").latest_step() == 6
    assert losses(tmp_path / "moved") == pytest.approx(losses(stayed), rel=1e-5)


FIXED = (*CONFIGS["dvae"][1:], "--config.optimizer.schedule.decay_steps=100", "--config.log.every=1")


@pytest.fixture(scope="module")
def stayed(scenes_dir, tmp_path_factory):
    """Six steps on one device without a move."""
    workdir = tmp_path_factory.mktemp("runs") / "stayed"
    run_on(1, CONFIGS["dvae"][0].removeprefix("--config="), scenes_dir, workdir, *FIXED, "--config.steps=6")
    return workdir
