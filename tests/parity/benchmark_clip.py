"""Times CLIP's training step beside OpenCLIP's: `python tests/parity/benchmark_clip.py --model=vit`.

The same published architecture, batch, float32, optimizer (AdamW) and threads, in one process and in alternating
windows; both are warmed up first. Prints the seconds of a step of each (median over windows) and their ratio.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

from cli.allocator import reexec_with_fast_allocator

MODELS = {
    "vit": ("configs/paper/clip_vit.py", "ViT-B-32-quickgelu"),
    "resnet": ("configs/paper/clip_resnet.py", "RN50-quickgelu"),
}


def main() -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="vit")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="updates in a window")
    options = parser.parse_args()
    config, name = MODELS[options.model]
    ours, theirs = jax_step(config, options.batch_size), open_clip_step(name, options.batch_size)
    for run in (ours, theirs):
        run(2)
    seconds: dict[str, list[float]] = {"jax": [], "torch": []}
    for _ in range(options.windows):
        for label, run in (("jax", ours), ("torch", theirs)):
            start = time.perf_counter()
            run(options.steps)
            seconds[label].append((time.perf_counter() - start) / options.steps)
    medians = {label: statistics.median(values) for label, values in seconds.items()}
    for label, values in seconds.items():
        print(f"{label}: {medians[label]:.3f} s a step ({min(values):.3f} to {max(values):.3f})")
    print(f"ratio: {medians['torch'] / medians['jax']:.2f}")


def jax_step(path: str, batch_size: int) -> Callable[[int], None]:
    """A function that makes as many updates of the config's training step."""
    import jax

    from cli.config import load_config
    from train.costs import made_up_batch
    from train.mesh import make_mesh
    from train.program import create_program

    overrides = [f"batch_size={batch_size}", "models.clip.scan=False", "models.clip.remat=none"]
    config = load_config([f"--config={path}", *(f"--config.{override}" for override in overrides)])
    program = create_program(config, make_mesh(config.mesh))
    with program.in_mesh():
        batch = made_up_batch(program, config)
        state = program.init(batch)

    def run(count: int) -> None:
        nonlocal state
        with program.in_mesh():
            for _ in range(count):
                state, _, _ = program.train_step(state, {}, batch)
        jax.block_until_ready(state)

    return run


def open_clip_step(name: str, batch_size: int) -> Callable[[int], None]:
    """A function that makes as many updates of OpenCLIP's network, as its training script does."""
    import open_clip
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = open_clip.create_model(name)
    model.train()
    loss_of = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.2)
    images = torch.randn(batch_size, 3, 224, 224)
    text = torch.randint(1, 49405, (batch_size, 77))
    text[:, -1] = 49407

    def run(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            features = model(images, text)
            loss_of(*features).backward()
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, 4.6052)

    return run


if __name__ == "__main__":
    reexec_with_fast_allocator()
    main()
