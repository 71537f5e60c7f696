"""Keys that were changed and have no effect are said; no shipped config has one."""

from pathlib import Path

import pytest

from cli.config import load_config
from train.unread import unread_keys

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("scenes", "paper", "toy")
    for path in (ROOT / "configs" / folder).glob("*.py")
    if path.stem != "__init__"
)


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("argument", ["", ":debug"])
def test_shipped_configs_say_nothing(name, argument):
    assert unread_keys(load_config([f"--config={name}{argument}"])) == []


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        ("toy/swiss_roll", ["optimizer.schedule.name=constant"], []),
        ("toy/swiss_roll", ["optimizer.schedule.name=constant", "optimizer.schedule.end=0.1"], ["schedule.end=0.1"]),
        ("toy/swiss_roll", ["optimizer.schedule.boundaries=(5,)"], ["optimizer.schedule.boundaries=(5,)"]),
        ("paper/ddpm", ["optimizer.schedule.decay_steps=7"], ["schedule.decay_steps=7"]),
        ("paper/ddpm", ["optimizer.schedule.factor=0.1"], ["schedule.factor=0.1"]),
        ("paper/ddpm", ["optimizer.schedule.factor=0.1", "optimizer.schedule.boundaries=(9,)"], []),
        ("toy/swiss_roll", ["optimizer.transform=lion", "optimizer.eps=1e-5"], ["config.optimizer.eps=1e-05"]),
        ("toy/swiss_roll", ["optimizer.transform=sgd", "optimizer.b1=0.5"], ["config.optimizer.b1=0.5"]),
        ("toy/swiss_roll", ["optimizer.transform=sgd", "optimizer.mu_dtype=bfloat16"], ["config.optimizer.mu_dtype="]),
        ("scenes/ddpm_uvit", ["optimizer.b2=0.9"], []),  # the rule of all that is no kernel takes it
        ("toy/swiss_roll", ["optimizer.no_decay=bias"], ["config.optimizer.no_decay='bias'"]),
        ("toy/swiss_roll", ["ema.decay=0.0", "ema.every=5"], ["config.ema.every=5"]),
        ("toy/swiss_roll", ["data.bpe_dropout=0.1"], ["config.data.bpe_dropout=0.1"]),
        ("scenes/dvae", ["data.text_length=12"], ["config.data.text_length=12"]),
        ("scenes/clip", ["data.label_field=shape"], ["config.data.label_field='shape'"]),
        ("scenes/ddpm_uvit", ["process.weighting=uniform", "process.gamma=3.0"], ["config.process.gamma=3.0"]),
        ("scenes/ddpm_uvit", ["process.sigma_data=1.0"], ["config.process.sigma_data=1.0"]),
        ("scenes/latent_unet", ["process.sigma_data=0.5"], ["config.process.sigma_data=0.5"]),
        ("scenes/latent_unet", ["process.sigma_data=0.5", "process.prediction=edm"], []),
        ("scenes/autoencoder", ["loss.measured_examples=64"], []),
        (
            "scenes/autoencoder",
            ["loss.measured_examples=64", "models.autoencoder.latent_scale=0.5"],
            ["config.loss.measured_examples=64"],
        ),
        ("paper/ddpm", ["process.schedule.kind=cosine", "process.schedule.end=0.1"], ["process.schedule.end=0.1"]),
        ("toy/swiss_roll", ["sample.rescale=0.7"], ["config.sample.rescale=0.7"]),
        ("scenes/ddpm_uvit", ["sample.rescale=0.7"], []),
        ("scenes/unidiffuser", ["sample.guidance=1.0", "sample.unconditional=empty"], ["config.sample.unconditional="]),
        ("scenes/dalle", ["models.dalle.conv_kernel=5"], ["config.models.dalle.conv_kernel=5"]),
        ("scenes/dalle", ["models.dalle.conv_edge=clip"], ["config.models.dalle.conv_edge='clip'"]),
        ("scenes/dalle", ["models.dalle.conv_kernel=5", "models.dalle.attention=conv"], []),
        ("scenes/dalle", ["sample.temperature=0.0", "sample.top_k=5"], ["config.sample.top_k=5"]),
    ],
)
def test_a_key_without_effect_is_said(name, overrides, said):
    lines = unread_keys(load_config([f"--config=configs/{name}.py", *(f"--config.{each}" for each in overrides)]))
    assert len(lines) == len(said) and all(part in line for part, line in zip(said, lines, strict=True)), lines
    assert all(" has no effect: " in line and "\n" not in line for line in lines)
