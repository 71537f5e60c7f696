"""DiT in its authors' layout and in that of diffusers: names, both directions, what shapes tell, what is refused."""

import json

import numpy as np
import pytest

import models
from cli.errors import UserError
from weights.files.origin import Folder, WeightsFile, open_origin
from weights.formats import FORMATS
from weights.formats.contract import Network, write_files
from weights.formats.diffusers_dit import dit_from_diffusers
from weights.formats.dit import ARGUMENTS, DROPOUT, dit_fields_of_tensors, dit_files, from_dit, read_dit

from ..clip_samples import assert_same_trees, tiny

SMALL = {"name": "dit", "image_size": 4, "patch_size": 2, "in_channels": 4, "out_channels": 8, "num_classes": 3}
SMALL |= {"width": 384, "depth": 2, "heads": 6, "mlp_ratio": 1}
OF_DIFFUSERS = {**SMALL, "width": 16, "heads": 2, "mlp_ratio": 4, "last_period": True, "mlp_norm_epsilon": 1e-5}


def written(form, network):
    """What a format makes of a network."""
    write = FORMATS[form].write
    assert write is not None
    return write(network)


def test_there_and_back(tmp_path):
    model, params, _ = tiny(SMALL)
    files = dit_files(model, params)
    tensors = files["dit.safetensors"]
    assert_same_trees(from_dit(model, tensors), params)
    assert {"blocks.1.attn.qkv.weight", "blocks.0.adaLN_modulation.1.bias", "y_embedder.embedding_table.weight"} < set(
        tensors
    )
    write_files(tmp_path, files)
    # From arguments, and from shapes alone, whatever lies beside the file.
    for origin in (Folder(tmp_path), WeightsFile(tmp_path / "dit.safetensors")):
        fields, read = read_dit(origin)
        assert models.create_model(**fields) == model and read.keys() == tensors.keys()
    run = FORMATS["dit"].read(Folder(tmp_path))
    assert run.config["process"]["variance"] == "learned" and run.config["loss"] == {"dropout": DROPOUT}
    assert run.config["sample"]["spacing"] == "linspace" and run.config["sample"]["guided_channels"] == 3
    # Trained without dropping classes, it has a row less, and none of them stands for none.
    arguments = {**json.loads((tmp_path / ARGUMENTS).read_text()), "num_classes": 3, "class_dropout_prob": 0.0}
    (tmp_path / ARGUMENTS).write_text(json.dumps(arguments))
    run = FORMATS["dit"].read(Folder(tmp_path))
    assert run.config["loss"] == {"dropout": 0.0} and run.config["models"]["denoiser"]["num_classes"] == 3
    moved = {**tensors, "pos_embed": tensors["pos_embed"][:, ::-1]}
    with pytest.raises(UserError, match="pos_embed are not the fixed sines and cosines of 2 x 2 patches"):
        from_dit(model, moved)
    del tensors["final_layer.linear.bias"]
    with pytest.raises(UserError, match="missing: final_layer.linear.bias"):
        from_dit(model, tensors)


def test_shapes_of_published_files_tell_their_networks():
    size = {"image_size": 32, "width": 1152, "depth": 28, "heads": 16, "mlp_ratio": 4, "num_classes": 1001}
    published = models.create_model(**{**SMALL, **size})
    shape = {
        **{"x_embedder.proj.weight": (1152, 4, 2, 2), "pos_embed": (1, 256, 1152)},
        **{"blocks.0.mlp.fc1.weight": (4608, 1152), "final_layer.linear.weight": (32, 1152)},
        **{"y_embedder.embedding_table.weight": (1001, 1152)},
        **{f"blocks.{i}.attn.qkv.bias": (3456,) for i in range(28)},
    }
    names = {name: np.broadcast_to(np.zeros((), np.float32), size) for name, size in shape.items()}
    assert models.create_model(**dit_fields_of_tensors(names)) == published
    with pytest.raises(UserError, match=rf"the picture of 255 patches, which no published DiT has; put {ARGUMENTS}"):
        dit_fields_of_tensors({**names, "pos_embed": np.zeros((1, 255, 1))})


def test_diffusers_there_and_back(tmp_path):
    model, params, _ = tiny(OF_DIFFUSERS)
    write_files(tmp_path, written("diffusers", Network(model, params, {})))
    origin = open_origin(str(tmp_path))
    assert FORMATS["diffusers"].recognizes(origin) and not FORMATS["dit"].recognizes(origin)
    read = FORMATS["diffusers"].read(origin)
    assert models.create_model(**read.config["models"]["denoiser"]) == model
    assert_same_trees(read.params["denoiser"], params)
    # In a pipeline, with its scheduler, whose process the channels complete.
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler/scheduler_config.json").write_text(
        json.dumps({"_class_name": "DDIMScheduler", "clip_sample": False})
    )
    assert FORMATS["diffusers"].read(origin).config["process"]["variance"] == "learned"
    with pytest.raises(UserError, match="--tokenizer says nothing of a DiT; leave it out"):
        FORMATS["diffusers"].read(origin, tokenizer="merges.txt")
    with pytest.raises(UserError, match="--latent_scale says nothing of a network without a first stage"):
        FORMATS["diffusers"].read(origin, latent_scale="0.5")


def test_a_network_without_a_class_for_none_is_written_as_such_or_refused():
    model, params, _ = tiny(SMALL)
    arguments = written("dit", Network(model, params, {}, null_class=False))[ARGUMENTS]
    assert (arguments["num_classes"], arguments["class_dropout_prob"]) == (3, 0.0)
    with pytest.raises(UserError, match="this DiT has no class for none"):
        written("diffusers", Network(models.create_model(**OF_DIFFUSERS), {}, {}, null_class=False))


def test_layers_that_embed_time_differently_are_refused(tmp_path):
    model, params, _ = tiny(OF_DIFFUSERS)
    tensors = written("diffusers", Network(model, params, {}))["diffusion_pytorch_model.safetensors"]
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"
    with pytest.raises(UserError, match=f"{name} is not that of transformer_blocks.0"):
        dit_from_diffusers(model, {**tensors, name: tensors[name] + 1})


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("dit", {"out_channels": 5}, "its out_channels is 5"),
        ("dit", {"last_period": True}, "its last_period is True"),
        ("dit", {"context_width": 6}, "its context_width is 6"),
        ("diffusers", {}, "its mlp_ratio is 1, theirs 4; its last_period is False, theirs True"),
        ("diffusers", {"num_classes": 0}, "its num_classes is 0"),
    ],
)
def test_what_theirs_cannot_compute_is_refused(form, change, message):
    model = models.create_model(**{**SMALL, **change})
    with pytest.raises(UserError, match=message):
        written(form, Network(model, {}, {}))
