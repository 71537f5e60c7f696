"""First stages as latent diffusion's authors have them (github.com/CompVis/latent-diffusion): state dicts to ours.

Those of taming-transformers, VQGANs, are the same networks by the same names; one that chooses codes by logits
("quantize.proj") is there alone.

A checkpoint of a first stage has the names of the autoencoder bare, and beside it under "loss." what it was trained
with: the discriminator, the network of LPIPS, and the logarithm of the output's variance. A checkpoint of a second
stage, such as Stable Diffusion's, has the autoencoder under "first_stage_model.". Shapes tell all sizes.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from cli.errors import UserError
from cli.locations import locate_from_home
from data.tokenizer import Tokenizer
from models import create_model
from models.discriminator import PatchDiscriminator
from models.gumbel_autoencoder import GumbelAutoencoder
from weights.files.layout import CONVOLUTION, Layout, Rule, Tree, pointwise
from weights.files.origin import Origin, WeightsFile, read_weights
from weights.formats import compvis_pipeline
from weights.formats.compvis_pipeline import UNET, under
from weights.formats.contract import Converted, Format, refuse_unread
from weights.formats.diffusers_pipeline import SAMPLING
from weights.formats.lpips import lpips_fields, lpips_from_torch
from weights.formats.runs import (
    AUTOENCODER_OPTIONS,
    STABLE_DIFFUSION_SCALE,
    autoencoder_run,
    check_latents,
    denoiser_run,
    read_latent_scale,
)

WEIGHTS = ("model.ckpt", "model.safetensors", "last.ckpt", "checkpoints/last.ckpt")
FIRST_STAGE = "first_stage"
_IMAGE_SIZE = 256  # of the pictures that all published first stages were trained on

_STAGE = "first_stage_model."
_TRAINED_BESIDE = "loss."
_DISCRIMINATOR, _LPIPS, _LOG_VARIANCE = "discriminator.", "perceptual_loss.", "logvar"
# kl-f8.ckpt, sd-v1-4.ckpt, v1-5-pruned.ckpt, 768-v-ema.ckpt, vae-ft-mse-840000-ema-pruned.ckpt, vqgan.1024.model.ckpt
_PUBLISHED = re.compile(r"^(kl-f\d|vq-f\d|sd-v\d|v\d-\d|\d+-v-|vae-ft-|vqgan[._]\w.*\.ckpt$)")
_CODES = {"autoencoder_vq": "quantize.embedding.weight", "autoencoder_gumbel": "quantize.embed.weight"}


def _residual(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Rules of a residual block; `ours` has one group."""
    return (
        Rule(rf"{ours}/norm_(\d)/(\w+)", rf"{theirs}.norm\2.\3"),
        Rule(rf"{ours}/conv_(\d)/(\w+)", rf"{theirs}.conv\2.\3", CONVOLUTION),
        Rule(rf"{ours}/skip/(\w+)", rf"{theirs}.nin_shortcut.\2", CONVOLUTION),
    )


