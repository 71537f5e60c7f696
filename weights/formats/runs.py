"""Converted networks as runs: the keys of a run's config.json that say what a network is and how it is used."""

from collections.abc import Mapping
from typing import Any

from cli.errors import UserError
from cli.locations import Location, locate_from_home
from configs.common import get_diffusion_sampling
from data.tokenizer import Tokenizer
from models import create_model
from weights.files.origin import Origin
from weights.formats.contract import Converted, Tree
from weights.run import OWN, TOKENIZER, WRITES_WITH

STABLE_DIFFUSION_SCALE = 0.18215  # what its second stage multiplies latents by

AUTOENCODER_OPTIONS = {
    "latent_scale": "what a second stage multiplies a first one's latents by, in place of what the files tell"
}

CLIP_OPTIONS = {"tokenizer": "of a CLIP that comes without one: CLIP's vocabulary, or a tokenizer.json"}


def clip_run(origin: Origin, fields: Mapping[str, Any], params: Tree, variables: Tree, tokenizer: str) -> Converted:
    """A CLIP: objective `clip`, part `clip`.

    Args:
      origin: where it is from, which may have a tokenizer.
      fields: {name, fields} of the network.
      params: its parameters.
      variables: its collections.
      tokenizer: path of its tokenizer; "" for the origin's.

    Raises:
      UserError: if there is no such tokenizer, or it is not this network's.
    """
    data = {"image_size": fields["image_size"], "text_length": fields["text_length"], "transform": "clip_training"}
    found, notes = _find_tokenizer(tokenizer, origin, fields["text_end_id"])
    if found is None:
        notes += ("it has no tokenizer, which captions take: give --tokenizer",)
    loss = {"kind": "contrastive" if fields.get("logit_bias_init") is None else "sigmoid"}
    return Converted(
        {"objective": "clip", "models": {"clip": dict(fields)}, "data": data, "loss": loss},
        {"clip": params},
        {"clip": variables} if variables else {},
        found,
        (f"activation {fields['activation']}", *notes),
    )


def captioner_run(fields: Mapping[str, Any], params: Tree) -> Converted:
    """A captioner alone, part `captioner`: no file of other projects says which CLIP it reads with."""
    note = (
        "it names no CLIP, and any that is as large is taken: set config.frozen.clip.source to the one that it was "
        f"trained with; its captions are taken to end with the last id, {fields['text_end_id']}"
    )
    return Converted({"objective": "", "models": {"captioner": dict(fields)}}, {"captioner": params}, notes=(note,))


def denoiser_run(
    fields: Mapping[str, Any],
    params: Tree,
    process: Mapping[str, Any] | None,
    sample: Mapping[str, Any],
    first_stage: tuple[Mapping[str, Any], Tree] | None = None,
    notes: tuple[str, ...] = (),
    text: tuple[Mapping[str, Any], Tree, Tokenizer | None] | None = None,
) -> Converted:
    """A diffusion backbone: objective `diffusion`, part `denoiser`; `first_stage` and `text` frozen in the same folder.

    Args:
      fields: {name, fields} of the network.
      params: its parameters.
      process: `config.process` that it was trained on; None where the files do not tell.
      sample: how to sample from it unless told otherwise: {"sampler", "steps"}, and other keys of `config.sample`.
      first_stage: ({name, fields}, parameters) of what makes pictures of its latents; None of pixels, or without one.
      notes: what a user should know.
      text: ({name, fields}, parameters, tokenizer) of what reads captions for it; None without one.
    """
    config: dict[str, Any] = {"objective": "diffusion", "models": {"denoiser": dict(fields)}}
    config["data"] = {"image_size": fields["image_size"], "label_field": "label" if fields["num_classes"] else ""}
    trees, frozen, tokenizer = {"denoiser": params}, {}, None
    if first_stage is not None:
        frozen["first_stage"], trees["first_stage"] = first_stage
        config["data"]["image_size"] *= 2 ** (len(first_stage[0]["multipliers"]) - 1)
    if text is not None:
        frozen["text"], trees["text"], tokenizer = text
        config["data"]["text_length"] = frozen["text"]["text_length"]
    if frozen:
        config["frozen"] = {
            part: {**network, "source": OWN, "part": part, "step": 0} for part, network in frozen.items()
        }
    if process is None:
        notes += ("its files do not tell the process that it was trained on, so that it cannot be sampled",)
        return Converted(config, trees, tokenizer=tokenizer, notes=notes)
    process = dict(process)
    # The channels tell, whatever the scheduler reads.
    if fields.get("out_channels") == 2 * fields.get("in_channels", 0):
        process["variance"] = "learned"
    if first_stage is not None and process.get("clip"):
        process["clip"] = False
        notes += ("its scheduler cuts estimates off at -1 and 1, which latents are not: that is left out",)
    usual = get_diffusion_sampling(sample["sampler"], sample["steps"])
    config |= {"process": process, "sample": {**usual.to_dict(), **sample}}
    return Converted(config, trees, tokenizer=tokenizer, notes=notes)


