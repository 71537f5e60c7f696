"""UniDiffuser's whole pipeline as diffusers has it: a folder of networks to a run folder, and back.

    unet            `UniDiffuserModel`, see `diffusers_unidiffuser.py`
    vae             `AutoencoderKL`
    text_encoder    `CLIPTextModel`, of which the last states are read
    image_encoder   `CLIPVisionModelWithProjection`, of another CLIP
    text_decoder    `UniDiffuserTextDecoder`, see `diffusers_text_decoder.py`
    scheduler       of the process; solvers are the authors', not its own

The library's pipeline tells a network the number of a noise among T, 0 to T - 1, where the authors' code and training
here tell 1 to T: one less for the same noise, with published folders too. A scheduler finds the noise by what it tells,
and has no key that parts the two. A side that is given has time 0, and one that is noise alone T, in both.

The two towers become one part `clip`, in which the text's projection, that nothing reads, is 0. Tokenizers are files of
text beside: both are read where they are there, and neither is written.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from cli.errors import UserError
from models import create_model
from models.unidiffuser import UniDiffuser
from weights.files.layout import Tensors
from weights.files.origin import Origin, Subfolder, read_weights
from weights.formats import diffusers_text_decoder as text_decoder
from weights.formats import diffusers_unidiffuser as unidiffuser
from weights.formats.contract import Converted, Files, Network
from weights.formats.diffusers_autoencoder import autoencoder_files, read_autoencoder
from weights.formats.diffusers_scheduler import read_scheduler, scheduler_config
from weights.formats.runs import unidiffuser_run
from weights.formats.transformers import WEIGHTS as CLIP_WEIGHTS
from weights.formats.transformers import clip_configs, clip_fields, clip_from_transformers, clip_to_transformers

TEXT_DECODER = "text_decoder/config.json"
BESIDE = ("first_stage", "clip", "captioner")
_POSITION_IDS = r"((text_model|vision_model)\.)?embeddings\.position_ids"
_LIBRARIES = {
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
    "clip_image_processor": ("transformers", "CLIPImageProcessor"),
    "clip_tokenizer": ("transformers", "CLIPTokenizer"),
    "text_decoder": ("diffusers", text_decoder.CLASS),
    "text_tokenizer": ("transformers", "GPT2Tokenizer"),
    "unet": ("diffusers", unidiffuser.CLASS),
    "scheduler": ("diffusers", "DPMSolverMultistepScheduler"),
}


def read_pipeline(origin: Origin, weights: tuple[str, ...]) -> Converted:
    """Reads what `UniDiffuserPipeline.save_pretrained` wrote, or the published folders.

    Args:
      origin: of the pipeline.
      weights: names of files of the library's own networks.

    Raises:
      UserError: if files are missing or say something else.
    """

    def part(folder: str) -> Subfolder:
        return Subfolder(origin, folder)

    own, clips = ("unet", "vae", "text_decoder"), ("text_encoder", "image_encoder")
    files = {**dict.fromkeys(own, weights), **dict.fromkeys(clips, CLIP_WEIGHTS)}
    origin.foretell(*([f"{folder}/{name}" for name in names] for folder, names in files.items()))
    network = part("unet")
    fields = unidiffuser.unidiffuser_fields(network.json("config.json"))
    tensors = read_weights(network, weights, unidiffuser.IGNORED)
    trees = {"unidiffuser": unidiffuser.unidiffuser_from_diffusers(create_model(**fields), tensors)}
    stage = read_autoencoder(part("vae").json("config.json"), read_weights(part("vae"), weights))
    trees["first_stage"] = stage.params["autoencoder"]
    words = text_decoder.text_decoder_fields(part("text_decoder").json("config.json"))
    tensors = read_weights(part("text_decoder"), weights, text_decoder.IGNORED)
    trees["captioner"] = text_decoder.text_decoder_from_diffusers(create_model(**words), tensors)
    clip, trees["clip"] = _read_clip(part("text_encoder"), part("image_encoder"), part("clip_image_processor"))
    # Of the solver only its noise is taken; which order it has plays no part.
    scheduler = part("scheduler").json("scheduler_config.json")
    process, _ = read_scheduler({key: 2 if key == "solver_order" else value for key, value in scheduler.items()})
    frozen = {"first_stage": stage.config["models"]["autoencoder"], "clip": clip, "captioner": words}
    return unidiffuser_run(part("clip_tokenizer"), part("text_tokenizer"), fields, trees, frozen, process)


def pipeline_files(network: Network, config: str, weights: str) -> Files:
    """What `UniDiffuserPipeline.from_pretrained` reads, given its two tokenizers.

    Args:
      network: a UniDiffuser, with `BESIDE` beside it and its run's config.
      config: name of a config's file.
      weights: name of the file of a network's weights.

    Raises:
      UserError: if the library has no such networks, process or scales of latents.
    """
    assert network.config is not None
    scheduler = _scheduler(network.config)
    stage, clip, words = (network.beside[name] for name in BESIDE)
    whole, preprocessor = clip_configs(clip.model)
    text, vision = whole["text_config"], whole["vision_config"]
    tensors = clip_to_transformers(clip.params)
    towers = {
        "text_encoder": ({"architectures": ["CLIPTextModel"], **text}, ("text_model.",)),
        "image_encoder": (
            {"architectures": ["CLIPVisionModelWithProjection"], **vision},
            ("vision_model.", "visual_projection."),
        ),
    }
    files: Files = {
        "model_index.json": {"_class_name": "UniDiffuserPipeline", **{k: list(v) for k, v in _LIBRARIES.items()}},
        "clip_image_processor/preprocessor_config.json": preprocessor,
        **network_files(network, config, weights, "unet/"),
        f"text_decoder/{config}": text_decoder.text_decoder_config(words.model),
        f"text_decoder/{weights}": text_decoder.text_decoder_to_diffusers(words.params),
        **{f"vae/{name}": file for name, file in autoencoder_files(stage, config, weights).items()},
        "scheduler/scheduler_config.json": scheduler,
    }
    for folder, (document, prefixes) in towers.items():
        files[f"{folder}/config.json"] = document
        files[f"{folder}/model.safetensors"] = {
            name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)
        }
    return files


def network_files(network: Network, config: str, weights: str, folder: str = "") -> Files:
    """What `UniDiffuserModel.from_pretrained` reads.

    Raises:
      UserError: if the library has no such network.
    """
    model = network.model
    assert isinstance(model, UniDiffuser)
    return {
        f"{folder}{config}": unidiffuser.unidiffuser_config(model),
        f"{folder}{weights}": unidiffuser.unidiffuser_to_diffusers(network.params),
    }


def _scheduler(config: ConfigDict) -> dict[str, Any]:
    """scheduler_config.json of a run's process, with the authors' solver.

    Raises:
      UserError: if the library has no such process, or latents are multiplied by something that it does not know.
    """
    scales = config.get("scales", ConfigDict()).to_dict()
    scales.pop("examples", None)
    if any(scale != 1 for scale in scales.values()):
        raise UserError(
            f"config.scales is {scales}, and diffusers' UniDiffuserPipeline multiplies no latents; give "
            "--part=unidiffuser to write the network alone"
        )
    # `time_shift` has no key; see the module's docstring.
    usual = {"sampler": "dpm_solver_multistep", "times": "published", "spacing": "linspace"}
    document = scheduler_config({**config.process.to_dict(), "time_shift": 0}, usual)
    return {**document, "algorithm_type": "dpmsolver++", "solver_order": 3, "solver_type": "midpoint"}


def _read_clip(text: Origin, image: Origin, preprocessor: Origin) -> tuple[dict[str, Any], Any]:
    """({name, fields}, parameters) of a CLIP whose towers are of two."""
    words, pictures = text.json("config.json"), image.json("config.json")
    width = pictures.get("projection_dim", 512)
    whole = {"model_type": "clip", "text_config": words, "vision_config": pictures, "projection_dim": width}
    name = "preprocessor_config.json"
    prepared = None if preprocessor.find(name) is None else preprocessor.json(name)
    fields = clip_fields(whole, prepared)
    tensors = {
        **_named(read_weights(text, CLIP_WEIGHTS, _POSITION_IDS), "text_model."),
        **_named(read_weights(image, CLIP_WEIGHTS, _POSITION_IDS), "vision_model."),
        "text_projection.weight": np.zeros((fields["embed_dim"], fields["text_width"]), np.float32),
        "logit_scale": np.zeros((), np.float32),
    }
    params, _ = clip_from_transformers(create_model(**fields), tensors)
    return fields, params


def _named(tensors: Mapping[str, Any], prefix: str) -> Tensors:
    """Names of a tower, which transformers 5.2 and later write without their prefix."""
    kept = (prefix, "visual_projection.", "text_projection.")
    return {name if name.startswith(kept) else prefix + name: array for name, array in tensors.items()}
