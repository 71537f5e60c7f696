"""Low-rank pairs beside a Stable Diffusion of diffusers: trained here, and drawn alike by both, whoever made the file.

All base weights are random and small; see tests/parity/stable_diffusion_pipelines.py.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextModel

from cli.config import load_config
from cli.errors import EXIT_OK, UserError
from models import create_model
from models.conditioning import Conditioning
from sample.trained import TrainedSampler
from scripts.convert import main as convert
from scripts.prepare import main as prepare
from train.loop import train
from weights.files.tensors import read_tensors
from weights.run import Run, model_of, read_metrics

from .stable_diffusion_pipelines import LENGTH, first_noise, make_pipeline

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["a red cat", "a dog"]
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # which peft asks of transformers
NAME = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """theirs/ and ours/, a pipeline converted; eight captioned pictures as folder/pictures."""
    home = tmp_path_factory.mktemp("lora")
    make_pipeline(home / "words", 1).save_pretrained(home / "theirs")
    convert([f"--input={home}/theirs", f"--output={home}/ours"])
    rng = np.random.default_rng(0)
    (home / "pictures").mkdir()
    for index in range(8):
        color = rng.integers(0, 256, 3)
        Image.fromarray(np.full((16, 16, 3), color, np.uint8)).save(home / "pictures" / f"{index}.png")
        (home / "pictures" / f"{index}.txt").write_text(f"a {'red cat' if index % 2 else 'dog'} {index}")
    prepare(
        [
            *("--dataset=folder", f"--source={home}/pictures", "--name=pictures", f"--data_dir={home}/data"),
            *("--workers=1", "--min_size=8", "--validation=0.25"),
        ]
    )
    return home


def config_of(home, variant, *overrides):
    """The published config, with the small pipeline's networks."""
    settings = (
        *(
            "steps=8",
            "batch_size=4",
            "data.dataset=folder/pictures",
            f"data.data_dir={home}/data",
            "data.image_size=16",
        ),
        *(f"data.text_length={LENGTH}", f"data.tokenizer={home}/ours/tokenizer.json", "data.workers=1"),
        *("optimizer.schedule.warmup_steps=0", "evaluate.every=8", "evaluate.batches=2", "checkpoint.every=8"),
        *("sample.steps=2", "wandb.mode=disabled"),
    )
    config = load_config(
        [
            f"--config={ROOT}/configs/paper/stable_diffusion_tuning.py:{variant}",
            *(f"--config.{each}" for each in (*settings, *overrides)),
        ]
    )
    converted = Run.open(home / "ours").config
    with config.unlocked():
        for group in (config.frozen, config.initialize):
            for entry in group.values():
                entry.source = str(home / "ours")
        config.frozen.first_stage.dtype = "float32"
        config.models.denoiser = converted.models.denoiser
        if "text" in config.models:
            config.models.text = ConfigDict(model_of(converted.frozen.text))
    return config


@pytest.fixture(scope="module")
def trained(home):
    """A run of pairs beside the UNet and the text tower."""
    settings = ("lora.rank=2", "lora.alpha=6.0", "optimizer.schedule.peak=2e-2", "process.weighting=min_snr")
    assert train(config_of(home, "v1_text", *settings, "ema.decay=0.5"), home / "run") == EXIT_OK
    return home / "run"


@pytest.fixture(scope="module")
def theirs(home):
    """A fresh pipeline."""

    def pipeline():
        loaded = StableDiffusionPipeline.from_pretrained(home / "theirs")
        loaded.scheduler = DDIMScheduler.from_config(loaded.scheduler.config, clip_sample=False)
        loaded.set_progress_bar_config(disable=True)
        return loaded

    return pipeline


def draw_theirs(pipeline, noise):
    settings = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    latents = pipeline(PROMPTS, latents=noise, **settings).images
    with torch.no_grad():
        pictures = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    return pictures.clamp(-1, 1).permute(0, 2, 3, 1).numpy()


