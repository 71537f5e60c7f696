"""Tables of names: what a wrong set of tensors is told, and where arrays go."""

import jax.numpy as jnp
import numpy as np
import pytest

from cli.errors import UserError
from weights.files.layout import CONVOLUTION, FLAT, LINEAR, SAME, check_tensors, linear
from weights.formats.open_clip import clip_from_open_clip, clip_to_open_clip
from weights.formats.transformers import clip_from_transformers, clip_to_transformers

from ..clip_samples import FIELDS, RESNET, assert_same_trees, tiny


@pytest.mark.parametrize(
    ("form", "shape", "outward"),
    [
        (LINEAR, (4, 3, 2, 5), (30, 4)),
        (linear(2), (2, 5, 3), (3, 10)),
        (FLAT, (3, 2, 5), (30,)),
        (CONVOLUTION, (3, 2, 4, 5), (5, 4, 3, 2)),
        (CONVOLUTION, (4, 5), (5, 4, 1, 1)),
        (SAME, (2, 3), (2, 3)),
    ],
)
def test_forms_turn_both_ways(form, shape, outward):
    array = np.arange(np.prod(shape)).reshape(shape)
    there = form.outward(array)
    assert there.shape == outward
    np.testing.assert_array_equal(form.inward(there, shape), array)


def test_a_joint_projection_is_query_key_value_in_turn_head_by_head():
    _, params, _ = tiny({**FIELDS, "image_heads": 2})
    kernel = np.asarray(params["image"]["blocks_1"]["attention"]["query_key_value"]["kernel"])  # [64, 3, 2, 32]
    bias = np.asarray(params["image"]["blocks_1"]["attention"]["query_key_value"]["bias"])
    joint = clip_to_open_clip(params, {})
    apart = clip_to_transformers(params)
    for part, name in enumerate("qkv"):
        for head in range(2):
            rows = slice(32 * head, 32 * (head + 1))
            expected = kernel[:, part, head].T
            separate = apart[f"vision_model.encoder.layers.1.self_attn.{name}_proj.weight"]
            np.testing.assert_array_equal(separate[rows], expected)
            in_joint = joint["visual.transformer.resblocks.1.attn.in_proj_weight"][64 * part : 64 * (part + 1)]
            np.testing.assert_array_equal(in_joint[rows], expected)
        np.testing.assert_array_equal(
            apart[f"vision_model.encoder.layers.1.self_attn.{name}_proj.bias"], bias[part].reshape(-1)
        )


FORMATS = {
    "open_clip": (clip_to_open_clip, clip_from_open_clip, FIELDS),
    "open_clip resnet": (clip_to_open_clip, clip_from_open_clip, RESNET),
    "transformers": (lambda params, variables: clip_to_transformers(params), clip_from_transformers, FIELDS),
}


@pytest.mark.parametrize("name", FORMATS)
def test_there_and_back_is_the_same(name):
    write, read, fields = FORMATS[name]
    model, params, variables = tiny(fields)
    tensors = write(params, variables)
    back = read(model, tensors)
    assert_same_trees(back, (params, variables))
    halved = {key: array.astype(np.float16) for key, array in tensors.items()}
    np.testing.assert_allclose(read(model, halved)[0]["logit_scale"], params["logit_scale"], rtol=1e-3)
    assert read(model, halved)[0]["logit_scale"].dtype == jnp.float32


@pytest.mark.parametrize("name", FORMATS)
def test_every_wrong_tensor_is_listed_at_once(name):
    write, read, fields = FORMATS[name]
    model, params, variables = tiny(fields)
    tensors = write(params, variables)
    names = sorted(key for key in tensors if tensors[key].ndim == 2)
    gone, cut = names[:2], names[2:4]
    wrong = {key: array for key, array in tensors.items() if key not in gone}
    wrong |= {key: tensors[key][:-1] for key in cut} | {"visual.extra": np.zeros(2), "head.weight": np.zeros(1)}
    with pytest.raises(UserError, match="these are not the weights of this CLIP") as error:
        read(model, wrong)
    assert f"missing: {gone[0]}, {gone[1]}; unexpected: head.weight, visual.extra; of another shape:" in str(
        error.value
    )
    for key in cut:
        assert f"{key} is {wrong[key].shape}, expected {tensors[key].shape}" in str(error.value)


@pytest.mark.parametrize("name", FORMATS)
def test_only_buffers_that_hold_nothing_learned_are_passed_over(name):
    write, read, fields = FORMATS[name]
    model, params, variables = tiny(fields)
    tensors = write(params, variables)
    buffers = {
        "transformers": ["text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"],
        "open_clip": ["input_resolution", "context_length", "vocab_size", "attn_mask"],
        "open_clip resnet": ["visual.bn1.num_batches_tracked", "visual.layer2.0.downsample.1.num_batches_tracked"],
    }[name]
    extra = {buffer: np.zeros((), np.int64) for buffer in buffers}
    assert_same_trees(read(model, tensors | extra), (params, variables))
    with pytest.raises(UserError, match="unexpected: my_attn_mask"):
        read(model, tensors | {"my_attn_mask": np.zeros(1)})


def test_a_prefix_of_all_is_said_of_more_than_one_name():
    wanted = {"a.weight": (1,), "b.weight": (1,), "c.weight": (1,)}
    with pytest.raises(UserError, match="they are there under 'model.': save those alone"):
        check_tensors("it", wanted, {f"model.{name}": shape for name, shape in wanted.items()})
    one_astray = {**wanted, "old.c.weight": (1,)}
    del one_astray["c.weight"]
    with pytest.raises(UserError) as error:
        check_tensors("it", wanted, one_astray)
    assert "without that prefix" not in str(error.value)


def test_a_network_that_a_layout_lacks_is_refused():
    _, params, _ = tiny(RESNET)
    with pytest.raises(UserError, match="transformers has no place for params/image/"):
        clip_to_transformers(params)
