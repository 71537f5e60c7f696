"""Numbers that a user gives, beside what the mathematics allows; refused in one line where they enter."""

import ctypes
import math
import numbers
from collections.abc import Mapping
from typing import Any

from cli.errors import UserError

SEEDS = 2**32  # what the generators tell apart: jax.random.key keeps the low 32 bits of a seed


def check_range(name: str, value: Any, interval: str) -> None:
    """Raises UserError unless a number lies in an interval; names it, and says what is allowed.

    Args:
      name: of the key or option.
      value: the number; NaN and infinity lie in no interval. A float must lie there as float32 too, in which devices
        compute: 0.99999999 is 1 to them, and 1e-46 is 0.
      interval: such as "[0, 1)", "(0, inf)"; square brackets include an end.
    """
    low, high = (float(end) for end in interval[1:-1].split(","))

    def lies(number: Any, low: float, high: float) -> bool:
        above = number >= low if interval[0] == "[" else number > low
        below = number <= high if interval[-1] == "]" else number < high
        return math.isfinite(number) and above and below

    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    fits = number and lies(value, low, high)
    if fits and isinstance(value, float) and not lies(_as_float32(value), _as_float32(low), _as_float32(high)):
        fits, value = False, f"{value}, which is {_as_float32(value):g} in float32"
    if fits:
        return
    words = f"{'at least' if interval[0] == '[' else 'above'} {_spell(low)}"
    if math.isfinite(high):
        words += f" and {'at most' if interval[-1] == ']' else 'below'} {_spell(high)}"
    raise UserError(f"{name} must be {words}, not {value}")


def _as_float32(number: float) -> float:
    return ctypes.c_float(number).value


def _spell(end: float) -> str:
    return str(int(end)) if end.is_integer() else f"{end:g}"


def check_ranges(prefix: str, values: Mapping[str, Any], intervals: Mapping[str, str]) -> None:
    """`check_range` of every number that has an interval, under the name `prefix.key`."""
    for key, interval in intervals.items():
        if key in values:
            check_range(f"{prefix}.{key}", values[key], interval)


def check_seed(name: str, seed: int) -> int:
    """Returns a seed.

    Raises:
      UserError: unless it is one of the 2^32 that differ; others would draw what one of these draws.
    """
    if not 0 <= seed < SEEDS:
        raise UserError(f"{name}={seed} is impossible; a seed is a whole number from 0 to {SEEDS - 1}")
    return seed