def check_latents(read: int, made: int) -> None:
    """Compares the channels that a pipeline's UNet reads with those that its first stage makes.

    Raises:
      UserError: if they differ.
    """
    if read != made:
        raise UserError(
            f"its UNet reads {read} channels and its first stage makes {made}: pipelines whose UNet sees more than "
            "latents are not converted"
        )


def read_latent_scale(given: str) -> float:
    """The number of `--latent_scale`.

    Raises:
      UserError: if it is none.
    """
    try:
        scale = float(given)
    except ValueError:
        scale = 0.0
    if not 0 < scale < float("inf"):
        stable = f"Stable Diffusion's is {STABLE_DIFFUSION_SCALE}"
        raise UserError(f"--latent_scale={given} is not a number above 0; {stable}")
    return scale


def autoencoder_run(
    fields: Mapping[str, Any],
    trees: Mapping[str, Tree],
    variables: Mapping[str, Tree] | None = None,
    others: Mapping[str, Mapping[str, Any]] | None = None,
    frozen: Mapping[str, Mapping[str, Any]] | None = None,
    notes: tuple[str, ...] = (),
) -> Converted:
    """A first stage: objective `autoencoder`, part `autoencoder`, and what it was trained beside where that is known.

    Args:
      fields: {name, fields} of the network.
      trees: {part: parameters} of it and the others.
      variables: {part: {collection: tree}}.
      others: {part: {name, fields}} of networks that were trained beside it.
      frozen: the same of those that were not trained, which lie in the same folder.
      notes: what a user should know.
    """
    config: dict[str, Any] = {"objective": "autoencoder", "models": {"autoencoder": dict(fields), **(others or {})}}
    config["data"] = {"image_size": fields["image_size"]}
    config["frozen"] = {
        part: {**network, "source": OWN, "part": part, "step": 0} for part, network in (frozen or {}).items()
    }
    return Converted(config, dict(trees), dict(variables or {}), notes=notes)


def unidiffuser_run(
    origin: Origin,
    written: Origin,
    fields: Mapping[str, Any],
    trees: Mapping[str, Tree],
    frozen: Mapping[str, Mapping[str, Any]],
    process: Mapping[str, Any],
) -> Converted:
    """A UniDiffuser: objective `unidiffuser`, part `unidiffuser`, and its frozen parts in the same folder.

    Args:
      origin: of the vocabulary that captions are read with, if it has one.
      written: of GPT-2's, that they are written with, likewise.
      fields: {name, fields} of the network.
      trees: {part: parameters} of it and the frozen parts.
      frozen: {part: {name, fields}}: "first_stage", "clip" and "captioner".
      process: `config.process`, but for the times that the network is fed, which are 1 to T.
    """
    clip, stage, words = (frozen[part] for part in ("clip", "first_stage", "captioner"))
    most = words["length"] - words["prefix_length"] + 1  # the last token is never read
    tokenizer, notes = _find_tokenizer("", origin, clip["text_end_id"])
    if tokenizer is None:
        notes += ("it has no tokenizer, which captions take: put one into the folder as tokenizer.json",)
    caption_tokenizer = None
    if any(words[key] != clip[key] for key in ("text_vocab_size", "text_end_id")):
        vocabulary, merges = written.find("vocab.json"), written.find("merges.txt")
        if vocabulary is not None and merges is not None:
            caption_tokenizer = Tokenizer.from_gpt2_vocabulary(vocabulary, merges, words["text_vocab_size"])
        else:
            notes += (f"it writes with another vocabulary than it reads: put that into the folder as {WRITES_WITH}",)
    config: dict[str, Any] = {
        "objective": "unidiffuser",
        "models": {"unidiffuser": dict(fields)},
        "frozen": {part: {**network, "source": OWN, "part": part, "step": 0} for part, network in frozen.items()},
        "data": {
            "image_size": fields["image_size"] * 2 ** (len(stage["multipliers"]) - 1),
            "text_length": clip["text_length"],
        },
        "process": {**process, "time_shift": 1, "clip": False},
        "scales": {"clip": 1.0, "text": 1.0},
        "sample": {"guidance": 8.0, "beams": 5, "caption_length": min(67, most)},  # the authors' s = 7
    }
    return Converted(config, dict(trees), {}, tokenizer, notes, caption_tokenizer=caption_tokenizer)


