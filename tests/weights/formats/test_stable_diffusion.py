"""Pipelines of Stable Diffusion in and out, and what is refused of them; tests/parity draws with them."""

import json
import shutil

import jax
import numpy as np
import pytest
from huggingface_hub import constants

from cli.errors import UserError
from sample.samplers import create_sampler
from sample.trained import CHUNK, TrainedSampler
from scripts.convert import main as convert
from weights.files.origin import Folder
from weights.formats.diffusers_pipeline import read_tokenizer
from weights.formats.diffusers_scheduler import SAMPLERS, read_scheduler, scheduler_config
from weights.run import Run

from ..stable_diffusion_samples import FIRST_STAGE, LENGTH, PROCESS, SAMPLE, TEXT, WEIGHTS, change_json
from ..unet_samples import STABLE_DIFFUSION_1

EULER = {"_class_name": "EulerDiscreteScheduler"}


def test_all_parts_become_one_folder_that_samples(theirs, ours):
    run = Run.open(ours)
    assert run.config.models.denoiser.to_dict() == STABLE_DIFFUSION_1
    stage, text = (run.config.frozen[part].to_dict() for part in ("first_stage", "text"))
    assert FIRST_STAGE.items() <= stage.items() and TEXT.items() <= text.items() and stage["source"] == "."
    assert run.config.process.to_dict() == PROCESS and run.config.sample.to_dict() == SAMPLE
    assert (run.config.data.image_size, run.config.data.text_length) == (16, LENGTH)
    loaded = run.load(parts=tuple(theirs[1])).params
    jax.tree.map(np.testing.assert_array_equal, loaded, theirs[1])
    words = run.tokenizer()
    assert words is not None and words.encode("a cat", LENGTH).ids[-1] == words.end_id == words.pad_id
    sampler = create_sampler(run.config)
    assert sampler.text.blank[1:] == (words.end_id,) * (LENGTH - 1) and sampler.reads == ("text",)


def test_it_goes_back_file_by_file(theirs, ours, tmp_path):
    convert(["--to=diffusers", f"--run={ours}", f"--output={tmp_path}/back"])
    files = {path.relative_to(theirs[0]) for path in theirs[0].rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path / "back") for path in (tmp_path / "back").rglob("*") if path.is_file()}
    for file in files:
        assert (theirs[0] / file).read_bytes() == (tmp_path / "back" / file).read_bytes(), file


