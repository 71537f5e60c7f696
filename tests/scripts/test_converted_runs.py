"""Converted networks are runs: the commands that take a run folder take theirs, and so do configs."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from cli.errors import UserError
from configs.common import get_defaults
from models import create_model
from sample.__main__ import main as sample
from scripts.convert import main as convert
from scripts.describe import describe_run
from scripts.describe import main as describe
from train.state import create_state
from train.transfer import initialize_parts
from weights import formats
from weights.files.origin import WeightsFile
from weights.files.tensors import read_tensors, write_tensors
from weights.formats import diffusers, open_clip, uvit
from weights.formats.contract import Format, write_files
from weights.formats.runs import denoiser_run
from weights.pretrained import write_pretrained
from weights.run import Run
from weights.sources import load_frozen, resolve_frozen

from ..models.random_parameters import random_parameters
from ..weights.clip_samples import FIELDS, assert_same_trees, tiny
from ..weights.unet_samples import DDPM, STABLE_DIFFUSION_2

SCHEDULER = {"_class_name": "DDIMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    """(run folder, parameters) of a pipeline's UNet."""
    folder = tmp_path_factory.mktemp("unet")
    params = random_parameters(create_model(**DDPM))
    write_files(folder / "theirs" / "unet", diffusers.unet_files(create_model(**DDPM), params))
    write_files(folder / "theirs", {diffusers.SCHEDULER: SCHEDULER})
    convert([f"--input={folder}/theirs", f"--output={folder}/ours"])
    return folder / "ours", params


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """(run folder, parameters) of a CLIP."""
    folder = tmp_path_factory.mktemp("clip")
    model, params, variables = tiny(FIELDS)
    write_files(folder / "theirs", open_clip.clip_files(model, params, variables))
    convert([f"--input={folder}/theirs", f"--output={folder}/ours"])
    return folder / "ours", params


def test_a_converted_unet_is_sampled(unet, tmp_path):
    folder, _ = unet
    process = Run.open(folder).config.process
    assert process.schedule.to_dict() == {
        **{"name": "discrete", "kind": "scaled_linear", "steps": 1000, "start": 1e-4, "end": 0.012}
    }
    sample([f"--run={folder}", "--num=2", "--steps=3", f"--out={tmp_path}/grid.png", f"--files={tmp_path}/each"])
    assert len(list((tmp_path / "each").glob("*.png"))) == 2
    pictures = np.stack([Image.open(path) for path in sorted((tmp_path / "each").glob("*.png"))])
    assert pictures.shape == (2, 8, 8, 3) and pictures[0].std() > 0 and (pictures[0] != pictures[1]).any()


@pytest.mark.parametrize(("name", "part"), [("unet", "denoiser"), ("clip", "clip")])
def test_a_converted_network_is_described_initialized_from_and_frozen(name, part, request, capsys):
    """Conversion says how; see tests/evaluation/clip/test_other_datasets.py for evaluations of a converted CLIP."""
    folder, params = request.getfixturevalue(name)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    described = describe_run(str(folder), 1)
    assert described["trained"][part]["parameters"] == count and described["matrix_flops_per_step"] > 0
    describe([f"--run={folder}"])
    assert f"{part} (trained): {count:,} parameters" in capsys.readouterr().out

    fields = Run.open(folder).models()[part]
    entry = {"source": str(folder), "part": part, "step": 0}
    config = get_defaults()
    config.models.own, config.initialize.own = ConfigDict(fields), ConfigDict(entry)
    other = random_parameters(create_model(**fields), seed=9)
    state = create_state({"own": other}, {}, {}, averaged={})
    assert_same_trees(initialize_parts(config, state, lambda params: {}).params["own"], params)

    config = ConfigDict({"frozen": {part: {**fields, **entry}}}).lock()
    resolve_frozen(config)
    assert_same_trees(load_frozen(config)[part]["params"], params)


def test_what_cannot_be_sampled_or_described_whole_says_why(tmp_path):
    """A UNet of latents that reads text, without the networks around it."""
    model = create_model(**STABLE_DIFFUSION_2)
    params = random_parameters(model)
    write_files(tmp_path / "theirs" / "unet", diffusers.unet_files(model, params))
    write_files(tmp_path / "theirs", {diffusers.SCHEDULER: SCHEDULER})
    convert([f"--input={tmp_path}/theirs", f"--output={tmp_path}/ours"])
    with pytest.raises(UserError, match="the denoiser reads a context; name what makes one"):
        sample([f"--run={tmp_path}/ours", f"--out={tmp_path}/grid.png"])
    described = describe_run(f"{tmp_path}/ours", 1)
    assert described["trained"]["denoiser"]["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert "context" in described["no_step"] and "matrix_flops_per_step" not in described


def test_a_run_is_described_by_its_folder_alone(unet):
    with pytest.raises(UserError, match="--config=x.py cannot be given with --run"):
        describe([f"--run={unet[0]}", "--config=x.py"])
    with pytest.raises(UserError, match="none does not exist"):
        describe([f"--run={unet[0]}/none"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "LCMScheduler"}, "the scheduler is a LCMScheduler; those that are converted are DDPMSch"),
        ({"thresholding": True, "gamma": 1}, "thresholding is True; it must be False; gamma: not known here"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'; it must be one of linear, scaled_linear"),
    ],
)
def test_a_scheduler_that_would_be_computed_otherwise_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        diffusers.read_scheduler({**SCHEDULER, **changes})


