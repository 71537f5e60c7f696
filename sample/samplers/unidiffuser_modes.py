"""Pictures and captions, one for the other, both, or one alone, by one network (Bao et al. 2023, section 3.2 and 3.3).

A side that is given has time 0, one that is to say nothing is noise at the last time T. With eps(image, text; t_image,
t_text) and t the solver's time:

    mode             drawn          the network is asked                    guidance leads away from
    text_to_image    picture        eps(x, text; t, 0)                      eps(x, noise; t, T), or the blank caption's
    image_to_text    caption        eps(image, x; 0, t)                     eps(noise, x; T, t)
    joint            both           eps(x, y; t, t)                         eps(x, noise; t, T) of the picture,
                                                                            eps(noise, y; T, t) of the caption
    image            picture        eps(x, noise; t, T)
    text             caption        eps(noise, x; T, t)
    image_variation  picture        image_to_text, then text_to_image
    text_variation   caption        text_to_image, then image_to_text

Variations hand over latents: neither the caption nor the picture between is decoded and encoded again. Guidance is
uncond + w (cond - uncond), where the paper has w = 1 + s. All calls of a step are one batch.

"Noise" is drawn anew at every step, as the authors' code does; diffusers keeps that of "image" and "text", and draws a
caption's first state as the captioner's latents of noise. Both are `noise="diffusers"`.

A picture may be given to be changed in text_to_image and image, see `sample.samplers.given_picture`.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from cli.errors import UserError
from diffusion.plan import Plan, per_example_noise, solve
from diffusion.process import Process
from models.unidiffuser import PictureAndText
from sample.arguments import silenced
from sample.samplers.given_picture import GivenPicture

Latents = dict[str, Array]  # some of "image", "clip" and "text"
Network = Callable[[PictureAndText, Array, Array], PictureAndText]

PICTURE, TEXT = ("image", "clip"), ("text",)
# Mode -> the row that it reads.
MODES: Mapping[str, str | None] = {
    **{"text_to_image": "text", "image_to_text": "image", "joint": None, "image": None, "text": None},
    **{"image_variation": "image", "text_variation": "text"},
}
_OPTIONS = {"text": "--prompt", "image": "--image"}  # how a user gives a row
_STEPS = 1  # what the keys of solvers' own noise are folded with


def choose_modes(mode: str, told: Collection[str]) -> tuple[str, ...]:
    """The modes of a request that holds rows of these names: the one that is chosen, or with "" what they ask for.

    Raises:
      UserError: if the chosen one reads others.
    """
    given = [name for name in ("text", "image") if name in told]
    if not mode:
        return tuple({"text": "text_to_image", "image": "image_to_text"}[name] for name in given) or ("joint",)
    wanted = MODES[mode]
    if given != [row for row in (wanted,) if row is not None]:
        reads = _OPTIONS[wanted] if wanted else "neither --prompt nor --image"
        shown = " and ".join(_OPTIONS[row] for row in given) or "nothing"
        raise UserError(f"mode {mode} reads {reads}, and {shown} {'are' if len(given) > 1 else 'is'} given")
    return (mode,)


def stages(mode: str) -> tuple[str, ...]:
    """The modes that a mode is made of, each of which is told what the one before it drew; itself, if of one alone."""
    both = ("image_to_text", "text_to_image")
    return {"image_variation": both, "text_variation": both[::-1]}.get(mode, (mode,))


def made_of(mode: str) -> dict[str, str]:
    """What a mode makes of the other side, {"image" or "text": "given", or "made" where it drew that side, too}."""
    made = {"text_to_image": "image", "image_to_text": "text"}
    return {made[one]: how for one, how in zip(stages(mode), ("given", "made"), strict=False) if one in made}


def unread_settings(modes: Sequence[str], guidance: float, captions: Sequence[str]) -> dict[str, str]:
    """Settings that modes of one request do not read, each with the reason.

    Args:
      modes: of the request.
      guidance: w.
      captions: the settings that say how a caption is written.
    """
    asked, named = {stage for mode in modes for stage in stages(mode)}, f"mode {' and '.join(modes)}"
    idle: dict[str, str] = {}
    if not any(TEXT[0] in drawn_names(stage) for stage in asked):
        idle |= dict.fromkeys(captions, f"{named} writes no caption")
    if asked <= {"image", "text"} and guidance != 1:
        idle["guidance"] = f"{named} is told nothing that guidance could lead to"
    if "text_to_image" not in asked:
        idle["unconditional"] = f"{named} draws no picture of a caption"
    elif why := silenced("unconditional", guidance):
        idle["unconditional"] = why
    if asked == {"text_to_image"}:
        idle["noise"] = f"{named} begins with no noise of a caption"
    return idle


def drawn_names(mode: str) -> tuple[str, ...]:
    """What of the latents a mode without stages draws."""
    return {"text_to_image": PICTURE, "image": PICTURE, "image_to_text": TEXT, "text": TEXT}.get(mode, PICTURE + TEXT)


def predict(
    network: Network,
    mode: str,
    x: Latents,
    t: Float[Array, "b"],
    last: Float[Array, ""] | float,
    told: Latents,
    fresh: Latents,
    guidance: Float[Array, ""] | float | None = None,
    empty: Float[Array, "b l z"] | None = None,
) -> Latents:
    """What of the network's outputs belongs to what a mode draws; guided if `guidance` is not None.

    Args:
      network: (x, time of the picture, time of the caption) -> outputs.
      mode: one of the first five of `MODES`.
      x: the noisy states of what is drawn.
      t: their time, as the network sees it.
      last: T.
      told: latents of what is given.
      fresh: noise in place of a side that is to say nothing.
      guidance: w.
      empty: latents of the blank caption, which guidance of text_to_image leads away from in place of noise's.
    """
    zero, end = jnp.zeros_like(t), jnp.full_like(t, last)

    def call(image: Latents, text: Latents, t_image: Array, t_text: Array) -> tuple[PictureAndText, Array, Array]:
        return PictureAndText(image["image"], image["clip"], text["text"]), t_image, t_text

    calls: Sequence[tuple[PictureAndText, Array, Array]]
    if mode == "text_to_image":
        away = call(x, fresh, t, end) if empty is None else call(x, {"text": empty}, t, zero)
        calls = [call(x, told, t, zero), away]
    elif mode == "image_to_text":
        calls = [call(told, x, zero, t), call(fresh, x, end, t)]
    elif mode == "joint":
        calls = [call(x, x, t, t), call(x, fresh, t, end), call(fresh, x, end, t)]
    elif mode == "image":
        calls = [call(x, fresh, t, end)]
    else:
        calls = [call(fresh, x, end, t)]
    outputs = in_one_batch(network, calls if guidance is not None else calls[:1])
    cond = outputs[0]
    if guidance is None or len(outputs) == 1:
        return {name: getattr(cond, name) for name in x}
    # Of joint guidance the second call is of the picture, the third of the caption; otherwise there are but two.
    away = {name: outputs[-1] if name in TEXT else outputs[1] for name in x}
    return {
        name: getattr(away[name], name) + guidance * (getattr(cond, name) - getattr(away[name], name)) for name in x
    }


def in_one_batch(network: Network, calls: Sequence[tuple[PictureAndText, Array, Array]]) -> tuple[PictureAndText, ...]:
    """Outputs of several calls, made as one, of whose batch an example's rows stand together: on one device."""
    count = len(calls)
    if count == 1:
        return (network(*calls[0]),)
    arguments = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1).reshape(-1, *leaves[0].shape[1:]), *calls)
    outputs = network(*arguments)
    return tuple(jax.tree.map(lambda leaf, place=place: leaf[place::count], outputs) for place in range(count))


