"""UniDiffuser's networks in their authors' layout, in and out, and how many tensors the published files have."""

import json

import jax
import numpy as np
import pytest

import models
from cli.errors import UserError
from scripts.convert import main as convert
from weights.files.tensors import read_tensors, write_tensors
from weights.formats import FORMATS, diffusers_unidiffuser, unidiffuser
from weights.formats.contract import Network
from weights.run import Run

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
def test_networks_in_and_out_again(fields, file, tmp_path):
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
    run, part = Run.open(tmp_path / "ours"), fields["name"]
    assert models.create_model(**run.config.models[part]) == model
    jax.tree.map(np.testing.assert_array_equal, run.load().params[part], network.params)
    convert(["--to=unidiffuser", f"--run={tmp_path}/ours", f"--output={tmp_path}/back"])
    (back,) = (tmp_path / "back").iterdir()
    for name, tensor in read_tensors(back).items():
        np.testing.assert_array_equal(tensor, tensors.get(name, tensors.get(f"module.{name}")))


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
