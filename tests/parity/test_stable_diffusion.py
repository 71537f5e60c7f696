"""Whole pipelines of Stable Diffusion 1 and 2 draw what diffusers draws with them, and go back to it.

All weights are random. Each network is compiled once and the samplers' steps are run one by one: compiled in whole, as
`python -m sample` has them, each of the cases would take longer to compile than all of them do now.
"""

import functools
import json
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_open_clip_checkpoint
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

import sample.samplers.diffusion_program
from cli.errors import UserError
from diffusion.process import Process
from diffusion.schedule import DiscreteSchedule
from models import create_model
from sample.first_stage import FirstStage
from sample.trained import TrainedSampler
from scripts.convert import main as convert
from weights.formats import clip_text, compvis, compvis_pipeline, open_clip
from weights.formats.clip_text import clip_text_fields
from weights.formats.diffusers_autoencoder import autoencoder_fields, autoencoder_layout
from weights.formats.diffusers_unet import unet_config, unet_fields, unet_from_diffusers, unet_layout
from weights.run import Run

from ..models.random_parameters import random_parameters
from .stable_diffusion_pipelines import LENGTH, first_noise, make_pipeline, write_tokenizer

SCHEDULER = "scheduler/scheduler_config.json"
# None has "!", which the library takes for the padding of version 2, and not for a sign as the authors do.
PROMPTS = ("a red cat", "a dog and another dog", "red, red.")
NEGATIVE = ("a cat", "blurred", "a cat")
SCHEDULERS = {
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "plms": (PNDMScheduler, {"skip_prk_steps": True}),
    "euler": (EulerDiscreteScheduler, {}),
    "dpm_solver_multistep": (DPMSolverMultistepScheduler, {}),
}


class Compiled:
    """A network whose calls are compiled, whatever they are part of."""

    def __init__(self, model):
        self.model = model
        self.compiled = {}

    def __getattr__(self, name):
        return getattr(self.model, name)

    def apply(self, *arguments, method=None):
        if method not in self.compiled:
            self.compiled[method] = jax.jit(functools.partial(self.model.apply, method=method))
        return self.compiled[method](*arguments)


def scan_step_by_step(body, carry, rows):
    outputs = []
    for i in range(len(rows["t"])):
        carry, output = body(carry, {name: row[i] for name, row in rows.items()})
        outputs.append(output)
    return carry, None if outputs[0] is None else jax.tree.map(lambda *leaves: np.stack(leaves), *outputs)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """{version: (theirs, the folder of it, ours converted)}."""
    made = {}
    for version in (1, 2):
        folder = tmp_path_factory.mktemp(f"stable_diffusion_{version}")
        theirs = make_pipeline(folder / "words", version)
        theirs.save_pretrained(folder / "theirs")
        if version == 1:  # as the published ones, which do not say it: each sampler then has its own
            without_spacing(folder / "theirs" / SCHEDULER)
        convert([f"--input={folder}/theirs", f"--output={folder}/ours"])
        made[version] = (theirs, folder / "theirs", folder / "ours")
    return made


def without_spacing(path):
    config = json.loads(path.read_text())
    del config["timestep_spacing"]
    path.write_text(json.dumps(config))


@pytest.fixture(scope="module")
def samplers(pipelines):
    """{version: ours}, with compiled networks."""
    opened = {}
    for version, (_, _, folder) in pipelines.items():
        trained = TrainedSampler.open(folder, chunk=3)
        sampler = trained.sampler
        for holder in (sampler, sampler.text, sampler.first_stage):
            object.__setattr__(holder, "model", Compiled(holder.model))
        opened[version] = trained
    return opened


@pytest.fixture
def step_by_step(monkeypatch):
    """Runs the samplers step by step; gives the latents that were decoded last."""
    latents = []
    decode = FirstStage.decode
    monkeypatch.setattr(FirstStage, "decode", lambda self, frozen, z: (latents.append(z), decode(self, frozen, z))[1])
    draw = sample.samplers.diffusion_program.draw.__wrapped__

    def eager(*arguments):
        *others, request, keys = arguments
        return draw(*others, jax.tree.map(jnp.asarray, request), keys)

    monkeypatch.setattr(sample.samplers.diffusion_program, "draw", eager)
    monkeypatch.setattr(jax.lax, "scan", scan_step_by_step)
    return latents


