"""`python -m scripts.convert`: weights of other projects to a run folder, and ours to theirs."""

import argparse
import math
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from cli import entry_point
from cli.errors import UserError

_DESCRIPTION = """\
Converts weights between this project and others.

  inward    --input=INPUT --output=DIR [--source=FORMAT]
            INPUT is a folder, a file of weights (.safetensors, .npz, .pt, .bin), or hf:ORGANIZATION/NAME[@REVISION] of
            the Hugging Face hub. DIR becomes a run folder whose training happened elsewhere: it is sampled, evaluated
            and described like a run, and configs name it as a source: --config.initialize.<part>.source=DIR or
            --config.frozen.<part>.source=DIR. INPUT and DIR may also be gs://BUCKET/NAME
  outward   --to=FORMAT --run=DIR --output=DIR
            DIR is any run folder. The result is what the other project loads.
  within    --to=pretrained --run=DIR --output=DIR
            The result is a folder of converted weights that needs no other: low-rank pairs are added to what they were
            trained beside, and frozen parts are in it.

formats:
{formats}
"""


_PRETRAINED = "pretrained"

# What configs call the networks that they train on from, and those that they use as they are; {part: entry}.
_INITIALIZED = {
    **{
        part: part
        for part in ("autoencoder", "captioner", "clip", "dalle", "denoiser", "discriminator", "dvae", "text")
    },
    **{"gpt2": "language", "llama": "language", "unidiffuser": "unidiffuser", "vision_adapter": "vision_adapter"},
}
_FROZEN = {
    **{part: part for part in ("captioner", "clip", "dvae", "first_stage", "lpips", "text")},
    "autoencoder": "first_stage",
}


def main(arguments: Sequence[str]) -> None:
    """Parses the command line and converts."""
    import jax

    from weights.formats import FORMATS  # imports jax

    options = _parse(arguments, FORMATS)
    # Weights go from file to file: what is converted need not fit an accelerator's memory.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        (_convert_outward if options.to else _convert_inward)(options, FORMATS)


def _parse(arguments: Sequence[str], formats: Any) -> argparse.Namespace:
    """Reads the command line; raises UserError for flags that are missing or that belong to something else."""
    lines = [
        f"  {form.name:<14}{', '.join(form.networks)}. In: {form.inputs}"
        + (f".\n{'':16}Out: {form.outputs}" if form.write or form.write_pairs else "")
        for form in formats.values()
    ]
    helps: dict[str, list[str]] = {}
    for form in formats.values():
        for name, text in form.options.items():
            helps.setdefault(name, [text]).append(form.name)
    parser = entry_point.parser("scripts.convert", _DESCRIPTION.format(formats="\n".join(lines)))
    parser.add_argument("--source", choices=formats, help="the format to read (default: the one that INPUT looks like)")
    parser.add_argument("--input", default="", help="folder, file, or hf:ORGANIZATION/NAME[@REVISION]")
    for name, (text, *names) in helps.items():
        parser.add_argument(f"--{name}", default="", help=f"with {', '.join(names)}: {text}")
    parser.add_argument(
        "--ignore_keys", default="", help="keys of INPUT's documents, with commas, to read as if they were not there"
    )
    parser.add_argument(
        "--allow_nonfinite", action="store_true", help="go on, with a warning, where weights are NaN or infinite"
    )
    written = [name for name, form in formats.items() if form.write is not None or form.write_pairs is not None]
    parser.add_argument("--to", choices=[*written, _PRETRAINED], help="the format to write")
    parser.add_argument("--run", default="", help="with --to: a run folder")
    parser.add_argument("--part", default="", help="with --to: which of its networks (default: the one that fits)")
    parser.add_argument("--step", type=int, default=0, help="with --to: the checkpoint (default the newest)")
    parser.add_argument("--output", required=True, help="a new folder")
    options = parser.parse_args(arguments)

    inward, outward = ("source", "input", "ignore_keys", "allow_nonfinite", *helps), ("to", "run", "part", "step")
    wrong = [f"--{name}" for name in (inward if options.to else outward) if getattr(options, name)]
    if wrong:
        raise UserError(f"{', '.join(wrong)} cannot be given {'with' if options.to else 'without'} --to; see --help")
    if not (options.run if options.to else options.input):
        raise UserError("give --input, which is read, or --to and --run, which is written; see --help")
    options.given = {name: getattr(options, name) for name in helps if getattr(options, name)}
    return options


