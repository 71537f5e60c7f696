"""What would otherwise fail late, found before anything is built: each check raises UserError with one line."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from cli.config import flatten
from cli.errors import UserError
from cli.ranges import check_ranges, check_seed
from data.llama_tokenizer import LlamaTokenizer, words_of
from data.pipeline import Stream
from data.points import is_points
from data.tokenizer import Tokenizer
from diffusion.process import Process
from diffusion.schedule import SCHEDULES, DiscreteSchedule
from models import MODELS
from sample.samplers.from_config import build_process
from train.distributed.sharding import check_pattern, check_rules
from train.health import MODES
from train.optimizer import complete_rules
from train.step_profile import WARM_UP
from weights.power_averages import exponent
from weights.starts import Start, starts_of

_NUMBERS = {
    **dict.fromkeys(("steps", "batch_size", "data.max_tiles"), "[1, 2147483648)"),
    **dict.fromkeys(("log.every", "evaluate.every", "checkpoint.every", "ema.every"), "[1, 2147483648)"),
    **dict.fromkeys(("evaluate.batches", "evaluate.previews"), "[1, 2147483648)"),
    **dict.fromkeys(("data.image_size", "data.text_length", "data.workers", "data.read_ahead"), "[0, 2147483648)"),
    **{"checkpoint.keep": "[0, 2147483648)", "lora.rank": "[0, 65536)", "lora.alpha": "[0, inf)"},
    **{"data.bpe_dropout": "[0, 1]", "ema.decay": "[0, 1)"},
}

# Objective -> parts whose sizes of pictures and captions it compares itself: CLIP's are resized and padded.
_COMPARED_ELSEWHERE = {"captioner": ("clip",), "unidiffuser": ("clip", "first_stage", "unidiffuser")}

# Parts that learn what a process says.
_DENOISERS = ("denoiser", "unidiffuser")
# Of schedules: where times end, which changes nothing of what a network says of those between.
_ENDS = ("time_min", "time_max", "sigma_min", "sigma_max")


def check_config(config: ConfigDict) -> None:
    """Raises UserError if a number, a choice or a pattern of the config itself is impossible."""
    check_seed("config.seed", config.seed)
    check_ranges("config", flatten(config), _NUMBERS)
    if config.nonfinite not in MODES:
        raise UserError(f"config.nonfinite={config.nonfinite!r} is unknown; choose one of {', '.join(MODES)}")
    complete_rules(config.optimizer, config.steps)
    for length in config.ema.lengths:
        try:
            exponent(length)
        except UserError as error:
            raise UserError(f"config.ema.lengths={tuple(config.ema.lengths)}: {error}") from None
    check_pattern("config.ema.paths", config.ema.paths)
    if strange := [key for key in config.relearn if not isinstance(key, str)]:
        raise UserError(f"config.relearn names {strange[0]!r}, which is no key; name some, such as ('process',)")
    for pattern in config.lora.paths:
        check_pattern("config.lora.paths", pattern)
    if config.lora.rank and not config.lora.paths:
        raise UserError("config.lora.paths is empty: no kernel would have a pair; set config.lora.rank to 0 for none")
    check_rules(config.mesh.rules)
    _check_buckets(config.data)
    if config.data.max_tiles > 1 and (config.data.buckets or config.objective != "vision_adapter"):
        raise UserError("config.data.max_tiles above 1 is of a vision_adapter, without buckets; set it to 1")
    if max(config.steps, config.batch_size * 2) >= 2**31:
        raise UserError("config.steps must stay below 2^31, and config.batch_size below 2^30")


def _check_buckets(data: ConfigDict) -> None:
    """Raises UserError if `config.data.buckets` are no shapes."""
    shapes = data.buckets
    right = isinstance(shapes, tuple | list) and all(
        isinstance(shape, tuple | list) and len(shape) == 2 and all(type(side) is int and side > 0 for side in shape)
        for shape in shapes
    )
    if not right or len(set(map(tuple, shapes))) < len(shapes):
        raise UserError(
            f"config.data.buckets is {shapes!r}; it must be a tuple of different (height, width) in pixels, such as "
            "((64,64),(48,80),(80,48))"
        )
    if shapes and is_points(data.dataset):
        raise UserError(f"config.data.buckets shapes pictures, and {data.dataset} has none; leave it empty")


def check_whole_batches(config: ConfigDict, examples_seen: int) -> None:
    """Raises UserError if a run would go on within a batch, where batches have shapes."""
    if config.data.buckets and examples_seen % config.batch_size:
        raise UserError(
            f"config.batch_size={config.batch_size} does not divide the {examples_seen:,} examples that this run has "
            "seen, and with config.data.buckets a batch is of one shape; set it to the size before, or one that does"
        )


def check_profile(updates: int, config: ConfigDict) -> None:
    """Raises UserError if `--profile` asks for more updates than a run has."""
    if updates + WARM_UP > config.steps and updates:
        raise UserError(
            f"--profile={updates} needs config.steps to be at least {updates + WARM_UP}, not {config.steps}: the first "
            "update compiles and is not traced"
        )


def check_parts(config: ConfigDict, tokenizer: Tokenizer | None, writer: Tokenizer | None = None) -> None:
    """Raises UserError where the sizes of networks, data, tokenizer and that of what is written disagree."""
    _check_vocabularies(config, writer)
    for group in ("models", "frozen"):
        for part, model in config[group].items():
            if part == "captioner" and group == "frozen" and writes_otherwise(config):
                continue  # its own tokenizer is that of its folder
            if part == "captioner" and group == "models" and writer is not None:
                continue  # compared above
            elsewhere = part in _COMPARED_ELSEWHERE.get(config.objective, ())
            for key in () if elsewhere else ("text_length", "image_size"):
                if key not in model or model[key] == config.data[key]:
                    continue
                if key == "image_size" and "first_stage" in config.frozen and part in ("denoiser", "first_stage"):
                    continue  # one is of latents, and is compared with what the other makes, which takes any size
                takes_shorter = getattr(MODELS.get(model.name), "TAKES_SHORTER_TEXT", False)
                shorter = takes_shorter and group == "models" and key == "text_length"
                if not (shorter and 0 < config.data[key] < model[key]):
                    raise UserError(
                        f"config.{group}.{part}.{key} is {model[key]}, but config.data.{key} is {config.data[key]}; "
                        + ("set it to that or less, at least 1" if shorter else "they must be equal")
                    )
            needed = 0 if tokenizer is None else words_of(tokenizer, model.get("image_token"))
            if model.get("text_vocab_size", needed) < needed:
                raise UserError(
                    f"config.{group}.{part}.text_vocab_size is {model.text_vocab_size}, but the tokenizer has "
                    f"{needed} ids; set it to at least that"
                )
            if tokenizer is not None and model.get("text_end_id", tokenizer.end_id) != tokenizer.end_id:
                raise UserError(
                    f"config.{group}.{part}.text_end_id is {model.text_end_id}, but the tokenizer ends captions with "
                    f"{tokenizer.end_id}; set it to that, and config.data.text_ends if there is none"
                )
            if isinstance(tokenizer, LlamaTokenizer):
                _check_llama(f"config.{group}.{part}", model, tokenizer)
            if tokenizer is not None and model.get("text_pad_id", tokenizer.pad_id) != tokenizer.pad_id:
                raise UserError(
                    f"config.{group}.{part} reads captions filled up with {model.text_pad_id}, and the tokenizer fills "
                    f"them up with {tokenizer.pad_id}; give its own as config.data.tokenizer"
                )


def _check_llama(name: str, model: ConfigDict, tokenizer: LlamaTokenizer) -> None:
    """Raises UserError where a network does not know the pads of Llama 3's tokenizer, or has another picture."""
    if model.get("text_pad_id") is None:
        raise UserError(f"{name}.text_pad_id is not set, and the tokenizer fills texts up with {tokenizer.pad_id}")
    image = tokenizer.image_id
    if tokenizer.in_turns and image is not None and model.get("image_token", image) != image:
        raise UserError(f"{name}.image_token is {model.image_token}, but the tokenizer's picture is {image}")


