"""Low-rank pairs in the files of diffusers and peft: what is written is what is read; what damage makes of it."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from cli.errors import UserError
from models import create_model
from scripts.convert import main as convert
from weights.files.tensors import read_tensors, write_tensors
from weights.formats.diffusers_lora import module_scale
from weights.lora import init_pairs, kernels_of, scale_of
from weights.pretrained import write_pretrained
from weights.run import Run

from ...models.random_parameters import random_parameters

UNET = {
    **{"name": "unet", "image_size": 4, "in_channels": 2, "out_channels": 2, "width": 8, "multipliers": (1,)},
    **{"attention_levels": (0,), "blocks": 1, "attention": "transformer", "context_width": 6, "heads": 2, "groups": 2},
}
CONFIG = {"objective": "diffusion", "models": {"denoiser": UNET}, "data": {"image_size": 4}}
NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """base/, a UNet; ours/, pairs of rank 3 with random values beside it, which count 0.5 times."""
    home = tmp_path_factory.mktemp("pairs")
    model = create_model(**UNET)
    kinds = r"attention/(query|key_value|out)/kernel|mlp/.*kernel|conv_1/kernel|attention_0/input/kernel"
    write_pretrained(home / "base", CONFIG, {"denoiser": random_parameters(model)}, {}, provenance={})
    kernels = {path: kernel for path, kernel in kernels_of(model).items() if re.search(kinds, path)}
    pairs = init_pairs(jax.random.key(0), kernels, 3)
    rng = np.random.default_rng(0)
    pairs = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), pairs)
    run = Run.open(home / "base")
    config = {
        **CONFIG,
        "initialize": {"denoiser": {"source": str(run.folder), "part": "denoiser", "step": 0, "run": run.identity()}},
        "lora": {"rank": 3, "alpha": 1.5, "paths": [kinds]},
    }
    write_pretrained(home / "ours", config, {"lora": {"denoiser": pairs}}, {}, provenance={})
    return home


@pytest.mark.parametrize("form", ["diffusers_lora", "peft"])
def test_pairs_go_out_and_come_back(form, folders, tmp_path):
    convert([f"--to={form}", f"--run={folders}/ours", f"--output={tmp_path}/theirs"])
    convert([f"--input={tmp_path}/theirs", f"--base={folders}/base", f"--output={tmp_path}/back"])
    back, ours = (Run.open(folder) for folder in (tmp_path / "back", folders / "ours"))
    assert back.models() == ours.models() and back.config.lora.rank == 3
    pairs = [flatten_dict(run.load_pairs()[0], sep="/") for run in (back, ours)]
    assert pairs[0].keys() == pairs[1].keys()
    for path, leaf in pairs[1].items():  # diffusers' files have the factor in them
        factor = 0.5 if path.endswith("/up") and form == "diffusers_lora" else 1.0
        np.testing.assert_allclose(pairs[0][path], factor * leaf, atol=1e-7)
    assert scale_of(back.config) == (1.0 if form == "diffusers_lora" else 0.5)


def test_pairs_are_added_in_a_folder_that_needs_no_other(folders, tmp_path):
    convert(["--to=pretrained", f"--run={folders}/ours", f"--output={tmp_path}/merged"])
    merged, ours = Run.open(tmp_path / "merged"), Run.open(folders / "ours")
    jax.tree.map(np.testing.assert_array_equal, merged.load().params, ours.load().params)
    assert merged.config.lora.rank == 0 and merged.config.initialize.denoiser.source == ""


def test_only_plain_pairs_of_this_network_are_read(folders, tmp_path):
    convert(["--to=peft", f"--run={folders}/ours", f"--output={tmp_path}/theirs"])
    file, settings = tmp_path / "theirs" / NAMES[1], tmp_path / "theirs" / "adapter_config.json"
    tensors, config = dict(read_tensors(file)), json.loads(settings.read_text())
    tensors = {name: np.array(tensor) for name, tensor in tensors.items()}
    first = next(iter(tensors))

    def refused(message, tensors, **changed):
        write_tensors(file, tensors)
        settings.write_text(json.dumps({**config, **changed}))
        with pytest.raises(UserError, match=message) as error:
            convert([f"--input={tmp_path}/theirs", f"--base={folders}/base", f"--output={tmp_path}/out"])
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()

    refused("one half of a pair", {name: tensor for name, tensor in tensors.items() if name != first})
    refused("no low-rank pair: extra.weight", {**tensors, "extra.weight": np.ones(2, np.float32)})
    refused("and its network takes", {**tensors, first: np.ones((3, 1), np.float32)})
    refused("without that module", {f"other.{name}": tensor for name, tensor in tensors.items()})
    refused("use_dora=True", tensors, use_dora=True)
    refused("alpha of .* must be a number", tensors, lora_alpha=None)
    settings.write_text(json.dumps(config))
    with pytest.raises(UserError, match="give its folder as --base"):
        convert([f"--input={tmp_path}/theirs", f"--output={tmp_path}/out"])
    with pytest.raises(UserError, match="has no low-rank pairs"):
        convert(["--to=peft", f"--run={folders}/base", f"--output={tmp_path}/out"])


@pytest.mark.parametrize(
    ("pattern", "alpha"),
    [
        ("attn1.to_q", 8),
        ("to_q", 8),
        (r"down\.\d+\.attn1\.to_[qk]", 8),
        ("to_(q|k)", 8),
        ("down.*", 8),
        ("o_q", 4),  # not from a dot on
        ("attn1", 4),
    ],
)
def test_patterns_of_alpha_are_expressions_as_in_peft(pattern, alpha):
    config = {"lora_alpha": 4, "alpha_pattern": {"to_v": 16, pattern: 8, ".*to_q": 4}}
    assert module_scale(config, "down.0.attn1.to_q", 2, "adapter_config.json") == alpha / 2


def test_a_pattern_of_alpha_that_is_none_is_one_line():
    with pytest.raises(UserError, match=r"adapter_config.json: 'to_\(q' of alpha_pattern is not a pattern") as error:
        module_scale({"alpha_pattern": {"to_(q": 8}}, "to_q", 2, "adapter_config.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["diffusers_lora", "peft"])
def test_pairs_go_out_alone_only_where_they_are_all_that_was_trained(form, folders, tmp_path):
    """Not beside what was trained in whole, nor beside a network that is random and nowhere else."""
    whole = shutil.copytree(folders / "ours", tmp_path / "whole")
    config = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps({**config, "trainable": ["^denoiser/output/"]}))
    own = {"lora": Run.open(folders / "ours").load_pairs()[0], "denoiser": random_parameters(create_model(**UNET))}
    write_pretrained(tmp_path / "random", {**config, "initialize": {}}, own, {}, provenance={})
    for run, path in ((whole, "denoiser/output/"), (tmp_path / "random", "denoiser/")):
        with pytest.raises(UserError, match=f"has more than pairs .*, {path}.*--to=pretrained"):
            convert([f"--to={form}", f"--run={run}", f"--output={tmp_path}/theirs"])
        assert not (tmp_path / "theirs").exists()


def test_a_base_that_is_stored_in_less_is_opened_in_the_dtype_that_the_pairs_were_trained_beside(folders, tmp_path):
    base, ours = (shutil.copytree(folders / name, tmp_path / name) for name in ("base", "ours"))
    for folder, change in ((base, {"models": {"denoiser": {**UNET, "param_dtype": "bfloat16"}}}), (ours, {})):
        config = {**json.loads((folder / "config.json").read_text()), **change}
        config.get("initialize", {}).get("denoiser", {})["source"] = str(base)
        (folder / "config.json").write_text(json.dumps(config))
    params = Run.open(ours).load().params["denoiser"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    change = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), params, Run.open(folders / "ours").load().params["denoiser"]
    )
    assert max(jax.tree.leaves(change)) < 0.02
