"""Rows of diffusion networks: a training step, and sampling, of ours and of what diffusers or torch have of the same.

The same architecture, weights, inputs, batch, threads and precision. U-ViT, which diffusers lacks, is beside
`torch_uvit.py`. Outputs, and the pictures that sampling ends in, are compared before they are timed.
"""

from collections.abc import Callable, Mapping
from typing import Any

from network_pair import Pair
from updates import Case, Peers, assert_agree, from_torch, our_calls, our_updates, their_calls, their_updates, to_torch

_SD = {
    **{"name": "unet", "image_size": 64, "in_channels": 4, "width": 320, "multipliers": (1, 2, 4, 4), "blocks": 2},
    **{"attention_levels": (0, 1, 2), "attention": "transformer", "heads": 8, "context_width": 768},
}
_UVIT = {"name": "uvit", "image_size": 32, "patch_size": 2}
_IN_LATENTS = {**_UVIT, "in_channels": 4}
_DIT = {
    **{"name": "dit", "image_size": 32, "patch_size": 2, "in_channels": 4, "out_channels": 8, "num_classes": 1001},
    **{"last_period": True, "mlp_norm_epsilon": 1e-5},
}
# Networks that no config of scenes has, by name; published sizes, and those of toy runs.
NETWORKS: Mapping[str, Mapping[str, Any]] = {
    "ddpm": {
        **{"name": "unet", "image_size": 32, "in_channels": 3, "width": 128, "multipliers": (1, 2, 2, 2), "blocks": 2},
        **{"attention_levels": (1,), "heads": 1, "sine_first": True, "last_period": True, "norm_epsilon": 1e-6},
        **{"downsample_padding": (0, 1), "kernel_init": "fan_avg"},
    },
    "uvit_s": {**_UVIT, "width": 512, "depth": 12, "heads": 8},
    "uvit_l": {**_IN_LATENTS, "width": 1024, "depth": 20, "heads": 16},
    "uvit_h": {**_IN_LATENTS, "width": 1152, "depth": 28, "heads": 16},
    "sd": _SD,
    "latent_unet": {
        **{"name": "unet", "image_size": 8, "in_channels": 4, "width": 64, "multipliers": (1, 2), "blocks": 1},
        **{"attention_levels": (0, 1), "attention": "transformer", "head_width": 32, "groups": 8},
        "context_width": 128,
    },
    "dit_small": {**_DIT, "image_size": 8, "patch_size": 1, "width": 128, "depth": 5, "heads": 4},
    "dit_xl": {**_DIT, "width": 1152, "depth": 28, "heads": 16},
    "toy_unet": {**_SD, "image_size": 4, "width": 32, "multipliers": (1,), "blocks": 1, "attention_levels": (0,)}
    | {"heads": 2, "context_width": 8},
    "toy_uvit": {**_UVIT, "image_size": 4, "width": 8, "depth": 2, "heads": 2},
    "toy_dit": {**_DIT, "image_size": 4, "width": 16, "depth": 2, "heads": 2, "num_classes": 4},
}


def training(peers: Peers, network: str, batch_size: int, length: int = 0, attention: str = "auto") -> Case:
    """Updates of both: the squared error of the noise of given states, backward, AdamW.

    Args:
      peers: what is measured beside ours.
      network: a name of `NETWORKS`, or a config whose denoiser it is.
      batch_size: of a step.
      length: tokens of the context; 0 for a network without one.
      attention: what ours attends with; another than "auto" is measured alone, beside the row that has it.
    """
    import jax.numpy as jnp
    import numpy as np
    import torch

    pair = _pair(peers, network, batch_size, length, attention)
    x_t, t, told = pair.inputs()
    eps = np.random.default_rng(3).normal(size=(*x_t.shape[:-1], _channels(pair.model))).astype(np.float32)

    def loss_of(pair: Pair) -> Callable[[Any, Any, Any], Any]:
        def loss(params: Any, batch: Any, _: Any) -> Any:
            outputs = pair.apply(params["denoiser"], batch["x_t"], batch["t"], batch.get("told"), True)
            return jnp.mean(jnp.square(outputs.astype(jnp.float32) - batch["eps"]))

        return loss

    batch = {"x_t": x_t, "t": t, "eps": eps, **({} if told is None else {"told": told})}
    arguments, target = [to_torch(value, pair.device) for value in (x_t, t, told)], to_torch(eps, pair.device)

    def their_side(compiled: bool) -> Any:
        def their_loss(called: Any) -> Any:
            return torch.nn.functional.mse_loss(pair.call(called, *arguments), target)

        # A DiT in training leaves out classes at random: more work, of which ours has none in this loss.
        train = not getattr(pair.model, "num_classes", 0)
        return their_updates(pair.network, their_loss, compiled=compiled, device=pair.device, train=train)

    ours = our_updates(loss_of(pair), {"denoiser": pair.params}, batch, plain=loss_of(pair.plain()))
    theirs = peers.sides(_library(pair), their_side) if attention == "auto" else {}
    return Case({"jax": ours, **theirs}, dtype=peers.dtype)


