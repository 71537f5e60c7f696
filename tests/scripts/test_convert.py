"""`python -m scripts.convert`: every format in and out, from a folder, a file, a run and the hub's cache."""

import json

import jax
import numpy as np
import pytest
from huggingface_hub import constants
from ml_collections import ConfigDict

from cli.config import load_config, to_json
from cli.errors import UserError
from models import create_model
from models.clip import IMAGE_MEAN, IMAGE_STD, Clip
from scripts.convert import flags_of_parts, main
from train.state import create_state
from train.transfer import initialize_parts
from weights.checkpoint import CheckpointStore
from weights.files.tensors import read_tensors, write_tensors
from weights.formats import diffusers, open_clip, transformers, uvit
from weights.formats.contract import write_files
from weights.run import Run

from ..models.random_parameters import random_parameters
from ..weights.clip_samples import FIELDS, RESNET, assert_same_trees, tiny
from ..weights.unet_samples import STABLE_DIFFUSION_2


def provenance(folder):
    return json.loads((folder / "provenance.json").read_text())


def write_theirs(folder, to: str, fields=FIELDS):
    """A folder as the other library would write it; returns what ours should make of it."""
    model, params, variables = tiny(fields)
    assert isinstance(model, Clip)
    if to == "transformers":
        files = transformers.clip_files(model, params)
    else:
        files = open_clip.clip_files(model, params, variables)
    write_files(folder, files)
    (tensors,) = (value for name, value in files.items() if name.endswith(".safetensors"))
    return params, variables, tensors


@pytest.mark.parametrize(
    ("form", "fields"),
    [
        pytest.param("transformers", FIELDS, id="transformers"),
        pytest.param("open_clip", FIELDS, id="open_clip"),
        pytest.param("open_clip", RESNET, id="open_clip resnet"),
    ],
)
def test_in_and_out_again(form, fields, tmp_path, capsys):
    params, variables, tensors = write_theirs(tmp_path / "theirs", form, fields)
    (tmp_path / "theirs" / "tokenizer.json").write_text("{}")
    main([f"--input={tmp_path}/theirs", f"--output={tmp_path}/ours"])  # its files tell the format
    said = capsys.readouterr().out
    assert "activation gelu" in said and "the tokenizer is left out: " in said and "give --tokenizer" in said
    ours = Run.open(tmp_path / "ours")
    assert ours.config.models.clip.to_dict() == fields
    assert {"format": form, "input": f"{tmp_path}/theirs"}.items() <= provenance(tmp_path / "ours").items()
    assert_same_trees(ours.load().params["clip"], params)
    assert_same_trees(ours.load().variables.get("clip", {}), variables)
    assert ours.tokenizer() is None

    main([f"--to={form}", f"--run={tmp_path}/ours", f"--output={tmp_path}/back"])
    for path in (tmp_path / "back").iterdir():
        if path.suffix == ".json":
            assert json.loads(path.read_text()) == json.loads((tmp_path / "theirs" / path.name).read_text())
        else:
            back = read_tensors(path)
            assert back.keys() == tensors.keys()
            assert all((back[name] == tensors[name]).all() for name in tensors)
    assert len(list((tmp_path / "back").iterdir())) == (3 if form == "transformers" else 2)


@pytest.mark.parametrize(
    ("parts", "config", "uses"),
    [
        (["clip"], "unidiffuser", ["initialize.clip.source=F", "frozen.clip.source=F"]),
        (["autoencoder"], "unidiffuser", ["initialize.autoencoder.source=F", "frozen.first_stage.source=F"]),
        (["gpt2"], "captioner", ["initialize.language.source=F --config.initialize.language.part=gpt2"]),
        (["lpips"], "autoencoder", ["frozen.lpips.source=F"]),
        (
            ["denoiser", "first_stage"],
            "latent_unet",
            [
                "initialize.denoiser.source=F",
                "frozen.first_stage.source=F --config.frozen.first_stage.part=first_stage",
            ],
        ),
    ],
)
def test_the_flags_that_are_printed_are_of_configs_and_take_the_part(parts, config, uses):
    assert list(flags_of_parts(parts, parts[:1], "F")) == uses
    argument = ":perceptual" if config == "autoencoder" else ""
    kept = [f"--config.{use}" for use in uses if config != "unidiffuser" or use.startswith("frozen")]
    loaded = load_config([f"--config=configs/scenes/{config}.py{argument}", *" ".join(kept).split()])
    sources = {**loaded.initialize, **loaded.frozen}.values()
    assert sorted(entry.part for entry in sources if entry.source == "F") == sorted(parts)


