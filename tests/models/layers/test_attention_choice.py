"""Which kernel is chosen, for which device, dtype and mask, and what networks give it to choose from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from models import create_model
from models.conditioning import Conditioning
from models.layers import attention
from models.layers.attention import KeyLengths, mask_kind
from models.layers.attention_choice import Device, choose_attention, device_in_context

CPU, TPU = Device("cpu"), Device("tpu")
AMPERE, HOPPER, BLACKWELL = (Device("gpu", capability) for capability in ((8, 0), (9, 0), (10, 0)))
FITS = {"device": AMPERE, "dtype": jnp.bfloat16, "head_dim": 64, "lengths": (77, 77), "mask_kind": "causal"}


@pytest.mark.parametrize(
    ("change", "chosen"),
    [
        ({}, "cudnn"),
        ({"mask_kind": "none"}, "cudnn"),
        ({"mask_kind": "lengths", "lengths": (256, 77)}, "cudnn"),
        ({"mask_kind": "dense"}, "xla"),
        ({"dtype": "bfloat16"}, "cudnn"),
        ({"dtype": jnp.dtype("float16")}, "cudnn"),
        ({"dtype": jnp.float32}, "xla"),
        ({"head_dim": 40}, "cudnn"),
        ({"head_dim": 36}, "xla"),
        ({"head_dim": 128}, "cudnn"),
        ({"head_dim": 160}, "xla"),
        ({"head_dim": 160, "device": HOPPER}, "cudnn"),
        ({"head_dim": 264, "device": HOPPER}, "xla"),
        ({"head_dim": 160, "device": BLACKWELL}, "xla"),
        ({"lengths": (64, 1), "mask_kind": "none"}, "cudnn"),
        ({"lengths": (1, 1), "mask_kind": "none"}, "xla"),
        ({"device": Device("gpu", (7, 5))}, "xla"),
        ({"device": Device("gpu")}, "xla"),
        ({"device": CPU}, "xla"),
        ({"device": TPU}, "xla"),
    ],
    ids=str,
)
def test_the_fused_kernel_is_chosen_where_it_runs(change, chosen):
    assert choose_attention(**{**FITS, **change}) == chosen


def test_an_unknown_kind_of_mask_is_refused():
    with pytest.raises(ValueError, match="choose one of none, causal, lengths, dense"):
        choose_attention(**{**FITS, "mask_kind": "sliding"})


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_a_program_for_devices_that_this_host_lacks_has_the_plain_attention(platform):
    device = AbstractDevice(f"some {platform}", 1, platform)
    with use_abstract_mesh(AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)):
        found = device_in_context()
    assert found == Device(platform)
    assert choose_attention(**{**FITS, "device": found}) == "xla"


@pytest.mark.parametrize(
    ("name", "capability"), [("8.6", (8, 6)), ("12.0", (12, 0)), ("gfx90a", None), ("gfx1100", None), (None, None)]
)
def test_a_gpu_says_its_compute_capability(monkeypatch, name, capability):
    class Gpu:
        if name is not None:
            compute_capability = name

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Gpu()])
    assert device_in_context() == Device("gpu", capability)


def test_kinds_of_masks():
    causal, lengths = np.tri(6, dtype=bool), KeyLengths(jnp.array([2, 6]))
    kinds = {
        "none": [None, np.ones((6, 6), bool)],
        "causal": [causal],
        "lengths": [lengths],
        "dense": [np.tri(6, k=1, dtype=bool), jnp.asarray(causal), causal[None], lengths.dense(6)],
    }
    for kind, masks in kinds.items():
        assert [mask_kind(mask, 6, 6) for mask in masks] == [kind] * len(masks)
    assert mask_kind(np.tri(4, 6, dtype=bool), 4, 6) == "dense"  # which corner it starts in is not said


CLIP = {"embed_dim": 8, "image_tower": "vit", "image_size": 8, "patch_size": 4, "image_width": 16, "image_layers": 2}
CLIP |= {"image_heads": 2, "text_vocab_size": 9, "text_length": 5, "text_end_id": 8, "text_width": 16}
CLIP |= {"text_layers": 2, "text_heads": 2}
DALLE = {"text_vocab_size": 9, "text_length": 3, "image_vocab_size": 7, "image_grid": (2, 2), "width": 16, "depth": 2}
UNET = {"image_size": 8, "in_channels": 3, "width": 8, "multipliers": (1,), "attention_levels": (0,), "blocks": 1}
UNET |= {"attention": "transformer", "heads": 2, "context_width": 6, "groups": 4}
UVIT = {"image_size": 8, "patch_size": 4, "width": 16, "depth": 2, "heads": 2, "context_length": 3, "context_width": 6}


@pytest.mark.parametrize(
    ("name", "fields", "mask", "kinds"),
    [
        ("clip", CLIP, None, {"none", "causal"}),
        ("dalle", {**DALLE, "heads": 2, "attention": "full"}, None, {"causal"}),
        ("dalle", {**DALLE, "heads": 2, "attention": "full", "scan": True}, None, {"causal"}),
        ("dalle", {**DALLE, "heads": 2, "attention": ("full", "column")}, None, {"causal", "dense"}),
        ("unet", UNET, None, {"none"}),
        ("unet", UNET, "lengths", {"none", "lengths"}),
        ("unet", {**UNET, "remat": "full"}, "lengths", {"none", "lengths"}),
        ("uvit", UVIT, None, {"none"}),
        ("uvit", UVIT, "lengths", {"lengths"}),
        ("uvit", {**UVIT, "scan": True, "remat": "full"}, "lengths", {"lengths"}),
        ("uvit", UVIT, "dense", {"dense"}),
    ],
)
def test_masks_of_networks_are_what_a_fused_kernel_takes(monkeypatch, name, fields, mask, kinds):
    offered = set()

    def choose(device, dtype, head_dim, lengths, kind):
        offered.add(kind)
        return "xla"

    monkeypatch.setattr(attention, "choose_attention", choose)
    model = create_model(name, **fields)
    inputs = [jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), each) for each in model.example_inputs(2)]
    if mask is not None:
        tokens = inputs[2].tokens
        lengths = KeyLengths(jnp.array([1, 3]))
        dense = jnp.ones(tokens.shape[:2], bool)
        inputs[2] = Conditioning(tokens=tokens, mask=lengths if mask == "lengths" else dense)
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    assert not offered  # parameters are made without
    jax.eval_shape(lambda *x: jax.tree.leaves(model.apply(*x)), params, *inputs)
    assert offered == kinds
