"""Whole pipelines of Stable Diffusion as diffusers keeps them in a folder, in and out.

A folder has model_index.json, which names the class of each part, and a folder for each: unet, vae, text_encoder,
tokenizer, scheduler. What is here is what a UNet's pipeline has beside UNet, first stage and scheduler, which have
files of their own in this package: what reads captions; and the writing of all of it.
"""

from collections.abc import Mapping
from typing import Any

from cli.errors import UserError
from cli.locations import locate_from_home
from configs.common import get_diffusion_sampling
from data.clip_vocabulary import END, START
from data.tokenizer import Tokenizer
from models import create_model
from models.autoencoder import KLAutoencoder
from models.clip_text import ClipText
from models.unet import UNet
from weights.files.fields import show
from weights.files.layout import Tree
from weights.files.origin import Origin, Subfolder, peek_json
from weights.formats import clip_text
from weights.formats.contract import Files, Pipeline
from weights.formats.diffusers_autoencoder import autoencoder_files
from weights.formats.diffusers_scheduler import scheduler_config

INDEX = "model_index.json"
CLASS = "StableDiffusionPipeline"
TEXT_FOLDER, TOKENIZER_FOLDER = "text_encoder", "tokenizer"
_TOKENIZER_CONFIG, _SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
_VOCABULARIES = (("merges.txt", "vocab.json"), ("tokenizer.json",))
_CONFIG, _WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"

STEPS, GUIDANCE = 50, 7.5  # what its pipelines take unless told otherwise
# How the published code samples, `config.sample`.
SAMPLING = {"sampler": "plms", "steps": STEPS, "guidance": GUIDANCE, "times": "published", "offset": 1, "end": "first"}

# Keys of `config.sample` that no file of a pipeline has.
_TOLD = ("steps", "guidance", "eta", "rescale", "guidance_start", "guidance_stop", "guided_channels")
_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
# Parts of pipelines that are left out, each with what that means.
_LEFT_OUT = {
    "safety_checker": "its safety checker is left out: nothing looks at the pictures that are drawn",
    "image_encoder": "its image encoder is left out",
    "feature_extractor": "",  # of the two others
}


def read_text_part(origin: Origin, tokenizer: str) -> tuple[dict[str, Any], Tree, Tokenizer] | None:
    """What reads the captions of a pipeline: ({name, fields}, parameters, tokenizer); None if it has nothing such.

    Args:
      origin: of the pipeline.
      tokenizer: path of a tokenizer in place of its own; "" for that.

    Raises:
      UserError: if it cannot be computed, or the tokenizer is missing or another network's.
    """
    part = Subfolder(origin, TEXT_FOLDER)
    if part.find(clip_text.CONFIG) is None:
        return None
    config = part.json(clip_text.CONFIG)
    words = read_tokenizer(Subfolder(origin, TOKENIZER_FOLDER), tokenizer)
    fields = clip_text.clip_text_fields(config, words.end_id or 0, words.pad_id)
    tensors = clip_text.read_clip_text(part)
    return fields, clip_text.LAYOUT.read_deferred(create_model(**fields), tensors)["params"], words


def read_tokenizer(origin: Origin, path: str = "") -> Tokenizer:
    """The tokenizer of a pipeline's folder, or at `path`, which fills captions up as the folder's files say.

    Raises:
      UserError: if there is none, or it is no CLIP's, or those files are damaged.
    """
    if path:
        words = Tokenizer.from_clip_vocabulary(locate_from_home(path))
    else:
        for first, *others in _VOCABULARIES:
            *_, file = (origin.find(name) for name in (*others, first))  # those beside are fetched first
            if file is not None:
                words = Tokenizer.from_clip_vocabulary(file)
                break
        else:
            raise UserError(
                f"{origin.describe()} has no {' and no '.join(names[0] for names in _VOCABULARIES)}{origin.limits()}; "
                "give CLIP's vocabulary as --tokenizer"
            )
    file, pad = _TOKENIZER_CONFIG, END
    config = origin.json(file) if origin.find(file) is not None else {}
    pad = config.get("pad_token", pad)
    # Older folders say it there too, and differently: the library believes the map where the config lists no tokens.
    if "added_tokens_decoder" not in config and origin.find(_SPECIAL_TOKENS) is not None:
        special = origin.json(_SPECIAL_TOKENS)
        if "pad_token" in special:
            file, pad = _SPECIAL_TOKENS, special["pad_token"]
    pad = pad.get("content") if isinstance(pad, Mapping) else pad
    if not isinstance(pad, str):
        raise UserError(
            f"{file} of {origin.describe()} says that captions are filled up with {show(pad)}; it must be a token"
        )
    return words.padded_with(pad)