def _convert_inward(options: argparse.Namespace, formats: Any) -> None:
    """Writes a run folder."""
    from ml_collections import ConfigDict

    from sample.samplers.from_config import build_process
    from weights.files.origin import Leniency, open_origin
    from weights.formats.contract import refuse_unread
    from weights.lora import LORA
    from weights.pretrained import free_folder, write_pretrained
    from weights.run import NONFINITE

    ignored = tuple(key.strip() for key in options.ignore_keys.split(",") if key.strip())
    origin = open_origin(options.input, Leniency(frozenset(ignored), options.allow_nonfinite))
    output = free_folder(options.output)
    form = formats[options.source or _recognize(origin, formats)]
    refuse_unread(form.name, **{name: value for name, value in options.given.items() if name not in form.options})
    read = form.read(origin, **options.given)
    if "process" in read.config:
        try:
            build_process(ConfigDict(read.config))
        except UserError as error:
            raise UserError(f"{origin.describe()} has the scheduler of no diffusion: {error}") from error
    provenance = {"format": form.name, "input": origin.describe(), **options.given}
    provenance |= {"ignore_keys": ignored} if ignored else {}
    provenance |= {NONFINITE: True} if options.allow_nonfinite else {}
    tokenizers = {"tokenizer": read.tokenizer, "caption_tokenizer": read.caption_tokenizer}
    write_pretrained(output, read.config, read.params, read.variables, provenance=provenance, **tokenizers)
    parts = "; ".join(f"part {part!r}, {_count(params):,} parameters" for part, params in read.params.items())
    print(f"{output}: {form.name}; {parts}")
    for note in read.notes:
        print(note)
    if LORA in read.params:
        print(f"use it as --run={output}; to train on from it, or to do without the other folder, --to={_PRETRAINED}")
        return
    uses = ", ".join(f"--config.{use}" for use in flags_of_parts(read.params, read.config["models"], output))
    print(f"use it as --run={output}" + (uses and f", or in configs: {uses}"))


def flags_of_parts(parts: Iterable[str], trained: Collection[str], folder: Any) -> Iterator[str]:
    """The keys of configs, with values, that take each part of a folder, and its name where they look for another."""
    for part in parts:
        entries = [f"initialize.{_INITIALIZED[part]}"] if part in _INITIALIZED and part in trained else []
        entries += [f"frozen.{_FROZEN[part]}"] if part in _FROZEN else []
        for entry in entries:
            named = part == "autoencoder" or part != "first_stage" and entry.endswith(f".{part}")
            yield f"{entry}.source={folder}" + ("" if named else f" --config.{entry}.part={part}")


def _recognize(origin: Any, formats: Any) -> str:
    """The name of the one format that the files look like.

    Raises:
      UserError: if there is none, or more than one.
    """
    found = [name for name, form in formats.items() if form.recognizes(origin)]
    if len(found) != 1:
        limits = f" by its files{origin.limits()}" if origin.limits() else ""
        looks = f"looks like {' and '.join(found) or 'none of the formats'}{limits}"
        raise UserError(f"{origin.describe()} {looks}; say which it is with --source={'|'.join(found or formats)}")
    return found[0]


