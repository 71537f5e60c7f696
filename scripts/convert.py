"""`python -m scripts.convert`: weights of other projects to a pretrained folder, and ours to theirs."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cli import entry_point
from cli.errors import UserError

_DESCRIPTION = """\
Converts weights between this project and others.

  inward    --source=FORMAT --input=INPUT --output=DIR
            INPUT is a folder, a file of weights (.safetensors, .npz, .pt, .bin), or hf:ORGANIZATION/NAME[@REVISION] of
            the Hugging Face hub. DIR becomes a pretrained folder; configs name it as a source, by its part:
            --config.initialize.clip.source=DIR or --config.frozen.clip.source=DIR
  outward   --to=FORMAT --run=DIR --output=DIR
            DIR is a run or a pretrained folder. The result is what the other library loads:
            transformers   CLIPModel.from_pretrained(DIR)
            diffusers      UNet2DModel.from_pretrained(DIR), or UNet2DConditionModel if it has transformers
            open_clip      open_clip.create_model("local-dir:DIR"), or create_model(NAME, pretrained=FILE)
            openai         clip.model.build_model(safetensors.torch.load_file("DIR/clip.safetensors")); clip.load reads
                           what torch.save makes of that dictionary
            uvit           utils.get_nnet(**ARGUMENTS) of the published U-ViT with nnet.json, and load_state_dict
