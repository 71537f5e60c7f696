"""Pictures of points in the plane, and of how they are noised and denoised."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.axes
import matplotlib.figure
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from data.pictures import read_picture
from data.points import PointStream
from sample.samplers.diffusion import DiffusionSampler
from sample.trained import TrainedSampler

_LIMIT = 2.6  # of the axes
_SHARES = (0.0, 0.03, 0.08, 0.2, 0.5, 1.0)  # of the process, that the figure shows
_DATA, _SAMPLES, _FIELD = "#3565b5", "#c2482e", "#4b4b52"


def draw_points(points: Float[np.ndarray, "n 2"], size: int = 256) -> UInt8[np.ndarray, "h w 3"]:
    """A square picture of points."""
    figure = matplotlib.figure.Figure(figsize=(size / 100, size / 100), dpi=100)
    _scatter(figure.add_axes((0, 0, 1, 1)), points, _SAMPLES)
    return _pixels(figure)


def draw_process(
    noised: Sequence[Float[np.ndarray, "n 2"]],
    denoised: Sequence[Float[np.ndarray, "n 2"]],
    fields: Sequence[tuple[Float[np.ndarray, "m 2"], Float[np.ndarray, "m 2"]]],
    shares: Sequence[float],
) -> Image.Image:
    """The figure of Sohl-Dickstein et al. 2015: data noised step by step, samples denoised, and the learned drift.

    Args:
      noised: data at each time, first without noise.
      denoised: samples at the same times, so that those on the right are where sampling starts.
      fields: of the same times, places and the directions in which the network moves them.
      shares: of the process, 0 at data, which each time is.
    """
    columns = len(shares)
    figure = matplotlib.figure.Figure(figsize=(2.1 * columns, 6.6), dpi=100, layout="constrained")
    axes = figure.subplots(3, columns, squeeze=False)
    rows = ("data, noised", "samples, denoised", "where the network pulls")
    for place, share in enumerate(shares):
        _scatter(axes[0, place], noised[place], _DATA)
        _scatter(axes[1, place], denoised[place], _SAMPLES)
        places, directions = fields[place]
        _frame(axes[2, place])
        axes[2, place].quiver(*places.T, *directions.T, color=_FIELD, angles="xy", pivot="mid", width=0.006)
        axes[0, place].set_title(f"t = {share:.0%}" if share else "t = 0", fontsize=10)
    for row, title in enumerate(rows):
        axes[row, 0].set_ylabel(title, fontsize=10)
    return Image.fromarray(_pixels(figure))


def draw_point_run(trained: TrainedSampler, num: int, seed: int, settings: Mapping[str, Any]) -> Image.Image:
    """The figure of `draw_process` for a run of points.

    Args:
      trained: a diffusion that makes points, whose dataset is one of `data.points`.
      num: points of the data, and drawn.
      seed: of both.
      settings: overrides of `config.sample`.
    """
    sampler: DiffusionSampler = trained.sampler
    process, config = sampler.process, trained.config
    drawn = trained({}, seed=seed, indices=range(num), trajectory=True, **settings)
    plan = sampler.plan(sampler.request(**settings)["steps"])
    data = PointStream(config.data.dataset, config.data.validation_split, seed).batch(range(num))["point"]
    eps = np.random.default_rng(seed).standard_normal(data.shape).astype(np.float32)
    axis = np.linspace(-0.92 * _LIMIT, 0.92 * _LIMIT, 15, dtype=np.float32)
    places = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    noised, denoised, fields = [], [], []
    for share in _SHARES:
        near = int(np.argmin(np.abs(np.asarray(process.progress(plan.t)) - share)))
        t = plan.t[near]
        alpha, sigma = float(process.schedule.alpha(t)), float(process.schedule.sigma(t))
        noised.append(alpha * data + sigma * eps if share else data)
        denoised.append(drawn["states"][:, near] if share else drawn["point"])
        estimate = sampler.estimate(trained.weights.params, places, float(t))
        fields.append((places, alpha * estimate - places))
    return draw_process(noised, denoised, fields, _SHARES)


def _scatter(axes: matplotlib.axes.Axes, points: np.ndarray, color: str) -> None:
    _frame(axes)
    axes.scatter(*points.T, s=1.5, color=color, linewidths=0, alpha=0.6)


def _frame(axes: matplotlib.axes.Axes) -> None:
    axes.set(xlim=(-_LIMIT, _LIMIT), ylim=(-_LIMIT, _LIMIT), xticks=[], yticks=[], aspect="equal")


def _pixels(figure: matplotlib.figure.Figure) -> np.ndarray:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return read_picture(buffer.getvalue())
