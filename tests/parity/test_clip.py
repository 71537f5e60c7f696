"""CLIP of transformers, OpenCLIP and OpenAI's archives computes what ours computes with the same weights, both ways."""

import copy
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import build_model_from_openai_state_dict
from transformers import CLIPConfig, CLIPModel

import models
from scripts.convert import main as convert
from weights.files.tensors import read_tensors
from weights.formats.open_clip import (
    clip_config,
    clip_fields,
    clip_fields_of_tensors,
    clip_from_open_clip,
    clip_to_open_clip,
)
from weights.formats.transformers import clip_fields as fields_of_transformers
from weights.formats.transformers import clip_from_transformers, clip_to_transformers
from weights.run import Run

TINY_TEXT = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2}
TINY_TEXT |= {"num_attention_heads": 2, "max_position_embeddings": 8, "eos_token_id": 39, "bos_token_id": 38}
TINY_VISION = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 3}
TINY_VISION |= {"image_size": 32, "patch_size": 8}
TINY_OPEN_CLIP_TEXT = {"context_length": 8, "vocab_size": 40, "width": 64, "heads": 1, "layers": 2}
TINY_OPEN_CLIP_VISION = {
    "vit": {"image_size": 32, "layers": 2, "width": 128, "patch_size": 8, "mlp_ratio": 1.7},
    "resnet": {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8, "patch_size": None},
}


def randomize(network: torch.nn.Module) -> torch.nn.Module:
    """Gives every weight that starts at 0 or 1 a value of its own, and running statistics some that fit the network."""
    generator = torch.Generator().manual_seed(1)

    def noise(tensor):
        return torch.randn(tensor.shape, generator=generator)

    with torch.no_grad():
        for name, tensor in network.named_parameters():
            if tensor.ndim == 1 and name.endswith("weight"):  # of a norm
                tensor.copy_(1 + 0.1 * noise(tensor))
            elif tensor.ndim <= 1:
                tensor.add_(0.1 * noise(tensor))
        norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        if norms:  # with statistics of no picture at all, a deep network would give one feature to all pictures
            for norm in norms:
                norm.momentum = 1.0
            size = network.visual.image_size
            network.train().encode_image(torch.randn(4, 3, size, size, generator=generator))
            for norm in norms:
                norm.momentum = 0.1
                norm.running_mean.add_(0.1 * norm.running_var.sqrt() * noise(norm.running_mean))
                norm.running_var.mul_(1 + 0.1 * noise(norm.running_var).abs())
    return network.eval()


def inputs(model, seed: int = 0):
    """Two pictures, as ours takes them and normalized, and two captions that end at different places."""
    rng = np.random.default_rng(seed)
    images = rng.uniform(-1, 1, (2, model.image_size, model.image_size, 3)).astype(np.float32)
    images[1] = 0.3 * images[1] + 0.7  # a light one: a ResNet averages noise
    text = rng.integers(1, model.text_end_id - 1, (2, model.text_length)).astype(np.int32)
    for row, length in zip(text, (model.text_length - 1, 4), strict=True):
        row[length:] = 0
        row[length] = model.text_end_id
    normalized = ((images + 1) / 2 - np.array(model.image_mean)) / np.array(model.image_std)
    return images, text, torch.from_numpy(normalized.astype(np.float32)).permute(0, 3, 1, 2)


def run_open_clip(network, pictures, text):
    """(image features, text features, logits)."""
    with torch.no_grad():
        image, caption = network.encode_image(pictures, True), network.encode_text(torch.from_numpy(text).long(), True)
        logits = network.logit_scale.exp() * image @ caption.T
        logits = logits if network.logit_bias is None else logits + network.logit_bias
    return image.numpy(), caption.numpy(), logits.numpy()


def run_transformers(network, pictures, text):
    """(image features, text features, logits)."""
    with torch.no_grad():
        out = network(input_ids=torch.from_numpy(text).long(), pixel_values=pictures)
    return out.image_embeds.numpy(), out.text_embeds.numpy(), out.logits_per_image.numpy()