@pytest.fixture
def plain(monkeypatch):
    """A format as a stranger would add it: what it declares, and one entry of the list."""

    def read(origin: WeightsFile, depth: str = "1"):
        fields = {"name": "uvit", "image_size": 4, "patch_size": 2, "width": 64, "depth": int(depth), "heads": 1}
        return denoiser_run(
            {**fields, "num_classes": 0}, uvit.from_uvit(create_model(**fields), read_tensors(origin.path)), None, {}
        )

    form = Format(
        name="plain",
        networks=("uvit",),
        inputs="a file ending in .plain.safetensors",
        outputs="plain.load(DIR)",
        recognizes=lambda origin: isinstance(origin, WeightsFile) and ".plain." in origin.path.name,
        read=read,
        write=lambda network: {"all.plain.safetensors": uvit.to_uvit(network.model, network.params)},
        options={"depth": "of the network"},
    )
    monkeypatch.setitem(formats.FORMATS, form.name, form)
    return form


def test_a_new_format_is_its_declaration(plain, tmp_path, capsys, monkeypatch):
    _, params, _ = tiny({"name": "uvit", "image_size": 4, "patch_size": 2, "width": 64, "depth": 2, "heads": 1})
    model = create_model(name="uvit", image_size=4, patch_size=2, width=64, depth=2, heads=1)
    tensors = uvit.to_uvit(model, params)
    write_tensors(tmp_path / "some.plain.safetensors", tensors)
    arguments = [f"--input={tmp_path}/some.plain.safetensors", "--depth=2"]
    convert([*arguments, f"--output={tmp_path}/ours"])
    assert_same_trees(Run.open(tmp_path / "ours").load().params["denoiser"], params)
    convert(["--to=plain", f"--run={tmp_path}/ours", f"--output={tmp_path}/back"])
    back = read_tensors(tmp_path / "back" / "all.plain.safetensors")
    assert back.keys() == tensors.keys() and all((back[name] == tensors[name]).all() for name in tensors)
    capsys.readouterr()

    with pytest.raises(SystemExit):
        convert(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "plain uvit. In: a file ending in .plain.safetensors. Out: plain.load(DIR)" in said
    assert "with plain: of the network" in said
    with pytest.raises(UserError, match="--depth says nothing of uvit; leave it out"):
        convert(["--source=uvit", *arguments, f"--output={tmp_path}/none"])
    greedy = dataclasses.replace(plain, name="greedy", recognizes=lambda origin: True)
    monkeypatch.setitem(formats.FORMATS, "greedy", greedy)
    with pytest.raises(UserError, match="looks like plain and greedy; say which it is with --source=plain|greedy"):
        convert([*arguments, f"--output={tmp_path}/none"])
    assert json.loads((tmp_path / "ours" / "provenance.json").read_text())["format"] == "plain"


def test_a_folder_that_needs_no_other_has_no_measures_of_latents_whose_scale_the_run_says(unet, tmp_path):
    fields = {"name": "autoencoder_kl", "image_size": 8, "width": 4, "multipliers": (1,), "blocks": 1, "groups": 2}
    _, params, variables = tiny(fields)
    assert variables.keys() == {"statistics"}
    stage = {"objective": "autoencoder", "models": {"autoencoder": fields}}
    write_pretrained(tmp_path / "stage", stage, {"autoencoder": params}, {"autoencoder": variables}, provenance={})
    run = shutil.copytree(unet[0], tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    entry = {**fields, "source": str(tmp_path / "stage"), "part": "autoencoder", "step": 0, "latent_scale": 0.25}
    (run / "config.json").write_text(json.dumps({**config, "frozen": {"first_stage": entry}}))
    convert(["--to=pretrained", f"--run={run}", f"--output={tmp_path}/whole"])
    whole = Run.open(tmp_path / "whole").load(parts=("denoiser", "first_stage"))
    assert_same_trees(whole.params, {"denoiser": unet[1], "first_stage": params})
