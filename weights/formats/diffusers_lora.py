"""Low-rank pairs of a Stable Diffusion as diffusers keeps them, `pytorch_lora_weights.safetensors`, in and out.

Names begin with "unet." or "text_encoder."; older files end in other words, and those of a popular trainer begin with
"lora_unet_" or "lora_te_" and have underscores for dots. A module's product counts alpha / rank times: alpha is a
tensor beside, or in the file's metadata, or else the rank. What is written has that factor in B, and so no alpha.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cli.errors import UserError
from models.unet import UNet
from weights.files.origin import Origin, WeightsFile
from weights.files.tensors import check_finite, read_metadata, read_tensors
from weights.formats.contract import Adaptation, Converted, Files, Format
from weights.formats.low_rank import (
    NETWORKS,
    OPTIONS,
    ForeignPair,
    as_tensors,
    is_pair_name,
    rank_of,
    read_run,
    split_names,
    write_modules,
)

FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")

# Beginnings of names -> (kind of network, how it is called in metadata).
_PREFIXES = {
    "unet.": ("unet", "unet"),
    "text_encoder.": ("clip_text", "text_encoder"),
    "lora_unet_": ("unet", ""),
    "lora_te_": ("clip_text", ""),
}
_METADATA = "lora_adapter_metadata"


def module_scale(config: Mapping[str, Any], name: str, rank: int, what: str) -> float:
    """What a module's product counts by a config of peft: alpha, of which `alpha_pattern` may say another, over rank.

    Its keys are regular expressions of the ends of modules' names, from a dot on; the first that fits counts.

    Raises:
      UserError: if it is not a number, or a key is no regular expression.
    """
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise UserError(f"{what} has an alpha_pattern that is no object; fetch it again")
    alpha = config.get("lora_alpha", rank)
    for pattern, given in patterns.items():
        try:
            found = re.match(rf"(.*\.)?({pattern})$", name)
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(f"{what}: {pattern!r} of alpha_pattern is not a pattern of names ({error})") from error
        if found:
            alpha = given
            break
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not np.isfinite(alpha):
        raise UserError(f"{what} says that alpha of {name} is {alpha!r}; it must be a number")
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def _path(origin: Origin) -> Path | None:
    if isinstance(origin, WeightsFile):
        return origin.path if origin.path.suffix == ".safetensors" else None
    return origin.find(*FILES)


def _recognizes(origin: Origin) -> bool:
    path = _path(origin)
    if path is None or not isinstance(origin, WeightsFile):
        return path is not None
    try:
        return any(map(is_pair_name, read_tensors(path)))
    except UserError:
        return False


def _read(origin: Origin, base: str = "") -> Converted:
    path = origin.path if isinstance(origin, WeightsFile) else origin.require(*FILES)
    what, tensors = str(path), read_tensors(path)
    check_finite(what, tensors, allowed=origin.leniency.nonfinite)
    metadata = _metadata(what, read_metadata(path))
    pairs: dict[str, dict[str, ForeignPair]] = {}
    for name, sides in split_names(what, tensors).items():
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            raise UserError(f"{what} has a pair for {name}; names begin with {', '.join(_PREFIXES)}")
        kind, part = _PREFIXES[prefix]
        module = name.removeprefix(prefix)
        rank = rank_of(sides["A"])
        if "alpha" in sides:
            if sides["alpha"].size != 1:
                raise UserError(f"{what}: alpha of {name} is {sides['alpha'].shape}; it must be one number")
            scale = float(sides["alpha"].reshape(())) / rank
        else:
            config = {
                key.removeprefix(f"{part}."): value for key, value in metadata.items() if key.startswith(f"{part}.")
            }
            scale = module_scale(config, module, rank, what)
        pairs.setdefault(kind, {})[module] = ForeignPair(sides["A"], sides["B"], scale)
    return read_run(origin, what, base, pairs)


def _metadata(what: str, found: Mapping[str, str]) -> dict[str, Any]:
    """What diffusers says of its pairs in a file, {"unet.lora_alpha": ...}; {} if nothing."""
    if _METADATA not in found:
        return {}
    try:
        value = json.loads(found[_METADATA])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} has metadata that is not valid JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{what} has metadata that is no object; fetch it again")
    if dora := [key for key, each in value.items() if key.endswith(".use_dora") and each]:
        raise UserError(f"{what} says {dora[0]}, which is not converted: only plain pairs are")
    return value


def _write(adaptation: Adaptation) -> Files:
    tensors = {}
    for part, model in adaptation.models.items():
        prefix = "unet." if isinstance(model, UNet) else "text_encoder."
        tensors |= as_tensors(write_modules(adaptation, part, adaptation.scale), prefix)
    return {FILES[0]: tensors}


FORMAT = Format(
    name="diffusers_lora",
    networks=NETWORKS,
    inputs="low-rank pairs of a Stable Diffusion, pytorch_lora_weights.safetensors or a file with such names",
    outputs="StableDiffusionPipeline.load_lora_weights(DIR), of a run with config.lora",
    recognizes=_recognizes,
    read=_read,
    write=None,
    options=OPTIONS,
    write_pairs=_write,
)
