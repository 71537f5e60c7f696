"""What a run is told: prompts, classes, pictures or nothing, with a seed and settings; and whether it reads that."""

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from cli.errors import UserError
from cli.ranges import check_seed
from data.pictures import read_picture
from data.tiles import show_tiles
from models.clip import Clip
from models.clip_text import ClipText
from sample.files import read_mask
from sample.prompts import Weighted, encode_prompts, parse_weights, plain
from sample.samplers.contract import besides
from sample.sheets.grid import side_by_side, to_uint8
from sample.trained import Call, Rows, TrainedSampler, refuse_idle

# Rows of a request (see `sample.samplers.contract`) that a user may give: what they are called, and the option.
_GIVEN = {
    "text": ("captions", "--prompt=TEXT"),
    "label": ("classes", "--label=N"),
    "image": ("pictures", "--image=FILE"),
    "negative": ("negative prompt", "--negative_prompt=TEXT"),
    "mask": ("mask", "--mask=FILE"),
}


@dataclasses.dataclass(frozen=True)
class Condition:
    """What one sample is told: a prompt, a class, a picture, several of them, or nothing.

    Attributes:
      prompt: the caption.
      label: the class.
      image: a picture file, or several that are shown together.
    """

    prompt: str | None = None
    label: int | None = None
    image: str | tuple[str, ...] | None = None

    @property
    def pictures(self) -> tuple[str, ...]:
        """The picture files."""
        return (self.image,) if isinstance(self.image, str) else self.image or ()

    @property
    def record(self) -> dict[str, Any]:
        """What it holds, by name: {"prompt": ..., "label": ..., "image": ...} without what is None."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    @property
    def rows(self) -> tuple[str, ...]:
        """The rows of a request that it fills."""
        fields = {"text": self.prompt, "label": self.label, "image": self.image}
        return tuple(row for row, value in fields.items() if value is not None)

    def __str__(self) -> str:
        parts = (
            *(Path(name).name for name in self.pictures),
            "" if self.label is None else f"class {self.label}",
            self.prompt or "",
        )
        return ", ".join(part for part in parts if part)


def make_conditions(
    prompts: Sequence[str] = (), labels: Sequence[int] = (), images: Sequence[str] = (), together: bool = False
) -> tuple[Condition, ...]:
    """Each picture with each prompt and each label of those that are given; without any, the one that says nothing.

    Args:
      prompts: captions.
      labels: classes.
      images: picture files.
      together: show them all at once.
    """
    lists = ((tuple(images),) if together else images or (None,), labels or (None,), prompts or (None,))
    return tuple(Condition(prompt, label, image) for image, label, prompt in itertools.product(*lists))


@dataclasses.dataclass(frozen=True)
class Order:
    """What is to be made.

    Attributes:
      conditions: of one kind, each drawn as often as the others.
      seed: s; sample i of a condition is drawn with `fold_in(key(s), i)`.
      settings: overrides of `config.sample`.
      negative_prompt: what guidance leads away from; None for the blank caption.
      mask: a picture file, white where pictures that are given are drawn anew; None for all of them.
      prompt_weights: whether brackets in prompts weigh words, see `sample.prompts`.
      long_prompts: whether prompts beyond the context are read in chunks, and not cut.
    """

    conditions: tuple[Condition, ...]
    seed: int = 0
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    negative_prompt: str | None = None
    mask: str | None = None
    prompt_weights: bool = False
    long_prompts: bool = False

    def describe(self, trained: TrainedSampler, idle: Collection[str] | None = None) -> dict[str, Any]:
        """Run, step, seed and the settings of the sampler, those of the run's config included.

        Args:
          trained: the run.
          idle: settings that had no effect, which are left out; None for those that have none on `call`.
        """
        texts = {"negative_prompt": self.negative_prompt, "mask": self.mask}
        told: dict[str, Any] = {name: value for name, value in texts.items() if value is not None}
        told |= {name: True for name in ("prompt_weights", "long_prompts") if getattr(self, name)}
        may_read = besides(trained.sampler)
        brought = {name: value for row in self.rows for name, value in may_read.get(row, {}).items()}
        idle = trained.idle(self.call) if idle is None else idle
        return trained.describe(self.seed, {**brought, **self.settings, **told}, idle)

    @property
    def rows(self) -> tuple[str, ...]:
        """The rows of a request that it fills."""
        more = {"negative": self.negative_prompt, "mask": self.mask}
        return (*self.conditions[0].rows, *(row for row, value in more.items() if value is not None))

    @property
    def call(self) -> Call:
        """What the sampler is told, for what looks at settings."""
        return self.rows, self.settings

    def captions(self, num: int = 1) -> list[str]:
        """The prompt of each of `num` samples of each condition as others read it, without weights; [] without any."""
        prompts = [condition.prompt for condition in self.conditions if condition.prompt is not None]
        if self.prompt_weights:
            prompts = [plain(parse_weights(prompt)) for prompt in prompts]
        return [prompt for prompt in prompts for _ in range(num)]

    def records(self, num: int) -> list[dict[str, Any]]:
        """Condition, seed and index of each of `num` samples of each condition."""
        return [
            {**condition.record, "seed": self.seed, "index": index}
            for condition in self.conditions
            for index in range(num)
        ]


@dataclasses.dataclass(frozen=True)
class Made:
    """What a sampler made, as people see it: one of each for every sample.

    Attributes:
      images: None if it makes none.
      texts: None if it makes none.
    """

    images: UInt8[np.ndarray, "n h w c"] | None
    texts: tuple[str, ...] | None

    def take(self, places: Sequence[int]) -> "Made":
        """Some of the samples."""
        images = None if self.images is None else self.images[list(places)]
        return Made(images, None if self.texts is None else tuple(self.texts[place] for place in places))


def order_rows(trained: TrainedSampler, order: Order) -> Rows:
    """What the sampler is told, a row for each condition; finds every mistake of an order before anything is drawn.

    Raises:
      UserError: if the run does not read such conditions or needs others, or a setting is impossible.
    """
    _check_kind(trained, order)
    check_seed("seed", order.seed)
    rows: Rows = {}
    told = order.conditions[0].rows
    if order.prompt_weights or order.long_prompts:
        rows |= _weighted_rows(trained, order)
    elif "text" in told:
        rows |= trained.encode([str(condition.prompt) for condition in order.conditions])
    if "label" in told:
        for condition in order.conditions:
            if condition.label is not None and not -(2**31) <= condition.label < 2**31:  # the sampler knows its classes
                has = _how_to_give(trained.sampler, "label")
                raise UserError(f"there is no class {condition.label}; {trained.run.folder} takes {has}")
        rows["label"] = np.array([condition.label for condition in order.conditions], np.int32)
    if "image" in told:
        files = sorted({name for condition in order.conditions for name in condition.pictures})
        places = [files.index(name) for condition in order.conditions for name in condition.pictures]
        together = any(isinstance(condition.image, tuple) for condition in order.conditions)
        if together and not getattr(trained.sampler, "sees_several", False):
            raise UserError(f"{trained.run.folder} sees one picture at a time; leave out --together")
        pictures = [read_picture(name) for name in files]
        for name, row in trained.picture_rows(pictures).items():
            told_of = row[places]
            rows[name] = told_of.reshape(len(order.conditions), -1, *row.shape[1:]) if together else told_of
        if order.mask is not None:  # prepared as the picture is, so that both stay on each other
            masks = [read_mask(order.mask, picture, name) for name, picture in zip(files, pictures, strict=True)]
            rows["mask"] = trained.picture_rows(masks)["image"][places].mean(axis=-1) >= 128
    if order.negative_prompt is not None and "negative" not in rows:
        rows["negative"] = np.repeat(trained.encode([order.negative_prompt])["text"], len(order.conditions), axis=0)
    trained.sampler.request(**rows, **order.settings)
    return rows


def refuse_unread(trained: TrainedSampler, *orders: Order) -> None:
    """Looks at what a user gave, before anything is drawn.

    Args:
      trained: the run.
      *orders: of each cell of a sweep, or one.

    Raises:
      UserError: if a setting, a row or the network that guides has no effect on any of them.
    """
    idle = trained.idle(*(order.call for order in orders))
    refuse_idle(idle, *(order.settings for order in orders))
    for row in orders[0].rows:
        if row in idle:
            raise UserError(f"{_GIVEN[row][1].partition('=')[0]} has no effect, as {idle[row]}; leave it out")
    if trained.guide and "guidance" in idle:
        raise UserError(f"--guide_run has no effect, as {idle['guidance']}; leave it out")


def _weighted_rows(trained: TrainedSampler, order: Order) -> Rows:
    """Prompts and the negative one with their weights, in as many chunks as the longest needs; prints the weights.

    A prompt and the negative one are read in as many chunks as the longer of the two needs, the other filled up with
    empty ones. Where prompts differ in that, "contexts" says how many each has: what it is filled up with beside longer
    prompts is not seen, so that its picture is the same whatever else is asked for.

    Raises:
      UserError: if there are no prompts, one is empty, brackets do not match, or the run reads captions otherwise.
    """
    context = getattr(trained.sampler, "text", None)
    reader = getattr(context, "model", None)  # frozen or tuned
    if not isinstance(reader, Clip | ClipText) or any(condition.prompt is None for condition in order.conditions):
        raise UserError("--prompt_weights and --long_prompts are of prompts that a CLIP reads; leave them out")
    denoisers = [one.model for one in (trained.sampler, trained.sampler.guide) if one is not None]
    if order.long_prompts and any(hasattr(model, "context_length") for model in denoisers):
        raise UserError("--long_prompts needs a denoiser that reads any number of tokens, such as a UNet; leave it out")
    prompts = [str(condition.prompt) for condition in order.conditions]
    prompts += [] if order.negative_prompt is None else [order.negative_prompt]
    parts = [parse_weights(prompt) if order.prompt_weights else (Weighted(prompt, 1.0),) for prompt in prompts]
    for prompt, of_prompt in dict(zip(prompts, parts, strict=True)).items():
        if order.prompt_weights:
            print(f"weights of {prompt!r}: " + ", ".join(f"{part.text!r} {part.weight:.3g}" for part in of_prompt))
    captions, length = [plain(of_prompt) for of_prompt in parts], trained.config.data.text_length
    text, weights, chunks = encode_prompts(trained.tokenizer_for(captions), parts, length)
    if not order.long_prompts:
        text, weights = text[:, :length], weights[:, :length]
        trained.warn_of_cut([caption for caption, needed in zip(captions, chunks, strict=True) if needed > 1])
    count, rows = len(order.conditions), {"text": text, "text_weights": weights}
    if order.negative_prompt is not None:
        rows |= {f"negative{end}": np.repeat(rows[f"text{end}"][count:], count, axis=0) for end in ("", "_weights")}
    rows |= {name: rows[name][:count] for name in ("text", "text_weights")}
    contexts = np.maximum(chunks[:count], max(chunks[count:], default=1)).astype(np.int32)
    if order.long_prompts and contexts.min() < contexts.max():
        rows["contexts"] = contexts
    return rows if order.prompt_weights else {name: row for name, row in rows.items() if "weights" not in name}


def find_sources(trained: TrainedSampler, order: Order, rows: Rows) -> dict[str, str]:
    """What of the outputs is made of the other side, {"image" or "text": "given" or "made"}; see `contract`."""
    if not hasattr(trained.sampler, "made_of"):
        return {}
    return trained.sampler.made_of(trained.sampler.request(**rows, **order.settings))


def record_sources(sources: Mapping[str, str]) -> dict[str, str]:
    """What a record says of `find_sources`: "file_of" and "text_of", each the name of another entry of the record."""
    names = {
        "image": ("file_of", {"given": "prompt", "made": "text"}),
        "text": ("text_of", {"given": "image", "made": "file"}),
    }
    return {names[output][0]: names[output][1][how] for output, how in sources.items()}


def given_pictures(rows: Rows) -> UInt8[np.ndarray, "c h w 3"] | None:
    """What people see of the pictures that each condition holds, several side by side; None if they hold none."""
    told = rows.get("image")
    if told is not None and "canvas" in rows:
        told = show_tiles(told, rows["canvas"])
    return None if told is None else side_by_side(told)


def draw_outputs(trained: TrainedSampler, order: Order, rows: Rows, num: int, **more: Any) -> Rows:
    """The sampler's outputs for `num` samples of each condition, those of a condition together.

    Args:
      trained: the run that draws.
      order: what.
      rows: `order_rows(trained, order)`.
      num: samples 0 to num - 1 of the seed.
      **more: settings beside the order's.
    """
    repeated = {name: np.repeat(value, num, axis=0) for name, value in rows.items()}
    indices = list(range(num)) * len(order.conditions)
    return trained(repeated, seed=order.seed, indices=indices, **order.settings, **more)


def draw(trained: TrainedSampler, order: Order, rows: Rows, num: int) -> Made:
    """The pictures and texts of `draw_outputs`."""
    outputs = draw_outputs(trained, order, rows, num)
    images = to_uint8(outputs["image"]) if "image" in outputs else None
    return Made(images, trained.decode(outputs["text"]) if "text" in outputs else None)


def write_out(trained: TrainedSampler, order: Order, rows: Rows, print_part: Callable[[str], None]) -> Made:
    """As `draw` of one sample of one condition, of a run that only makes text: each part of it is said as it comes."""
    said, text = "", ""
    for ids in trained.stream(rows, seed=order.seed, index=0, **order.settings):
        (text,) = trained.decode(ids[None])
        # A letter may have several tokens, and is none before the last one.
        if text.startswith(said) and not text.endswith("\ufffd"):
            print_part(text[len(said) :])
            said = text
    print_part((text[len(said) :] if text.startswith(said) else f"\n{text}") + "\n")
    return Made(None, (text,))


def _check_kind(trained: TrainedSampler, order: Order) -> None:
    """Raises UserError unless the conditions are of the kind that the run's sampler reads."""
    sampler, folder = trained.sampler, trained.run.folder
    told, may_read = order.rows, besides(sampler)
    takes = " or ".join(_how_to_give(sampler, row) for row in sampler.reads if row in _GIVEN)
    takes = takes or "no condition at all; leave it out"
    if may_read:
        takes += f" (and besides {', '.join(_GIVEN[row][1] for row in may_read)})"
    for row in told:
        if row not in (*sampler.reads, *may_read):
            raise UserError(f"{folder} takes no {_GIVEN[row][0]}; it takes {takes}")
    if sampler.reads and not order.conditions[0].rows and not getattr(sampler, "needs_none", False):
        raise UserError(f"{folder} takes {takes}")
    if order.mask is not None and "image" not in told:
        raise UserError("mask is of a picture to change; give one, --image=FILE")
    for name, parameter in inspect.signature(sampler.request).parameters.items():
        if name in sampler.reads and parameter.default is parameter.empty and name not in told:
            raise UserError(f"{folder} also takes {_how_to_give(sampler, name)}")


def _how_to_give(sampler: Any, row: str) -> str:
    """Such as "captions; give --prompt=TEXT"."""
    noun, option = _GIVEN[row]
    classes = getattr(sampler, "class_range", "") if row == "label" else ""
    return f"{noun}; give {option}" + (f", N from {classes}" if classes else "")