def is_whole(origin: Origin) -> bool:
    """Whether files say that they are a pipeline of Stable Diffusion."""
    path = origin.find(INDEX)
    return path is not None and peek_json(path).get("_class_name") == CLASS


def check_parts(origin: Origin, read: Mapping[str, bool]) -> tuple[str, ...]:
    """Compares what a pipeline's index says with what was found; returns notes on what is left out.

    Args:
      origin: of the pipeline.
      read: folder -> whether something was read from it.

    Raises:
      UserError: if a part that the index names is not there, or is none that is converted.
    """
    path = origin.find(INDEX)
    if path is None and (limits := origin.limits()):
        raise UserError(f"{origin.describe()} has no {INDEX}{limits}, which says what parts it has; fetch all of it")
    index = peek_json(path) if path is not None else {}
    named = {
        part for part, classes in index.items() if isinstance(classes, list | tuple) and any(each for each in classes)
    }
    if missing := sorted(part for part, found in read.items() if part in named and not found):
        raise UserError(
            f"{origin.describe()} names {', '.join(missing)} in {INDEX}, and there is no such folder with a config of "
            f"a class that is converted{origin.limits()}; fetch it too"
        )
    if unknown := sorted(named - {*_PARTS, *_LEFT_OUT}):
        raise UserError(f"{origin.describe()} has parts that are not converted: {', '.join(unknown)}")
    return tuple(said for part, said in _LEFT_OUT.items() if said and part in named)


def pipeline_files(pipeline: Pipeline, unet_files: Files) -> Files:
    """What `StableDiffusionPipeline.from_pretrained` reads; tensors are made one by one.

    Args:
      pipeline: of a run.
      unet_files: of its denoiser.

    Raises:
      UserError: if it is no such pipeline: says what would have to be otherwise.
    """
    networks, config = pipeline.networks, pipeline.config
    stage, text = networks.get("first_stage"), networks.get("text")
    problems = []
    if not isinstance(networks["denoiser"].model, UNet):
        problems.append("its denoiser is no UNet")
    if stage is None or not isinstance(stage.model, KLAutoencoder):
        problems.append("it has no first stage with a Gaussian bottleneck")
    if text is None or not isinstance(text.model, ClipText):
        problems.append("its captions are not read by a CLIP's text tower alone")
    if pipeline.tokenizer is None or not pipeline.tokenizer.reads_as_clip:
        problems.append("it has no tokenizer of CLIP's form")
    if problems or stage is None or text is None or pipeline.tokenizer is None:
        raise UserError(
            f"this run is no {CLASS}: {'; '.join(problems)}; give --part to write one of its networks alone"
        )
    scheduler = scheduler_config(config.process.to_dict(), config.sample.to_dict())
    usual = get_diffusion_sampling("", STEPS, GUIDANCE)
    if lost := [f"{key} {config.sample[key]}" for key in _TOLD if config.sample.get(key, usual[key]) != usual[key]]:
        print(f"warning: the files of a pipeline do not say {', '.join(lost)}, which the run samples with")
    parts = {
        "unet": unet_files,
        "vae": autoencoder_files(stage, _CONFIG, _WEIGHTS),
        TEXT_FOLDER: clip_text.clip_text_files(text.model, text.params),
        TOKENIZER_FOLDER: tokenizer_files(pipeline.tokenizer, text.model.text_length),
        "scheduler": {"scheduler_config.json": scheduler},
    }
    index = {
        "_class_name": CLASS,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", clip_text.CLASS],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", unet_files[_CONFIG]["_class_name"]],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    return {INDEX: index} | {f"{folder}/{name}": value for folder, of in parts.items() for name, value in of.items()}


def tokenizer_files(tokenizer: Tokenizer, length: int) -> Files:
    """What `CLIPTokenizer.from_pretrained` reads."""
    vocabulary = tokenizer.clip_vocabulary()
    named = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": vocabulary.pad}
    merges = "".join(f"{first} {second}\n" for first, second in vocabulary.merges)
    return {
        "vocab.json": dict(sorted(vocabulary.ids.items(), key=lambda item: item[1])),
        "merges.txt": f"#version: 0.2\n{merges}",
        _TOKENIZER_CONFIG: {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": length,
            "do_lower_case": True,
            "add_prefix_space": False,
            **named,
        },
        _SPECIAL_TOKENS: named,
    }
