"""Low-rank pairs of one network as the peft library keeps them: adapter_config.json and adapter_model.safetensors.

Of its kinds of adapters LORA is converted, with alpha and rank of single modules and rank-stabilized factors
(`use_rslora`: alpha over the root of the rank). What changes more than kernels by a product is refused by name.
"""

from typing import Any

from cli.errors import UserError
from weights.files.origin import Origin, peek_json
from weights.files.tensors import check_finite, read_tensors
from weights.formats.contract import Adaptation, Converted, Files, Format
from weights.formats.diffusers_lora import module_scale
from weights.formats.low_rank import (
    NETWORKS,
    OPTIONS,
    ForeignPair,
    as_tensors,
    rank_of,
    read_run,
    split_names,
    write_modules,
)

CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")
KIND = "LORA"

_PREFIX = "base_model.model."

# Keys under which an adapter is more, or other, than a product beside each kernel; what they are where it is not.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_dora": (False,),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "modules_to_save": ([],),
    "layer_replication": (),
    "trainable_token_indices": (),
    "target_parameters": ([],),
    "alora_invocation_tokens": (),
    "arrow_config": (),
    "use_qalora": (False,),
    "use_bdlora": (),
    # Others begin with a change of the network's own kernels, which the pairs do not say.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}


def _recognizes(origin: Origin) -> bool:
    path = origin.find(CONFIG)
    return path is not None and peek_json(path).get("peft_type") == KIND


def _read(origin: Origin, base: str = "") -> Converted:
    config = origin.json(CONFIG)
    if config.get("peft_type") != KIND:
        raise UserError(
            f"{origin.describe()} is an adapter of peft_type {config.get('peft_type')!r}; {KIND} is converted"
        )
    strange = [f"{key}={config[key]!r}" for key, plain in _PLAIN.items() if config.get(key) not in (None, *plain)]
    if strange:
        raise UserError(f"{origin.describe()} has {', '.join(strange)}, which is not converted: only plain pairs are")
    path = origin.require(*FILES)
    what, tensors = str(path), read_tensors(path)
    check_finite(what, tensors, allowed=origin.leniency.nonfinite)
    pairs = {}
    for name, sides in split_names(what, tensors).items():
        if "alpha" in sides:
            raise UserError(f"{what} has an alpha of {name}; that is in {CONFIG}")
        module = name.removeprefix(_PREFIX)
        scale = module_scale(config, module, rank_of(sides["A"]), CONFIG)
        pairs[module] = ForeignPair(sides["A"], sides["B"], scale)
    return read_run(origin, what, base, {"": pairs})


def _write(adaptation: Adaptation) -> Files:
    if len(adaptation.models) > 1:
        raise UserError(f"peft's files are of one network; choose a --part: {', '.join(adaptation.models)}")
    (part,) = adaptation.models
    modules = write_modules(adaptation, part, 1.0)
    config = {
        "peft_type": KIND,
        "task_type": None,
        "base_model_name_or_path": None,
        "r": adaptation.rank,
        "lora_alpha": adaptation.scale * adaptation.rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "use_rslora": False,
    }
    return {CONFIG: config, FILES[0]: as_tensors(modules, _PREFIX)}


FORMAT = Format(
    name="peft",
    networks=NETWORKS,
    inputs="low-rank pairs of one network, adapter_config.json with adapter_model.safetensors",
    outputs="PeftModel.from_pretrained(network, DIR) of a UNet2DConditionModel or a CLIPTextModel, of a run with "
    "config.lora",
    recognizes=_recognizes,
    read=_read,
    write=None,
    options=OPTIONS,
    write_pairs=_write,
)
