"""Every config can be described, and every debug variant trains and is sampled from, on the real entry points."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cli.config import from_json, load_config, to_json
from data import scenes
from data.dialogues import encode_dialogue, make_dialogue
from data.pipeline import batch_spec
from data.tokenizer import Tokenizer
from models import create_model
from sample.samplers.diffusion import DiffusionSampler
from sample.trained import TrainedSampler
from scripts.describe import describe
from train.optimizer import create_optimizer
from weights.run import model_of

ROOT = Path(__file__).resolve().parents[2]
# Variants that run what `debug` of the same file does not.
MORE_VARIANTS = tuple(f"configs/paper/{name}" for name in ("uvit.py:debug_coco", "dit.py:debug_sit"))
MORE_VARIANTS += ("configs/paper/latent_diffusion.py:debug_text",)
CONFIGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").glob("*/[a-z]*.py"))


def test_there_are_configs():
    assert {"configs/scenes/dvae.py", "configs/paper/dalle_12b.py"} <= set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_locked_documented_and_survives_json(name):
    config = load_config([f"--config={ROOT / name}"])
    assert config.is_locked
    assert to_json(from_json(to_json(config))) == to_json(config)
    docstring = (ROOT / name).read_text().split('"""')[1]
    assert f"python -m train --config={name}" in docstring and "Paper:" in docstring


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name.split("/")[1] in ("paper", "drawings") else [])
        for name in (*CONFIGS, *MORE_VARIANTS)
    ],
)
def test_the_debug_variant_runs_without_any_other_run(name, debug_run):
    trained = TrainedSampler.open(debug_run(name.removeprefix("configs/")), chunk=2)
    if trained.tokenizer is not None:
        rows = trained.encode(["a small red circle"] * 3)
    elif trained.config.objective == "diffusion":
        rows = {"label": np.zeros(3, np.int32)} if trained.sampler.classes else {}
    else:
        rows = {"image": np.zeros((3, 32, 32, 3), np.uint8)}
    if "text" in trained.sampler.makes and "image" in trained.sampler.reads:  # answers are about pictures
        rows |= trained.picture_rows([np.zeros((32, 32, 3), np.uint8)] * 3)
    outputs = trained(rows, seed=0, indices=range(3))
    assert outputs and all(len(rows) == 3 and np.isfinite(rows).all() for rows in outputs.values())
    assert "image" not in outputs or outputs["image"].shape == (3, 32, 32, 3)


@pytest.mark.parametrize("name", ["latent_unet", "latent_uvit", "latent_dit"])
def test_latents_of_larger_pictures_fit_their_first_stage(name):
    config = load_config([f"--config={ROOT}/configs/scenes/{name}.py:pair64"])
    stage = load_config([f"--config={ROOT}/configs/scenes/autoencoder.py:pair64"])
    assert model_of(config.frozen.first_stage) == model_of(stage.models.autoencoder)
    assert DiffusionSampler.from_config(config).sample_shape == (16, 16, 4)


def test_captions_of_three_objects_fit_their_configs():
    config = load_config([f"--config={ROOT}/configs/scenes/latent_unet.py:pair64"])
    world, rng = scenes.WORLDS["pair64"], np.random.default_rng(0)
    captions = {text for _ in range(2000) for text in scenes.write_captions(world, scenes.sample_scene(world, rng))}
    tokenizer = Tokenizer.train(sorted(captions), 512)
    assert tokenizer.vocab_size == config.models.text.text_vocab_size
    assert not any(tokenizer.encode(text, config.data.text_length).truncated for text in captions)


@pytest.mark.parametrize("world", ["single32", "pair32"])
def test_questions_and_answers_fit_their_configs(world):
    """With a caption before them where they are read without a picture."""
    rng, its_world = np.random.default_rng(0), scenes.WORLDS[world]
    captions = [scenes.write_captions(its_world, scenes.sample_scene(its_world, rng)) for _ in range(1500)]
    tokenizer = Tokenizer.train(sorted({text for texts in captions for text in texts}), 512).with_ends()
    for part in ("llama", "vision_adapter"):
        config = load_config([f"--config={ROOT}/configs/scenes/{part}.py:{world}"])
        assert tokenizer.vocab_size == config.models[part].text_vocab_size
        for texts in captions:
            dialogue = make_dialogue(config.data.dialogues, config.data.dataset, texts, rng)
            assert not encode_dialogue(tokenizer, dialogue, config.data.text_length).truncated, dialogue