def draw_latents(
    network: Network,
    process: Process,
    plan: Plan,
    mode: str,
    first: Latents,
    told: Latents,
    keys: Key[Array, "b"],
    guidance: Float[Array, ""] | float | None = None,
    empty: Float[Array, "b l z"] | None = None,
    kept: Latents | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    given: GivenPicture | None = None,
) -> Latents:
    """Runs a solver in one mode.

    Args:
      network: see `predict`, as `mode`, `told`, `guidance` and `empty`.
      process: that it was trained on.
      plan: of the solver.
      mode: see there.
      first: noise of unit variance, of what is drawn.
      told: see there.
      keys: of the examples, for all noise that is drawn on the way.
      guidance: see there.
      empty: see there.
      kept: noise of the sides that say nothing, where it is not drawn anew at every step.
      shapes: of an example's latents, those that are neither drawn nor told among them.
      given: a picture to change, of what is drawn; the plan is then of its strength.
    """
    schedule = process.schedule
    last = process.network_time(jnp.float32(schedule.time_range[1]))
    noises = {**{name: value.shape[1:] for name, value in {**told, **first}.items()}, **(shapes or {})}

    def fresh_noise(t: Array) -> Latents:
        # A solver asks at every time once, so that the time's bits are a number of the step.
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, jax.lax.bitcast_convert_type(t, jnp.int32))
        return normal_latents(step_keys, noises)

    def denoise(x: Latents, t: Array) -> Latents:
        times = jnp.broadcast_to(t, keys.shape)
        fresh = kept if kept is not None else fresh_noise(t)
        outputs = predict(network, mode, x, process.network_time(times), last, told, fresh, guidance, empty)
        estimates = {name: process.data(outputs[name].astype(jnp.float32), x[name], times) for name in x}
        return estimates if given is None else given.keep(estimates)

    x = jax.tree.map(lambda leaf: plan.first_scale * leaf, first) if given is None else given.first_state(plan, first)
    noise_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, _STEPS)
    drawn = solve(plan, denoise, x, per_example_noise(noise_keys, x)).x
    return drawn if given is None else given.keep(drawn)


def normal_latents(keys: Key[Array, "b"], shapes: Mapping[str, tuple[int, ...]]) -> Latents:
    """Standard normal latents of these shapes; each of an example's own key."""
    places = {name: place for place, name in enumerate(PICTURE + TEXT)}
    return {
        name: jax.vmap(lambda key, name=name: jax.random.normal(jax.random.fold_in(key, places[name]), shapes[name]))(
            keys
        )
        for name in sorted(shapes)
    }