def _check_vocabularies(config: ConfigDict, writer: Tokenizer | None) -> None:
    """Raises UserError if a captioner writes with another vocabulary than its CLIP reads, and has no tokenizer of it.

    Or if that tokenizer is not the captioner's.
    """
    if config.objective != "captioner" or "clip" not in config.frozen:
        return
    ids = [_vocabulary(entry) for entry in (config.models.get("captioner", {}), config.frozen.clip)]
    if writer is not None:
        if ids[0] != (writer.vocab_size, writer.end_id):
            raise UserError(
                f"config.data.writes_with has {writer.vocab_size} ids with the end {writer.end_id}, and the captioner "
                f"{ids[0][0]} with the end {ids[0][1]}; set config.models.captioner.text_vocab_size and text_end_id"
            )
    elif ids[0] != ids[1] and any(entry.source for entry in config.initialize.values()):
        raise UserError(
            f"this captioner writes with another vocabulary ({ids[0][0]} ids with the end {ids[0][1]}) than CLIP reads "
            f"({ids[1][0]} with the end {ids[1][1]}); give its tokenizer as config.data.writes_with, and "
            "config.data.written_length"
        )


def writes_otherwise(config: ConfigDict) -> bool:
    """Whether a frozen captioner writes with another vocabulary than the frozen CLIP reads."""
    frozen = config.frozen
    return {"captioner", "clip"} <= set(frozen) and _vocabulary(frozen.captioner) != _vocabulary(frozen.clip)


