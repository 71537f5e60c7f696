"""UniDiffuser's networks in their authors' layout, in and out, its pipeline, and the published files' tensors."""

import json

import jax
import numpy as np
import pytest

import models
from cli.errors import UserError
from sample import trained
from sample.trained import TrainedSampler
from scripts.convert import main as convert
from weights.files.origin import open_origin
from weights.files.tensors import read_tensors, write_tensors
from weights.formats import FORMATS, diffusers_unidiffuser, unidiffuser
from weights.formats.contract import Network
from weights.formats.runs import unidiffuser_run
from weights.pretrained import write_pretrained
from weights.run import TOKENIZER, WRITES_WITH, Run

from ...models.random_parameters import random_parameters

NETWORK = {"name": "unidiffuser", "image_size": 4, "patch_size": 2, "width": 64, "depth": 2, "heads": 1}
NETWORK |= {"in_channels": 4, "clip_width": 5, "text_length": 77, "text_width": 3}
CAPTIONER = {"name": "captioner", "text_vocab_size": 9, "length": 80, "width": 64, "depth": 1, "heads": 1}
CAPTIONER |= {"feature_width": 6, "prefix_length": 77, "mapper": "bottleneck", "latent_width": 3, "text_end_id": 8}


@pytest.mark.parametrize(
    ("fields", "file"),
    [
        (NETWORK, "uvit_v0.safetensors"),
        ({**NETWORK, "data_types": 2}, "uvit_v1.safetensors"),
        (CAPTIONER, "caption_decoder.safetensors"),
    ],
)
def test_networks_in_and_out_again(fields, file, tmp_path, capsys):
    model = models.create_model(**fields)
    network = Network(model, random_parameters(model), {})
    write = FORMATS["unidiffuser"].write
    assert write is not None
    ((_, tensors),) = write(network).items()
    if fields is CAPTIONER:  # as it is published: wrapped, beside a CLIP, and with masks
        assert {"gpt.transformer.wte.weight", "gpt.lm_head.weight", "encode_prefix.bias"} <= tensors.keys()
        others = {"clip_model.x": np.ones(1, np.float32), "gpt.transformer.h.0.attn.bias": np.ones(1, np.float32)}
        tensors = {f"module.{name}": tensor for name, tensor in {**tensors, **others}.items()}
    write_tensors(tmp_path / file, tensors)
    convert([f"--input={tmp_path / file}", f"--output={tmp_path}/ours"])
    assert ("it names no CLIP" in capsys.readouterr().out) == (fields is CAPTIONER)
    run, part = Run.open(tmp_path / "ours"), fields["name"]
    assert models.create_model(**run.config.models[part]) == model
    jax.tree.map(np.testing.assert_array_equal, run.load().params[part], network.params)
    convert(["--to=unidiffuser", f"--run={tmp_path}/ours", f"--output={tmp_path}/back"])
    if fields is CAPTIONER:
        convert(["--to=diffusers", f"--run={tmp_path}/ours", f"--output={tmp_path}/theirs"])
        convert([f"--input={tmp_path}/theirs", f"--output={tmp_path}/again"])
        assert "it names no CLIP" in capsys.readouterr().out
    (back,) = (tmp_path / "back").iterdir()
    for name, tensor in read_tensors(back).items():
        np.testing.assert_array_equal(tensor, tensors.get(name, tensors.get(f"module.{name}")))


@pytest.mark.parametrize("form", ["unidiffuser", "diffusers"])
def test_captions_that_end_otherwise_do_not_go_out(form):
    write = FORMATS[form].write
    assert write is not None
    with pytest.raises(UserError, match="its text_end_id is 7, and their captions end with the last id, 8"):
        write(Network(models.create_model(**{**CAPTIONER, "text_end_id": 7}), {}, {}))


@pytest.mark.parametrize(("kinds", "theirs", "diffusers"), [(0, 416, 480), (2, 418, 482)])
def test_published_files_have_their_number_of_tensors(kinds, theirs, diffusers):
    sizes = {"image_size": 64, "width": 1536, "depth": 30, "heads": 24, "clip_width": 512, "text_width": 64}
    model = models.create_model(**{**NETWORK, **sizes, "data_types": kinds})
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs(1))
    assert len(unidiffuser.LAYOUT.write_deferred(shapes)) == theirs
    names = diffusers_unidiffuser.LAYOUT.write_deferred(shapes)
    assert len(names) + 2 == diffusers  # with the patch embedding that nothing reads
    skip = unidiffuser.LAYOUT.write_deferred(shapes)["out_blocks.14.skip_linear.weight"]
    assert skip.shape == (1536, 3072)


