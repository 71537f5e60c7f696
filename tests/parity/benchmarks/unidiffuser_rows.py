"""Rows of UniDiffuser: a training step, and text to picture, beside diffusers' network of the same weights."""

from collections.abc import Callable
from typing import Any

from random_parameters import random_parameters
from updates import (
    Case,
    Peers,
    assert_agree,
    our_calls,
    our_updates,
    their_calls,
    their_updates,
    to_torch,
    torch_weights,
    use_all_cores,
)

SIZES = {
    "toy": {"image_size": 4, "patch_size": 2, "width": 32, "depth": 2, "heads": 2, "text_length": 3},
    # Layers and latents of configs/scenes/unidiffuser.py, whose captions are 24 tokens of 16 numbers and not 12 of 64;
    # and one with more heads and layers.
    "scenes": {"image_size": 8, "patch_size": 1, "width": 128, "depth": 4, "heads": 4, "text_length": 12},
    "medium": {"image_size": 16, "patch_size": 2, "width": 384, "depth": 8, "heads": 6, "text_length": 77},
    # Version 1 as published.
    "v1": {"image_size": 64, "patch_size": 2, "width": 1536, "depth": 30, "heads": 24, "text_length": 77},
}
_SIDES = ("image", "clip", "text")
_LAST = 1000.0  # the time at which a side is noise


def training(peers: Peers, size: str, batch_size: int) -> Case:
    """Updates of both: squared errors of the three predictions of noise at independent times, backward, AdamW.

    Args:
      peers: what is measured beside ours.
      size: a name of `SIZES`.
      batch_size: of a step.
    """
    import jax.numpy as jnp
    import numpy as np
    import torch

    from models.unidiffuser import PictureAndText

    model, params, network = _pair(peers, size, batch_size)
    x, times = _inputs(model, batch_size)
    noise, _ = _inputs(model, batch_size, seed=1)

    def loss_of(model: Any) -> Callable[[Any, Any, Any], Any]:
        def loss(params: Any, batch: Any, _: Any) -> Any:
            given = PictureAndText(*(batch[name] for name in _SIDES))
            outputs = model.apply({"params": params["unidiffuser"]}, given, batch["t_image"], batch["t_text"])
            return sum(jnp.mean(jnp.square(getattr(outputs, name) - batch[f"noise_{name}"])) for name in _SIDES)

        return loss

    batch = {**x, **{f"noise_{name}": value for name, value in noise.items()}}
    batch |= {"t_image": times[0], "t_text": times[1]}
    arguments, targets = _torch(peers, x, times), _torch(peers, noise, times)[:3]

    def their_loss(called: Any) -> Any:
        outputs = _call(peers, called, *arguments)
        pairs = zip(outputs, targets, strict=True)
        return sum(torch.nn.functional.mse_loss(output.float(), target) for output, target in pairs)

    batch = {name: np.asarray(value) for name, value in batch.items()}
    ours = our_updates(loss_of(model), {"unidiffuser": params}, batch, plain=loss_of(_plain(model)))
    sides = peers.sides(
        "diffusers", lambda compiled: their_updates(network, their_loss, compiled=compiled, device=peers.device)
    )
    return Case({"jax": ours, **sides}, dtype=peers.dtype)


