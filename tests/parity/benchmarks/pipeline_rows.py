"""Rows of Stable Diffusion: prompts to pictures beside diffusers' pipeline of the same weights."""

import contextlib
import io
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from updates import Case, Peers, assert_agree, from_torch, our_calls, their_calls, use_all_cores

PROMPTS = ("red cat", "a dog on a red cat", "dog", "cat")


def sampling(
    peers: Peers, batch_size: int, steps: int, widths: Sequence[int] = (32, 64), side: int = 8, guidance: float = 7.5
) -> Case:
    """Pictures of a small pipeline by DDIM, guided: text tower, UNet, first stage; what is counted is a picture.

    Raises AssertionError unless both draw the same pictures from the same noise, and unless another prompt, seed and
    guidance go without a new compilation.

    Args:
      peers: what is measured beside ours.
      batch_size: pictures, of as many prompts.
      steps: of the solver.
      widths: channels of the UNet's two levels.
      side: of the latents; pictures have twice as many pixels.
      guidance: w.
    """
    import jax
    import numpy as np
    import torch
    from diffusers import DDIMScheduler
    from stable_diffusion_pipelines import make_pipeline

    from sample.trained import TrainedSampler
    from scripts.convert import main as convert

    use_all_cores()
    prompts = [PROMPTS[place % len(PROMPTS)] for place in range(batch_size)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        theirs = make_pipeline(folder / "words", 1, widths=tuple(widths), side=side)
        theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config, clip_sample=False)
        theirs.save_pretrained(folder / "theirs")
        with contextlib.redirect_stdout(io.StringIO()):
            convert([f"--input={folder}/theirs", f"--output={folder}/ours"])
        trained = TrainedSampler.open(folder / "ours", chunk=batch_size, dtype=peers.dtype)
    theirs.to(peers.device)
    indices = list(range(batch_size))

    def draw(prompts: Sequence[str] = tuple(prompts), seed: int = 0, guidance: float = guidance) -> Any:
        rows = {"text": trained.encode(prompts)["text"]}
        return trained(rows, seed=seed, indices=indices, steps=steps, guidance=guidance)["image"]

    keys = [jax.random.fold_in(jax.random.key(0), i) for i in indices]
    shape = trained.sampler.sample_shape
    noise = np.stack([jax.random.normal(jax.random.fold_in(key, 0), shape) for key in keys])
    latents = torch.from_numpy(noise).permute(0, 3, 1, 2).contiguous().to(peers.device)

    def their_draw() -> Any:
        told = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "latent"}
        with torch.autocast("cuda", torch.bfloat16, enabled=peers.gpu):
            z = theirs(prompts, latents=latents, **told).images
            return theirs.vae.decode(z / theirs.vae.config.scaling_factor).sample.clamp(-1, 1)

    with torch.inference_mode():
        assert_agree(draw(), from_torch(their_draw()), "pictures", 0.5 if peers.gpu else 1e-3)
    with compilations() as compiled:
        draw(prompts[::-1], seed=1, guidance=guidance + 1)
    assert not compiled, f"another prompt, seed and guidance compiled {len(compiled)} programs"
    sides = {"jax": our_calls(draw), "diffusers": their_calls(their_draw, peers.device)}
    if peers.compiled:
        # The pipeline asks its networks for their configs too, which compiled modules pass on.
        plain = their_calls(their_draw, peers.device)
        unet, compiled_unet = theirs.unet, torch.compile(theirs.unet)

        def run(count: int) -> None:
            theirs.unet = compiled_unet
            plain.run(count)
            theirs.unet = unet

        sides["diffusers, torch.compile"] = type(plain)(run, memory=plain.memory)
    return Case(sides, units=batch_size, dtype=peers.dtype)


@contextlib.contextmanager
def compilations() -> Iterator[list[float]]:
    """Seconds of each compilation by XLA in the context."""
    import jax

    found: list[float] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