def sampling(peers: Peers, network: str, batch_size: int, steps: int, length: int = 0) -> Case:
    """Calls of both samplers, DPM-Solver++ 2M, guided where there is a context; what is counted is a picture.

    Raises AssertionError unless both draw the same pictures.
    """
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch
    from diffusers import DPMSolverMultistepScheduler

    from cost.flops import matrix_flops
    from diffusion.process import Process
    from diffusion.schedule import DiscreteSchedule
    from sample.samplers.diffusion import DiffusionSampler
    from sample.samplers.diffusion_settings import Steps
    from sample.text_context import TextContext

    pair = _pair(peers, network, batch_size, length)
    shape = pair.model.example_inputs(1)[0].shape[1:]
    guided, text, trees = pair.table is not None, None, {"denoiser": pair.params}
    if pair.table is not None:
        text = TextContext(nn.Embed(*pair.table.shape), "text", (0,) * pair.length)
        trees["text"] = {"embedding": jnp.asarray(pair.table)}
    sampler, plain = (
        DiffusionSampler(
            model,
            Process(DiscreteSchedule("linear"), prediction="eps"),
            text,
            Steps("dpm_solver_multistep", steps),
            guidance=2.0 if guided else 1.0,
        )
        for model in (pair.model, pair.plain().model)
    )
    request = sampler.request(text=pair.captions() if guided else None)
    keys = jax.random.split(jax.random.key(0), batch_size)

    def draw(params: Any, sampler: Any = sampler) -> Any:
        return sampler(params, {}, {}, request, keys)["image"]

    first = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), shape))(keys)
    first = to_torch(sampler.plan(sampler.defaults).first_scale * np.asarray(first), pair.device)
    told = None
    if pair.table is not None:
        tokens = pair.table[np.concatenate([np.zeros_like(pair.captions()), pair.captions()])]
        told = to_torch(tokens, pair.device)

    def torch_draw(called: Any) -> Any:
        scheduler = DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
        scheduler.set_timesteps(steps)
        x = first
        for t in scheduler.timesteps:
            both = torch.cat([x, x]) if guided else x
            output = pair.call(called, both, torch.full((len(both),), float(t), device=pair.device), told)
            if guided:
                uncond, cond = output.chunk(2)
                output = uncond + float(request["guidance"]) * (cond - uncond)
            x = scheduler.step(output, t, x, return_dict=False)[0]
        return x

    their_network = pair.network.eval()
    with torch.inference_mode():
        theirs = from_torch(torch_draw(their_network))
    assert_agree(np.asarray(draw(trees), np.float32), theirs, "pictures", 0.5 if peers.gpu else 1e-2)

    def their_side(compiled: bool) -> Any:
        called = torch.compile(their_network) if compiled else their_network
        return their_calls(lambda: torch_draw(called), pair.device)

    ours = our_calls(draw, trees, flops=lambda: matrix_flops(lambda trees: draw(trees, plain), trees))
    return Case({"jax": ours, **peers.sides(_library(pair), their_side)}, units=batch_size, dtype=peers.dtype)


def _pair(peers: Peers, network: str, batch_size: int, length: int, attention: str = "auto") -> Pair:
    fields = NETWORKS[network] if network in NETWORKS else read_network(network)
    return Pair.create(fields, batch_size=batch_size, length=length, device=peers.device, attention=attention)


def _channels(model: Any) -> int:
    return getattr(model, "out_channels", None) or model.in_channels


def _library(pair: Pair) -> str:
    return "torch" if type(pair.network).__name__ == "TorchUViT" else "diffusers"


def read_network(path: str) -> dict[str, Any]:
    """The denoiser of a config; of a UNet what lies between folding and unfolding patches, which torch's has not."""
    from cli.config import load_config

    fields = load_config([f"--config={path}"]).models.denoiser.to_dict()
    if fields["name"] == "unet":
        side = fields.pop("patch_size", 1)
        fields |= {"image_size": fields["image_size"] // side, "in_channels": fields["in_channels"] * side**2}
    return fields
