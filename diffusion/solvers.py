"""The standard samplers, each as the plan that `diffusion.plan.solve` runs."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from diffusion.plan import Plan
from diffusion.schedule import ContinuousSchedule, require
from diffusion.times import TimeGrid

VARIANCES = ("small", "large", "learned")


def ddpm(grid: TimeGrid, variance: str = "small") -> Plan:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), on any grid (Nichol and Dhariwal 2021, section 4).

    Args:
      grid: times.
      variance: "small", of the posterior q(x_{t-1} | x_t, x_0); "large", beta_t; "learned", between the two by a
        fraction that `denoise` returns beside its estimate (Nichol and Dhariwal 2021, eq. 15).

    Raises:
      ValueError: on an unknown variance.
    """
    if variance not in VARIANCES:
        raise ValueError(f"unknown variance {variance!r}; choose one of {', '.join(VARIANCES)}")
    alpha, sigma, ratio, beta = _chain(grid)
    small = np.square(sigma[1:] / sigma[:-1]) * beta
    last = len(grid) - 1
    low, high = np.maximum(small, 1e-20), np.maximum(beta, 1e-20)
    chosen = {"small": low, "large": high, "learned": np.ones(len(grid))}[variance]
    # No noise on the last step to clean data: its posterior has no variance.
    scale = np.sqrt(chosen) * ~((np.arange(len(grid)) == last) & (sigma[1:] == 0))
    return _plan(
        grid,
        state=ratio * np.square(sigma[1:] / sigma[:-1]),
        model=alpha[1:] * beta / np.square(sigma[:-1]),
        noise=scale,
        log_variance=np.log(np.stack([low, high], axis=1)) if variance == "learned" else None,
    )


def ddim(grid: TimeGrid, eta: float = 0.0) -> Plan:
    """DDIM (Song et al. 2021, eq. 12); eta = 0 draws no noise, eta = 1 as much as ancestral sampling.

    Raises:
      ValueError: if eta is not between 0 and 1: a step would draw more noise than its state may have.
    """
    require("eta", eta, lambda share: 0 <= share <= 1, "between 0, which draws no noise, and 1, as much as ddpm")
    alpha, sigma, _, beta = _chain(grid)
    noise = eta * sigma[1:] / sigma[:-1] * np.sqrt(beta)
    along = np.sqrt(np.maximum(np.square(sigma[1:]) - np.square(noise), 0)) / sigma[:-1]
    return _plan(grid, state=along, model=alpha[1:] - along * alpha[:-1], noise=noise)


def euler(grid: TimeGrid) -> Plan:
    """Euler's method for the probability-flow ODE in the variance-exploding view (Karras et al. 2022, algorithm 1).

    With y = x / alpha and s = sigma / alpha the ODE is dy/ds = (y - x_0) / s; one step of it is one of DDIM's.
    """
    return ddim(grid)


def euler_ancestral(grid: TimeGrid) -> Plan:
    """Euler's method down to below the next noise level, then noise up to it (Crowson, k-diffusion).

    In the variance-exploding view: s_up^2 = s'^2 (s^2 - s'^2) / s^2 and s_down^2 = s'^2 - s_up^2.
    """
    alpha, after = grid.alpha, grid.noise[1:]
    share = np.square(after * alpha[:-1] / grid.sigma[:-1])  # s'^2 / s^2, also where s is infinite
    return _plan(
        grid,
        state=alpha[1:] * np.square(after) * alpha[:-1] / np.square(grid.sigma[:-1]),
        model=alpha[1:] * (1 - share),
        noise=alpha[1:] * after * np.sqrt(1 - share),
    )


