"""Times CLIP's training step beside OpenCLIP's: `PYTHONPATH=. python tests/parity/benchmark_clip.py --model=vit`.

The same architecture, batch, float32, optimizer (AdamW) and threads, in one process and in alternating
windows; both are warmed up first. Captions fill the context unless --caption_length says otherwise: OpenCLIP computes
the padding behind shorter ones too, this project leaves it out where config.data.text_length says so. Prints the
seconds of a step of each (median over windows) and their ratio.
"""

import argparse
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from side_by_side import print_side_by_side, time_in_turn, use_all_cores

from cli.allocator import reexec_with_fast_allocator

# Name -> (config, overrides of its network): the published sizes, and those of a laptop's experiment.
MODELS = {
    "vit": ("configs/paper/clip_vit.py", ()),
    "resnet": ("configs/paper/clip_resnet.py", ()),
    "small_vit": ("configs/scenes/clip.py:vit", ()),
    "small_resnet": ("configs/scenes/clip.py", ("image_layers=(1,1,1,1)", "image_size=64")),
}


def main() -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="vit")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="updates in a window")
    parser.add_argument(
        "--caption_length", type=int, default=0, help="tokens of the longest caption; 0 for the whole context"
    )
    options = parser.parse_args()
    config = read_config(*MODELS[options.model], options.batch_size, options.caption_length)
    runs = {"jax": jax_step(config), "torch": open_clip_step(config)}
    print_side_by_side(time_in_turn(runs, windows=options.windows, steps=options.steps), "step")


def read_config(path: str, overrides: Sequence[str], batch_size: int, caption_length: int) -> Any:
    """The config, in float32 and without recomputation; rows of text are as long as the longest caption."""
    from cli.config import load_config

    network = ("dtype=float32", "scan=False", "remat=none", *overrides)
    flags = [f"--config.models.clip.{override}" for override in network]
    sizes = [flag.replace("models.clip", "data") for flag in flags if "image_size" in flag]
    sizes += [f"--config.data.text_length={caption_length}"] if caption_length else []
    return load_config([f"--config={path}", f"--config.batch_size={batch_size}", *flags, *sizes])


def jax_step(config: Any) -> Callable[[int], None]:
    """A function that makes as many updates of the config's training step."""
    import jax

    from cost.measured import made_up_batch
    from train.distributed.mesh import make_mesh
    from train.program import create_program

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


def open_clip_step(config: Any) -> Callable[[int], None]:
    """A function that makes as many updates of OpenCLIP's network of the same shape, as its training script does."""
    importlib.import_module("conftest")  # lies beside this file; makes torchvision importable, which OpenCLIP needs

    import open_clip
    import torch

    from models import create_model
    from weights.formats.open_clip import clip_config

    use_all_cores()
    network = create_model(**config.models.clip)
    model = open_clip.CLIP(**clip_config(network)["model_cfg"])
    model.train()
    loss_of = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.2)
    images = torch.randn(config.batch_size, 3, network.image_size, network.image_size)
    length = config.data.text_length
    text = torch.randint(1, network.text_vocab_size - 2, (config.batch_size, length))
    text[:, -1] = network.text_vocab_size - 1
    text = torch.nn.functional.pad(text, (0, network.text_length - length))  # as OpenCLIP's tokenizer does

    def run(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            image, caption, scale = model(images, text)
            loss_of(image, caption, scale).backward()
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, 4.6052)

    return run


if __name__ == "__main__":
    reexec_with_fast_allocator()
    main()
