"""What is to be drawn: captions, classes or nothing, with a seed and settings; and whether a run can draw it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from cli.errors import UserError
from sample.sheets.grid import to_uint8
from sample.trained import Rows, TrainedSampler


@dataclasses.dataclass(frozen=True)
class Condition:
    """What one picture is told: a caption, a class, or nothing.

    Attributes:
      prompt: the caption.
      label: the class.
    """

    prompt: str | None = None
    label: int | None = None

    @property
    def record(self) -> dict[str, Any]:
        """{"prompt": ...}, {"label": ...} or {}."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def __str__(self) -> str:
        if self.prompt is not None:
            return self.prompt
        return "" if self.label is None else f"class {self.label}"


def make_conditions(prompts: Sequence[str] = (), labels: Sequence[int] = ()) -> tuple[Condition, ...]:
    """One condition for each prompt or label; without any, the one that says nothing."""
    conditions = [Condition(prompt=prompt) for prompt in prompts] + [Condition(label=label) for label in labels]
    return tuple(conditions) or (Condition(),)


@dataclasses.dataclass(frozen=True)
class Order:
    """What one drawing is of.

    Attributes:
      conditions: of one kind, each drawn as often as the others.
      seed: s; picture i of a condition is drawn with `fold_in(key(s), i)`.
      settings: overrides of `config.sample`.
      negative_prompt: what guidance leads away from; None for the blank caption.
    """

    conditions: tuple[Condition, ...]
    seed: int = 0
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    negative_prompt: str | None = None

    def describe(self, trained: TrainedSampler) -> dict[str, Any]:
        """Run, step, seed and the settings of the sampler, those of the run's config included."""
        negative = {} if self.negative_prompt is None else {"negative_prompt": self.negative_prompt}
        return trained.describe(self.seed, {**self.settings, **negative})


def order_rows(trained: TrainedSampler, order: Order) -> Rows:
    """What the sampler is told, a row for each condition; finds every mistake of an order before anything is drawn.

    Raises:
      UserError: if the run does not read such conditions or needs others, or a setting is impossible.
    """
    _check_kind(trained, order)
    if not -(2**63) <= order.seed < 2**63:
        raise UserError(f"the seed {order.seed} does not fit 64 bits; choose a smaller one")
    rows: Rows = {}
    first = order.conditions[0]
    if first.prompt is not None:
        rows |= trained.encode([str(condition.prompt) for condition in order.conditions])
    if first.label is not None:
        rows["label"] = np.array([condition.label for condition in order.conditions], np.int32)
    if order.negative_prompt is not None:
        rows["negative"] = np.repeat(trained.encode([order.negative_prompt])["text"], len(order.conditions), axis=0)
    trained.sampler.request(**rows, **order.settings)
    return rows


def draw_outputs(trained: TrainedSampler, order: Order, rows: Rows, num: int, **more: Any) -> Rows:
    """The sampler's outputs for `num` pictures of each condition, those of a condition together.

    Args:
      trained: the run that draws.
      order: what.
      rows: `order_rows(trained, order)`.
      num: pictures 0 to num - 1 of the seed.
      **more: settings beside the order's.
    """
    repeated = {name: np.repeat(value, num, axis=0) for name, value in rows.items()}
    indices = list(range(num)) * len(order.conditions)
    return trained(repeated, seed=order.seed, indices=indices, **order.settings, **more)


def draw_images(trained: TrainedSampler, order: Order, rows: Rows, num: int) -> UInt8[np.ndarray, "n h w c"]:
    """The pictures of `draw_outputs`."""
    return to_uint8(draw_outputs(trained, order, rows, num)["image"])


def records_of(order: Order, num: int) -> list[dict[str, Any]]:
    """Condition, seed and index of each of `draw_images`."""
    return [
        {**condition.record, "seed": order.seed, "index": index}
        for condition in order.conditions
        for index in range(num)
    ]


def _check_kind(trained: TrainedSampler, order: Order) -> None:
    """Raises UserError unless the conditions are of the kind that the run's sampler reads."""
    reads, folder, first = trained.sampler.reads, trained.run.folder, order.conditions[0]
    takes = {
        "text": "captions; give --prompt=TEXT",
        "label": f"classes; give --label=N, N from {getattr(trained.sampler, 'class_range', '')}",
        "image": "pictures, to reconstruct; give --image=FILE",
    }
    instead = " or ".join(takes[kind] for kind in reads if kind in takes) or "no condition at all; leave it out"
    if first.prompt is not None and "text" not in reads:
        raise UserError(f"{folder} takes no captions; it takes {instead}")
    if first.label is not None and "label" not in reads:
        raise UserError(f"{folder} takes no classes; it takes {instead}")
    if not first.record and reads:
        raise UserError(f"{folder} takes {instead}")
    if order.negative_prompt is not None and "negative" not in reads:
        raise UserError(f"{folder} takes no negative prompt, as only diffusions of captions do; leave it out")