def draw_ours(folder):
    opened = TrainedSampler.open(folder, chunk=2)
    settings = {"steps": 2, "guidance": 1.0, "sampler": "ddim", "spacing": "leading"}
    return opened(opened.encode(PROMPTS), seed=0, indices=[0, 1], **settings)["image"], opened.sampler


def outputs_of(unet, text, folder):
    """Largest differences of (noise, features of captions) between their networks and those of our folder."""
    run = Run.open(folder)
    params, rng = run.load(parts=tuple(run.models())).params, np.random.default_rng(1)
    x, t = rng.normal(size=(2, 4, 8, 8)).astype(np.float32), np.array([3.0, 700.0], np.float32)
    context, ids = rng.normal(size=(2, LENGTH, 24)).astype(np.float32), rng.integers(0, 99, (2, LENGTH))
    with torch.no_grad():
        expected = unet(torch.from_numpy(x), torch.from_numpy(t), torch.from_numpy(context)).sample.numpy()
        features = text(torch.from_numpy(ids)).last_hidden_state.numpy()
    models = {part: create_model(**fields) for part, fields in run.models().items()}
    told = Conditioning(tokens=jax.numpy.asarray(context))
    noise = jax.jit(lambda p, *a: models["denoiser"].apply({"params": p}, *a))(
        params["denoiser"], jax.numpy.asarray(x.transpose(0, 2, 3, 1)), jax.numpy.asarray(t), told
    )
    difference = [np.abs(np.asarray(noise).transpose(0, 3, 1, 2) - expected).max()]
    if "text" in models:
        ours = models["text"].apply({"params": params["text"]}, jax.numpy.asarray(ids, jax.numpy.int32))
        difference.append(np.abs(np.asarray(ours) - features).max())
    return difference


def test_a_few_updates_on_eight_pictures(home, trained, theirs, tmp_path):
    """Loss falls, samples change, merged is unmerged, and diffusers draws the same with our file."""
    losses = [row["validation/loss"] for row in read_metrics(trained) if "validation/loss" in row]
    assert losses[-1] < 0.95 * losses[0], losses
    for name in ("merged", "file"):
        convert(
            [
                f"--to={'pretrained' if name == 'merged' else 'diffusers_lora'}",
                f"--run={trained}",
                f"--output={tmp_path}/{name}",
            ]
        )
    merged, apart = (Run.open(folder) for folder in (tmp_path / "merged", trained))
    assert merged.config.lora.rank == 0 and set(merged.models()) == {"denoiser", "text", "first_stage"}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged.load().params, apart.load().params)
    before, sampler = draw_ours(home / "ours")
    after, _ = draw_ours(trained)
    assert np.abs(after - before).max() > 0.05
    noise = first_noise(sampler, 2)
    pipeline = theirs()
    np.testing.assert_allclose(draw_theirs(pipeline, noise), before, atol=1e-4)
    pipeline.load_lora_weights(tmp_path / "file")
    np.testing.assert_allclose(draw_theirs(pipeline, noise), after, atol=1e-4)
    convert(["--to=diffusers", f"--run={trained}", f"--output={tmp_path}/pipeline"])
    whole = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert max(outputs_of(whole.unet, whole.text_encoder, trained)) < 1e-4
    size = (tmp_path / "file" / NAME).stat().st_size
    assert size < 0.1 * (tmp_path / "merged" / "weights.safetensors").stat().st_size


def test_a_part_of_the_network_is_tuned_in_whole_and_goes_out(home, tmp_path):
    """By path, with captions left out, weighed steps and a moving average; the rest stays as it was."""
    settings = (
        "trainable=('attention/',)",
        "process.weighting=min_snr",
        "ema.decay=0.9",
        "steps=2",
        "evaluate.every=2",
    )
    assert train(config_of(home, "v1_full", *settings), tmp_path / "run") == EXIT_OK
    tuned, before = (
        flatten_dict(Run.open(folder).load().params, sep="/") for folder in (tmp_path / "run", home / "ours")
    )
    changed = {path for path, leaf in tuned.items() if not np.array_equal(leaf, before[path])}
    assert changed == {path for path in tuned if "attention/" in path}
    convert(["--to=diffusers", f"--run={tmp_path}/run", f"--output={tmp_path}/pipeline"])
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "pipeline" / "unet")
    assert max(outputs_of(unet, their_networks(home)[1], tmp_path / "run")) < 1e-4