def rows_of(trained):
    return {"text": trained.encode(PROMPTS)["text"], "negative": trained.encode(NEGATIVE)["text"]}


def draw_theirs(pipeline, noise, **settings):
    """(latents, pictures) with channels last, pictures in [-1, 1]."""
    latents = pipeline(list(PROMPTS), latents=noise, output_type="latent", **settings).images
    with torch.no_grad():
        pictures = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample.clamp(-1, 1)
    return tuple(each.permute(0, 2, 3, 1).numpy() for each in (latents, pictures))


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("version", [1, 2])
def test_samples_of_every_scheduler(version, kind, pipelines, samplers, step_by_step, monkeypatch):
    """One, five and twenty steps, unguided and guided away from another prompt, three pictures at once."""
    (theirs, folder, _), trained = pipelines[version], samplers[version]
    sampler, rows = trained.sampler, rows_of(trained)
    config, (scheduler, more) = json.loads((folder / SCHEDULER).read_text()), SCHEDULERS[kind]
    if kind == "plms" and version == 2:
        # Of combinations of v theirs makes the noise that ours combines; the version that has PNDM predicts noise.
        config |= {"prediction_type": "epsilon"}
        plain = DiscreteSchedule("scaled_linear", start=0.00085, end=0.012)
        monkeypatch.setitem(sampler.__dict__, "process", Process(plain))
    monkeypatch.setattr(theirs, "scheduler", scheduler.from_config(config, **more))
    noise, drawn = first_noise(sampler, 3), {}
    for steps in (1, 5, 20):
        for guidance in (1.0, 7.5):
            told = {name: row for name, row in rows.items() if name == "text" or guidance != 1}
            settings = {"steps": steps, "guidance": guidance, "sampler": kind}
            ours = trained(told, seed=0, indices=[0, 1, 2], **settings)["image"]
            away = {"negative_prompt": list(NEGATIVE)} if guidance != 1 else {}
            latents, pictures = draw_theirs(theirs, noise, num_inference_steps=steps, guidance_scale=guidance, **away)
            differences = [np.abs(step_by_step[-1] - latents).max(), np.abs(ours - pictures).max()]
            print(version, kind, steps, guidance, *(f"{each:.1e}" for each in differences), f"{latents.std():.2f}")
            assert max(differences) < 1e-3 and pictures.std() > 0.1
            drawn[steps, guidance] = latents
    for steps in (5, 20):
        assert np.abs(drawn[steps, 7.5] - drawn[steps, 1.0]).max() > 0.05  # what is told is seen


@pytest.mark.parametrize("version", [1, 2])
def test_a_pipeline_goes_back(version, pipelines, tmp_path):
    """Strictly loaded by the library, with the same tensors, ids of captions and samples."""
    theirs, _, ours = pipelines[version]
    convert(["--to=diffusers", f"--run={ours}", f"--output={tmp_path}/back"])
    back = StableDiffusionPipeline.from_pretrained(tmp_path / "back")
    back.set_progress_bar_config(disable=True)
    for part in ("unet", "vae", "text_encoder"):
        network = getattr(back, part)
        _, report = type(network).from_pretrained(tmp_path / "back" / part, output_loading_info=True)
        assert not any(report.values()), (part, report)
        ours, tensors = network.state_dict(), getattr(theirs, part).state_dict()
        assert ours.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(ours[name], tensor), name
    assert type(back.scheduler) is type(theirs.scheduler)
    said, saying = dict(theirs.scheduler.config), dict(back.scheduler.config)
    assert {key: value for key, value in saying.items() if key[0] != "_" and said.get(key, value) != value} == {}
    settings = {"num_inference_steps": 3, "negative_prompt": list(NEGATIVE)}
    noise = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 4, 8, 8)).astype(np.float32))
    for one, other in zip(draw_theirs(theirs, noise, **settings), draw_theirs(back, noise, **settings), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_variants_of_files(pipelines, tmp_path):
    """Half precision, shards, the names of today's text towers and of old attention: the same folder comes out."""
    theirs, folder, ours = pipelines[1]
    other = tmp_path / "variants"
    theirs.save_pretrained(other, variant="fp16", max_shard_size="1MB")
    without_spacing(other / SCHEDULER)
    assert sorted((other / "unet").glob("*.index.fp16.json"))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    file = next((other / "vae").glob("*.safetensors"))
    tensors = {}
    for name, tensor in load_file(file).items():
        for new, before in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        tensors[name] = tensor.half()
    assert any(".query." in name for name in tensors)
    save_file(tensors, file)
    file = next((other / "text_encoder").glob("*.safetensors"))
    tensors = {name.removeprefix("text_model."): tensor.half() for name, tensor in load_file(file).items()}
    tensors["embeddings.position_ids"] = torch.arange(16)[None]
    save_file(tensors, file)
    convert([f"--input={other}", f"--output={tmp_path}/ours"])
    runs = [Run.open(place) for place in (ours, tmp_path / "ours")]
    assert runs[0].config == runs[1].config
    parts = tuple(runs[0].models())
    params = [run.load(parts=parts).params for run in runs]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), *params)
    jax.tree.map(np.testing.assert_array_equal, params[0]["denoiser"], params[1]["denoiser"])
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a.astype(np.float16), b),
        *(tree["first_stage"] for tree in params),
    )


