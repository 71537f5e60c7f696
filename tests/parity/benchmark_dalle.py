"""Times DALL-E's training step and cached decoding beside dalle-pytorch's: `make benchmark-dalle ARGS=--size=medium`.

Both have the same width, depth, heads, vocabularies, text and image tokens, full causal attention, learned positions,
batch and threads, in float32 on a CPU, in one process and in alternating windows, after a warm-up. dalle-pytorch's
feed-forward layers are gated: of 4 D hidden units they have 12 D^2 weights, as 6 D units without a gate have, which is
what this project's get here. A step is forward, backward, clipping and AdamW on image tokens that are given; LayerScale
stays, rotary embeddings and token shift are off. Decoding draws whole pictures among the most likely tenth of the
codes, without guidance, through a small image tokenizer. Prints the seconds of each (median over windows) and their
ratio.

Threads of torch wait for each other in a loop, so that other work on the machine slows it far beyond its share: there,
--cpu_time on one core (`taskset --cpu-list 0`) counts what each computes, and nobody waits.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from typing import Any

from dalle_pytorch_imports import stand_ins
from side_by_side import print_side_by_side, time_in_turn, use_all_cores

from cli.allocator import reexec_with_fast_allocator


@dataclasses.dataclass(frozen=True)
class Size:
    """Of both networks."""

    width: int
    depth: int
    heads: int
    text_vocab: int
    image_vocab: int
    text: int
    grid: int


SIZES = {
    "scenes": Size(width=160, depth=4, heads=2, text_vocab=512, image_vocab=256, text=12, grid=8),
    "medium": Size(width=512, depth=8, heads=8, text_vocab=8192, image_vocab=8192, text=64, grid=16),
    "long": Size(width=512, depth=8, heads=8, text_vocab=8192, image_vocab=8192, text=256, grid=32),
}


def main() -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="scenes")
    parser.add_argument("--measure", default="step,decode", help="some of step,decode (default both)")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="updates in a window; pictures are drawn once in each")
    parser.add_argument("--cpu_time", action="store_true", help="seconds of the processor, not of the clock")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    size, batch = SIZES[options.size], options.batch_size
    use_all_cores()
    if "step" in options.measure:
        runs = {"jax": jax_step(size, batch), "torch": torch_step(size, batch)}
        print_side_by_side(time_in_turn(runs, windows=options.windows, steps=options.steps, clock=clock), "step")
    if "decode" in options.measure:
        runs = {"jax": jax_decoding(size, batch), "torch": torch_decoding(size, batch)}
        seconds = time_in_turn(runs, windows=options.windows, steps=1, warmup=1, clock=clock)
        print_side_by_side(seconds, f"draw of {batch} pictures")


def read_config(size: Size, batch_size: int) -> Any:
    """The experiment of `configs/scenes/dalle.py` at this size."""
    from configs.scenes import dalle

    config = dalle.get_config("debug")
    with config.unlocked():
        config.batch_size = batch_size
        config.data.text_length, config.data.image_size = size.text, 4 * size.grid
        config.frozen.dvae.update({"image_size": 4 * size.grid, "vocab_size": size.image_vocab})
        config.models.dalle.update(
            {
                "text_vocab_size": size.text_vocab,
                "text_length": size.text,
                "image_vocab_size": size.image_vocab,
                "image_grid": (size.grid, size.grid),
                "width": size.width,
                "depth": size.depth,
                "heads": size.heads,
                "mlp_ratio": 6.0,
                "activation": "gelu",
                "attention": "full",
            }
        )
        config.loss.caption_dropout = 0.0
        config.sample.update({"guidance": 1.0, "temperature": 1.0, "top_k": size.image_vocab // 10, "top_p": 1.0})
        config.ema.decay = 0.0
    return config


def jax_step(size: Size, batch_size: int) -> Callable[[int], None]:
    """A function that makes as many updates of this project."""
    import jax
    import numpy as np

    from train.distributed.mesh import make_mesh
    from train.program import create_program
    from weights.sources import load_frozen

    config = read_config(size, batch_size)
    example = {
        "text": ((size.text,), np.dtype(np.int32)),
        "image_tokens": ((size.grid**2,), np.dtype(np.int32)),
        "index": ((), np.dtype(np.int32)),
    }
    program = create_program(config, make_mesh(config.mesh), example)
    rng = np.random.default_rng(0)
    with program.in_mesh():
        batch = {
            "text": jax.numpy.asarray(rng.integers(1, size.text_vocab, (batch_size, size.text)), np.int32),
            "image_tokens": jax.numpy.asarray(rng.integers(0, size.image_vocab, (batch_size, size.grid**2)), np.int32),
            "index": jax.numpy.arange(batch_size),
        }
        frozen = load_frozen(config, config.seed, program.abstract_frozen)
        state = program.init(batch)

    def run(count: int) -> None:
        nonlocal state
        with program.in_mesh():
            for _ in range(count):
                state, _, _ = program.train_step(state, frozen, batch)
        jax.block_until_ready(state)

    return run


def jax_decoding(size: Size, batch_size: int) -> Callable[[int], None]:
    """A function that draws a batch of pictures as often."""
    import jax
    import numpy as np

    from sample.samplers.dalle import DalleSampler
    from weights.sources import load_frozen

    config = read_config(size, batch_size)
    sampler, frozen = DalleSampler.from_config(config), load_frozen(config)
    inputs = [jax.numpy.zeros(x.shape, x.dtype) for x in sampler.model.example_inputs(1)]
    params = {"dalle": jax.jit(sampler.model.init)(jax.random.key(0), *inputs)["params"]}
    request = sampler.request(np.random.default_rng(0).integers(1, size.text_vocab, (batch_size, size.text)))
    keys = jax.random.split(jax.random.key(0), batch_size)

    def run(count: int) -> None:
        for _ in range(count):
            jax.block_until_ready(sampler(params, {}, frozen, request, keys))

    return run


def torch_step(size: Size, batch_size: int) -> Callable[[int], None]:
    """A function that makes as many updates of dalle-pytorch, as its training script does."""
    import torch

    model = torch_model(size)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.96), weight_decay=0.045)
    text = torch.randint(1, size.text_vocab, (batch_size, size.text))
    tokens = torch.randint(0, size.image_vocab, (batch_size, size.grid**2))

    def run(count: int) -> None:
        for _ in range(count):
            loss = model(text, tokens, return_loss=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return run


def torch_decoding(size: Size, batch_size: int) -> Callable[[int], None]:
    """A function that draws a batch of pictures as often, with dalle-pytorch's cache."""
    import torch

    model = torch_model(size)
    text = torch.randint(1, size.text_vocab, (batch_size, size.text))
    # It keeps a share of all its logits, those of text among them, which are hidden: so many codes are left.
    share = (size.image_vocab // 10) / (size.text_vocab + size.text + size.image_vocab)

    def run(count: int) -> None:
        for _ in range(count):
            model.generate_images(text, filter_thres=1 - share, use_cache=True)

    return run


def torch_model(size: Size) -> Any:
    """dalle-pytorch's network."""
    sys.modules.update(stand_ins())
    from dalle_pytorch import DALLE, DiscreteVAE

    tokenizer = DiscreteVAE(
        image_size=4 * size.grid, num_tokens=size.image_vocab, codebook_dim=16, num_layers=2, hidden_dim=16
    )
    return DALLE(
        dim=size.width,
        vae=tokenizer,
        num_text_tokens=size.text_vocab,
        text_seq_len=size.text,
        depth=size.depth,
        heads=size.heads,
        dim_head=size.width // size.heads,
        attn_types=("full",),
        shift_tokens=False,
        rotary_emb=False,
    )


if __name__ == "__main__":
    reexec_with_fast_allocator()
    main()
