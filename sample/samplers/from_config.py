"""What samplers, and objectives, are built of: the settings and the networks of a run's config."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from ml_collections import ConfigDict

from cli.errors import UserError
from diffusion.process import Process
from diffusion.schedule import create_schedule
from models import create_model
from weights.run import model_of


def read_settings(
    sample: Mapping[str, Any] | ConfigDict, *declared: type, place: str = "config.sample"
) -> dict[str, Any]:
    """Reads the values of `config.sample` that are settings in a sampler's dataclasses, whose defaults say their types.

    Args:
      sample: {setting: value}; keys that are no setting are left alone.
      *declared: the dataclasses.
      place: names the group in errors.

    Returns:
      {setting: value} of those that are given; whole numbers as floats where the default is one.

    Raises:
      UserError: if one is of another type, or a number that is not finite.
    """
    given = {}
    for field in (field for each in declared for field in dataclasses.fields(each)):
        default = field.default
        if type(default) not in (int, float, str) or field.name not in sample:
            continue
        value = sample[field.name]
        fits = type(value) is type(default) or (type(default) is float and type(value) is int)
        if not fits or (type(value) is float and not math.isfinite(value)):
            shown = "an object" if isinstance(value, Mapping | ConfigDict) else repr(value)
            raise UserError(f"{place}.{field.name} is {shown}; it must be such as {default!r}")
        given[field.name] = type(default)(value)
    return given


def build_process(config: ConfigDict) -> Process:
    """The process that a config describes, `config.process`.

    Raises:
      UserError: if there is none, or it is impossible.
    """
    if not isinstance(config.get("process"), ConfigDict):
        raise UserError(
            "the config does not tell on which process the denoiser was trained; convert it with its pipeline, "
            "whose scheduler does"
        )
    fields = config.process.to_dict()
    if not isinstance(schedule := fields.pop("schedule", None), dict):
        raise UserError("config.process.schedule names no schedule of noise; give it, such as {'name': 'discrete'}")
    if fields.get("prediction") != "edm":
        fields.pop("sigma_data", None)  # which nothing else is told, so that equal processes have equal fields
    try:
        return Process(create_schedule(**schedule), **fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"config.process is impossible: {str(error).splitlines()[0]}") from error


def build_network(config: ConfigDict, place: str) -> nn.Module:
    """The network that a config describes.

    Args:
      config: of a run.
      place: where in it, such as "models.dalle" or "frozen.dvae".

    Raises:
      UserError: if there is none, or it cannot be built.
    """
    group, _, part = place.partition(".")
    entry = config[group].get(part)
    if not isinstance(entry, ConfigDict) or "name" not in entry:
        raise UserError(f"config.{place} names no network, and objective {config.objective!r} needs one")
    try:
        return create_model(**model_of(entry))
    except (KeyError, TypeError, ValueError) as error:
        said = str(error.args[0] if error.args else error).splitlines()[0]
        raise UserError(f"config.{place} cannot be built: {said}") from error