def test_large_pictures_are_drawn_in_smaller_chunks(ours, tmp_path):
    assert TrainedSampler.open(ours).chunk == CHUNK
    shutil.copytree(ours, tmp_path / "large")
    config = json.loads((tmp_path / "large" / "config.json").read_text())
    config["data"]["image_size"], config["models"]["denoiser"]["image_size"] = 512, 256
    (tmp_path / "large" / "config.json").write_text(json.dumps(config))
    assert TrainedSampler.open(tmp_path / "large").chunk == 1


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("scheduler/scheduler_config.json", {"gamma": 1}, "gamma: not known here"),
        ("scheduler/scheduler_config.json", {**EULER, "use_karras_sigmas": True}, "use_karras_sigmas is True; it must"),
        ("scheduler/scheduler_config.json", {"timestep_spacing": "even"}, "timestep_spacing is 'even'; it must be one"),
        ("scheduler/scheduler_config.json", {**EULER, "final_sigmas_type": "sigma_min"}, "final_sigmas_type is"),
        ("scheduler/scheduler_config.json", {**EULER, "rescale_betas_zero_snr": True}, "where a chain ends in noise"),
        ("scheduler/scheduler_config.json", {"beta_end": 1.0}, "has the scheduler of no diffusion: .* end=1.0 is"),
        ("text_encoder/config.json", {"model_type": "t5"}, "the text encoder is of model_type 't5'"),
        ("text_encoder/config.json", {"vocab_size": 100}, "has 100 ids, and its tokenizer uses 5"),
        (
            "text_encoder/config.json",
            {"hidden_size": 8, "intermediate_size": 32},
            "text encoder has width 8|are not the",
        ),
        ("tokenizer/special_tokens_map.json", {"pad_token": 1}, "filled up with 1; it must be a token"),
        (
            "tokenizer/tokenizer_config.json",
            {"pad_token": "<pad>", "added_tokens_decoder": {}},
            "pad with '<pad>', which is none of its",
        ),
        ("unet/config.json", {"in_channels": 9}, "are not the weights|more than latents"),
        ("model_index.json", {"text_encoder_2": ["transformers", "CLIPTextModel"]}, "not converted: text_encoder_2"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(file, changes, message, theirs, tmp_path):
    shutil.copytree(theirs[0], tmp_path / "theirs")
    change_json(tmp_path / "theirs" / file, **changes)
    with pytest.raises(UserError, match=message):
        convert([f"--input={tmp_path}/theirs", f"--output={tmp_path}/ours"])
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("config", "special", "pad"),
    [
        ({"pad_token": ...}, {"pad_token": "!"}, "!"),
        ({"pad_token": "<|endoftext|>"}, {"pad_token": {"content": "!"}}, "!"),
        ({"pad_token": "<|endoftext|>", "added_tokens_decoder": {}}, {"pad_token": "!"}, "<|endoftext|>"),
        ({"pad_token": "!"}, {"pad_token": ...}, "!"),
        ({"pad_token": ...}, {"pad_token": ...}, "<|endoftext|>"),
    ],
)
def test_captions_are_filled_up_as_either_layout_of_a_folder_says(config, special, pad, theirs, tmp_path):
    """Old folders, such as the hub's version 2, say it in the map alone."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(theirs[0] / "tokenizer", folder)
    change_json(folder / "tokenizer_config.json", **config)
    change_json(folder / "special_tokens_map.json", **special)
    assert read_tokenizer(Folder(folder)).clip_vocabulary().pad == pad
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json is not valid JSON"):
        read_tokenizer(Folder(folder))


def test_every_scheduler_draws_in_as_many_steps_as_the_pipeline(theirs, tmp_path):
    shutil.copytree(theirs[0], tmp_path / "theirs")
    change_json(
        tmp_path / "theirs/scheduler/scheduler_config.json",
        **{"_class_name": "UniPCMultistepScheduler", "set_alpha_to_one": ..., "skip_prk_steps": ...},
    )
    convert([f"--input={tmp_path}/theirs", f"--output={tmp_path}/ours"])
    sampling = Run.open(tmp_path / "ours").config.sample
    assert (sampling.sampler, sampling.steps) == ("unipc", 50)


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_the_variance_of_ancestral_steps_goes_out_and_comes_back(variance):
    process = {**PROCESS, "variance": variance}
    assert read_scheduler(scheduler_config(process, {**SAMPLE, "sampler": "ddpm"}))[0] == process
    for sampler, _ in SAMPLERS.values():
        if variance == "learned" and sampler != "ddpm":
            with pytest.raises(UserError, match="learned, which DDPMScheduler alone reads, and its sampler is"):
                scheduler_config(process, {**SAMPLE, "sampler": sampler})


def test_what_no_file_of_a_pipeline_says_is_said(ours, tmp_path, capsys):
    arguments = ["--to=diffusers", f"--run={tmp_path}/run"]
    shutil.copytree(ours, tmp_path / "run")
    convert([*arguments, f"--output={tmp_path}/one"])
    assert "warning" not in capsys.readouterr().out
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["sample"] |= {"steps": 20, "guidance_stop": 0.5, "eta": 1.0}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    convert([*arguments, f"--output={tmp_path}/two"])
    assert "files of a pipeline do not say steps 20, eta 1.0, guidance_stop 0.5, which" in capsys.readouterr().out


def test_parts_that_are_left_out_are_named(theirs, tmp_path, capsys):
    shutil.copytree(theirs[0], tmp_path / "theirs")
    change_json(tmp_path / "theirs" / "model_index.json", safety_checker=["stable_diffusion", "SafetyChecker"])
    convert([f"--input={tmp_path}/theirs", f"--output={tmp_path}/ours"])
    assert "safety checker is left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("subfolder", "without", "option", "what"),
    [
        ("vae", (), "tokenizer", "a first stage"),
        ("", ("text_encoder",), "tokenizer", "a UNet without a text encoder"),
        ("", ("text_encoder", "vae"), "latent_scale", "a network without a first stage"),
    ],
)
def test_options_that_a_folder_does_not_read_are_refused(subfolder, without, option, what, theirs, tmp_path):
    shutil.copytree(theirs[0], tmp_path / "theirs")
    for folder in without:
        shutil.rmtree(tmp_path / "theirs" / folder)
    with pytest.raises(UserError, match=f"--{option} says nothing of {what}; leave it out"):
        convert(
            [f"--subfolder={subfolder}", f"--{option}=1", f"--input={tmp_path}/theirs", f"--output={tmp_path}/ours"]
        )


@pytest.mark.parametrize(
    ("missing", "flags", "message"),
    [
        ("unet/config.json", (), "none of the formats by its files in the hub's cache, and HF_HUB_OFFLINE is set"),
        ("unet/config.json", ("--source=diffusers",), "has none of unet/config.json, config.json in the hub's cache"),
        ("unet", ("--source=diffusers",), "has none of unet/config.json, config.json in the hub's cache"),
        (f"unet/{WEIGHTS['unet']}", (), "unet/ has none of diffusion_pytorch_model.safetensors, .* in the hub's cache"),
        ("vae/config.json", (), "names vae in model_index.json, .* converted in the hub's cache, and HF_HUB_OFFLINE"),
        ("tokenizer", (), "tokenizer/ has no merges.txt and no tokenizer.json in the hub's cache"),
        ("model_index.json", (), "has no model_index.json in the hub's cache, .* says what parts it has"),
    ],
)
def test_what_the_hub_s_cache_lacks_is_named(missing, flags, message, theirs, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository, commit = tmp_path / "models--tiny--sd", "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(theirs[0], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    gone = repository / "snapshots" / commit / missing
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    with pytest.raises(UserError, match=message):
        convert(["--input=hf:tiny/sd", f"--output={tmp_path}/ours", *flags])
