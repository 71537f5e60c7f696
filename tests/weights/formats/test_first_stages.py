"""First stages, discriminators and LPIPS of other projects: what is read and written, what is refused, the traps."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from cli.errors import UserError
from sample.trained import TrainedSampler
from scripts.convert import main as convert
from weights.files.layout import TORCH_LEAVES
from weights.files.origin import WeightsFile
from weights.files.tensors import write_tensors
from weights.formats import compvis
from weights.formats.contract import Network, write_files
from weights.formats.diffusers import unet_files
from weights.formats.diffusers_autoencoder import (
    autoencoder_config,
    autoencoder_fields,
    autoencoder_files,
    autoencoder_from_diffusers,
    autoencoder_to_diffusers,
)
from weights.formats.lpips import lpips_to_torch
from weights.run import Run

from ...models.random_parameters import random_parameters
from ..clip_samples import assert_same_trees
from ..unet_samples import DDPM

_TINY = {
    **{"image_size": 8, "channels": 3, "width": 8, "multipliers": (1, 3), "attention_levels": (1,), "blocks": 1},
    **{"latent_channels": 2, "latent_scale": 0.5},
}
KL = {"name": "autoencoder_kl", **_TINY, "groups": 4}
VQ = {"name": "autoencoder_vq", **_TINY, "groups": 4, "vocab_size": 5}
LPIPS = {"name": "lpips", "widths": (2, 3, 4, 5, 6)}

CONFIG = {"_class_name": "AutoencoderKL", "block_out_channels": [32, 64], "sample_size": 64}
CONFIG |= {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}


@pytest.mark.parametrize("fields", [KL, VQ], ids=["kl", "vq"])
def test_diffusers_in_and_out_again(fields, tmp_path):
    model = models.create_model(**fields)
    params = random_parameters(model)
    files = autoencoder_files(Network(model, params, {}), "config.json", "diffusion_pytorch_model.safetensors")
    write_files(tmp_path / "theirs" / "vae", files)
    convert(["--source=diffusers", "--subfolder=vae", f"--input={tmp_path}/theirs", f"--output={tmp_path}/ours"])
    run = Run.open(tmp_path / "ours")
    assert run.config.models.autoencoder.to_dict() == fields and run.config.objective == "autoencoder"
    assert_same_trees(run.load().params["autoencoder"], params)
    convert(["--to=diffusers", f"--run={tmp_path}/ours", f"--output={tmp_path}/back"])
    theirs, back = (folder / "config.json" for folder in (tmp_path / "theirs" / "vae", tmp_path / "back"))
    assert json.loads(back.read_text()) == json.loads(theirs.read_text())


def test_a_pipeline_brings_its_first_stage(tmp_path, capsys):
    stage = models.create_model(**VQ)
    unet = models.create_model(**{**DDPM, "in_channels": 2, "out_channels": 2})
    params, own = random_parameters(unet), random_parameters(stage)
    write_files(tmp_path / "theirs" / "unet", unet_files(unet, params))
    config, weights = "config.json", "diffusion_pytorch_model.safetensors"
    write_files(tmp_path / "theirs" / "vqvae", autoencoder_files(Network(stage, own, {}), config, weights))
    write_files(tmp_path / "theirs" / "scheduler", {"scheduler_config.json": {"_class_name": "DDIMScheduler"}})
    convert([f"--input={tmp_path}/theirs", f"--output={tmp_path}/ours"])
    assert "estimates off at -1 and 1, which latents are not" in capsys.readouterr().out
    trained = TrainedSampler.open(tmp_path / "ours", chunk=2)
    assert_same_trees(trained.frozen["first_stage"]["params"], own)
    assert_same_trees(trained.weights.params["denoiser"], params)
    assert trained.config.data.image_size == 16 and not trained.sampler.process.clip
    assert trained.sampler.first_stage.model == stage

    said = json.loads((tmp_path / "theirs" / "vqvae" / config).read_text())
    write_files(tmp_path / "theirs" / "vqvae", {config: {**said, "norm_type": "spatial"}})
    convert([f"--input={tmp_path}/theirs", f"--output={tmp_path}/alone"])
    assert "its first stage is left out: this autoencoder cannot be" in capsys.readouterr().out
    assert list(Run.open(tmp_path / "alone").models()) == ["denoiser"]


def test_names_of_diffusers():
    """The way up is numbered from the coarsest level; a decoder has one block more."""
    tensors = autoencoder_to_diffusers(
        models.create_model(**VQ), params := random_parameters(models.create_model(**VQ))
    )
    assert {name.split(".")[4] for name in tensors if name.startswith("decoder.up_blocks.0.resnets")} == {"0", "1"}
    np.testing.assert_array_equal(
        tensors["decoder.up_blocks.0.resnets.1.conv1.weight"],
        params["decoder"]["up_1_residual_1"]["conv_1"]["kernel"].transpose(3, 2, 0, 1),
    )
    joint = params["encoder"]["mid_attention"]["attention"]["query_key_value"]["kernel"]
    np.testing.assert_array_equal(tensors["encoder.mid_block.attentions.0.to_k.weight"], joint[:, 1, 0].T)
    np.testing.assert_array_equal(tensors["quantize.embedding.weight"], params["codebook"]["embedding"])


def test_what_a_config_of_diffusers_leaves_out_is_the_library_s():
    fields = autoencoder_fields(CONFIG)
    assert (fields["latent_scale"], fields["latent_channels"], fields["blocks"]) == (0.18215, 4, 1)
    quantized = autoencoder_fields({**CONFIG, "_class_name": "VQModel", "scaling_factor": 1.0})
    assert (quantized["latent_scale"], quantized["latent_channels"], quantized["vocab_size"]) == (1.0, 3, 256)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_quant_conv": False}, "use_quant_conv is False; it must be True"),
        ({"use_post_quant_conv": False}, "use_post_quant_conv is False; it must be True"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention is False; it must be True"),
        ({"shift_factor": 0.1159}, "shift_factor is 0.1159; it must be None"),
        ({"latents_mean": [0.1], "latents_std": [2.0]}, r"latents_mean is \[0.1\].*latents_std is \[2.0\]"),
        ({"_class_name": "VQModel", "norm_type": "spatial"}, "norm_type is 'spatial'; it must be 'group'"),
        ({"_class_name": "VQModel", "vq_embed_dim": 8}, "vq_embed_dim is 8, ours is latent_channels, 3"),
        ({"out_channels": 4}, "in_channels is 3 and out_channels 4"),
        ({"up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]}, "attention at different levels"),
        ({"down_block_types": ["KDownBlock2D"] * 2}, r"down_block_types\[0\] is 'KDownBlock2D'"),
        ({"scaling_factor": 0}, "scaling_factor is 0; it must be a number above 0"),
        ({"temporal": True}, "temporal: not known here"),
    ],
)
def test_what_ours_cannot_compute_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        autoencoder_fields({**CONFIG, **change})


def test_a_measured_scale_goes_out():
    fields = {key: value for key, value in KL.items() if key != "latent_scale"}
    statistics = {"mean": jnp.asarray(0.5), "square": jnp.asarray(4.25), "count": jnp.asarray(9.0)}
    config = autoencoder_config(models.create_model(**fields), {"statistics": {"latents": statistics}})
    assert config["scaling_factor"] == 0.5
    with pytest.raises(UserError, match="its patch_size is 2, theirs is 1"):
        autoencoder_config(models.create_model(**{**KL, "patch_size": 2}), {})


@pytest.mark.parametrize("fields", [KL, VQ], ids=lambda fields: fields["name"])
def test_what_is_taken_off_latents_goes_out_in_the_weights(fields):
    """So a pipeline that only multiplies gets the latents that a diffusion here learned, and the pictures of them."""
    model = models.create_model(**{**fields, "latent_shift": 0.25, "latent_scale": 2.0})
    params = random_parameters(model)
    files = autoencoder_files(Network(model, params, {}), "config.json", "weights")
    back = models.create_model(**fields)
    moved = autoencoder_from_diffusers(back, files["weights"])
    images = jax.random.uniform(jax.random.key(0), (1, 16, 16, 3), minval=-1)
    latents, theirs = (
        network.apply({"params": tree}, images, method="encode")[..., : model.latent_channels]
        for network, tree in ((model, params), (back, moved))
    )
    np.testing.assert_allclose(theirs, latents - 0.25, atol=1e-5)
    pictures, others = (
        network.apply({"params": tree}, z, method="decode")
        for network, tree, z in ((model, params, latents), (back, moved, theirs))
    )
    np.testing.assert_allclose(others, pictures, atol=1e-4)


def state_dict(fields, params):
    """A first stage by the names of CompVis, written from the list of its modules and not from the table under test."""
    names = {
        **{"mid_residual_0": "mid.block_1", "mid_attention": "mid.attn_1", "mid_residual_1": "mid.block_2"},
        **{"input": "conv_in", "output_norm": "norm_out", "output": "conv_out"},
    }
    for level in range(2):
        for way in ("down", "up"):
            names[f"{way}_{level}_resample"] = f"{way}.{level}.{way}sample"
            for block in range(2):
                names[f"{way}_{level}_residual_{block}"] = f"{way}.{level}.block.{block}"
                names[f"{way}_{level}_attention_{block}"] = f"{way}.{level}.attn.{block}"
    tensors = {}

    def add(name, leaf, array):
        array = np.asarray(array)
        tensors[f"{name}.{TORCH_LEAVES.get(leaf, leaf)}"] = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array

    for side in ("encoder", "decoder"):
        for module, tree in params[side].items():
            name = f"{side}.{names[module]}"
            if "attention" in tree:
                joint, out = tree["attention"]["query_key_value"], tree["attention"]["out"]
                for place, letter in enumerate("qkv"):
                    tensors[f"{name}.{letter}.weight"] = np.asarray(joint["kernel"])[:, place, 0].T[..., None, None]
                    tensors[f"{name}.{letter}.bias"] = np.asarray(joint["bias"])[place, 0]
                tensors[f"{name}.proj_out.weight"] = np.asarray(out["kernel"])[0].T[..., None, None]
                tensors[f"{name}.proj_out.bias"] = np.asarray(out["bias"])
                for leaf, array in tree["norm"].items():
                    add(f"{name}.norm", leaf, array)
                continue
            for layer, leaves in tree.items():
                if not isinstance(leaves, dict):
                    add(name, layer, leaves)
                for leaf, array in leaves.items() if isinstance(leaves, dict) else ():
                    inner = {"skip": "nin_shortcut"}.get(layer, layer.replace("_", ""))
                    add(f"{name}.{inner}", leaf, array)
    for module in ("quant", "post_quant"):
        for leaf, array in params[module].items():
            add(f"{module}_conv", leaf, array)
    if "vocab_size" in fields:
        tensors["quantize.embedding.weight"] = np.asarray(params["codebook"]["embedding"])
    return tensors


def of_32_groups(fields):
    return {**fields, "width": 32, "groups": 32, "image_size": 256}


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_compvis_comes_in_with_what_it_was_trained_beside(prefix, tmp_path, capsys):
    fields = of_32_groups(KL if prefix else VQ)
    model = models.create_model(**fields)
    params = random_parameters(model)
    tensors = {f"{prefix}{name}": array for name, array in state_dict(fields, params).items()}
    if prefix:
        tensors |= {"model.diffusion_model.out.2.bias": np.zeros(4), "scale_factor": np.asarray(0.25)}
        tensors |= {"model_ema.decay": np.zeros(())}
    judge = models.create_model("discriminator", layers=2, width=4)
    judged = random_parameters(judge)
    distance = random_parameters(models.create_model(**LPIPS))
    if not prefix:
        places = {"conv_0": 0, "conv_1": 2, "norm_1": 3, "conv_2": 5, "norm_2": 6, "output": 8}
        for layer, leaves in judged.items():
            for leaf, array in leaves.items():
                array = np.asarray(array)
                name = f"loss.discriminator.main.{places[layer]}.{TORCH_LEAVES.get(leaf, leaf)}"
                tensors[name] = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array
        for layer, width in ((3, 8), (6, 16)):
            tensors[f"loss.discriminator.main.{layer}.running_mean"] = np.full(width, 0.5)
            tensors[f"loss.discriminator.main.{layer}.running_var"] = np.full(width, 2.0)
            tensors[f"loss.discriminator.main.{layer}.num_batches_tracked"] = np.asarray(7)
        tensors |= {f"loss.perceptual_loss.{name}": array for name, array in lpips_to_torch(distance).items()}
        tensors["loss.logvar"] = np.asarray(-1.5)
    write_tensors(tmp_path / "kl-f4.safetensors", tensors)
    only = ["--only=first_stage"] if prefix else []
    convert([f"--input={tmp_path}/kl-f4.safetensors", f"--output={tmp_path}/ours", *only])
    run = Run.open(tmp_path / "ours")
    scale = 0.25 if prefix else 1.0
    assert run.config.models.autoencoder.to_dict() == {
        **{name: value for name, value in fields.items() if name != "groups"},
        "latent_scale": scale,
    }
    weights = run.load()
    assert_same_trees(weights.params["autoencoder"], params)
    if not prefix:
        assert "logarithm of the output's variance, -1.5, is left out" in capsys.readouterr().out
        assert_same_trees(weights.params["discriminator"], judged)
        stats = weights.variables["discriminator"]["batch_stats"]
        assert jax.tree.map(lambda leaf: (leaf.shape, float(leaf[0])), stats) == {
            "norm_1": {"mean": ((8,), 0.5), "var": ((8,), 2.0)},
            "norm_2": {"mean": ((16,), 0.5), "var": ((16,), 2.0)},
        }
        assert_same_trees(run.load(parts=("lpips",)).params["lpips"], distance)


def test_a_kl_model_alone_says_which_scale_is_assumed(tmp_path, capsys):
    fields = of_32_groups({**KL, "multipliers": (1,), "attention_levels": ()})
    write_tensors(tmp_path / "f.safetensors", state_dict(fields, random_parameters(models.create_model(**fields))))
    arguments = ["--source=compvis", f"--input={tmp_path}/f.safetensors"]
    convert([*arguments, f"--output={tmp_path}/one"])
    assert "0.18215 is Stable Diffusion's, give --latent_scale for another" in capsys.readouterr().out
    convert([*arguments, f"--output={tmp_path}/two", "--latent_scale=0.5"])
    scales = [Run.open(tmp_path / name).config.models.autoencoder.latent_scale for name in ("one", "two")]
    assert scales == [0.18215, 0.5]
    with pytest.raises(UserError, match="--latent_scale=-1 is not a number above 0"):
        convert([*arguments, f"--output={tmp_path}/three", "--latent_scale=-1"])


def test_published_files_of_compvis_are_recognized_by_name(tmp_path):
    def recognized(*names):
        return [name for name in names if compvis.FORMAT.recognizes(WeightsFile(tmp_path / name))]

    published = ("kl-f8.ckpt", "sd-v1-4.ckpt", "v1-5-pruned.safetensors", "vq-f4.ckpt", "768-v-ema.ckpt", "model.ckpt")
    published += ("vqgan.1024.model.ckpt", "vqgan_gumbel_f8.ckpt", "last.ckpt")
    assert recognized(*published, "vae-ft-mse-840000-ema-pruned.ckpt")[:-1] == list(published)
    others = ("uvit_v1.pth", "dalle_v2.pt", "sd-vae-ft-mse.safetensors", "dallekl.ckpt", "vqgan.yaml")
    others += ("model.safetensors",)
    assert recognized(*others) == []


def test_a_compvis_file_that_says_no_scale_or_is_of_diffusers_is_one_line(tmp_path):
    fields = of_32_groups({**KL, "multipliers": (1,), "attention_levels": ()})
    model = models.create_model(**fields)
    params = random_parameters(model)
    tensors = {f"first_stage_model.{name}": array for name, array in state_dict(fields, params).items()}
    arguments = ["--source=compvis", f"--input={tmp_path}/f.safetensors", f"--output={tmp_path}/ours"]
    for scale, shown in ((np.ones((2, 3)), "an array of 2 x 3"), (np.zeros(1), "0.0"), (np.full((), np.inf), "inf")):
        write_tensors(tmp_path / "f.safetensors", {**tensors, "scale_factor": scale})
        with pytest.raises(UserError, match=f"scale_factor, .*, is {shown}, and one number above 0 is read; give it"):
            convert([*arguments, "--allow_nonfinite"])
    write_tensors(tmp_path / "f.safetensors", autoencoder_to_diffusers(model, params))
    with pytest.raises(UserError, match="in the layout of diffusers; give the folder that has its config.json"):
        convert(arguments)


def test_a_scale_that_a_config_of_diffusers_leaves_out_is_said(tmp_path, capsys):
    model = models.create_model(**VQ)
    files = autoencoder_files(Network(model, random_parameters(model), {}), "config.json", "model.safetensors")
    del files["config.json"]["scaling_factor"]
    write_files(tmp_path / "theirs", {**files, "diffusion_pytorch_model.safetensors": files["model.safetensors"]})
    convert([f"--input={tmp_path}/theirs", f"--output={tmp_path}/one"])
    assert "0.18215 is the library's own default; that of latent diffusion's authors is 1" in capsys.readouterr().out
    convert([f"--input={tmp_path}/theirs", f"--output={tmp_path}/two", "--latent_scale=1"])
    assert "scaling_factor" not in capsys.readouterr().out
    scales = [Run.open(tmp_path / name).config.models.autoencoder.latent_scale for name in ("one", "two")]
    assert scales == [0.18215, 1.0]


def test_lpips_comes_of_two_files_or_one(tmp_path):
    params = random_parameters(models.create_model(**LPIPS))
    whole = lpips_to_torch(params)
    vgg = {name.split(".", 2)[2]: array for name, array in whole.items() if name.startswith("net.")}
    assert set(vgg) >= {"0.weight", "28.bias"} and whole["lin4.model.1.weight"].shape == (1, 6, 1, 1)
    lins = {name: array for name, array in whole.items() if name.startswith("lin")}
    features = {f"features.{name}": array for name, array in vgg.items()} | {"classifier.0.bias": np.zeros(2)}
    write_tensors(tmp_path / "vgg16.safetensors", features)
    write_tensors(tmp_path / "lins.safetensors", lins)
    scaling = {"scaling_layer.shift": np.array([-0.03, -0.088, -0.188]).reshape(1, 3, 1, 1)}
    write_tensors(tmp_path / "lpips.safetensors", {**whole, "lins.0.model.1.weight": np.zeros(1), **scaling})
    convert(
        [f"--input={tmp_path}/vgg16.safetensors", f"--lins={tmp_path}/lins.safetensors", f"--output={tmp_path}/one"]
    )
    convert([f"--input={tmp_path}/lpips.safetensors", f"--output={tmp_path}/two"])
    for name in ("one", "two"):
        run = Run.open(tmp_path / name)
        assert run.config.models.lpips.to_dict() == LPIPS
        assert_same_trees(run.load().params["lpips"], params)
    with pytest.raises(UserError, match=r"is VGG-16 without the linear layers of LPIPS; give --lins=FILE"):
        convert([f"--input={tmp_path}/vgg16.safetensors", f"--output={tmp_path}/three"])
    write_tensors(tmp_path / "lpips.safetensors", {**whole, "scaling_layer.shift": np.zeros(3)})
    with pytest.raises(UserError, match=r"not the weights of LPIPS with VGG-16: scaling_layer.shift is \[0.0"):
        convert([f"--input={tmp_path}/lpips.safetensors", f"--output={tmp_path}/four"])
