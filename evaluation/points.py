"""How near drawn points are to a distribution of points in the plane."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from cli.errors import UserError
from data.points import PointStream
from diffusion.likelihood import bits_per_dimension, log_likelihood
from diffusion.schedule import DiscreteSchedule
from evaluation.records import Record
from models.conditioning import Conditioning
from sample.samplers.diffusion import DiffusionSampler
from sample.trained import TrainedSampler

LIKELIHOOD = "likelihood"
POINT_METRICS = ("energy_distance", LIKELIHOOD)

_BLOCK = 2000  # points that are compared with as many others at once


def energy_distance(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| (Szekely and Rizzo 2013, eq. 6.1): 0 for equal distributions.

    The estimate is without bias, so it may be a little below 0.
    """

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        blocks = (a[start : start + _BLOCK] for start in range(0, len(a), _BLOCK))
        return sum(np.linalg.norm(block[:, None] - b, axis=-1).sum(dtype=np.float64) for block in blocks) / (
            len(a) * len(b)
        )

    within = [mean(z, z) * len(z) / (len(z) - 1) for z in (x, y)]
    return float(2 * mean(x, y) - sum(within))


def default_point_metrics(trained: TrainedSampler) -> tuple[str, ...]:
    """What is computed unless a user names metrics: a likelihood only where there is an exact one."""
    chain = isinstance(trained.sampler.process.schedule, DiscreteSchedule)
    return POINT_METRICS[:1] if chain else POINT_METRICS


def point_values(
    name: str, trained: TrainedSampler, split: str, num: int, seed: int, settings: Mapping[str, Any]
) -> Record:
    """Computes a metric of a run whose dataset is one of `data.points`.

    Args:
      name: of `POINT_METRICS`.
      trained: a diffusion that makes points.
      split: of its dataset.
      num: points of it, and drawn.
      seed: of sampling.
      settings: overrides of `config.sample`.

    Returns:
      values: energy_distance beside that of as many other points of the data, which is chance; or bits, of a dimension
      of the data, by the probability-flow ODE.

    Raises:
      UserError: if a chain's likelihood is asked for, or the distance of one point.
    """
    if name == "energy_distance" and num < 2:
        raise UserError(f"energy_distance compares points with each other; --num must be at least 2, not {num}")
    stream = PointStream(trained.config.data.dataset, split, trained.config.seed)
    data = stream.batch(range(num))["point"]
    if name == "energy_distance":
        drawn = trained({}, seed=seed, indices=range(num), **settings)["point"]
        others = stream.batch(range(num, 2 * num))["point"]
        return {"values": {"energy_distance": energy_distance(drawn, data), "of_data": energy_distance(others, data)}}
    bits = _likelihood(trained.sampler, trained.weights.params, data)
    return {"values": {"bits_per_dimension": float(bits.mean())}}


def _likelihood(sampler: DiffusionSampler, params: Any, data: np.ndarray) -> np.ndarray:
    process = sampler.process
    if isinstance(process.schedule, DiscreteSchedule):
        raise UserError("likelihood is exact for schedules in continuous time alone; leave this metric out")
    schedule = process.schedule

    def network(x: Any, t: Any) -> Any:
        return sampler.model.apply({"params": params["denoiser"]}, x, t, Conditioning())

    log_p = jax.jit(lambda x: log_likelihood(schedule, process.denoiser(network), x, time_min=1e-3))(jnp.asarray(data))
    return np.asarray(bits_per_dimension(log_p, data.shape[1]))
