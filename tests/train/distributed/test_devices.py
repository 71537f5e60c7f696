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
    "clip, low-rank pairs": ("--config=configs/scenes/clip.py:debug", "--config.lora.rank=4"),
    "clip, resnet": ("--config=configs/scenes/clip.py:pair32", "--config.batch_size=8"),
    "clip, sigmoid": (
        *("--config=configs/scenes/clip.py:debug", "--config.loss.kind=sigmoid"),
        "--config.models.clip.logit_bias_init=-10.0",
    ),
    "dalle": ("--config=configs/scenes/dalle.py:debug", *FROZEN, "--config.batch_size=8"),
    "dalle, scanned": (
        *("--config=configs/scenes/dalle.py:debug", *FROZEN, "--config.batch_size=8"),
        *("--config.models.dalle.scan=True", "--config.models.dalle.remat=full"),
    ),
    "diffusion, uvit": ("--config=configs/scenes/ddpm_uvit.py:debug",),
    "diffusion, dit": ("--config=configs/scenes/ddpm_dit.py:debug",),
    "diffusion, uvit of classes": (
        "--config=configs/paper/uvit.py:debug",
        "--config.models.denoiser.dtype=float32",
    ),
    "diffusion, latents": (
        *("--config=configs/scenes/latent_unet.py:debug", "--config.models.denoiser.head_width=8"),
        "--config.optimizer.rules=({'pattern': '.*'},)",  # a UNet's Muon takes minutes to compile; a U-ViT has it too
    ),
    "autoencoder": (
        *("--config=configs/scenes/autoencoder.py:debug", "--config.loss.discriminator_start=0"),
        *("--config.models.autoencoder.dtype=float64", "--config.models.discriminator.dtype=float64"),
    ),
    "captioner": ("--config=configs/scenes/captioner.py:debug",),
    "vision_adapter": (
        *("--config=configs/scenes/vision_adapter.py:debug", "--config.loss.pack=2"),
        *("--config.models.vision_adapter.text_vocab_size=354", "--config.models.vision_adapter.image_token=354"),
    ),
    "unidiffuser": ("--config=configs/scenes/unidiffuser.py:debug",),
    "diffusion, ddpm": ("--config=configs/paper/ddpm.py:debug", "--config.models.denoiser.heads=2"),
}


# Every config on a mesh of all three axes, and one of each loss in microbatches too. Each axis alone for CLIP.
# A VQ-VAE's codebook takes microbatches in turn, and a ResNet's statistics are of the whole batch: these differ.
MESHES = {name: ["all"] for name in CONFIGS}
for name in ("dvae", "clip, sigmoid", "dalle", "diffusion, uvit"):
    MESHES[name].append("microbatches")
MESHES["clip"] += ["microbatches", "data", "fsdp", "tensor"]

# Where the gradient of a rectifier or of an absolute error jumps, float32's rounding decides, and a discriminator's is
# a difference of near equal means: in float64, beside which float32 is within 7e-5 (`configs/mesh_rules.py`).
FLOAT64 = ("autoencoder",)


@pytest.mark.slow
@pytest.mark.parametrize("objective", sorted({name.split(",")[0] for name in CONFIGS}))
def test_a_step_on_every_mesh_is_that_of_one_device(objective):
    """Loss, metrics, norms and first moments of the gradients, batch statistics; noise is a part of the same loss."""
    exact = objective in FLOAT64
    keys = ("loss", "metrics", "gradients", "moments", *(["variables"] if exact else []))
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
    chosen = [(CONFIGS[name], MESHES[name]) for name in CONFIGS if name.split(",")[0] == objective]
    result = subprocess.run(
        [sys.executable, "tests/train/distributed/compare_meshes.py", json.dumps(chosen), *(["float64"] * exact)],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [row["mesh"] for row in rows] == [mesh for _, names in chosen for mesh in ("one", *names)]
    for row in rows:
        assert row.pop("split") > 0 or row["mesh"] in ("one", "data"), row
        assert row.pop("initial") == 0, row  # parameters are created alike, bit for bit
        assert max(row[key] for key in keys) <= (1e-11 if exact else 1e-5), row


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
def test_one_loss_curve_on_every_layout(scenes_dir, start_pair, tmp_path):
    config, *overrides = CONFIGS["dalle"]
    overrides += ["--config.models.dalle.heads=4"]
    overrides += ["--config.batch_size=16", "--config.steps=10", "--config.log.every=1"]
    overrides += ["--config.evaluate.every=1000", "--config.optimizer.schedule.warmup_steps=1"]
    config = config.removeprefix("--config=")
    run_on(1, config, scenes_dir, tmp_path / "one", *overrides)
    expected = losses(tmp_path / "one")
    assert len(expected) == 10
    run_on(8, config, scenes_dir, tmp_path / "split", *overrides, *LAYOUTS["fsdp x tensor"])
    assert losses(tmp_path / "split") == pytest.approx(expected, rel=1e-5)
    pair = start_pair(config, tmp_path / "pair", *overrides)  # eight devices along the axis of data
    assert pair.codes() == [0, 0], pair.output()
    assert losses(tmp_path / "pair") == pytest.approx(expected, rel=1e-5)


MOVES = (
    (8, LAYOUTS["data"]),
    (1, ()),
    (8, LAYOUTS["fsdp"]),
    (8, ("--config.mesh.data=4", "--config.mesh.tensor=2")),
)


@pytest.mark.slow
def test_a_checkpoint_moves_between_meshes(scenes_dir, tmp_path):
    config, *fixed = CONFIGS["dvae"]
    config = config.removeprefix("--config=")
    fixed += ["--config.optimizer.schedule.decay_steps=100", "--config.log.every=1", "--config.evaluate.every=1000"]
    fixed += ["--config.wandb.mode=disabled"]
    for end, (devices, mesh) in enumerate(MOVES, start=1):
        run_on(devices, config, scenes_dir, tmp_path / "moved", *fixed, *mesh, f"--config.steps={2 * end}")
    run_on(1, config, scenes_dir, tmp_path / "stayed", *fixed, f"--config.steps={2 * len(MOVES)}")
    assert Run.open(tmp_path / "moved").latest_step() == 2 * len(MOVES)
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "stayed"), rel=1e-5)