def heun(
    grid: TimeGrid,
    churn: float = 0.0,
    churn_range: tuple[float, float] = (0.0, np.inf),
    churn_noise: float = 1.0,
    *,
    straight: bool = False,
    total: int | None = None,
) -> Plan:
    """Heun's method with the ODE of `euler`, two network calls a step, one for the last (Karras et al. 2022).

    Args:
      grid: times.
      churn: S_churn of algorithm 2; 0 is the deterministic algorithm 1. Noise is raised between the schedule's times,
        so this needs a grid whose alpha is 1 and t is sigma.
      churn_range: S_min and S_max, the noise levels between which noise is added.
      churn_noise: S_noise, the standard deviation of what is added.
      straight: average the slopes of x / (alpha + sigma) over sigma / (alpha + sigma) in place of those of x / alpha
        over sigma / alpha. Rectified flow's own time, and finite where a chain begins in noise alone.
      total: N of algorithm 2, which shares churn out; more than the grid's steps where it is the last part of a longer
        one. None for as many.

    Raises:
      ValueError: if churn is asked for on a grid of another kind, or the grid begins in noise alone without `straight`.
    """
    if churn and (straight or not (np.all(grid.alpha == 1) and np.allclose(grid.t, grid.sigma))):
        raise ValueError(
            "churn raises the noise between the schedule's times: it needs alpha = 1 and t = sigma, as in schedule edm"
        )
    total = len(grid) if total is None else total
    if grid.alpha[0] == 0 and not straight:
        raise ValueError("heun needs some signal at its first time, which is noise alone; choose ddim or unipc")
    scale, steps = grid.alpha + grid.sigma if straight else grid.alpha, len(grid)
    s = grid.sigma / scale
    churned = (s[:-1] >= churn_range[0]) & (s[:-1] <= churn_range[1])
    raised = s[:-1] * (1 + np.where(churned, min(churn / total, np.sqrt(2) - 1), 0))
    extra = np.append(churn_noise * np.sqrt(np.square(raised) - np.square(s[:-1])), 0.0)
    rows: list[dict[str, Any]] = []
    for i in range(steps):
        high, low = raised[i], s[i + 1]
        ratio, end = scale[i + 1] / scale[i], scale[i + 1]
        # With y = x / scale the slope is (y - x_0) / s.
        slope = (low - high) / high
        one = {"t": high if churn else grid.t[i], "alpha": grid.alpha[i], "sigma": scale[i] * high, "starts": True}
        rows.append({**one, "state": ratio * (1 + slope), "model": [-end * slope, 0], "noise": extra[i + 1]})
        if low:
            # The second slope is taken at Euler's point, which is a combination of y and the first estimate.
            rows[-1]["noise"] = 0.0
            half = (low - high) / 2
            state = 1 + half / high + half / low * (1 + slope)
            model = [-end * half / low, -end * (half / high + half / low * slope)]
            two = {"t": grid.t[i + 1], "alpha": grid.alpha[i + 1], "sigma": grid.sigma[i + 1], "starts": False}
            rows.append({**two, "state": ratio * state, "model": model, "noise": extra[i + 1]})
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return Plan(**columns, first_noise=float(extra[0]), start_sigma=float(grid.sigma[0]))


def plms(grid: TimeGrid) -> Plan:
    """Pseudo linear multistep sampling, started by a step that is done twice (Liu et al. 2022, eq. 9; Crowson).

    Adams-Bashforth of orders up to 4 on the noise estimates, moved by DDIM's transfer. The first step is Heun's in this
    sense, so S steps ask the network S + 1 times. A single step is DDIM's.

    Raises:
      ValueError: if the grid begins in noise alone.
    """
    if grid.alpha[0] == 0:
        raise ValueError("plms needs some signal at its first time, which is noise alone; choose ddim or unipc")
    if len(grid) == 1:
        return ddim(grid)
    alpha, sigma, level = grid.alpha, grid.sigma, grid.noise
    weights = [[1.0], [0.5, 0.5], [1.5, 0.0, -0.5], [23 / 12, -16 / 12, 0.0, 5 / 12]]
    weights += [[55 / 24, -59 / 24, 37 / 24, 0.0, -9 / 24]]  # the second estimate is not one of the past
    weights += [[55 / 24, -59 / 24, 37 / 24, -9 / 24]] * (len(grid) - 4)
    weights = weights[: len(grid) + 1]
    steps = np.array([0, 0, *range(1, len(grid))])  # the step that a row makes
    asked = np.array([0, 1, *range(1, len(grid))])
    # The estimates' weighted mean is the newest one and a sum over its changes: of d_{i-k}, by what is older.
    older = np.zeros((len(weights), min(4, len(weights) - 1)))
    for row, weight in enumerate(weights):
        for k in range(len(weight) - 1):
            older[row, k] = -sum(weight[k + 1 :])
    # With y = x / alpha the noise estimate is (y - m) / level, and a step moves y by its mean times the level's change.
    along = np.diff(level)
    change = np.zeros((len(weights), 1 + older.shape[1]))
    change[1:, 0] = 1 / level[asked[1:]]
    change[2:, 1:] = (along[steps[1:-1]] / level[asked[2:]])[:, None] * older[1:-1]
    # The first step is done twice from where it starts: as DDIM's with the first estimate, and half of the change.
    share = sigma[steps + 1] / sigma[steps]
    model = np.zeros((len(weights), 2))
    first = np.arange(len(weights)) == 1
    model[np.arange(len(weights)), first.astype(int)] = alpha[steps + 1] - share * alpha[steps]
    of_change = (alpha[steps + 1] * along[steps])[:, None] * older
    of_change[1, 0] *= -1
    change[2:3, 1] *= -1
    return Plan(
        t=grid.t[asked],
        alpha=alpha[asked],
        sigma=sigma[asked],
        state=share,
        model=model,
        noise=np.zeros(len(weights)),
        starts=~first,
        change=change,
        of_change=of_change,
    )


