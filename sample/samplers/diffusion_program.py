"""The compiled programs of a diffusion's sampler: one of all steps, or three, which stop between steps.

`draw` is the first. Nothing interrupts it, so whoever watches asks for the three in its place: `begin`, `advance` for
as many steps at a time as is liked, `end`. They trace the same functions, and no number of steps at a time compiles
another program. A diffusion of `strength` 0 has no steps; it and what is shown of the way are `draw`'s alone.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Key

from diffusion.guidance import Guidance, interleave, pairs, separate
from diffusion.plan import Denoise, Noise, Plan, Progress, Solution, per_example_noise, solve
from diffusion.plan import advance as advance_plan
from diffusion.plan import begin as begin_plan
from models.conditioning import Conditioning
from sample.attention_maps import caption_maps
from sample.samplers.diffusion_settings import Steps
from sample.samplers.given_picture import GivenPicture

Tree = Any
Request = dict[str, Any]


@struct.dataclass
class Start:
    """What a solver starts from, and what the networks are told at all of its steps.

    Attributes:
      x: noise, or a noisy picture, [B ...].
      cond: what is wanted.
      told: the same with guidance's other half, where there is one.
      weakly_told: what the network is told that guides; None without one.
      data: of a picture that is given, [B ...]; None without one.
      known: where they stay, [B ... 1]; None for nowhere.
    """

    x: Float[Array, "b ..."]
    cond: Conditioning
    told: Conditioning
    weakly_told: Conditioning | None = None
    data: Array | None = None
    known: Array | None = None

    def keep(self, drawn: Array) -> Array:
        """What was drawn or estimated, with the picture where it is known."""
        return drawn if self.data is None else GivenPicture(self.data, self.known, 1.0).keep(drawn)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def draw(
    sampler: Any,
    steps: Steps,
    strength: float,
    guided: bool,
    shown: str,
    params: Tree,
    frozen: Tree,
    request: Request,
    keys: Key[Array, "b"],
) -> dict[str, Array]:
    """All of `DiffusionSampler.__call__`; `shown` is "attention", "trajectory" or ""."""
    given = sampler.given(frozen, request, strength)
    if given is not None and strength == 0:
        still = {key: given.data[:, None] for key in ("states", "estimates")} if shown == "trajectory" else {}
        return sampler.show(frozen, {**{name: given.data for name in sampler.makes}, **still}, request)
    plan = sampler.plan(steps, strength)
    start = _start(sampler, plan, given, guided, params, frozen, request, keys)
    denoise = _denoiser(sampler, plan, steps, guided, params, frozen, request, start)
    solution = solve(plan, denoise, start.x, _noise(keys, start.x), trajectory=bool(shown))
    outputs = _outputs(sampler, plan, frozen, request, start, solution, shown)
    if shown == "attention":
        maps = caption_maps(sampler.model, sampler.process, params["denoiser"], start.cond, plan, solution.states)
        outputs["attention"] = maps
    return outputs


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def begin(
    sampler: Any,
    steps: Steps,
    strength: float,
    guided: bool,
    params: Tree,
    frozen: Tree,
    request: Request,
    keys: Key[Array, "b"],
) -> tuple[Start, Progress]:
    """What comes before the first step."""
    plan, given = sampler.plan(steps, strength), sampler.given(frozen, request, strength)
    start = _start(sampler, plan, given, guided, params, frozen, request, keys)
    return start, begin_plan(plan, start.x, _noise(keys, start.x))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def advance(
    sampler: Any,
    steps: Steps,
    strength: float,
    guided: bool,
    params: Tree,
    frozen: Tree,
    request: Request,
    keys: Key[Array, "b"],
    start: Start,
    progress: Progress,
    first: Int[Array, ""],
    stop: Int[Array, ""],
) -> Progress:
    """Steps `first` to `stop` - 1."""
    plan = sampler.plan(steps, strength)
    denoise = _denoiser(sampler, plan, steps, guided, params, frozen, request, start)
    return advance_plan(plan, denoise, progress, first, stop, _noise(keys, start.x))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def end(
    sampler: Any, steps: Steps, strength: float, frozen: Tree, request: Request, start: Start, progress: Progress
) -> dict[str, Array]:
    """What comes after the last step."""
    return _outputs(sampler, sampler.plan(steps, strength), frozen, request, start, Solution(progress[0]), "")


def _start(
    sampler: Any,
    plan: Plan,
    given: GivenPicture | None,
    guided: bool,
    params: Tree,
    frozen: Tree,
    request: Request,
    keys: Key[Array, "b"],
) -> Start:
    """Reads captions, and draws the first noise."""
    count = len(keys)
    rows = {key: request[key] for key in ("text", "label", "contexts") if key in request}
    if "text_weights" in request:
        rows["weights"] = request["text_weights"]
    chunks = rows["text"].shape[1] // len(sampler.text.blank) if sampler.text is not None and "text" in rows else 1
    cond = sampler.conditioning(params, frozen, sampler.blank(rows, count))
    told, guide, weakly_told = cond, sampler.guide, None
    if guided and guide is not None:
        weak = frozen["guide"]
        weakly_told = guide.conditioning(weak["params"], weak["frozen"], guide.blank(rows, count))
    elif guided:
        fields = {"text": "negative", "weights": "negative_weights", "contexts": "contexts"}
        negative = {key: request[name] for key, name in fields.items() if name in request}
        if sampler.null_label is None and "label" in rows:
            negative["label"] = rows["label"]
        told = interleave(cond, sampler.conditioning(params, frozen, sampler.blank(negative, count, chunks)))
    first = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), sampler.sample_shape))(keys)
    if given is None:
        return Start(plan.first_scale * first, cond, told, weakly_told)
    return Start(given.first_state(plan, first), cond, told, weakly_told, given.data, given.known)


def _denoiser(
    sampler: Any,
    plan: Plan,
    steps: Steps,
    guided: bool,
    params: Tree,
    frozen: Tree,
    request: Request,
    start: Start,
) -> Denoise:
    """The estimate of the data in x_t, guided, and the data themselves where they are known."""
    process, guide, weak = sampler.process, sampler.guide, frozen.get("guide")
    guidance = Guidance(request["guidance"], request["rescale"], request["guidance_start"], request["guidance_stop"])

    def denoise(x_t: Array, t: Array) -> Any:
        def network(x: Array, time: Array) -> Array:
            if not guided:
                return sampler.check_output(sampler.model.apply({"params": params["denoiser"]}, x, time, start.told), x)
            if guide is not None:
                strong = sampler.model.apply({"params": params["denoiser"]}, x, time, start.told)
                both = strong, guide.model.apply({"params": weak["params"]["denoiser"]}, x, time, start.weakly_told)
            else:
                both = separate(sampler.model.apply({"params": params["denoiser"]}, pairs(x), pairs(time), start.told))
            for output in both:
                sampler.check_output(output, x)
            guided_channels = steps.guided_channels or x.shape[-1]  # learned variances are behind them
            return guidance.of_first(guided_channels, *both, 1 - process.progress(t))

        estimate = process.denoiser(network)(x_t, t)
        if start.known is not None:
            data, *fraction = estimate if isinstance(estimate, tuple) else (estimate,)
            estimate = (start.keep(data), *fraction) if fraction else start.keep(data)
        # A fixed variance is the plan's own; the network's idea of it is asked for in ancestral sampling alone.
        return estimate[0] if process.variance == "learned" and plan.log_variance is None else estimate

    return denoise


def _noise(keys: Key[Array, "b"], x: Array) -> Noise:
    """The noise of all steps."""
    return per_example_noise(jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, 1), x)


def _outputs(
    sampler: Any, plan: Plan, frozen: Tree, request: Request, start: Start, solution: Solution, shown: str
) -> dict[str, Array]:
    """Pictures, or points, of where a solver ended, and of its way where a trajectory is shown."""
    outputs = dict.fromkeys(sampler.makes, start.keep(solution.x))
    if shown == "trajectory":
        outputs |= {key: jnp.moveaxis(getattr(solution, key), 0, 1) for key in ("states", "estimates")}
        if sampler.first_stage is not None:
            outputs["states"] = outputs["states"] / plan.state_scales[:, None, None, None]
    return sampler.show(frozen, outputs, request)