def test_a_vocabulary_comes_along_or_is_named(tmp_path):
    merges = ["r e", "re d</w>"]
    size = 2 * 256 + len(merges) + 2
    write_theirs(tmp_path / "theirs", "transformers", {**FIELDS, "text_vocab_size": size, "text_end_id": size - 1})
    own, other = tmp_path / "theirs" / "merges.txt", tmp_path / "merges.txt"
    own.write_text("\n".join(["#version: 0.2", *merges, ""]))
    other.write_text("\n".join(["#version: 0.2", *merges, "b l", ""]))
    command = ["--source=transformers", f"--input={tmp_path}/theirs"]
    main([*command, f"--output={tmp_path}/found"])
    main([*command, f"--output={tmp_path}/named", f"--tokenizer={own}"])
    for folder in ("found", "named"):
        tokenizer = Run.open(tmp_path / folder).tokenizer()
        assert tokenizer is not None and tokenizer.encode("Red", 4).ids.tolist() == [size - 2, 513, size - 1, 0]
    with pytest.raises(UserError, match=f"ends captions with {size}, and this network's end with {size - 1}"):
        main([*command, f"--output={tmp_path}/none", f"--tokenizer={other}"])


@pytest.mark.parametrize("form", ["transformers", "open_clip", "openai"])
def test_training_starts_from_what_others_wrote(form, tmp_path):
    """A published config has every field in which another project's network may differ."""
    fields = {**FIELDS, "image_width": 128}
    if form == "openai":
        fields |= {"image_heads": 2, "activation": "quick_gelu", "image_mean": IMAGE_MEAN, "image_std": IMAGE_STD}
    else:
        fields |= {"text_heads": 2} | ({"logit_bias_init": -3.0} if form == "open_clip" else {})
    params, variables, tensors = write_theirs(tmp_path / "theirs", "open_clip" if form == "openai" else form, fields)
    source = tmp_path / "theirs"
    if form == "openai":
        source = tmp_path / "clip.safetensors"
        write_tensors(source, tensors)
    main([f"--source={form}", f"--input={source}", f"--output={tmp_path}/ours"])
    flags = [f"--config.models.clip.{name}={value}" for name, value in fields.items() if name != "name"]
    command = ["--config=configs/paper/clip_vit.py:debug", f"--config.initialize.clip.source={tmp_path}/ours"]
    with pytest.raises(UserError, match="embed_dim: 24, not 32;.*set the same fields"):
        initialize_parts(load_config(command), state_of(load_config(command)), lambda params: {})
    config = load_config([*command, *flags])
    state = initialize_parts(config, state_of(config), lambda params: {})
    assert_same_trees(state.params["clip"], params)


def state_of(config):
    """A state of other parameters."""
    _, params, variables = tiny(config.models.clip.to_dict(), seed=5)
    return create_state({"clip": params}, {"clip": variables} if variables else {}, {}, averaged={})


def write_pipeline(folder):
    """A pipeline's folder with the UNet that it holds; returns what ours should make of it."""
    model = create_model(**STABLE_DIFFUSION_2)
    params = random_parameters(model)
    write_files(folder / "unet", diffusers.unet_files(model, params))
    (folder / "model_index.json").write_text("{}")
    return params


def test_the_unet_of_a_pipeline_in_and_out_again(tmp_path, capsys):
    params = write_pipeline(tmp_path / "theirs")
    for folder, name in (("theirs", "ours"), ("theirs/unet", "same")):
        main(["--source=diffusers", f"--input={tmp_path}/{folder}", f"--output={tmp_path}/{name}"])
        ours = Run.open(tmp_path / name)
        assert ours.config.models.denoiser.to_dict() == STABLE_DIFFUSION_2
        assert_same_trees(ours.load().params["denoiser"], params)
    said = capsys.readouterr().out
    assert "part 'denoiser', " in said
    assert said.endswith(f"--run={tmp_path}/same, or in configs: --config.initialize.denoiser.source={tmp_path}/same\n")
    main(["--to=diffusers", f"--run={tmp_path}/ours", f"--output={tmp_path}/back"])
    for path in (tmp_path / "theirs" / "unet").iterdir():
        assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes() or path.suffix == ".json"
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == json.loads((tmp_path / "theirs" / "unet" / "config.json").read_text())


