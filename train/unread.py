"""Keys of a config that were changed and that nothing reads, as the choice beside them has no use for them.

They are no mistake that could spoil a run, so it says them and goes on: who compares two schedules, or switches
guidance off, need not take the other one's numbers out of the config.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from configs.common import get_defaults
from data.points import is_points
from models.dalle import Dalle
from sample.arguments import idle_settings
from sample.samplers.from_config import build_network
from train.objectives.autoencoder import AutoencoderObjective
from train.optimizer import READ_BY_SCHEDULE, READ_BY_TRANSFORM

_ENDLESS_BETAS = ("cosine", "sohl_dickstein")  # chains that have no `start` and `end`


def unread_keys(config: ConfigDict) -> list[str]:
    """A line for each key whose value is not the default and has no effect; it names the key and the reason."""
    found = [*_of_optimizer(config.optimizer), *_of_average(config.ema), *_of_data(config), *_of_process(config)]
    found += [*_of_lora(config.lora), *_of_dalle(config), *_of_first_stage(config)]
    found += [
        (f"config.sample.{key}", config.sample[key], why) for key, why in idle_settings({}, config.sample.to_dict())
    ]
    return [f"{name}={value!r} has no effect: {why}" for name, value, why in found]


def _of_optimizer(config: ConfigDict) -> Iterator[tuple[str, Any, str]]:
    defaults, rules = get_defaults().optimizer, list(config.rules)
    transforms = [rule.get("transform", config.transform) for rule in rules]
    schedules = [{**dict(config.schedule), **dict(rule.get("schedule", {}))} for rule in rules]
    for key in ("b1", "b2", "eps", "mu_dtype"):
        reads = [key in READ_BY_TRANSFORM[transform] for transform in transforms]
        inherited = any(read and key not in rule for read, rule in zip(reads, rules, strict=True))
        if config[key] != defaults[key] and not inherited:
            yield f"config.optimizer.{key}", config[key], f"no rule takes it that has a transform ({_or(transforms)})"
        for index, (rule, read) in enumerate(zip(rules, reads, strict=True)):
            if key in rule and not read:
                yield f"config.optimizer.rules[{index}].{key}", rule[key], f"transform {transforms[index]!r} has none"
    decays = any(rule.get("weight_decay", config.weight_decay) for rule in rules)
    if config.no_decay != defaults.no_decay and not decays:
        yield "config.optimizer.no_decay", config.no_decay, "weight_decay is 0"
    for key in ("end", "decay_steps", "boundaries", "factor"):
        reads = [_schedule_reads(schedule, key) for schedule in schedules]
        own = [key in rule.get("schedule", {}) for rule in rules]
        inherited = any(read and not given for read, given in zip(reads, own, strict=True))
        why = [f"schedule {schedule['name']!r} {_without(schedule, key)}" for schedule in schedules]
        if config.schedule[key] != defaults.schedule[key] and not inherited:
            yield f"config.optimizer.schedule.{key}", config.schedule[key], _or(why)
        for index, (read, given) in enumerate(zip(reads, own, strict=True)):
            if given and not read:
                yield f"config.optimizer.rules[{index}].schedule.{key}", schedules[index][key], why[index]


def _schedule_reads(schedule: Mapping[str, Any], key: str) -> bool:
    return key in READ_BY_SCHEDULE[schedule["name"]] and not (key == "factor" and not schedule["boundaries"])


def _without(schedule: Mapping[str, Any], key: str) -> str:
    return "has no boundaries" if key in READ_BY_SCHEDULE[schedule["name"]] else "does not read it"


def _of_average(config: ConfigDict) -> Iterator[tuple[str, Any, str]]:
    defaults = get_defaults().ema
    for key in ("warm_up", "every", "paths"):
        read = config.decay or (key == "paths" and config.lengths)
        if config[key] != defaults[key] and not read:
            yield f"config.ema.{key}", config[key], "there is no moving average while config.ema.decay is 0"


def _of_lora(config: ConfigDict) -> Iterator[tuple[str, Any, str]]:
    defaults = get_defaults().lora
    for key in ("alpha", "paths"):
        if not config.rank and config[key] != defaults[key]:
            yield f"config.lora.{key}", config[key], "there are no low-rank pairs while config.lora.rank is 0"


def _of_data(config: ConfigDict) -> Iterator[tuple[str, Any, str]]:
    data, defaults = config.data, get_defaults().data
    reasons = {}
    if config.objective in ("autoencoder", "dvae", "vqvae"):
        reasons["text_length"] = f"objective {config.objective!r} reads no captions"
    if config.objective != "diffusion":
        reasons["label_field"] = f"objective {config.objective!r} reads no classes"
    if not data.text_length:
        reasons |= dict.fromkeys(("text_ends", "tokenizer", "bpe_dropout"), "config.data.text_length is 0")
    if data.max_tiles > 1:
        reasons |= dict.fromkeys(("transform", "draft"), "config.data.max_tiles has pictures cut into tiles whole")
    if is_points(data.dataset):
        keys = ("text_length", "text_ends", "tokenizer", "bpe_dropout", "image_size", "transform", "cache")
        reasons |= dict.fromkeys(keys, f"the dataset {data.dataset} has neither pictures nor captions")
    for key, why in reasons.items():
        if data[key] != defaults[key]:
            yield f"config.data.{key}", data[key], why


def _of_process(config: ConfigDict) -> Iterator[tuple[str, Any, str]]:
    process = config.get("process") or {}
    if process.get("weighting", "uniform") == "uniform" and process.get("gamma", 5.0) != 5.0:
        yield "config.process.gamma", process["gamma"], "weighting 'uniform' has none"
    usual = 1.0 if "first_stage" in config.frozen or is_points(config.data.dataset) else 0.5
    if process.get("prediction", "eps") != "edm" and process.get("sigma_data", usual) != usual:
        yield "config.process.sigma_data", process["sigma_data"], "prediction 'edm' alone is told it"
    schedule = process.get("schedule") or {}
    if schedule.get("kind", "linear") in _ENDLESS_BETAS:
        for key, default in (("start", 1e-4), ("end", 2e-2)):
            if schedule.get(key, default) != default:
                yield f"config.process.schedule.{key}", schedule[key], f"kind {schedule['kind']!r} has none"


def _of_first_stage(config: ConfigDict) -> Iterator[tuple[str, Any, str]]:
    usual = AutoencoderObjective.measured_examples
    if config.objective != "autoencoder" or config.loss.get("measured_examples", usual) == usual:
        return
    if config.models.autoencoder.get("latent_scale") is not None:
        why = "config.models.autoencoder.latent_scale says what latents are multiplied by, and nothing is measured"
        yield "config.loss.measured_examples", config.loss.measured_examples, why


def _of_dalle(config: ConfigDict) -> Iterator[tuple[str, Any, str]]:
    if config.objective != "dalle":
        return
    model: Dalle = build_network(config, "models.dalle")
    if "conv" in model.layer_types:
        return
    for key in ("conv_kernel", "conv_edge"):
        value = getattr(model, key)
        if value != Dalle.__dataclass_fields__[key].default:
            attention = config.models.dalle.get("attention", model.attention)
            yield f"config.models.dalle.{key}", value, f"attention {attention!r} has no layer of type 'conv'"


def _or(choices: list[str]) -> str:
    return " or ".join(dict.fromkeys(choices))