SHARED: dict[str, Any] = {"sample_size": 64, "block_out_channels": (320, 640, 1280, 1280)}
PUBLISHED: dict[int, Any] = {
    1: (
        {**SHARED, "attention_head_dim": 8, "cross_attention_dim": 768},
        {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12},
        (859_520_964, 123_060_480),
    ),
    2: (
        {
            **{**SHARED, "attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024},
            "use_linear_projection": True,
        },
        {
            **{"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23},
            "hidden_act": "gelu",
        },
        (865_910_724, 340_387_840),
    ),
}


@pytest.mark.parametrize("version", PUBLISHED)
def test_published_shapes(version):
    """Every tensor of theirs has its place in ours and back, nothing left over; by shapes alone."""
    unet, text, counts = PUBLISHED[version]
    vae = {
        **{"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4, "sample_size": 512},
        **{"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4},
    }
    with torch.device("meta"):
        networks = UNet2DConditionModel(**unet), CLIPTextModel(CLIPTextConfig(**text)), AutoencoderKL(**vae)
    configs: list[dict[str, Any]] = [
        *(dict(networks[0].config), networks[1].config.to_dict(), dict(networks[2].config)),
    ]
    fields = (
        unet_fields({**configs[0], "_class_name": "UNet2DConditionModel"}),
        clip_text_fields(configs[1], 49407, 49407),
        autoencoder_fields({**configs[2], "_class_name": "AutoencoderKL"}),
    )
    models = [create_model(**each) for each in fields]
    layouts = unet_layout(models[0]), clip_text.LAYOUT, autoencoder_layout(models[2])
    for network, model, layout, count, number in zip(
        networks, models, layouts, (*counts, 83_653_863), (686, 196 if version == 1 else 372, 248), strict=True
    ):
        shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        if model is models[1]:
            shapes = {name: shapes[name.removeprefix("text_model.")] for name in clip_text.with_prefix(shapes)}
        theirs = {name: np.broadcast_to(np.zeros((), np.float32), shape) for name, shape in shapes.items()}
        ours = layout.read_deferred(model, theirs)["params"]  # refuses what is missing, unexpected, of another shape
        assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(ours)) == count
        written = layout.write_deferred({"params": ours})
        assert {name: tensor.shape for name, tensor in written.items()} == shapes and len(shapes) == number


@pytest.mark.parametrize("version", [1, 2])
def test_one_file_of_the_authors(version, tmp_path, capsys):
    """Names as the library's own converter has them, without an OpenCLIP's last layer, and the moving average."""
    second = version == 2
    width, tokens = (64, 64) if second else (32, 128)
    unet = {
        **{"name": "unet", "image_size": 8, "in_channels": 4, "out_channels": 4, "width": width, "multipliers": (1, 2)},
        **{"attention_levels": (0,), "blocks": 2, "attention": "transformer", "num_classes": 0},
        **{"context_width": tokens, "linear_projection": second, "time_width": 4 * width},
        **({"head_width": 64} if second else {"heads": 8}),
    }
    stage = {
        **{"name": "autoencoder_kl", "image_size": 16, "channels": 3, "width": 32, "multipliers": (1, 2)},
        **{"attention_levels": (), "blocks": 1, "latent_channels": 4, "latent_scale": 0.18215},
    }
    words = write_tokenizer(tmp_path / "words", "!" if second else "<|endoftext|>")
    text = {
        **{"name": "clip_text", "text_vocab_size": len(words), "text_length": LENGTH, "text_end_id": len(words) - 1},
        **{"text_pad_id": 0 if second else len(words) - 1, "text_width": tokens, "text_layers": 2},
        **{"text_heads": tokens // 64, "activation": "gelu" if second else "quick_gelu"},
    }
    models = {part: create_model(**each) for part, each in (("denoiser", unet), ("first_stage", stage), ("text", text))}
    params = {part: random_parameters(model) for part, model in models.items()}
    tensors = {
        "model.diffusion_model." + name: each
        for name, each in compvis_pipeline.unet_layout(models["denoiser"]).write({"params": params["denoiser"]}).items()
    }
    theirs = convert_ldm_unet_checkpoint(
        {name: torch.from_numpy(each) for name, each in tensors.items()}, unet_config(models["denoiser"])
    )
    assert_equal(
        unet_from_diffusers(models["denoiser"], {k: v.numpy() for k, v in theirs.items()})[0], params["denoiser"]
    )
    if not second:
        averages = {f"model_ema.{name[6:].replace('.', '')}": 2 * each for name, each in tensors.items()}
        tensors |= averages | {"model_ema.decay": np.asarray(0.9999), "model_ema.num_updates": np.asarray(1)}
        params["denoiser"] = jax.tree.map(lambda leaf: 2 * leaf, params["denoiser"])
    written = compvis.autoencoder_layout(models["first_stage"]).write({"params": params["first_stage"]})
    tensors |= {f"first_stage_model.{name}": each for name, each in written.items()}
    if second:
        deeper = random_parameters(create_model(**{**text, "text_layers": 3}))
        written = open_clip.CLIP.write({"params": {"text": {**deeper["text"], **params["text"]["text"]}}})
        written |= {"logit_scale": np.zeros(()), "text_projection": np.zeros((tokens, tokens), np.float32)}
        prefix = "cond_stage_model.model."
        reference = SimpleNamespace(config=SimpleNamespace(hidden_size=tokens))
        theirs = convert_open_clip_checkpoint(
            reference, {prefix + name: torch.from_numpy(np.asarray(each)) for name, each in written.items()}, prefix
        )
        theirs = {k: v.numpy() for k, v in theirs.items() if ".layers.2." not in k and "projection" not in k}
        assert_equal(clip_text.LAYOUT.read(models["text"], clip_text.with_prefix(theirs))["params"], params["text"])
    else:
        prefix, written = "cond_stage_model.transformer.", clip_text.LAYOUT.write({"params": params["text"]})
        written["text_model.embeddings.position_ids"] = np.arange(LENGTH)[None]
    tensors |= {prefix + name: each for name, each in written.items()}
    tensors["scale_factor"] = np.asarray(0.18215)
    torch.save({"state_dict": {k: torch.from_numpy(np.array(v)) for k, v in tensors.items()}}, tmp_path / "sd-v1.ckpt")
    arguments = [f"--input={tmp_path}/sd-v1.ckpt", f"--output={tmp_path}/ours", f"--tokenizer={tmp_path}/words"]
    if second:
        with pytest.raises(UserError, match="give --prediction=v"):
            convert([*arguments, "--image_size=16"])
    convert([*arguments, "--image_size=16", f"--prediction={'v' if second else 'eps'}"])
    assert second or "the moving average is taken" in capsys.readouterr().out
    run = Run.open(tmp_path / "ours")
    assert_equal(run.load(parts=tuple(params)).params, params)
    assert create_model(**run.config.models.denoiser) == models["denoiser"]
    assert run.config.process.prediction == ("v" if second else "eps") and run.config.data.image_size == 16
    assert TrainedSampler.open(tmp_path / "ours").sampler.text.model == models["text"]


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)