def dalle_run(
    fields: Mapping[str, Any],
    params: Tree,
    image_tokenizer: tuple[Mapping[str, Any], Tree] | None,
    tokenizer: Tokenizer | None,
    notes: tuple[str, ...],
) -> Converted:
    """A DALL-E: objective `dalle`, part `dalle`, and `dvae` frozen in the same folder.

    Args:
      fields: {name, fields} of the transformer.
      params: its parameters.
      image_tokenizer: ({name, fields}, parameters) of what makes its image tokens; None where that did not come along.
      tokenizer: of captions; None if there is none.
      notes: what a user should know.

    Raises:
      UserError: if the image tokenizer makes other tokens than the transformer reads.
    """
    config: dict[str, Any] = {"objective": "dalle", "models": {"dalle": dict(fields)}}
    config["data"] = {"text_length": fields["text_length"]}
    trees = {"dalle": params}
    if image_tokenizer is not None:
        tokens, trees["dvae"] = image_tokenizer
        network = create_model(**tokens)
        made = (*network.token_grid, network.vocab_size)
        read = (*fields["image_grid"], fields["image_vocab_size"])
        if made != read:
            told = [f"{height} x {width} tokens of {codes} codes" for height, width, codes in (made, read)]
            raise UserError(
                f"its image tokenizer makes {told[0]}, and its transformer reads {told[1]}; give the right pair"
            )
        config["frozen"] = {"dvae": {**tokens, "source": OWN, "part": "dvae", "step": 0}}
        config["data"]["image_size"] = tokens["image_size"]
    return Converted(config, trees, {}, tokenizer, notes)


def read_unframed(path: str, vocab_size: int) -> Tokenizer:
    """A tokenizer that does not frame captions: CLIP's vocabulary without its ends, or one that was trained here.

    Raises:
      UserError: if there is none, or it has more ids than `vocab_size`.
    """
    file = locate_from_home(path)
    ours = file.suffix == ".json" and not Tokenizer.load(file).reads_as_clip
    tokenizer = Tokenizer.load(file) if ours else Tokenizer.from_clip_vocabulary(file, ends=False)
    if tokenizer.end_id is not None or tokenizer.vocab_size > vocab_size:
        what = "frames captions" if tokenizer.end_id is not None else f"has {tokenizer.vocab_size} ids"
        raise UserError(f"{path} {what}, and this network's captions have {vocab_size} ids and no ends; give its own")
    return tokenizer


def _find_tokenizer(path: str, origin: Origin, end_id: int) -> tuple[Tokenizer | None, tuple[str, ...]]:
    """The tokenizer at `path`, or else of the origin, None if there is none that fits; and why one was left out."""
    if path:
        return _read_tokenizer(locate_from_home(path), end_id), ()
    notes = []
    for names in ((TOKENIZER,), ("vocab.json", "merges.txt")):  # the second two are read together
        *_, found = (origin.find(name) for name in names)
        try:
            if found is not None:
                return _read_tokenizer(found, end_id), tuple(notes)
        except UserError as error:
            notes.append(f"the tokenizer is left out: {error}")
    return None, tuple(notes)


def _read_tokenizer(path: Location, end_id: int) -> Tokenizer:
    """A CLIP vocabulary, or the tokenizer of a run, whose captions end in `end_id`."""
    tokenizer = (Tokenizer.load if path.suffix == ".json" else Tokenizer.from_clip_vocabulary)(path)
    if tokenizer.end_id != end_id:
        ends = f"ends captions with {tokenizer.end_id}, and this network's end with {end_id}"
        raise UserError(f"{path} {ends}; give its own vocabulary as --tokenizer")
    return tokenizer