"diffusers" is of UNets, INPUT a folder of one or of a pipeline; "uvit" is of U-ViTs, INPUT a published .pth file or a
folder that --to=uvit wrote; all others are CLIP's.
"""

# The networks that are converted from and to each format.
FORMATS = {
    "transformers": ("clip",),
    "diffusers": ("unet",),
    "open_clip": ("clip",),
    "openai": ("clip",),
    "uvit": ("uvit",),
}
MODELS = ("clip", "unet", "uvit")


def main(arguments: Sequence[str]) -> None:
    """Parses the command line and converts."""
    parser = entry_point.parser("scripts.convert", _DESCRIPTION)
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--source", choices=FORMATS, help="the format to read")
    direction.add_argument("--to", choices=FORMATS, help="the format to write")
    parser.add_argument("--model", choices=MODELS, help="the network (default: the one that the format is of)")
    parser.add_argument("--part", default="", help="what a run calls it (default: as the network)")
    parser.add_argument("--input", default="", help="with --source: folder, file, or hf:ORGANIZATION/NAME[@REVISION]")
    parser.add_argument("--name", default="", help="OpenCLIP's name of a network that comes without a config")
    parser.add_argument(
        "--tokenizer", default="", help="of a CLIP that comes without one: CLIP's vocabulary, or a tokenizer.json"
    )
    parser.add_argument("--run", default="", help="with --to: a run or pretrained folder")
    parser.add_argument("--step", type=int, default=0, help="with --to: the checkpoint (default the newest)")
    parser.add_argument("--output", required=True, help="a new folder")
    options = parser.parse_args(arguments)
    _check(options)

    import jax

    # Weights go from file to file: what is converted need not fit an accelerator's memory.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        (_convert_inward if options.source else _convert_outward)(options)


def _check(options: argparse.Namespace) -> None:
    """Fills the network in; raises UserError for flags that are missing or that belong to something else."""
    inward = {"--input": options.input, "--name": options.name, "--tokenizer": options.tokenizer}
    outward = {"--run": options.run, "--step": options.step}
    needed, foreign = ("--input", outward) if options.source else ("--run", inward)
    if not {**inward, **outward}[needed]:
        raise UserError(f"{'--source' if options.source else '--to'} needs {needed}; see --help")
    if wrong := [flag for flag, value in foreign.items() if value]:
        raise UserError(f"{', '.join(wrong)} cannot be given with {'--source' if options.source else '--to'}")
    models = FORMATS[options.source or options.to]
    options.model = options.model or models[0]
    if options.model not in models:
        raise UserError(f"{options.source or options.to} is a format of {', '.join(models)}, not of {options.model}")
    if options.tokenizer and options.model != "clip":
        raise UserError("--tokenizer is of a CLIP; leave it out")
    if options.name and options.source != "open_clip":
        raise UserError("--name is OpenCLIP's name of a network; leave it out")


def _convert_inward(options: argparse.Namespace) -> None:
    """Writes a pretrained folder."""
    from models import create_model
    from weights.files.origin import open_origin
    from weights.formats import diffusers, open_clip, transformers, uvit
    from weights.pretrained import new_folder, write_pretrained

    output, origin = new_folder(options.output), open_origin(options.input)
    if options.source == "transformers":
        fields, tensors = transformers.read_clip(origin)
        params, variables = transformers.clip_from_transformers(create_model(**fields), tensors)
    elif options.source == "uvit":
        fields, tensors = uvit.read_uvit(origin)
        params, variables = uvit.from_uvit(create_model(**fields), tensors), {}
    elif options.source == "diffusers":
        fields, tensors = diffusers.read_unet(origin)
        params, variables = diffusers.unet_from_diffusers(create_model(**fields), tensors)
    else:
        read = open_clip.read_openai_clip(origin) if options.source == "openai" else None
        fields, tensors = read or open_clip.read_clip(origin, options.name)
        params, variables = open_clip.clip_from_open_clip(create_model(**fields), tensors)
    tokenizer = None
    if "text_end_id" in fields:
        tokenizer = _find_tokenizer(options.tokenizer, origin, fields["text_end_id"])
    provenance = {"format": options.source, "input": origin.describe()}
    if options.name:
        provenance["name"] = options.name
    part = options.part or options.model
    write_pretrained(output, fields, params, variables, part=part, provenance=provenance, tokenizer=tokenizer)
    activation = f", activation {fields['activation']}" if "activation" in fields else ""
    print(f"{output}: part {part!r}, {_count(params):,} parameters{activation}")
    print(f"use it with --config.initialize.{part}.source={output} or --config.frozen.{part}.source={output}")
    if "text_end_id" in fields and tokenizer is None:
        print("it has no tokenizer, which evaluating it takes: give --tokenizer")


def _find_tokenizer(path: str, origin: Any, end_id: int) -> Any:
    """The `Tokenizer` at `path`, or else of the origin; None if there is none, or none that fits.

    Raises:
      UserError: if `path` is none, or not this network's.
    """
    from weights.run import TOKENIZER

    if path:
        return _read_tokenizer(Path(path).expanduser(), end_id)
    for names in ((TOKENIZER,), ("vocab.json", "merges.txt")):  # the second two are read together
        *_, found = (origin.find(name) for name in names)
        try:
            if found is not None:
                return _read_tokenizer(found, end_id)
        except UserError as error:
            print(f"the tokenizer is left out: {error}")
    return None


def _read_tokenizer(path: Path, end_id: int) -> Any:
    """A CLIP vocabulary, or the tokenizer of a run, whose captions end in `end_id`."""
    from data.tokenizer import Tokenizer

    tokenizer = (Tokenizer.load if path.suffix == ".json" else Tokenizer.from_clip_vocabulary)(path)
    if tokenizer.end_id != end_id:
        ends = f"ends captions with {tokenizer.end_id}, and this network's end with {end_id}"
        raise UserError(f"{path} {ends}; give its own vocabulary as --tokenizer")
    return tokenizer


def _convert_outward(options: argparse.Namespace) -> None:
    """Writes what another library loads."""
    from models import create_model
    from weights.files.tensors import write_tensors
    from weights.formats import diffusers, open_clip, transformers, uvit
    from weights.pretrained import new_folder, write_json
    from weights.sources import open_source, trained_model

    source = open_source(options.run)
    part = options.part or options.model
    fields = trained_model(source, part)
    if fields["name"] != options.model:
        raise UserError(f"part {part!r} of {options.run} is a {fields['name']}, not a {options.model}; choose --part")
    output, model = new_folder(options.output), create_model(**fields)
    weights = source.load(options.step or None)
    params, variables = weights.params[part], weights.variables.get(part, {})
    if options.to == "transformers":
        documents, (name, tensors) = transformers.clip_files(model, params)
    elif options.to == "uvit":
        documents, (name, tensors) = uvit.uvit_files(model, params)
    elif options.to == "diffusers":
        documents, (name, tensors) = diffusers.unet_files(model, params)
    else:
        files = open_clip.openai_clip_files if options.to == "openai" else open_clip.clip_files
        documents, (name, tensors) = files(model, params, variables)
    write_tensors(output / name, tensors)
    for document, value in documents.items():
        write_json(output / document, value)
    kind = "moving average" if weights.ema else "parameters"
    print(f"{output}: {_count(params):,} parameters ({kind} of step {weights.step}) for {options.to}")


def _count(params: Any) -> int:
    import jax

    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


if __name__ == "__main__":
    entry_point.run(main)