def _vocabulary(entry: Mapping[str, Any] | ConfigDict) -> tuple[int | None, int | None]:
    """Number of ids and the end of a network's texts."""
    return entry.get("text_vocab_size"), entry.get("text_end_id")


def check_classes(config: ConfigDict, stream: Stream) -> None:
    """Raises UserError where a dataset's classes are more than a network's."""
    for part, model in config.models.items():
        # Where classes are dropped in training, the last one stands for none.
        needed = stream.classes + bool(config.loss.get("dropout", 0.0))
        if stream.classes and model.get("num_classes", needed) < needed:
            raise UserError(
                f"config.models.{part}.num_classes is {model.num_classes}, but the dataset has {stream.classes} classes"
                + (" and config.loss.dropout needs one for none" if needed > stream.classes else "")
                + f"; set it to {needed}"
            )


def check_starts(config: ConfigDict) -> None:
    """Raises UserError where a network begins with what it learned on another process than the run's.

    Its estimates would be taken for others than they are, of v for noise, say. What `config.relearn` names may differ:
    that is learned anew, and a line says so.
    """
    idle = set(config.relearn)
    for start in starts_of(config):
        differing = _differing_process(config, start)
        named = {key: {each for each in config.relearn if f"{key}.".startswith(f"{each}.")} for key in differing}
        idle.difference_update(*named.values())
        said = {key: f"{key}: {theirs!r}, not {ours!r}" for key, (theirs, ours) in differing.items()}
        source = f"config.initialize.{start.name}: {start.entry.source}"
        if refused := [key for key in differing if not named[key]]:
            settable = {f"process.{key}" for key in flatten(config.process)}
            flags = " ".join(f"--config.{key}={differing[key][0]}" for key in refused)
            enough = settable.issuperset(refused) and "process.schedule.name" not in refused
            where = flags if enough else "the same in the config's file"
            keys = "".join(f"'{key}'," for key in differing)
            raise UserError(
                f"{source} was trained on another process than this run's: {'; '.join(said[key] for key in refused)}; "
                f'set {where}, or learn the process of this run anew with --config.relearn="({keys})"'
            )
        if said:
            print(f"{source} was trained on another process, which is learned anew: {'; '.join(said.values())}")
    if idle:
        print(f"warning: config.relearn names {', '.join(sorted(idle))}, in which no source differs")


def _differing_process(config: ConfigDict, start: Start) -> dict[str, tuple[Any, Any]]:
    """Key of the config -> (the source's value, the run's) of what a network would learn otherwise."""
    if start.at not in _DENOISERS or "process" not in config:
        return {}
    source = start.source()
    if "process" not in source.config:
        print(f"{source.folder} does not tell on which process it was trained; that of this run is taken for it")
        return {}
    try:
        processes = build_process(source.config), build_process(config)
    except UserError as error:
        raise UserError(f"config.initialize.{start.name}: {source.folder} or this run: {error}") from error
    theirs, ours = (_learned(process) for process in processes)
    chains = [process.schedule for process in processes if isinstance(process.schedule, DiscreteSchedule)]
    if len(chains) == 2 and np.array_equal(chains[0].alpha_bar, chains[1].alpha_bar):
        theirs |= {key: value for key, value in ours.items() if key.startswith("process.schedule.")}
    shared = [key for key in ours if key in theirs]
    return {key: (theirs[key], ours[key]) for key in shared if theirs[key] != ours[key]}


def _learned(process: Process) -> dict[str, Any]:
    """What tells which function a network learns, by its key in a config; of a schedule first which one it is.

    Not how it is trained (weighting, times) or sampled (variance, clip); learned variances are in the channels.
    """
    names = {kind: name for name, kind in SCHEDULES.items()}
    fields = {key: value for key, value in dataclasses.asdict(process.schedule).items() if key not in _ENDS}
    fields = {"name": names[type(process.schedule)], **fields}
    found = {f"process.schedule.{key}": value for key, value in fields.items()}
    found |= {"process.prediction": process.prediction, "process.time_shift": process.time_shift}
    return found | ({"process.sigma_data": process.sigma_data} if process.prediction == "edm" else {})