def random_pairs(network, seed, **settings):
    """Another project's network with pairs of its own making, of random values on both sides."""
    generator = torch.Generator().manual_seed(seed)
    adapted = get_peft_model(network, LoraConfig(**settings))
    with torch.no_grad():
        for name, tensor in adapted.named_parameters():
            if "lora_" in name:
                tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
    return adapted.eval()


UNET = {
    "r": 3,
    "lora_alpha": 6,
    # Keys and values without queries in some, convolutions with and without windows, ranks and factors of some alone.
    "target_modules": r".*(attn1\.to_[qkv]|attn2\.to_[kv]|to_out\.0|proj_in|resnets\.0\.conv1|ff\.net\.0\.proj)",
    "rank_pattern": {"attn1.to_k": 2},
    "alpha_pattern": {"attn2.to_v": 1.5},
}
TEXT = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj", "fc1"], "use_rslora": True}


def their_networks(home):
    return UNet2DConditionModel.from_pretrained(home / "theirs" / "unet"), CLIPTextModel.from_pretrained(
        home / "theirs" / "text_encoder"
    )


def test_files_of_the_library_and_of_peft_are_drawn_as_there(home, tmp_path, capsys):
    """Through its own writer, with metadata; in the names of older versions and of trainers, with alphas; by peft."""
    unet, text = their_networks(home)
    unet, text = random_pairs(unet, 1, **UNET), random_pairs(text, 2, **TEXT)
    layers = [get_peft_model_state_dict(each) for each in (unet, text)]
    layers = [{name.removeprefix("base_model.model."): value for name, value in each.items()} for each in layers]
    metadata = [dict(each.peft_config["default"].to_dict()) for each in (unet, text)]
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "new",
        *layers,
        unet_lora_adapter_metadata={key: metadata[0][key] for key in UNET},
        text_encoder_lora_adapter_metadata={key: metadata[1][key] for key in TEXT},
    )
    convert([f"--input={tmp_path}/new", f"--base={home}/ours", f"--output={tmp_path}/ours"])
    assert "pairs of rank 3" in capsys.readouterr().out
    assert max(outputs_of(unet, text, tmp_path / "ours")) < 1e-4
    assert max(outputs_of(*their_networks(home), tmp_path / "ours")) > 0.1  # they do something

    def scale(which, name):
        config = (unet, text)[which].peft_config["default"]
        rank = next(v for k, v in (*config.rank_pattern.items(), ("", config.r)) if name.endswith(k))
        alpha = next(v for k, v in (*config.alpha_pattern.items(), ("", config.lora_alpha)) if name.endswith(k))
        return alpha * (rank**0.5 if config.use_rslora else 1.0)  # what alpha / rank is to give

    older, trainers = {}, {}
    for which, (prefix, other) in enumerate((("unet", "lora_unet_"), ("text_encoder", "lora_te_"))):
        for name, tensor in layers[which].items():
            module, side = name.removesuffix(".weight").rsplit(".lora_", 1)
            alpha = torch.tensor(scale(which, module))
            word = {"A": "down", "B": "up"}[side]
            older[f"{prefix}.{module}.{'lora' if which == 0 else 'lora_linear_layer'}.{word}.weight"] = (
                tensor.contiguous()
            )
            older[f"{prefix}.{module}.alpha"] = alpha
            full = module if which == 0 or module.startswith("text_model.") else f"text_model.{module}"
            trainers[f"{other}{full.replace('.', '_')}.lora_{word}.weight"] = tensor.contiguous()
            trainers[f"{other}{full.replace('.', '_')}.alpha"] = alpha
    expected = read_tensors(tmp_path / "ours" / "weights.safetensors")
    for kind, tensors in (("older", older), ("trainers", trainers)):
        save_file(tensors, tmp_path / f"{kind}.safetensors")
        convert([f"--input={tmp_path}/{kind}.safetensors", f"--base={home}/ours", f"--output={tmp_path}/{kind}"])
        found = read_tensors(tmp_path / kind / "weights.safetensors")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            np.testing.assert_allclose(found[name], tensor, rtol=1e-6, atol=1e-7)
    for network, part in ((unet, 0), (text, 1)):
        network.save_pretrained(tmp_path / f"peft{part}")
        convert([f"--input={tmp_path}/peft{part}", f"--base={home}/ours", f"--output={tmp_path}/one{part}"])
        mixed = their_networks(home)
        difference = outputs_of(*((network, mixed[1]) if part == 0 else (mixed[0], network)), tmp_path / f"one{part}")
        assert max(difference) < 1e-4