def test_published_sizes_have_the_published_parameter_counts():
    stage1 = describe(load_config([f"--config={ROOT}/configs/paper/dvae.py"]), depth=1)
    assert stage1["trained"]["dvae"]["modules"] == {"encoder": 53_786_240, "decoder": 43_829_766}
    # Three quarters of a training step's work is... the forward pass alone is a third of it.
    ratio = stage1["matrix_flops_per_step"] / stage1["matrix_flops_forward"]
    assert 2.9 < ratio < 3.0  # the first convolution needs no gradient of its input


@pytest.mark.parametrize(
    ("name", "parameters", "size", "peak", "adam"),
    [
        ("clip_vit.py", 151_277_313, 224, 5e-4, (0.98, 1e-6)),
        ("clip_vit.py:b16", 149_620_737, 224, 5e-4, (0.98, 1e-6)),
        ("clip_vit.py:l14", 427_616_513, 224, 4e-4, (0.98, 1e-6)),
        ("clip_vit.py:l14_336", 427_944_193, 336, 2e-5, (0.98, 1e-6)),
        ("clip_resnet.py", 102_007_137, 224, 5e-4, (0.999, 1e-8)),
        ("clip_resnet.py:rn101", 119_688_033, 224, 5e-4, (0.999, 1e-8)),
        ("clip_resnet.py:rn50x4", 178_300_601, 288, 5e-4, (0.999, 1e-8)),
        ("clip_resnet.py:rn50x16", 290_979_217, 384, 4e-4, (0.999, 1e-8)),
        ("clip_resnet.py:rn50x64", 623_258_305, 448, 3.6e-4, (0.999, 1e-8)),
    ],
)
def test_published_clips_are_as_published(name, parameters, size, peak, adam):
    """Radford et al. 2021, tables 18 to 20; parameters as the authors' code has them."""
    config = load_config([f"--config={ROOT}/configs/paper/{name}"])
    model = create_model(**config.models.clip)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs(1))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters
    assert config.data.image_size == model.image_size == size
    assert (config.data.text_length, config.data.transform) == (77, "clip_training")
    optimizer, schedule = config.optimizer, config.optimizer.schedule
    assert (schedule.peak, schedule.warmup_steps, optimizer.weight_decay) == (peak, 2000, 0.2)
    assert (optimizer.b2, optimizer.eps) == adam and optimizer.bounds == ((r"logit_scale$", 0.0, math.log(100)),)
    epochs = config.steps * config.batch_size / 400e6
    assert config.batch_size == 32_768 and epochs == pytest.approx(1 if size == 336 else 32, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("ddpm.py", 35_746_307),
        ("uvit.py:cifar10", 44_255_328),
        ("uvit.py:celeba64", 44_292_228),
        ("uvit.py:imagenet64_m", 130_940_292),
        ("uvit.py:imagenet64_l", 286_827_652),
    ],
)
def test_published_diffusions_have_the_published_parameter_counts(name, parameters):
    config = load_config([f"--config={ROOT}/configs/paper/{name}"])
    model = create_model(**config.models.denoiser)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs(1))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters
    _, schedule = create_optimizer(config.optimizer, {"denoiser": shapes}, config.steps)
    assert batch_spec(config.data)["image"][0] == (model.image_size, model.image_size, 3)
    warm_up, peak = config.optimizer.schedule.warmup_steps, config.optimizer.schedule.peak
    rates = [float(schedule(np.int32(step))) for step in (0, warm_up // 2, warm_up, config.steps - 1)]
    assert rates == pytest.approx([0, peak / 2, peak, peak])


def test_published_weight_decay_spares_nothing():
    """The authors' optimizer is given all parameters of U-ViT alike."""
    config = load_config([f"--config={ROOT}/configs/paper/uvit.py:debug"])
    params = {"position": {"embedding": jnp.ones(3)}, "norm": {"scale": jnp.ones(3), "bias": jnp.ones(3)}}
    optimizer, _ = create_optimizer(config.optimizer, params, config.steps)
    state = optimizer.init(params)
    nothing = jax.tree.map(jnp.zeros_like, params)
    _, state = optimizer.update(nothing, state, params)  # at the warm-up's start, of rate 0
    updates, _ = optimizer.update(nothing, state, params)
    assert all(float(jnp.max(update)) == pytest.approx(-0.03 * 3e-4) for update in jax.tree.leaves(updates))


def test_the_12_billion_transformer_is_described_without_memory():
    before = sum(array.nbytes for array in jax.live_arrays())
    config = load_config([f"--config={ROOT}/configs/paper/dalle_12b.py"])
    description = describe(config, depth=1)
    parameters = description["trained"]["dalle"]["parameters"]
    assert 12.285e9 < parameters < 12.30e9
    assert description["frozen"]["dvae"]["parameters"] == 97_616_006
    assert sum(array.nbytes for array in jax.live_arrays()) - before < 1e6
