"""What does not go together with a diffusion: rows of a request, a guide, a shape. Each check says so in one line."""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import numpy as np
from flax.errors import FlaxError
from jaxtyping import Int, UInt8

from cli.errors import UserError
from sample.attention_maps import has_caption_attention

Sampler = Any  # a `sample.samplers.diffusion.DiffusionSampler`


def check_condition(sampler: Sampler, told: Collection[str], label: Int[np.ndarray, " b"] | None) -> None:
    """Looks at what a request tells the denoiser.

    Args:
      sampler: that draws.
      told: which of "text", "label" and "negative" the request holds.
      label: its classes.

    Raises:
      UserError: if the denoiser is not told such, or lacks what it needs, or there is no such class.
    """
    if sampler.text is None and ("text" in told or "negative" in told):
        raise UserError("this run takes no captions")
    if not sampler.classes and "label" in told:
        raise UserError("this run takes no classes")
    if sampler.classes and sampler.null_label is None and "label" not in told:
        raise UserError(f"this run needs a class, 0 to {sampler.classes - 1}: none of them stands for none")
    wrong = [] if label is None else [n for n in label.tolist() if not 0 <= n < sampler.classes]
    if wrong:
        raise UserError(f"there is no class {wrong[0]}; classes are {sampler.class_range}")


def check_picture(sampler: Sampler, image: UInt8[np.ndarray, "b H W 3"]) -> None:
    """Raises UserError unless pictures that are to be changed are such as the sampler draws."""
    if "image" not in sampler.makes:
        raise UserError("this run makes no pictures, so there is none to change")
    factor = 1 if sampler.first_stage is None else sampler.first_stage.model.downsampling
    height, width = (side * factor for side in sampler.sample_shape[:2])
    if image.shape[1:3] != (height, width):
        given, own = f"pictures are {image.shape[1]} x {image.shape[2]} pixels", f"{height} x {width} pixels"
        raise UserError(f"{given}, this run's are {own}{in_latents(sampler, height, width)}")


def check_negative(sampler: Sampler, guidance: float) -> None:
    """Raises UserError if a negative prompt has no effect with a guidance, or another network is led away from."""
    if sampler.guide is not None:
        raise UserError("guidance leads away from the --guide_run; leave out the negative prompt, or that")
    if guidance == 1:
        raise UserError("a negative prompt has no effect with guidance 1, which means none; choose another guidance")


def check_attention(sampler: Sampler, told: bool, strength: float) -> None:
    """Raises UserError unless there is attention to a caption to be shown; `told` is whether one is given."""
    if sampler.text is None or not has_caption_attention(sampler.model):
        raise UserError("attention maps are of a denoiser that reads captions; leave out --attention_maps")
    if not told:
        raise UserError("attention maps are of a caption; give one, --prompt=TEXT")
    if strength == 0:
        raise UserError("strength 0 runs no step that could show its attention; choose more")


def check_guide_fits(sampler: Sampler, guide: Any) -> None:
    """Raises UserError if another sampler draws something else, or was told or trained on something else."""
    if not isinstance(guide, type(sampler)):
        raise UserError("a diffusion is guided by another diffusion; give one as --guide_run")
    lengths = (0 if one.text is None else len(one.text.blank) for one in (sampler, guide))
    for name, ours, theirs in (
        ("process", sampler.process, guide.process),
        ("size and channels", sampler.sample_shape, guide.sample_shape),
        ("condition", (sampler.reads, sampler.classes), (guide.reads, guide.classes)),
        ("class for none", sampler.null_label, guide.null_label),
        ("caption length", *lengths),
    ):
        if ours != theirs:
            raise UserError(f"the --guide_run is of another {name} than the run: {theirs}, not {ours}")


def check_shape(sampler: Sampler, shape: tuple[int, int]) -> None:
    """Raises UserError if a network does not take pictures of a height and width: one with a position of each patch."""
    wanted = dataclasses.replace(sampler, shape=shape).sample_shape
    for model in (sampler.model, *(() if sampler.guide is None else (sampler.guide.model,))):
        x_t, *told = model.example_inputs(1)
        params = jax.eval_shape(model.init, jax.random.key(0), x_t, *told)
        try:
            jax.eval_shape(model.apply, params, jax.ShapeDtypeStruct((1, *wanted), x_t.dtype), *told)
        except (ValueError, TypeError, FlaxError) as error:  # what networks of one shape raise
            said = str(error).strip().splitlines()[0]
            raise UserError(
                f"the denoiser does not take pictures of {shape[0]} x {shape[1]} pixels{in_latents(sampler, *shape)}: "
                f"{said}; leave out --size"
            ) from error


def in_latents(sampler: Sampler, height: int, width: int) -> str:
    """What so many pixels are to the denoiser, for messages; "" to one of pixels."""
    if sampler.first_stage is None:
        return ""
    factor = sampler.first_stage.model.downsampling
    return f", {height // factor} x {width // factor} latents"
