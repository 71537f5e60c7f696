"""Configs of what latent diffusion's papers published: parameters to the unit, and what else is known of training."""

import functools
import json

import jax
import jax.numpy as jnp
import pytest

from cli.config import load_config
from models import create_model
from sample.samplers.diffusion import DiffusionSampler
from train.objectives.autoencoder import AutoencoderObjective
from train.optimizer import create_optimizer
from weights.formats.diffusers_unet import unet_fields
from weights.run import model_of

KL_F8, CLIP_L14 = 83_653_863, 123_060_480

# Of every part: trained ones in the order of the config, then frozen ones in that of their names.
DIFFUSIONS = {
    "uvit.py:imagenet256_l": (286_763_172, KL_F8),
    "uvit.py:imagenet256_h": (500_832_016, KL_F8),
    "uvit.py:imagenet512_l": (286_861_524, KL_F8),
    "uvit.py:imagenet512_h": (500_942_656, KL_F8),
    "uvit.py:coco_s": (44_692_644, KL_F8, CLIP_L14),
    "uvit.py:coco_s_deep": (58_345_636, KL_F8, CLIP_L14),
    "dit.py": (674_834_720, KL_F8),
    "dit.py:sit_xl2": (674_834_720 - 1153 * 16, KL_F8),  # without the variances that its authors do not read
    "dit.py:s2": (32_963_360 - 256 * 384, KL_F8),  # the authors count fixed positions too
    "dit.py:b2": (130_512_416 - 256 * 768, KL_F8),
    "dit.py:l2": (458_102_816 - 256 * 1024, KL_F8),
    "latent_diffusion.py": (400_920_579 + 1001 * 512, 55_322_782),
    "latent_diffusion.py:text": (872_300_484, 542_895_360, KL_F8),
    "stable_diffusion.py": (859_520_964, KL_F8, CLIP_L14),
    "stable_diffusion.py:v2_256": (865_910_724, KL_F8, 340_387_840),
}
FIRST_STAGES = {
    "kl_f4": (55_312_063, 2_765_633),
    "kl_f8": (KL_F8, 2_765_633),
    "kl_f16": (69_610_963, 2_765_633),
    "kl_f32": (103_880_131, 2_765_633),
    "vq_f4": (55_322_782, 2_765_633),
    "vq_f8": (67_717_295, 663_361),
    "vq_f16": (69_593_371, 663_361),
}
# Of each kind of network one is counted in the fast suite.
SLOW = ("uvit.py:imagenet512_l", "uvit.py:imagenet512_h", "uvit.py:coco_s_deep", "dit.py:b2", "dit.py:l2")
SLOW += ("latent_diffusion.py:text", "stable_diffusion.py:v2_256", "kl_f16", "kl_f32", "vq_f8", "vq_f16")


def fast_and_slow(names):
    return [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in names]


def read(name):
    return load_config([f"--config=configs/paper/{name}"])


