"""What a UniDiffuser is asked for: what its program is compiled for, scales of latents, and kinds of data."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from cli.errors import UserError
from models.unidiffuser import UniDiffuser
from sample.samplers.unidiffuser_modes import MODES, Latents

UNCONDITIONAL = ("noise", "empty")
NOISE = ("authors", "diffusers")

MEASURED = ("clip", "text")  # latents that have no scale of their own


@dataclasses.dataclass(frozen=True)
class Choices:
    """What a sampler is compiled for, beside the batch.

    Attributes:
      mode: one of `MODES`; "" for what the rows that are given ask for: a caption its picture, a picture its caption,
        both each of them, nothing a pair.
      sampler: see `diffusion.solver_choice.SOLVERS`.
      steps: S.
      spacing: of the times; "time" and the singlestep solver are the authors'.
      unconditional: what guidance of text_to_image leads away from: "noise" at the last time, or the "empty" caption.
      noise: whose habits of drawing it: "authors" or "diffusers".
    """

    mode: str = ""
    sampler: str = "dpm_solver_singlestep"
    steps: int = 50
    spacing: str = "time"
    unconditional: str = "noise"
    noise: str = "authors"

    def check_names(self) -> None:
        """Raises UserError unless there are such mode, unconditional and noise."""
        for name, allowed in (("mode", ("", *MODES)), ("unconditional", UNCONDITIONAL), ("noise", NOISE)):
            if getattr(self, name) not in allowed:
                shown = ", ".join(each or "'' for what is given" for each in allowed)
                raise UserError(f"{name}={getattr(self, name)!r} is unknown; choose one of {shown}")


@dataclasses.dataclass(frozen=True)
class Scales:
    """What latents are multiplied by before they are diffused, and divided by behind; those of pictures have their own.

    Attributes:
      clip: of the CLIP embedding; 1 where published. 0 for what a run measures before its first update: 1 over the
        root of the mean square.
      text: of the captioner's latents; likewise.
      examples: of the training set, which are measured.
    """

    clip: float = 1.0
    text: float = 1.0
    examples: int = 2048

    @property
    def measured(self) -> tuple[str, ...]:
        """Which are measured."""
        return tuple(name for name in MEASURED if not getattr(self, name))


def scaled(latents: Latents, factors: Mapping[str, Array]) -> Latents:
    """Latents as they are diffused."""
    return {name: value * factors[name] if name in factors else value for name, value in latents.items()}


def learned_kind(config: ConfigDict, model: UniDiffuser) -> int:
    """The kind of data that a run learns, `config.data.data_type`; -1 where the network does not tell kinds apart.

    Raises:
      UserError: if the network does not know it.
    """
    return find_kind(model, "config.data.data_type", config.data.get("data_type", -1), model.data_types - 1)


def kinds_of(model: UniDiffuser, kind: Int[Array, ""] | int, count: int) -> Int[Array, "b"] | None:
    """What the network is told of so many examples of a kind of data; None where it does not tell kinds apart."""
    return jnp.full(count, kind, jnp.int32) if model.data_types else None


def find_kind(model: UniDiffuser, name: str, kind: Any, usual: int) -> int:
    """The kind that a key of a config says, `usual` for -1.

    Raises:
      UserError: unless the network knows it.
    """
    return usual if type(kind) is int and kind == -1 else check_kind(model, name, kind)


def check_kind(model: UniDiffuser, name: str, kind: Any) -> int:
    """The kind that a setting of this name says.

    Raises:
      UserError: unless the network knows it.
    """
    if not model.data_types:
        raise UserError(
            f"{name}={kind!r} is of a UniDiffuser that tells kinds of data apart, and this one's data_types is 0; "
            "leave it out"
        )
    if type(kind) is not int or not 0 <= kind < model.data_types:
        kinds = ", ".join(map(str, range(model.data_types)))
        raise UserError(f"{name}={kind!r} is unknown; this UniDiffuser's kinds of data are {kinds}")
    return kind