def run_ours(model, params, variables, images, text):
    """(image features, text features, logits)."""
    out = jax.jit(model.apply)({"params": params, **variables}, jnp.asarray(images), jnp.asarray(text))
    return out.image, out.text, out.logit_scale * out.image @ out.text.T + out.logit_bias


def assert_close(ours, theirs):
    differences = [float(np.abs(np.asarray(one) - two).max()) for one, two in zip(ours, theirs, strict=True)]
    print("largest differences (image, text, logits):", *(f"{value:.1e}" for value in differences))
    assert max(differences) < 1e-4, differences
    # And they are no constants: the rows differ by far more.
    assert all(np.abs(one[0] - one[1]).max() > 100 * max(differences[:2]) for one in theirs[:2]), theirs[:2]


def state(network) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in network.state_dict().items()}


def as_torch(tensors):
    return {name: torch.from_numpy(np.array(array)) for name, array in tensors.items()}


def tiny_transformers(activation: str = "quick_gelu", **text):
    towers = {"text_config": {**TINY_TEXT, "hidden_act": activation, **text}}
    towers["vision_config"] = {**TINY_VISION, "hidden_act": activation}
    torch.manual_seed(0)
    return randomize(CLIPModel(CLIPConfig(**towers, projection_dim=24)))


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos", [39, 2])
def test_tiny_transformers_through_the_command_and_back(activation, eos, tmp_path):
    network = tiny_transformers(activation, eos_token_id=eos)
    network.save_pretrained(tmp_path / "theirs")
    convert(["--source=transformers", f"--input={tmp_path}/theirs", f"--output={tmp_path}/ours"])
    pretrained = Run.open(tmp_path / "ours")
    weights, model = pretrained.load(), models.create_model(**pretrained.config.models.clip)
    assert (model.activation, model.text_end_id) == (activation, 39)
    images, text, pictures = inputs(model)
    theirs = run_transformers(network, pictures, text)
    assert_close(run_ours(model, weights.params["clip"], {}, images, text), theirs)

    convert(["--to=transformers", f"--run={tmp_path}/ours", f"--output={tmp_path}/back"])
    loaded: Any = CLIPModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    back, report = loaded
    assert not any(report.values()), report
    for one, two in zip(run_transformers(back.eval(), pictures, text), theirs, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)