@functools.cache
def _count(network: str) -> int:
    model = create_model(**json.loads(network))
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs(1))["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def count(entry) -> int:
    return _count(json.dumps(model_of(entry)))


@pytest.mark.parametrize("name", fast_and_slow(DIFFUSIONS))
def test_parameters_of_diffusions_in_latents(name):
    config = read(name)
    parts = [*config.models.values(), *(config.frozen[part] for part in sorted(config.frozen))]
    assert tuple(map(count, parts)) == DIFFUSIONS[name]
    DiffusionSampler.from_config(config)  # latents are as large as the denoiser's, settings are possible
    devices = 1
    for side in config.mesh.topology.split(":")[1].split("x"):
        devices *= int(side)
    assert config.batch_size % (devices * config.mesh.microbatches) == 0 and devices % config.mesh.fsdp == 0


@pytest.mark.parametrize("name", fast_and_slow(FIRST_STAGES))
def test_first_stages_are_as_published(name):
    config = read(f"first_stage.py:{name}")
    assert tuple(map(count, config.models.values())) == FIRST_STAGES[name]
    assert count(config.frozen.lpips) == 14_714_688 + 1_472
    objective = AutoencoderObjective.from_config(config)
    quantized = name.startswith("vq")
    assert objective.reduction == ("mean" if quantized else "sum") and not objective.output_variance
    assert objective.perceptual_weight == 1
    if quantized:
        assert (objective.commitment, objective.legacy_commitment, objective.codebook_weight) == (0.25, True, 1)
    else:
        assert (objective.kl_weight, objective.discriminator_start, objective.discriminator_weight) == (
            1e-6,
            50_001,
            0.5,
        )
    params = {"autoencoder": {"kernel": jnp.ones(3)}, "discriminator": {"kernel": jnp.ones(3)}}
    _, schedule = create_optimizer(config.optimizer, params, config.steps)
    for step in (0, config.steps - 1):
        assert float(schedule(step)) == pytest.approx(4.5e-6 * config.batch_size)


@pytest.mark.parametrize(
    ("name", "last_alpha_bar"),
    [
        ("dit.py", 4.035830e-05),
        ("latent_diffusion.py", 1.423039e-04),
        ("latent_diffusion.py:text", 4.660095e-03),
        ("stable_diffusion.py", 4.660095e-03),
        ("uvit.py:imagenet256_h", 4.660095e-03),
        ("uvit.py:coco_s", 4.660095e-03),
    ],
)
def test_chains_end_where_the_published_ones_do(name, last_alpha_bar):
    process = DiffusionSampler.from_config(read(name)).process
    assert float(process.schedule.alpha(999)) ** 2 == pytest.approx(last_alpha_bar, rel=1e-5)
    first = 1 if name.startswith("uvit") else 0
    assert [float(process.network_time(jnp.float32(t))) for t in (0, 999)] == [first, 999 + first]
    assert not process.clip


@pytest.mark.parametrize(
    ("name", "dropout", "guidance", "continuous"),
    [
        ("uvit.py:imagenet256_l", 0.15, 1.4, True),
        ("uvit.py:imagenet256_h", 0.1, 1.4, False),
        ("uvit.py:imagenet512_l", 0.15, 1.7, True),
        ("uvit.py:imagenet512_h", 0.1, 1.7, False),
        ("uvit.py:coco_s_deep", 0.1, 2.0, False),
    ],
)
def test_u_vits_in_latents_are_trained_and_guided_as_published(name, dropout, guidance, continuous):
    config = read(name)
    assert config.loss.dropout == dropout and config.sample.guidance == guidance
    assert (config.process.schedule.name == "vp") == continuous
    coco = "coco" in name
    assert config.frozen.first_stage.latent_scale == (0.2301 if coco else 0.18215)
    assert (config.optimizer.b1, config.optimizer.b2) == ((0.9, 0.9) if coco else (0.99, 0.99))
    assert config.batch_size == (256 if coco else 1024)
    assert config.models.denoiser.convolution == ("none" if name.endswith("_h") else "image")


def test_parts_of_stable_diffusion_follow_one_another():
    parts = {name: read(f"stable_diffusion.py:{name}") for name in ("v1_256", "v1_512", "v1_2", "v1_4")}
    starts = [config.initialize.denoiser.source for config in parts.values()]
    assert starts == ["", "runs/sd1_256", "runs/sd1_512", "runs/sd1_2"]
    assert [config.steps for config in parts.values()] == [237_000, 194_000, 515_000, 225_000]
    assert [config.loss.dropout for config in parts.values()] == [0, 0, 0, 0.1]
    config = parts["v1_4"]
    assert config.frozen.text.text_pad_id == config.frozen.text.text_end_id == 49_407
    _, schedule = create_optimizer(config.optimizer, {"denoiser": {"kernel": jnp.ones(3)}}, config.steps)
    assert [float(schedule(step)) for step in (0, 5000, 10_000, 224_999)] == pytest.approx([0, 5e-5, 1e-4, 1e-4])


def test_both_versions_of_stable_diffusion_are_tuned_alike():
    names = ("v1", "v1_text", "v1_full", "v2", "v2_text", "v2_full")
    configs = {name: read(f"stable_diffusion_tuning.py:{name}") for name in names}
    for name, config in configs.items():
        version, _, trained = name.partition("_")
        second = version == "v2"
        source = "pretrained/sd21" if second else "pretrained/sd15"
        entries = [*config.initialize.values(), *config.frozen.values()]
        assert {entry.source for entry in entries} == {source} and config.data.tokenizer.startswith(source)
        assert (config.process.prediction, config.data.image_size) == (("v", 768) if second else ("eps", 512))
        full = trained == "full"
        assert (config.lora.rank, config.ema.decay) == ((0, 0.9999) if full else (4, 0.0))
        assert config.optimizer.schedule.peak == (1e-5 if full else 1e-4)
        assert set(config.models) == ({"denoiser", "text"} if trained == "text" else {"denoiser"})
        text = config.models.text if trained == "text" else config.frozen.text
        assert (text.text_width, text.text_layers, text.text_pad_id) == ((1024, 23, 0) if second else (768, 12, 49_407))


@pytest.mark.parametrize(("version", "heads"), [("v1", 8), ("v2", [5, 10, 20, 20])])
def test_what_a_pipeline_s_unet_may_have_otherwise_can_be_set(version, heads):
    document = {"_class_name": "UNet2DConditionModel", "sample_size": 64, "attention_head_dim": heads}
    fields = unet_fields({**document, "cross_attention_dim": 768})
    settable = set(read(f"stable_diffusion_tuning.py:{version}").models.denoiser)
    assert set(fields) - settable == {"resampler"}  # "convolution" beside transformers
