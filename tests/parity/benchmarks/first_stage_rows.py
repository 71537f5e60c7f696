"""First stages: a training step of the KL autoencoder beside diffusers', and what encoding costs a diffusion."""

from collections.abc import Sequence
from typing import Any

from clip_rows import config_step
from random_parameters import random_parameters
from updates import Case, Peers, assert_agree, from_torch, our_updates, their_updates, to_torch, torch_weights

KL_WEIGHT = 1e-6


def training(
    peers: Peers, batch_size: int, image_size: int, width: int, multipliers: Sequence[int] = (1, 2), groups: int = 8
) -> Case:
    """Updates of both: absolute error of the reconstruction of a drawn latent and KL, backward, AdamW.

    There is no discriminator on either side.

    Args:
      peers: what is measured beside ours.
      batch_size: of a step.
      image_size: side of a picture, pixels.
      width: channels of the finest level.
      multipliers: of it, a level each.
      groups: of the norms.
    """
    import diffusers
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    from models import create_model
    from models.autoencoder import draw_posterior, posterior
    from train.objectives.autoencoder import kl_to_standard_normal
    from weights.formats.diffusers_autoencoder import autoencoder_config, autoencoder_to_diffusers

    fields = {"image_size": image_size, "width": width, "multipliers": tuple(multipliers), "blocks": 1}
    fields |= {"attention_levels": (), "groups": groups, "latent_channels": 4, "latent_scale": 1.0}
    model: Any = create_model("autoencoder_kl", **fields, dtype=peers.dtype)
    params = random_parameters(model)
    config = autoencoder_config(model, {})
    network = getattr(diffusers, config.pop("_class_name"))(**config)
    network.load_state_dict(torch_weights(autoencoder_to_diffusers(model, params)))
    network = network.to(peers.device)
    shape = (batch_size, image_size, image_size, 3)
    image = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    pixels = to_torch(image, peers.device)

    def loss(params: Any, batch: Any, rng: Any) -> Any:
        tree = {"params": params["autoencoder"]}
        moments = model.apply(tree, batch["image"], method="encode")
        keys = jax.random.split(rng, batch_size)
        outputs = model.apply(tree, draw_posterior(moments, keys), method="decode")
        kl = kl_to_standard_normal(*posterior(moments))
        return jnp.mean(jnp.abs(batch["image"] - outputs)) + KL_WEIGHT * jnp.mean(kl)

    class Reconstruction(torch.nn.Module):
        """What is differentiated, as one module, so that all of it can be compiled."""

        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Any) -> Any:
            with torch.autocast("cuda", torch.bfloat16, enabled=peers.gpu):
                distribution = self.network.encode(x).latent_dist
                z = distribution.mean + distribution.std * torch.randn_like(distribution.mean)
                outputs = self.network.decode(z).sample
            return (x - outputs.float()).abs().mean() + KL_WEIGHT * distribution.kl().mean()

    with torch.inference_mode():
        theirs = from_torch(network.decode(network.encode(pixels).latent_dist.mode()).sample)
    ours = jax.jit(lambda tree, x: model.apply({"params": tree}, x))(params, jnp.asarray(image))
    assert_agree(np.asarray(ours), theirs, "reconstructions", 0.1 if peers.gpu else 1e-4)
    sides = peers.sides(
        "diffusers",
        lambda compiled: their_updates(
            Reconstruction(), lambda called: called(pixels), compiled=compiled, device=peers.device
        ),
    )
    return Case({"jax": our_updates(loss, {"autoencoder": params}, {"image": image}), **sides}, dtype=peers.dtype)


def moments(peers: Peers, config: str, batch_size: int, stage: Sequence[str] = ()) -> Case:
    """Updates of a second stage from stored moments, beside the same with the first stage in the step.

    Args:
      peers: none is measured.
      config: of a diffusion in latents.
      batch_size: of a step.
      stage: fields of the first stage, such as "width=128".
    """
    from cli.config import load_config

    flags = [f"--config={config}", f"--config.batch_size={batch_size}"]
    flags += [f"--config.frozen.first_stage.{field}" for field in stage]
    stored, live = (load_config([*flags, *more]) for more in (["--config.data.latent_moments=auto"], []))
    return Case({"stored moments": config_step(stored), "encoded in the step": config_step(live)}, dtype=peers.dtype)