def sampling(peers: Peers, size: str, batch_size: int, steps: int, guidance: float = 7.0) -> Case:
    """Latents of pictures of given captions' latents, DPM-Solver++ 2M, guided; what is counted is a picture.

    diffusers' pipeline asks its network twice a step, and so does the peer; this project asks once for both.

    Args:
      peers: what is measured beside ours.
      size: a name of `SIZES`.
      batch_size: pictures.
      steps: of the solver.
      guidance: w.
    """
    import jax
    import jax.numpy as jnp
    import torch
    from diffusers import DPMSolverMultistepScheduler

    from cost.flops import matrix_flops
    from diffusion.process import Process
    from diffusion.schedule import DiscreteSchedule
    from diffusion.solver_choice import make_plan
    from models.unidiffuser import PictureAndText
    from sample.samplers.unidiffuser_modes import draw_latents

    model, params, network = _pair(peers, size, batch_size)
    network.eval()
    x, times = _inputs(model, batch_size)
    process = Process(DiscreteSchedule("scaled_linear", start=0.00085, end=0.012))
    plan = make_plan(process.schedule, "dpm_solver_multistep", steps)

    def draw_of(model: Any) -> Callable[..., Any]:
        def draw(params: Any, first: Any, text: Any, keys: Any) -> Any:
            def ask(x: PictureAndText, t_image: Any, t_text: Any) -> PictureAndText:
                return model.apply({"params": params}, x, t_image, t_text)

            return draw_latents(ask, process, plan, "text_to_image", first, {"text": text}, keys, guidance)

        return draw

    first = {name: jnp.asarray(x[name]) for name in ("image", "clip")}
    given = (params, first, jnp.asarray(x["text"]), jax.random.split(jax.random.key(0), batch_size))
    image, clip, text, *_ = _torch(peers, x, times)
    fresh = torch.randn_like(text)

    def their_draw(called: Any) -> Any:
        schedulers = [
            DPMSolverMultistepScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
            for _ in range(2)
        ]
        for scheduler in schedulers:
            scheduler.set_timesteps(steps)
        x, y = image, clip
        for t in schedulers[0].timesteps:
            now = torch.full((batch_size,), float(t), device=peers.device)
            zero, last = torch.zeros_like(now), torch.full_like(now, _LAST)
            cond = _call(peers, called, x, y, text, now, zero)
            uncond = _call(peers, called, x, y, fresh, now, last)
            one, other = (b + guidance * (a - b) for a, b in zip(cond[:2], uncond[:2], strict=True))
            x = schedulers[0].step(one.float(), t, x, return_dict=False)[0]
            y = schedulers[1].step(other.float(), t, y, return_dict=False)[0]
        return x

    def their_side(compiled: bool) -> Any:
        called = torch.compile(network) if compiled else network
        return their_calls(lambda: their_draw(called), peers.device)

    ours = our_calls(jax.jit(draw_of(model)), *given, flops=lambda: matrix_flops(draw_of(_plain(model)), *given))
    return Case({"jax": ours, **peers.sides("diffusers", their_side)}, units=batch_size, dtype=peers.dtype)


def _pair(peers: Peers, size: str, batch_size: int) -> tuple[Any, Any, Any]:
    """(model, parameters, the library's network), which agree."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch
    from diffusers.pipelines.deprecated.unidiffuser import UniDiffuserModel

    from models import create_model
    from models.unidiffuser import PictureAndText
    from weights.formats.diffusers_unidiffuser import unidiffuser_config, unidiffuser_to_diffusers

    fields = {**SIZES[size], "in_channels": 4, "clip_width": 64, "text_width": 64}
    model = create_model("unidiffuser", **fields, dtype=peers.dtype)
    params = random_parameters(model)
    use_all_cores()
    config = unidiffuser_config(model)
    config.pop("_class_name")
    network = UniDiffuserModel(**config)
    network.load_state_dict(torch_weights(unidiffuser_to_diffusers(params)))
    network = network.to(peers.device).eval()
    x, times = _inputs(model, batch_size)
    with torch.inference_mode():
        theirs = _call(peers, network, *_torch(peers, x, times))[0].float().permute(0, 2, 3, 1).cpu().numpy()
    given = PictureAndText(*(jnp.asarray(x[name]) for name in _SIDES))
    ours = jax.jit(model.apply)({"params": params}, given, *map(jnp.asarray, times)).image
    assert_agree(np.asarray(ours, np.float32), theirs, "outputs", 0.1 if peers.gpu else 1e-4)
    return model, params, network


def _plain(model: Any) -> Any:
    """The network with plain attention, whose products `matrix_flops` sees."""
    return model.clone(implementation="xla")


def _inputs(model: Any, batch_size: int, seed: int = 0) -> tuple[dict[str, Any], tuple[Any, Any]]:
    """States by name, and times of pictures and captions, as numpy arrays."""
    import numpy as np

    rng = np.random.default_rng(seed)
    x = model.example_inputs(batch_size)[0]
    states = {name: rng.normal(size=getattr(x, name).shape).astype(np.float32) for name in _SIDES}
    image, text = rng.uniform(0, 1000, (2, batch_size)).astype(np.float32)
    return states, (image, text)


def _torch(peers: Peers, x: dict[str, Any], times: tuple[Any, Any]) -> list[Any]:
    """Arguments of the library's network."""
    states = [to_torch(value, peers.device) for value in (x["image"], x["clip"][:, None], x["text"])]
    return [*states, *(to_torch(t, peers.device) for t in times)]


def _call(peers: Peers, network: Any, *arguments: Any) -> Any:
    """The library's three outputs."""
    import torch

    *states, t_image, t_text = arguments
    with torch.autocast("cuda", torch.bfloat16, enabled=peers.gpu):
        return network(*states, timestep_img=t_image, timestep_text=t_text)