def test_a_pipeline_in_the_hub_s_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit, repository = "01234567" * 5, tmp_path / "cache" / "models--tiny--pipeline"
    params = write_pipeline(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    main(["--source=diffusers", "--input=hf:tiny/pipeline", f"--output={tmp_path}/ours"])
    ours = Run.open(tmp_path / "ours")
    assert provenance(tmp_path / "ours")["input"] == f"hf:tiny/pipeline@{commit}"
    assert_same_trees(ours.load().params["denoiser"], params)


def test_a_file_of_openai_s_has_quick_gelu(tmp_path):
    _, params, _ = tiny()
    extras = {"input_resolution": np.array(16), "context_length": np.array(8), "vocab_size": np.array(40)}
    tensors = open_clip.clip_to_open_clip(params, {})
    np.savez(tmp_path / "tiny.npz", **extras, **tensors)
    main(["--source=openai", f"--input={tmp_path}/tiny.npz", f"--output={tmp_path}/ours"])
    ours = Run.open(tmp_path / "ours")
    known = {**FIELDS, "activation": "quick_gelu"}
    told = ours.config.models.clip.to_dict()
    assert {key: told[key] for key in told if told[key] != known[key]}.keys() <= {
        *("logit_scale_init", "image_mean", "image_std")
    }
    assert_same_trees(ours.load().params["clip"], params)
    with pytest.raises(UserError, match="is not a file; OpenAI's weights are one"):
        main(["--source=openai", f"--input={tmp_path}", f"--output={tmp_path}/again"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "gelu"}, "its activation is 'gelu'; OpenAI's has 'quick_gelu'"),
        ({"text_heads": 2}, "its text_heads is 2; OpenAI's has 1"),
        ({"image_mean": (0.5, 0.5, 0.5)}, r"its image_mean is \(0.5, 0.5, 0.5\)"),
        ({"image_mlp_ratio": 2}, "its image_mlp_ratio is 2; OpenAI's has 4"),
        ({"text_end_id": 3}, "its text_end_id is 3; OpenAI's has 39"),
        ({"logit_bias_init": -10.0}, "its logit_bias_init is -10.0; OpenAI's has None"),
        ({"image_width": 72, "image_heads": 1}, "a width of 72, which heads of 64 do not divide"),
        (
            {"image_tower": "resnet", "image_size": 32, "image_width": 8, "image_layers": (1, 1, 1), "image_heads": 4},
            "a ResNet of OpenAI's has 4 stages",
        ),
    ],
)
def test_what_openai_s_package_would_not_compute_alike(changes, message):
    published = {"activation": "quick_gelu", "image_mlp_ratio": 4, "image_mean": IMAGE_MEAN, "image_std": IMAGE_STD}
    model, params, variables = tiny({**FIELDS, **published, **changes})
    assert isinstance(model, Clip)
    with pytest.raises(UserError, match=message):
        open_clip.openai_clip_files(model, params, variables)


def test_a_u_vit_in_and_out_again(tmp_path, capsys):
    fields = {"name": "uvit", "image_size": 4, "patch_size": 2, "width": 64, "depth": 2, "heads": 1, "num_classes": 3}
    model, params, _ = tiny(fields)
    (tmp_path / "theirs").mkdir()
    tensors = uvit.to_uvit(model, params)
    write_tensors(tmp_path / "theirs" / "cifar10.safetensors", tensors)
    main(["--source=uvit", f"--input={tmp_path}/theirs/cifar10.safetensors", f"--output={tmp_path}/ours"])
    assert "--config.initialize.denoiser.source" in capsys.readouterr().out
    ours = Run.open(tmp_path / "ours")
    assert create_model(**ours.config.models.denoiser) == model
    assert_same_trees(ours.load().params["denoiser"], params)
    main(["--to=uvit", f"--run={tmp_path}/ours", f"--output={tmp_path}/back"])
    assert json.loads((tmp_path / "back" / "nnet.json").read_text())["num_classes"] == 3
    back = read_tensors(tmp_path / "back" / "nnet_ema.safetensors")
    assert back.keys() == tensors.keys() and all((back[name] == tensors[name]).all() for name in tensors)
    with pytest.raises(UserError, match="part 'denoiser' of .* is a uvit; open_clip is of clip"):
        main(["--to=open_clip", f"--run={tmp_path}/ours", "--part=denoiser", f"--output={tmp_path}/none"])
    with pytest.raises(UserError, match=r"denoiser \(uvit\), and open_clip is a format of clip; choose another --to"):
        main(["--to=open_clip", f"--run={tmp_path}/ours", f"--output={tmp_path}/none"])