def _convert_outward(options: argparse.Namespace, formats: Any) -> None:
    """Writes what another project loads."""
    from models import create_model
    from weights.formats.contract import Network, write_files
    from weights.pretrained import filled_folder, free_folder
    from weights.run import Run, model_of
    from weights.sources import load_part, resolve_frozen, trained_model

    run = Run.open(options.run)
    if options.to == _PRETRAINED:
        _write_pretrained(run, options)
        return
    form = formats[options.to]
    if form.write_pairs is not None:
        _write_pairs(run, form, options)
        return
    reader = "text" in run.config.frozen or run.config.models.get("text", {}).get("name") == "clip_text"
    if (
        form.write_pipeline is not None
        and not options.part
        and {"denoiser"} == set(run.config.models) - {"text"}
        and reader
    ):
        _write_pipeline(run, form, options)
        return
    fitting = [part for part, fields in run.models().items() if fields["name"] in form.networks]
    whole = [part for part in fitting if run.models()[part]["name"] in form.beside]
    fitting = whole if len(whole) == 1 else fitting  # which takes the others with it
    if not options.part and len(fitting) != 1:
        has = ", ".join(f"{part} ({fields['name']})" for part, fields in run.models().items())
        raise UserError(
            f"{options.run} has {has}, and {form.name} is a format of {', '.join(form.networks)}; "
            + ("choose a --part" if fitting else "choose another --to")
        )
    part = options.part or fitting[0]
    fields = trained_model(run, part)
    if fields["name"] not in form.networks:
        holds = ", ".join(form.networks)
        raise UserError(f"part {part!r} of {options.run} is a {fields['name']}; {form.name} is of {holds}")
    output = free_folder(options.output)
    weights = run.load(options.step or None, parts=(part,), mapped=True)
    null_class = bool(run.config.loss.get("dropout", 0.0))
    beside, config = {}, None
    wanted = () if options.part else form.beside.get(fields["name"], ())
    if wanted and set(wanted) <= set(run.config.frozen):
        config = run.config
        resolve_frozen(config, near=run.folder)
        for name in wanted:
            entry = run.config.frozen[name]
            other = load_part(entry)
            beside[name] = Network(create_model(**model_of(entry)), other.params, other.variables)
    params, variables = weights.network(part)
    tokenizer = run.tokenizer() if part.partition("/")[0] in run.config.models else None
    network = Network(create_model(**fields), params, variables, null_class, beside, config, tokenizer)
    files = form.write(network)
    with filled_folder(output) as new:
        write_files(new, files)
    kind = "moving average" if weights.ema else "parameters"
    print(f"{output}: {_count(network.params):,} parameters ({kind} of step {weights.step}) for {form.name}")


def _write_pipeline(run: Any, form: Any, options: argparse.Namespace) -> None:
    """Writes a run with all that it draws with; frozen parts come from where they are."""
    from weights.formats.contract import Pipeline, write_files
    from weights.pretrained import filled_folder, free_folder

    output = free_folder(options.output)
    networks, weights = _networks(run, options)
    files = form.write_pipeline(Pipeline(run.config, networks, run.tokenizer()))
    with filled_folder(output) as new:
        write_files(new, files)
    _say_written(output, networks, weights, form.name)


def _write_pairs(run: Any, form: Any, options: argparse.Namespace) -> None:
    """Writes the low-rank pairs of a run."""
    from models import create_model
    from weights.formats.contract import Adaptation, write_files
    from weights.lora import scale_of
    from weights.pretrained import filled_folder, free_folder
    from weights.sources import trained_model

    output = free_folder(options.output)
    pairs, step = run.load_pairs(options.step or None)
    if options.part:
        trained_model(run, options.part)
        if options.part not in pairs:
            raise UserError(
                f"part {options.part!r} of {run.folder} has no low-rank pairs; {', '.join(pairs)} have some"
            )
        pairs = {options.part: pairs[options.part]}
    if beside := _beside_pairs(run, (options.part,) if options.part else run.config.models):
        raise UserError(
            f"{run.folder} has more than pairs and what they add to, {beside[0]} for one, which {form.name} cannot "
            f"hold; write it with --to={_PRETRAINED}"
        )
    fields = {part: trained_model(run, part) for part in pairs}
    if strange := [f"{part} ({each['name']})" for part, each in fields.items() if each["name"] not in form.networks]:
        holds = ", ".join(form.networks)
        raise UserError(f"{run.folder} has pairs of {', '.join(strange)}; {form.name} holds those of {holds}")
    models = {part: create_model(**each) for part, each in fields.items()}
    files = form.write_pairs(Adaptation(models, pairs, run.config.lora.rank, scale_of(run.config)))
    with filled_folder(output) as new:
        write_files(new, files)
    print(f"{output}: {_count(pairs):,} parameters of pairs of {', '.join(pairs)} (step {step}) for {form.name}")