def test_what_is_imported_goes_out_again_to_both_and_into_one_folder(home, tmp_path):
    unet, text = their_networks(home)
    unet = random_pairs(unet, 3, **UNET)
    unet.save_pretrained(tmp_path / "peft")
    convert([f"--input={tmp_path}/peft", f"--base={home}/ours", f"--output={tmp_path}/ours"])
    convert(["--to=peft", f"--run={tmp_path}/ours", f"--output={tmp_path}/again"])
    again = PeftModel.from_pretrained(their_networks(home)[0], tmp_path / "again").eval()
    assert max(outputs_of(again, text, tmp_path / "ours")) < 1e-4
    convert(["--to=diffusers", f"--run={tmp_path}/ours", f"--output={tmp_path}/pipeline"])
    merged = UNet2DConditionModel.from_pretrained(tmp_path / "pipeline" / "unet")
    assert max(outputs_of(merged, text, tmp_path / "ours")) < 1e-4


def files(home, tmp_path):
    """A plain pair of each kind of file, to be damaged."""
    pair = {"lora_A.weight": torch.ones(2, 32), "lora_B.weight": torch.ones(32, 2)}
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    (tmp_path / "peft").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "bias": "none"}
    return {f"{module}.{name}": tensor for name, tensor in pair.items()}, config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, c: t.pop(next(iter(t))), "one half of a pair alone for .*down_blocks"),
        (lambda t, c: t.update({"conv_in.weight": torch.ones(2)}), "holds what is no low-rank pair: "),
        (lambda t, c: t.update({next(iter(t)): torch.ones(2, 5)}), r"is \(2, 5\) and \(32, 2\), and its network takes"),
        (lambda t, c: t.update({next(iter(t)): torch.ones(())}), "and its network takes"),
        (lambda t, c: t.update({next(iter(t)): torch.full((2, 32), torch.nan)}), "NaN"),
        (lambda t, c: t.update({f"x.{k}": t.pop(k) for k in list(t)}), "a pair for x.down_blocks"),
        (lambda t, c: c.update(use_dora=True), "use_dora=True, which is not converted"),
        (lambda t, c: c.update(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (lambda t, c: c.update(modules_to_save=["conv_in"]), "modules_to_save"),
        (lambda t, c: c.update(lora_alpha="two"), "alpha of down_blocks.*'two'; it must be a number"),
        (lambda t, c: c.update(alpha_pattern=3), "alpha_pattern that is no object"),
        (lambda t, c: c.update(peft_type="IA3"), "peft_type 'IA3'"),
        (lambda t, c: t.clear(), "holds no low-rank pairs"),
    ],
)
def test_a_malformed_adapter_is_one_line_and_nothing_is_written(change, message, home, tmp_path):
    tensors, config = files(home, tmp_path)
    change(tensors, config)
    save_file(
        {f"base_model.model.{name}": value for name, value in tensors.items()},
        tmp_path / "peft" / "adapter_model.safetensors",
    )
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as error:
        convert(["--source=peft", f"--input={tmp_path}/peft", f"--base={home}/ours", f"--output={tmp_path}/out"])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