def _attention(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Rules of an attention block; `ours` has one group."""
    return (
        Rule(rf"{ours}/norm/(\w+)", rf"{theirs}.norm.\2"),
        Rule(rf"{ours}/attention/query_key_value/(\w+)", tuple(rf"{theirs}.{name}.\2" for name in "qkv"), pointwise()),
        Rule(rf"{ours}/attention/out/(\w+)", rf"{theirs}.proj_out.\2", pointwise(inputs=2)),
    )


def _autoencoder_rules(codes: str) -> tuple[Rule, ...]:
    """Both ways number their levels from the finest."""
    rules = [
        Rule(r"codebook/embedding", codes),
        Rule(r"logits/(\w+)", r"quantize.proj.\1", CONVOLUTION),
        Rule(r"(quant|post_quant)/(\w+)", r"\1_conv.\2", CONVOLUTION),
        Rule(r"(encoder|decoder)/input/(\w+)", r"\1.conv_in.\2", CONVOLUTION),
        Rule(r"(encoder|decoder)/output_norm/(\w+)", r"\1.norm_out.\2"),
        Rule(r"(encoder|decoder)/output/(\w+)", r"\1.conv_out.\2", CONVOLUTION),
        Rule(r"(encoder|decoder)/(down|up)_(\d+)_resample/conv/(\w+)", r"\1.\2.\3.\2sample.conv.\4", CONVOLUTION),
    ]
    for side, way in (("encoder", "down"), ("decoder", "up")):
        rules += _attention(f"{side}/mid_attention()", f"{side}.mid.attn_1")
        for block in range(2):
            rules += _residual(f"{side}/mid_residual_{block}()", f"{side}.mid.block_{block + 1}")
        for level in range(8):  # more than there are anywhere
            ours, theirs = f"{side}/{way}_{level}", f"{side}.{way}.{level}"
            rules += _residual(rf"{ours}_residual_(\d+)", rf"{theirs}.block.\1")
            rules += _attention(rf"{ours}_attention_(\d+)", rf"{theirs}.attn.\1")
    return tuple(rules)


_AUTOENCODERS = {
    codes: Layout(what="this autoencoder in the layout of CompVis", rules=_autoencoder_rules(codes))
    for codes in _CODES.values()
}


def autoencoder_layout(model: Any) -> Layout:
    """The table of a first stage, a `models.autoencoder`."""
    return _AUTOENCODERS[_CODES["autoencoder_gumbel" if isinstance(model, GumbelAutoencoder) else "autoencoder_vq"]]


def discriminator_layout(model: PatchDiscriminator) -> Layout:
    """The table of a discriminator, whose layers are counted with the activations between them."""
    places = {0: 0} | {layer: 3 * layer - 1 for layer in range(1, model.layers + 1)}
    return Layout(
        what="this discriminator in the layout of CompVis",
        rules=(
            Rule(r"conv_(\d)/(\w+)", lambda match: f"main.{places[int(match[1])]}.{match[2]}", CONVOLUTION),
            Rule(r"output/(\w+)", rf"main.{3 * model.layers + 2}.\1", CONVOLUTION),
            Rule(r"norm_(\d)/(\w+)", lambda match: f"main.{places[int(match[1])] + 1}.{match[2]}"),
        ),
        ignored=r".*\.num_batches_tracked",
    )


def autoencoder_fields(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Tells {"name", fields of `models.autoencoder`} from the shapes of a first stage's tensors.

    Raises:
      UserError: if a tensor that says a size is missing.
    """

    def size(name: str, axis: int, ndim: int = 4) -> int:
        if name not in tensors or tensors[name].ndim != ndim or not tensors[name].size:
            raise UserError(f"these are not the weights of a first stage in the layout of CompVis: there is no {name}")
        return tensors[name].shape[axis]

    def found(pattern: str) -> list[int]:
        return sorted({int(match[1]) for name in tensors if (match := re.match(pattern, name))})

    width = size("encoder.conv_in.weight", 0)
    if any(name.startswith("encoder.down_blocks.") for name in tensors):
        raise UserError(
            "these are the weights of a first stage in the layout of diffusers; give the folder that has its "
            "config.json too, and --source=diffusers"
        )
    levels = len(found(r"encoder\.down\.(\d+)\."))
    widths = [size(f"encoder.down.{level}.block.0.conv2.weight", 0) for level in range(levels)]
    name = next((name for name, codes in _CODES.items() if codes in tensors), "autoencoder_kl")
    fields: dict[str, Any] = {
        "name": name,
        "image_size": _IMAGE_SIZE,
        "channels": size("encoder.conv_in.weight", 1),
        "width": width,
        "multipliers": tuple(each // width if each % width == 0 else each / width for each in widths),
        "attention_levels": tuple(found(r"encoder\.down\.(\d+)\.attn\.")),
        "blocks": len(found(r"encoder\.down\.0\.block\.(\d+)\.")),
        "latent_channels": size("post_quant_conv.weight", 1),
    }
    if name in _CODES:
        fields["vocab_size"] = size(_CODES[name], 0, ndim=2)
    return fields


def discriminator_fields(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Tells {"name": "discriminator", fields} from the shapes of its tensors.

    Raises:
      UserError: if its first layer is missing.
    """
    if np.ndim(tensors.get("main.0.weight")) != 4:
        raise UserError(
            "these are not the weights of a discriminator in the layout of CompVis: there is no main.0.weight"
        )
    width, channels = tensors["main.0.weight"].shape[:2]
    normalized = sum(name.endswith("running_mean") for name in tensors)
    return {"name": "discriminator", "layers": normalized, "width": width, "channels": channels}


def discriminator_from_compvis(
    model: PatchDiscriminator, tensors: Mapping[str, np.ndarray]
) -> tuple[Tree, dict[str, Tree]]:
    """Converts a state dict to (params, variables) of `model`.

    Raises:
      UserError: if tensors are missing, unexpected or of another shape; lists them.
    """
    collections = discriminator_layout(model).read(model, tensors)
    return collections.pop("params"), collections


def autoencoder_from_compvis(model: Any, tensors: Mapping[str, np.ndarray]) -> Tree:
    """Converts the tensors of a first stage to the parameters of `model`, a `models.autoencoder`.

    Raises:
      UserError: if tensors are missing, unexpected or of another shape; lists them.
    """
    return autoencoder_layout(model).read(model, tensors)["params"]


def quantized_from_compvis(tensors: Mapping[str, np.ndarray], grid: tuple[int, int]) -> tuple[dict[str, Any], Tree]:
    """({name, fields}, parameters) of a VQGAN that is the image tokenizer of a second stage.

    Args:
      tensors: a state dict; what it was trained beside may be in it.
      grid: tokens of a picture, as many down as across.

    Raises:
      UserError: if they are not a VQGAN's, or of another shape than they should be.
    """
    stage = {name: array for name, array in tensors.items() if not name.startswith(_TRAINED_BESIDE)}
    fields = autoencoder_fields(stage)
    if fields["name"] not in _CODES:
        raise UserError(f"these are not the weights of a VQGAN: there is no {' or '.join(_CODES.values())}")
    fields |= {"image_size": grid[0] * 2 ** (len(fields["multipliers"]) - 1), "latent_scale": 1.0}
    return fields, autoencoder_from_compvis(create_model(**fields), stage)


def _read(
    origin: Origin,
    latent_scale: str = "",
    prediction: str = "",
    image_size: str = "",
    tokenizer: str = "",
    only: str = "",
) -> Converted:
    tensors = read_weights(origin, WEIGHTS)
    if only not in ("", FIRST_STAGE):
        raise UserError(f"--only={only} is none of what a checkpoint has; give --only={FIRST_STAGE}, or leave it out")
    if not only and any(name.startswith(compvis_pipeline.TEXT) for name in tensors):
        return _read_pipeline(tensors, latent_scale, prediction, image_size, tokenizer)
    if not only and any(name.startswith(UNET) for name in tensors):
        raise UserError(
            f"{origin.describe()} has a UNet ({UNET}*) without a text encoder that is known, CLIP's of Stable "
            f"Diffusion 1 or 2: it is not converted; give --only={FIRST_STAGE} for its first stage alone"
        )
    refuse_unread("a first stage", prediction=prediction, image_size=image_size, tokenizer=tokenizer)
    stage = under(_STAGE, tensors) or {
        name: array for name, array in tensors.items() if not name.startswith((_TRAINED_BESIDE, "model_ema."))
    }
    stage = {name: array for name, array in stage.items() if not name.startswith(_TRAINED_BESIDE)}
    fields = autoencoder_fields(stage)
    scale, notes = _find_scale(fields, tensors, latent_scale)
    fields["latent_scale"] = scale
    trees: dict[str, Tree] = {"autoencoder": autoencoder_from_compvis(create_model(**fields), stage)}

    beside, others, variables, frozen = under(_TRAINED_BESIDE, tensors), {}, {}, {}
    if discriminator := under(_DISCRIMINATOR, beside):
        others["discriminator"] = discriminator_fields(discriminator)
        model = create_model(**others["discriminator"])
        trees["discriminator"], variables["discriminator"] = discriminator_from_compvis(model, discriminator)
    if perceptual := under(_LPIPS, beside):
        frozen["lpips"] = lpips_fields(perceptual)
        trees["lpips"] = lpips_from_torch(create_model(**frozen["lpips"]), perceptual)
    if log_variance := float(np.sum(beside.get(_LOG_VARIANCE, 0.0))):
        notes += (f"the logarithm of the output's variance, {log_variance:g}, is left out",)
    return autoencoder_run(fields, trees, variables, others, frozen, notes)


def _read_pipeline(
    tensors: Mapping[str, np.ndarray], latent_scale: str, prediction: str, image_size: str, tokenizer: str
) -> Converted:
    """Stable Diffusion, whole."""
    words = Tokenizer.from_clip_vocabulary(locate_from_home(tokenizer)) if tokenizer else None
    stage = autoencoder_fields(under(_STAGE, tensors))
    text = compvis_pipeline.read_text(tensors, words)
    process = compvis_pipeline.read_process(tensors, prediction, second=text[0]["text_pad_id"] == 0)
    usual = 768 if process["prediction"] == "v" else 512
    factor = 2 ** (len(stage["multipliers"]) - 1)
    side = int(image_size) if image_size.isdecimal() else 0 if image_size else usual
    if side < factor or side % factor:
        raise UserError(f"--image_size={image_size} is no multiple of {factor} pixels, such as {usual}")
    fields, params, notes = compvis_pipeline.read_unet(tensors, side // factor)
    check_latents(fields["in_channels"], stage["latent_channels"])
    if text[0]["text_width"] != fields["context_width"]:
        raise UserError(
            f"its text encoder has width {text[0]['text_width']}, and its UNet reads {fields['context_width']}"
        )
    stage["latent_scale"], more = _find_scale(stage, tensors, latent_scale)
    model = create_model(**stage)
    first_stage = stage, autoencoder_layout(model).read_deferred(model, under(_STAGE, tensors))["params"]
    if words is None:
        notes += ("it has no tokenizer, which prompts take: give CLIP's vocabulary as --tokenizer",)
    return denoiser_run(fields, params, process, SAMPLING, first_stage, (*notes, *more), text)


def _find_scale(
    fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray], given: str
) -> tuple[float, tuple[str, ...]]:
    """What latents are multiplied by: as told, as a second stage's checkpoint says, or as published; and a note."""
    if given:
        return read_latent_scale(given), ()
    if (stored := tensors.get("scale_factor")) is not None:
        if np.size(stored) != 1 or not 0 < float(np.ravel(stored)[0]) < float("inf"):
            raise UserError(
                f"scale_factor, what a second stage multiplies latents by, is {_shown(stored)}, and one number above 0 "
                "is read; give it as --latent_scale"
            )
        return float(np.ravel(stored)[0]), ()
    if fields["name"] in _CODES:
        return 1.0, ()
    note = (
        f"its files do not tell what latents are multiplied by; {STABLE_DIFFUSION_SCALE} is Stable Diffusion's, give "
    )
    return STABLE_DIFFUSION_SCALE, (f"{note}--latent_scale for another",)


def _shown(value: np.ndarray) -> str:
    return str(np.ravel(value)[0]) if np.size(value) == 1 else f"an array of {' x '.join(map(str, np.shape(value)))}"


def _recognizes(origin: Origin) -> bool:
    if isinstance(origin, WeightsFile):
        # Anybody's weights may be called model.safetensors.
        return origin.path.name in (*WEIGHTS[:1], *WEIGHTS[2:]) or bool(_PUBLISHED.search(origin.path.name))
    return origin.find(WEIGHTS[0], *WEIGHTS[2:]) is not None


FORMAT = Format(
    name="compvis",
    networks=("autoencoder_kl", "autoencoder_vq", "autoencoder_gumbel", "discriminator", "lpips"),
    inputs="a first stage, also a VQGAN of taming-transformers; Stable Diffusion 1 or 2 in one file: a .ckpt or "
    ".safetensors, or a folder with model.ckpt or checkpoints/last.ckpt",
    outputs="nothing",
    recognizes=_recognizes,
    read=_read,
    write=None,
    options={
        **AUTOENCODER_OPTIONS,
        "prediction": "of Stable Diffusion 2: v or eps",
        "image_size": "of Stable Diffusion: the pictures that it draws, pixels (default 512, of v 768)",
        "tokenizer": "of Stable Diffusion: CLIP's vocabulary",
        "only": "first_stage: of a checkpoint of Stable Diffusion, or of another second stage, that alone",
    },
)