def _beside_pairs(run: Any, parts: Iterable[str]) -> list[str]:
    """The parameters of these networks that neither a source has nor a pair changes: trained in whole, or random."""
    from models import create_model
    from train.trainable import trained_patterns
    from weights.files.layout import model_shapes
    from weights.sources import trained_model
    from weights.starts import is_based

    patterns = trained_patterns(run.config)
    paths = [
        f"{part}/{path.removeprefix('params/')}"
        for part in parts
        for path in model_shapes(create_model(**trained_model(run, part)))
        if path.startswith("params/")
    ]
    return [
        path
        for path in paths
        if not is_based(run.config, path) or any(re.search(pattern, path) for pattern in patterns)
    ]


def _write_pretrained(run: Any, options: argparse.Namespace) -> None:
    """Writes a run as a folder of weights that needs no other."""
    import json

    from cli.config import to_json
    from configs.common import get_defaults
    from weights.pretrained import free_folder, write_pretrained
    from weights.run import OWN, WRITES_WITH

    if options.part:
        raise UserError(f"--part cannot be given with --to={_PRETRAINED}, which writes all of a run; leave it out")
    output = free_folder(options.output)
    networks, weights = _networks(run, options)
    config = json.loads(to_json(run.config))
    for part, entry in config["frozen"].items():
        entry |= {"source": OWN, "part": part, "step": 0, "run": ""}
    for entry in config["initialize"].values():
        entry |= {"source": "", "step": 0, "run": ""}
    defaults = json.loads(to_json(get_defaults()))
    config |= {key: defaults[key] for key in ("lora", "trainable", "relearn")}
    write_pretrained(
        output,
        config,
        {part: network.params for part, network in networks.items()},
        {part: network.variables for part, network in networks.items() if network.variables},
        provenance={"format": "run", "input": str(run.folder), **weights.record},
        tokenizer=run.tokenizer(),
        caption_tokenizer=run.tokenizer(WRITES_WITH),
    )
    _say_written(output, networks, weights, "any use as a run or a source")


def _networks(run: Any, options: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """The networks of a run, frozen ones from where they are, which are resolved; and the trained weights."""
    from models import create_model
    from weights.files.layout import model_shapes
    from weights.formats.contract import Network
    from weights.run import OWN, Run, model_of
    from weights.sources import resolve_frozen, trained_model

    resolve_frozen(run.config, near=run.folder)
    weights = run.load(options.step or None, mapped=True)
    networks = {}
    for part in run.config.models:
        fields = trained_model(run, part)
        networks[part] = Network(create_model(**fields), weights.params[part], weights.variables.get(part, {}))
    for part, entry in run.config.frozen.items():
        source = run if entry.source in (OWN, str(run.folder)) else Run.open(entry.source)
        frozen = source.load(entry.get("step", 0) or None, parts=(entry.part,), mapped=True)
        model, (params, variables) = create_model(**model_of(entry)), frozen.network(entry.part)
        # Without what was measured of latents whose scale the config says; see `load_part`.
        kept = {path.partition("/")[0] for path in model_shapes(model)} & variables.keys()
        networks[part] = Network(model, params, {name: variables[name] for name in kept})
    return networks, weights


def _say_written(output: Any, networks: dict[str, Any], weights: Any, use: str) -> None:
    counts = "; ".join(f"{part} {_count(network.params):,} parameters" for part, network in networks.items())
    kind = "moving average" if weights.ema else "parameters"
    print(f"{output}: {counts} ({kind} of step {weights.step}) for {use}")


def _count(params: Any) -> int:
    import jax

    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


if __name__ == "__main__":
    entry_point.run(main)