@pytest.mark.parametrize("name", ["vit", "resnet"])
@pytest.mark.parametrize("quick_gelu", [True, False])
def test_tiny_open_clip_through_the_command_and_back(name, quick_gelu, tmp_path):
    config = {"embed_dim": 24, "quick_gelu": quick_gelu, "vision_cfg": TINY_OPEN_CLIP_VISION[name]}
    config |= {"text_cfg": {**TINY_OPEN_CLIP_TEXT}, "init_logit_bias": -3.0 if quick_gelu else None}
    torch.manual_seed(0)
    network = randomize(open_clip.CLIP(**copy.deepcopy(config)))
    (tmp_path / "theirs").mkdir()
    torch.save(network.state_dict(), tmp_path / "theirs" / "open_clip_pytorch_model.bin")
    document = {"model_cfg": config, "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.3]}}
    (tmp_path / "theirs" / "open_clip_config.json").write_text(json.dumps(document))
    convert(["--source=open_clip", f"--input={tmp_path}/theirs", f"--output={tmp_path}/ours"])
    pretrained = Run.open(tmp_path / "ours")
    weights, model = pretrained.load(), models.create_model(**pretrained.config.models.clip)
    images, text, pictures = inputs(model)
    theirs = run_open_clip(network, pictures, text)
    assert_close(run_ours(model, weights.params["clip"], weights.variables.get("clip", {}), images, text), theirs)

    convert(["--to=open_clip", f"--run={tmp_path}/ours", f"--output={tmp_path}/back"])
    back = open_clip.create_model(f"local-dir:{tmp_path}/back")
    for one, two in zip(run_open_clip(back.eval(), pictures, text), theirs, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_an_archive_of_openai_s(name, tmp_path):
    """TorchScript in half precision that carries three numbers as tensors; OpenCLIP reads it for comparison."""
    torch.manual_seed(0)
    config = {"embed_dim": 24, "quick_gelu": True, "vision_cfg": TINY_OPEN_CLIP_VISION[name] | {"mlp_ratio": 4.0}}
    network = randomize(open_clip.CLIP(**config, text_cfg=TINY_OPEN_CLIP_TEXT))
    size = config["vision_cfg"]["image_size"]
    for key, value in (("input_resolution", size), ("context_length", 8), ("vocab_size", 40)):
        network.__dict__.pop(key, None)
        network.register_buffer(key, torch.tensor(value))
    pictures, text = torch.zeros(2, 3, size, size), torch.full((2, 8), 39)
    traced = torch.jit.trace_module(network, {"forward": (pictures, text)}, check_trace=False)
    torch.jit.save(traced.half(), tmp_path / "tiny.pt")

    convert(["--source=openai", f"--input={tmp_path}/tiny.pt", f"--output={tmp_path}/ours"])
    pretrained = Run.open(tmp_path / "ours")
    weights, model = pretrained.load(), models.create_model(**pretrained.config.models.clip)
    assert model.activation == "quick_gelu"
    tensors = torch.jit.load(tmp_path / "tiny.pt").state_dict()
    del tensors["attn_mask"]  # tracing made a buffer of it
    reference = build_model_from_openai_state_dict(tensors, cast_dtype=torch.float32).float()
    images, text, pictures = inputs(model)
    theirs = run_open_clip(reference, pictures, text)
    assert_close(run_ours(model, weights.params["clip"], weights.variables.get("clip", {}), images, text), theirs)

    convert(["--to=openai", f"--run={tmp_path}/ours", f"--output={tmp_path}/back"])
    tensors = as_torch(read_tensors(tmp_path / "back" / "clip.safetensors"))
    back = build_model_from_openai_state_dict(tensors, cast_dtype=torch.float32).float()
    for one, two in zip(run_open_clip(back, pictures, text), theirs, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)


def test_transformers_at_the_published_shape():
    torch.manual_seed(0)
    network = randomize(CLIPModel(CLIPConfig()))
    model = models.create_model(**fields_of_transformers(network.config.to_dict()))
    assert model.text_end_id == 49407
    tensors = state(network)
    params, variables = clip_from_transformers(model, tensors)
    images, text, pictures = inputs(model)
    theirs = run_transformers(network, pictures, text)
    assert_close(run_ours(model, params, variables, images, text), theirs)
    back = clip_to_transformers(params)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor)


@pytest.mark.parametrize("name", ["ViT-B-32-quickgelu", "RN50", "ViT-B-32"])
def test_open_clip_at_published_shapes(name, tmp_path):
    torch.manual_seed(0)
    network = randomize(open_clip.create_model(name))
    tensors = state(network)
    fields = clip_fields(open_clip.get_model_config(name))
    model = models.create_model(**fields)
    assert model.activation == ("quick_gelu" if name.endswith("quickgelu") else "gelu")
    assert {**clip_fields_of_tensors(tensors, model.activation)} == fields
    params, variables = clip_from_open_clip(model, tensors)
    images, text, pictures = inputs(model)
    theirs = run_open_clip(network, pictures, text)
    ours = run_ours(model, params, variables, images, text)
    assert_close(ours, theirs)
    if name == "ViT-B-32":  # under the other label, the same weights are another network
        mislabelled = model.clone(activation="quick_gelu")
        wrong = run_ours(mislabelled, params, variables, images, text)
        apart = [float(np.abs(np.asarray(one) - two).max()) for one, two in zip(wrong, theirs, strict=True)]
        print("largest differences under the other activation:", *(f"{value:.1e}" for value in apart))
        assert min(apart) > 3e-4, apart

    back = clip_to_open_clip(params, variables)
    assert back.keys() == tensors.keys()
    del network
    file = tmp_path / "open_clip_model.safetensors"
    from safetensors.numpy import save_file

    save_file(back, file)
    try:  # half a gigabyte, which pytest would keep
        again = open_clip.create_model(name, pretrained=str(file)).eval()
    finally:
        file.unlink()
    for one, two in zip(run_open_clip(again, pictures, text), theirs, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)
    assert clip_fields(clip_config(model)["model_cfg"]) == fields