def dpm_solver_multistep(grid: TimeGrid, *, lower_order_final: bool | None = None) -> Plan:
    """DPM-Solver++ 2M (Lu et al. 2022b, algorithm 2).

    Args:
      grid: times.
      lower_order_final: make the last step of first order; None for steps to clean data and for fewer than 15, as is
        stable there. A step to clean data has no second order.
    """
    step = _ExponentialStep(grid)
    final = len(grid) < 15 if lower_order_final is None else lower_order_final
    model = np.zeros((len(grid), 2))
    for i in range(len(grid)):
        last = i == len(grid) - 1
        model[i, 0] = step.first(i, i + 1)
        if i > 0 and not (last and (final or grid.sigma[-1] == 0)):
            slope = step.first(i, i + 1) / 2 / step.share(i - 1, i, i + 1)
            model[i] += slope, -slope
    return _plan(grid, state=grid.sigma[1:] / grid.sigma[:-1], model=model)


def fast_orders(num: int) -> tuple[int, ...]:
    """How DPM-Solver-fast spends `num` network calls: on steps of order 3, with smaller ones at the end.

    Lu et al. 2022a, section 3.4. A multiple of 3 ends in orders 2 and 1, so that the last step is of first order.
    """
    whole, rest = divmod(num, 3)
    if rest:
        return (*(3,) * whole, rest)
    return (*(3,) * (whole - 1), 2, 1)


def dpm_solver_singlestep(grid: TimeGrid, orders: Sequence[int], *, midpoint: bool = False) -> Plan:
    """DPM-Solver++ singlestep of orders 1 to 3 (Lu et al. 2022b, appendix; Lu et al. 2022a, algorithms 4 and 5).

    A step of order k starts from one of the grid's states and uses the k - 1 times that follow as its inner nodes.

    Args:
      grid: times, with the inner nodes.
      orders: of the steps, which together make the grid's; see `fast_orders`.
      midpoint: weigh the first difference by (1 - exp(-h)) / 2 in place of its exact integral, in steps of order 2 and
        up to the second node of those of order 3. The authors' code has the first for the former and the second for the
        latter; neither changes the order.

    Raises:
      ValueError: if the orders do not add up to the grid's steps, or a step that is infinitely long in lambda has an
        order above 1.
    """
    if sum(orders) != len(grid) or not set(orders) <= {1, 2, 3}:
        raise ValueError(f"orders {tuple(orders)} of 1 to 3 must add up to the {len(grid)} steps of the grid")
    if (grid.sigma[-1] == 0 and orders[-1] != 1) or (grid.alpha[0] == 0 and orders[0] != 1):
        raise ValueError("a step from noise alone or to clean data has no inner nodes in lambda; its order must be 1")
    step = _ExponentialStep(grid)
    model = np.zeros((len(grid), 3))
    state, starts = np.zeros(len(grid)), np.zeros(len(grid), bool)
    start = 0
    for order in orders:
        starts[start] = True
        for k in range(order):
            row = start + k
            state[row] = grid.sigma[row + 1] / grid.sigma[start]
            base = step.first(start, row + 1)
            if k == 0:
                model[row, 0] = base
                continue
            inner = k == 1 and order == 3
            node = start + k
            # Stage k uses the difference of the newest estimate and the first, over their distance in lambda.
            weight = base / 2 if (k == 1 and (midpoint or not inner)) else step.second(start, row + 1)
            slope = weight / step.share(start, node, row + 1, of=start)
            model[row, 0] += slope
            model[row, k] += base - slope
        start += order
    return _plan(grid, state=state, model=model, starts=starts)


