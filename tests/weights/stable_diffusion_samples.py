"""A tiny pipeline of Stable Diffusion as diffusers keeps one, written here, for the tests of formats."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from configs.common import get_defaults, get_diffusion_sampling
from data.tokenizer import Tokenizer
from models import create_model
from weights.formats import clip_text, compvis, compvis_pipeline, diffusers
from weights.formats.contract import Network, Pipeline, write_files

from ..models.random_parameters import random_parameters
from .unet_samples import STABLE_DIFFUSION_1

LENGTH = 8  # tokens of a caption
TEXT = {
    **{"name": "clip_text", "text_length": LENGTH, "text_width": 6, "text_layers": 1, "text_heads": 2},
    "activation": "quick_gelu",
}
FIRST_STAGE = {
    **{"name": "autoencoder_kl", "image_size": 16, "channels": 3, "width": 4, "multipliers": (1, 2), "blocks": 1},
    **{"attention_levels": (), "latent_channels": 4, "latent_scale": 0.18215, "groups": 2},
}
PROCESS = {
    "schedule": {"name": "discrete", "kind": "scaled_linear", "steps": 1000, "start": 0.00085, "end": 0.012},
    **{"prediction": "eps", "variance": "small", "clip": False},
}
SAMPLE = {**get_diffusion_sampling("plms", 50, 7.5).to_dict(), "times": "published", "offset": 1, "end": "first"}

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


def change_json(path: Path, **changes: Any) -> None:
    """Sets keys of a document; `...` takes one away."""
    document = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not ...}))


def write_pipeline(folder: Path) -> dict[str, Any]:
    """Writes one, with a small vocabulary of CLIP's form; returns {part: parameters}."""
    vocabulary = folder.parent / "merges.txt"
    vocabulary.write_text("#version: 0.2\nc a\nca t</w>\nr e\nre d</w>\n", encoding="utf-8")
    words = Tokenizer.from_clip_vocabulary(vocabulary).padded_with("<|endoftext|>")
    ends = {"text_vocab_size": words.vocab_size, "text_end_id": words.end_id, "text_pad_id": words.pad_id}
    config = get_defaults()
    with config.unlocked():
        config.process, config.sample = PROCESS, SAMPLE
    fields = {"denoiser": STABLE_DIFFUSION_1, "first_stage": FIRST_STAGE, "text": {**TEXT, **ends}}
    models = {part: create_model(**each) for part, each in fields.items()}
    networks = {part: Network(model, random_parameters(model), {}) for part, model in models.items()}
    write = diffusers.FORMAT.write_pipeline
    assert write is not None
    write_files(folder, write(Pipeline(config, networks, words)))
    return {part: network.params for part, network in networks.items()}


def single_file() -> dict[str, Any]:
    """{name: tensor} of a tiny version 1 as its authors keep it."""
    unet = {**STABLE_DIFFUSION_1, "width": 32, "groups": 32, "heads": 8}
    unet = create_model(**{**unet, "time_width": 128})
    stage = create_model(**{**FIRST_STAGE, "width": 32, "groups": 32})
    text = create_model(**TEXT, text_vocab_size=518, text_end_id=517, text_pad_id=517)
    layouts = {
        "model.diffusion_model.": (compvis_pipeline.unet_layout(unet), unet),
        "first_stage_model.": (compvis.autoencoder_layout(stage), stage),
        "cond_stage_model.transformer.": (clip_text.LAYOUT, text),
    }
    return {
        f"{prefix}{name}": np.asarray(tensor)
        for prefix, (layout, model) in layouts.items()
        for name, tensor in layout.write({"params": random_parameters(model)}).items()
    }