def test_from_the_hub_s_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit, repository = "89abcdef" * 5, tmp_path / "cache" / "models--tiny--clip"
    params, _, _ = write_theirs(repository / "snapshots" / commit, "transformers")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    main(["--source=transformers", "--input=hf:tiny/clip", f"--output={tmp_path}/ours"])
    ours = Run.open(tmp_path / "ours")
    assert provenance(tmp_path / "ours")["input"] == f"hf:tiny/clip@{commit}"
    assert_same_trees(ours.load().params["clip"], params)
    with pytest.raises(UserError, match="has no config.json in the hub's cache"):
        main(["--source=transformers", "--input=hf:tiny/none", f"--output={tmp_path}/none"])


def test_a_run_s_moving_average_is_what_goes_out(tmp_path):
    _, params, variables = tiny(RESNET)
    average = jax.tree.map(lambda leaf: leaf / 2, params)
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    for step, ema in ((1, params), (2, average)):
        trees = {"params": params, "ema_params": ema, "variables": variables}
        store.save(step, {name: {"tower": tree} for name, tree in trees.items()})
    store.close()
    config = ConfigDict({"objective": "clip", "models": {"tower": {**RESNET, "scan": True}}})
    (tmp_path / "run" / "config.json").write_text(to_json(config))
    arguments = ["--to=open_clip", f"--run={tmp_path}/run", "--part=tower"]
    main([*arguments, f"--output={tmp_path}/newest"])
    main([*arguments, f"--output={tmp_path}/first", "--step=1"])
    for name, tree in (("newest", average), ("first", params)):
        written = read_tensors(tmp_path / name / "open_clip_model.safetensors")
        expected = open_clip.clip_to_open_clip(tree, variables)
        assert written.keys() == expected.keys()
        assert all((written[key] == expected[key]).all() for key in expected)
    with pytest.raises(UserError, match="has no part 'clip'; it has tower"):
        main(["--to=open_clip", f"--run={tmp_path}/run", "--part=clip", f"--output={tmp_path}/none"])
    with pytest.raises(UserError, match="image_tower is 'resnet'; CLIPModel has a vit"):
        main(["--to=transformers", f"--run={tmp_path}/run", "--part=tower", f"--output={tmp_path}/none"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source=transformers"], "give --input, which is read, or --to and --run"),
        (["--to=open_clip"], "give --input, which is read, or --to and --run"),
        (["--source=open_clip", "--input=x", "--run=y"], "--run cannot be given without --to"),
        (["--to=open_clip", "--run=x", "--input=y", "--name=RN50"], "--input, --name cannot be given with --to"),
        (["--source=openai", "--input={tmp}", "--name=RN50"], "--name says nothing of openai; leave it out"),
        (["--source=keras", "--input=x"], "invalid choice: 'keras'"),
        (["--to=dalle_mini", "--run=x"], "invalid choice: 'dalle_mini'"),
        (["--source=uvit", "--input={tmp}", "--tokenizer=y"], "--tokenizer says nothing of uvit"),
        (["--to=open_clip", "--run=x", "--tokenizer=y"], "--tokenizer cannot be given with --to"),
        (["--source=diffusers", "--input={tmp}"], "has none of unet/config.json, config.json; give another"),
        (["--input={tmp}"], "looks like none of the formats; say which it is with --source=transformers|diffusers"),
        (["--source=openai", "--to=open_clip"], "--source cannot be given with --to"),
        (["--to=open_clip", "--run={tmp}/none"], "none does not exist"),
        (["--source=transformers", "--input={tmp}"], "has no config.json; give another"),
    ],
)
def test_mistakes(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        main([argument.format(tmp=tmp_path) for argument in arguments] + [f"--output={tmp_path}/out"])
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_fit_leave_no_folder_that_looks_whole(tmp_path):
    _, _, tensors = write_theirs(tmp_path / "theirs", "open_clip")
    del tensors["ln_final.bias"]
    write_tensors(tmp_path / "theirs" / "open_clip_model.safetensors", tensors)
    arguments = ["--source=open_clip", f"--input={tmp_path}/theirs", f"--output={tmp_path}/ours"]
    with pytest.raises(UserError, match="missing: ln_final.bias"):
        main(arguments)
    write_theirs(tmp_path / "theirs", "open_clip")
    main(arguments)  # what the first attempt left does not stand in the way
    with pytest.raises(UserError, match="is not empty; choose another --output"):
        main(arguments)