def unipc(grid: TimeGrid, order: int = 2) -> Plan:
    """UniPC with B(h) = exp(h) - 1, predictor and corrector, for data estimates (Zhao et al. 2023, algorithms 1, 2).

    The corrector reuses the estimate at the predicted state, so it costs no network call; it is not applied to the
    final state. Orders fall towards the end.

    Raises:
      ValueError: if the order is not at least 1.
    """
    if order < 1:
        raise ValueError(f"order={order} is impossible; UniPC has orders from 1")
    step, steps = _ExponentialStep(grid), len(grid)
    model, corrector = np.zeros((steps, order)), np.zeros((steps, order + 3))
    corrector[0, 0] = 1
    orders = [min(order, steps - i, i + 1) for i in range(steps)]
    for i, k in enumerate(orders):
        if grid.sigma[i + 1] == 0:
            k = 1
        # Noise alone is infinitely far away in lambda, so what was estimated there has no difference.
        k = min(k, max(1, int(np.sum(np.isfinite(step.log_snr[: i + 1])))))
        base = step.first(i, i + 1)
        points = np.array([-step.share(i - j, i, i + 1) for j in range(1, k)])
        # The published code keeps 1/2 for a single difference, which solves the equation to its order.
        rho = np.array([0.5]) if k == 2 else step.unified(i, points, k - 1)
        model[i, 0] = base
        for j, (r, weight) in enumerate(zip(points, rho, strict=True), start=1):
            model[i, j] += base * weight / r
            model[i, 0] -= base * weight / r
        if i + 1 < steps:
            row = corrector[i + 1]
            row[1] = grid.sigma[i + 1] / grid.sigma[i]
            rho = np.array([0.5]) if k == 1 else step.unified(i, np.append(points, 1.0), k)
            row[2] = base * rho[-1]  # of the estimate at the predicted state
            row[3] = base * (1 - rho[-1])
            for j, (r, weight) in enumerate(zip(points, rho, strict=False), start=1):
                row[3 + j] += base * weight / r
                row[3] -= base * weight / r
    return dataclasses.replace(_plan(grid, state=grid.sigma[1:] / grid.sigma[:-1], model=model), corrector=corrector)


def reverse_sde(grid: TimeGrid, schedule: ContinuousSchedule) -> Plan:
    """Euler-Maruyama steps of the reverse-time SDE (Song et al. 2021, eq. 6), the last without noise.

    dx = (f x - g^2 score) dt + g dw, with score = (alpha x_0 - x) / sigma^2.

    Raises:
      ValueError: if the grid begins in noise alone, where f has no limit.
    """
    if grid.alpha[0] == 0:
        raise ValueError("the reverse SDE needs some signal at its first time, which is noise alone; choose heun")
    t, alpha, sigma = grid.t[:-1], grid.alpha[:-1], grid.sigma[:-1]
    span = grid.t[:-1] - grid.t[1:]
    f, squared = schedule.drift(t), schedule.diffusion_squared(t)
    pull = span * squared / np.square(sigma)
    noise = np.sqrt(span * squared)
    noise[-1] = 0
    return _plan(grid, state=1 - span * f - pull, model=pull * alpha, noise=noise)