@pytest.mark.parametrize("kind", ["UniDiffuserModel", "UniDiffuserTextDecoder"])
def test_options_that_they_do_not_read_are_refused(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": kind}))
    with pytest.raises(UserError, match=f"--latent_scale, --tokenizer says nothing of a {kind}; leave it out"):
        convert([f"--input={tmp_path}", f"--output={tmp_path}/ours", "--latent_scale=1", "--tokenizer=merges.txt"])


PARTS = {
    "unidiffuser": {**NETWORK, "text_length": 3, "data_types": 0},
    "first_stage": {"name": "autoencoder_kl", "image_size": 8, "width": 4, "multipliers": (1, 1), "blocks": 1}
    | {"attention_levels": (), "latent_channels": 4, "groups": 2, "latent_scale": 1.0},
    "clip": {"name": "clip", "embed_dim": 5, "image_size": 8, "patch_size": 4, "image_tower": "vit", "image_width": 64}
    | {"image_layers": 1, "image_heads": 1, "text_vocab_size": 9, "text_length": 3, "text_end_id": 8, "text_width": 64}
    | {"text_layers": 1, "text_heads": 1},
    "captioner": {**CAPTIONER, "prefix_length": 3, "feature_width": 64},
}
SCHEDULE = {"name": "discrete", "kind": "linear", "steps": 10, "start": 0.1, "end": 0.2}


@pytest.fixture
def run(tmp_path):
    """A run that holds its frozen parts, with a process of its own."""
    config = {
        "objective": "unidiffuser",
        "models": {"unidiffuser": PARTS["unidiffuser"]},
        "frozen": {part: {**PARTS[part], "source": ".", "part": part} for part in PARTS if part != "unidiffuser"},
        "data": {"image_size": 8, "text_length": 3},
        "process": {"schedule": SCHEDULE, "prediction": "v", "time_shift": 1},
        "scales": {"clip": 1.0, "text": 1.0},
        "sample": {"steps": 2, "caption_length": 4},
    }
    trees = {part: random_parameters(models.create_model(**fields)) for part, fields in PARTS.items()}
    write_pretrained(tmp_path / "run", config, trees, {}, provenance={})
    return tmp_path / "run"


def change(folder, **groups):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **groups}))


def test_a_pipeline_has_the_process_of_its_run_and_scales_are_refused(run, tmp_path):
    convert(["--to=diffusers", f"--run={run}", f"--output={tmp_path}/theirs"])
    convert([f"--input={tmp_path}/theirs", f"--output={tmp_path}/back"])
    process = Run.open(tmp_path / "back").config.process.to_dict()
    assert (process["schedule"], process["prediction"], process["time_shift"]) == (SCHEDULE, "v", 1)
    change(run, scales={"clip": 2.0, "text": 1.0})
    with pytest.raises(UserError, match="config.scales is {'clip': 2.0, 'text': 1.0}, and diffusers"):
        convert(["--to=diffusers", f"--run={run}", f"--output={tmp_path}/scaled"])
    convert(["--to=diffusers", f"--run={run}", "--part=unidiffuser", f"--output={tmp_path}/alone"])
    assert {path.name for path in (tmp_path / "alone").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }


def test_a_vocabulary_that_ends_otherwise_is_another_one(tmp_path):
    def notes(end):
        frozen = {**{part: PARTS[part] for part in ("first_stage", "clip")}, "captioner": dict(PARTS["captioner"])}
        frozen["captioner"]["text_end_id"] = end
        origin = open_origin(str(tmp_path))
        read = unidiffuser_run(origin, origin, PARTS["unidiffuser"], {}, frozen, {"schedule": SCHEDULE})
        return " ".join(read.notes)

    assert WRITES_WITH in notes(7) and WRITES_WITH not in notes(8)


def test_large_pictures_are_drawn_in_smaller_chunks_and_captions_in_another_vocabulary_are_told(run, monkeypatch):
    opened = TrainedSampler.open(run)
    assert (opened.chunk, opened.sampler.writes_with) == (trained.CHUNK, TOKENIZER)
    monkeypatch.setattr(trained, "_PIXELS", 2 * 8 * 8)
    assert TrainedSampler.open(run).chunk == 2
    frozen = json.loads((run / "config.json").read_text())["frozen"]
    change(run, frozen={**frozen, "captioner": {**frozen["captioner"], "text_end_id": 7}})  # with as many ids
    assert TrainedSampler.open(run).sampler.writes_with == WRITES_WITH