def flow_sde(grid: TimeGrid) -> Plan:
    """Euler-Maruyama steps of a flow's reverse SDE with diffusion w_t = 2 sigma_t (Ma et al. 2024, "SiT", section 3.4).

    dx = (v - w score / 2) dt + sqrt(w) dw of the velocity v = (x - x_0) / t and score = ((1 - t) x_0 - x) / t^2, finite
    where the flow is noise alone. The last step is without noise, to the estimate of the data, one of the choices of
    the authors' code; their default leaves sigma of the last time.

    Raises:
      ValueError: if the grid is not that of a straight flow.
    """
    t = grid.t[:-1]
    if not (np.allclose(grid.sigma[:-1], t) and np.allclose(grid.alpha[:-1], 1 - t)):
        raise ValueError("sampler 'flow_sde' needs schedule flow")
    span = grid.t[:-1] - grid.t[1:]
    state, model, noise = 1 - 2 * span / t, span * (2 - t) / t, np.sqrt(2 * t * span)
    state[-1], model[-1], noise[-1] = grid.t[-1] / t[-1], 1 - grid.t[-1] / t[-1], 0.0
    return _plan(grid, state=state, model=model, noise=noise)


class _ExponentialStep:
    """Integrals over lambda of DPM-Solver++'s exact solution (Lu et al. 2022b, eq. 9), finite at infinite lambda."""

    def __init__(self, grid: TimeGrid):
        self._grid, self.log_snr = grid, grid.log_snr

    def _decay(self, start: int, end: int) -> float:
        """exp(-h)."""
        alpha, sigma = self._grid.alpha, self._grid.sigma
        return alpha[start] * sigma[end] / (sigma[start] * alpha[end])

    def first(self, start: int, end: int) -> float:
        """alpha_end (1 - exp(-h)), of a constant estimate."""
        return self._grid.alpha[end] * (1 - self._decay(start, end))

    def second(self, start: int, end: int) -> float:
        """alpha_end (1 - (1 - exp(-h)) / h), of an estimate that grows as (lambda - lambda_start) / h."""
        h = self.log_snr[end] - self.log_snr[start]
        return self._grid.alpha[end] * (1 + np.expm1(-h) / h)

    def share(self, start: int, end: int, last: int, of: int | None = None) -> float:
        """Distance in lambda from start to end, over that from `end` (or `of`) to last."""
        low = self.log_snr[end if of is None else of]
        return (self.log_snr[end] - self.log_snr[start]) / (self.log_snr[last] - low)

    def unified(self, start: int, points: np.ndarray, order: int) -> np.ndarray:
        """UniPC's weights of differences at these points, in h from start (Zhao et al. 2023, eq. 5)."""
        if order == 0:
            return np.zeros(0)
        h = -(self.log_snr[start + 1] - self.log_snr[start])
        scale = np.expm1(h)
        phi, factorial, right = scale / h - 1, 1, []
        for i in range(1, order + 1):
            right.append(phi * factorial / scale)
            factorial *= i + 1
            phi = phi / h - 1 / factorial
        left = np.stack([points**i for i in range(order)])
        return np.linalg.solve(left, np.array(right))


def _chain(grid: TimeGrid) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """alpha, sigma, and of each step from t to the less noisy s: the ratio alpha_t / alpha_s, and beta.

    beta is the variance that noising adds on the way back, sigma_t^2 - ratio^2 sigma_s^2.
    """
    alpha, sigma = grid.alpha, grid.sigma
    ratio = alpha[:-1] / alpha[1:]
    return alpha, sigma, ratio, np.square(sigma[:-1]) - np.square(ratio * sigma[1:])


def _plan(
    grid: TimeGrid,
    *,
    state: np.ndarray,
    model: np.ndarray,
    noise: np.ndarray | None = None,
    starts: np.ndarray | None = None,
    log_variance: np.ndarray | None = None,
) -> Plan:
    """A plan that asks the network at each of the grid's times but the last."""
    return Plan(
        t=grid.t[:-1],
        alpha=grid.alpha[:-1],
        sigma=grid.sigma[:-1],
        state=state,
        model=model if model.ndim == 2 else model[:, None],
        noise=np.zeros(len(grid)) if noise is None else noise,
        starts=np.ones(len(grid), bool) if starts is None else starts,
        log_variance=log_variance,
    )
