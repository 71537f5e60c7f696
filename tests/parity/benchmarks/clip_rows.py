"""Rows of CLIP: a training step beside OpenCLIP's.

The same architecture, batch, precision and threads, and AdamW on both sides. Captions fill the context unless a length
is given: OpenCLIP computes the padding behind shorter ones too, this project leaves it out where
config.data.text_length says so.
"""

import importlib
from collections.abc import Sequence
from typing import Any

from updates import Case, Peers, our_program, synchronize, torch_bytes, torch_memory, use_all_cores

from cost.side_by_side import Side


def training(
    peers: Peers, config: str, batch_size: int, caption_length: int = 0, overrides: Sequence[str] = ()
) -> Case:
    """Updates of both.

    Args:
      peers: what is measured beside ours.
      config: a file of configs.
      batch_size: of a step.
      caption_length: tokens of the longest caption; 0 for the whole context.
      overrides: of the network.
    """
    read = read_config(config, overrides, batch_size, caption_length, peers.dtype)
    sides = peers.sides("OpenCLIP", lambda compiled: open_clip_step(read, peers, compiled))
    return Case({"jax": config_step(read), **sides}, dtype=peers.dtype)


def read_config(path: str, overrides: Sequence[str], batch_size: int, caption_length: int, dtype: str) -> Any:
    """The config without recomputation; rows of text are as long as the longest caption."""
    from cli.config import load_config

    network = (f"dtype={dtype}", "scan=False", "remat=none", *overrides)
    flags = [f"--config.models.clip.{override}" for override in network]
    sizes = [flag.replace("models.clip", "data") for flag in flags if "image_size" in flag]
    sizes += [f"--config.data.text_length={caption_length}"] if caption_length else []
    whole = ["--config.mesh.fsdp=1", "--config.mesh.microbatches=1"]
    return load_config([f"--config={path}", f"--config.batch_size={batch_size}", *whole, *flags, *sizes])


def config_step(config: Any, example: Any = None, batch: Any = None) -> Side:
    """Updates of a config's training step, its frozen stages with random weights.

    Args:
      config: an experiment.
      example: shapes and dtypes of the fields of an example; None for those of the config's data.
      batch: of such examples; None for a made-up one.
    """
    from cost.measured import made_up_batch, model_flops, without_sources
    from train.distributed.mesh import make_mesh
    from train.program import create_program
    from weights.sources import load_frozen

    config = without_sources(config)
    program = create_program(config, make_mesh(config.mesh), *(() if example is None else (example,)))
    with program.in_mesh():
        batch = made_up_batch(program, config) if batch is None else batch
        frozen = load_frozen(config, config.seed, program.abstract_frozen)
        return our_program(program.train_step, program.init(batch), frozen, batch, flops=lambda: model_flops(config))


def open_clip_step(config: Any, peers: Peers, compiled: bool) -> Side:
    """Updates of OpenCLIP's network of the same shape, as its training script makes them."""
    importlib.import_module("conftest")  # of the parity tests; makes torchvision importable, which OpenCLIP needs

    import open_clip
    import torch

    from models import create_model
    from weights.formats.open_clip import clip_config

    use_all_cores()
    before = torch_bytes(peers.device)
    network = create_model(**config.models.clip)
    model = open_clip.CLIP(**clip_config(network)["model_cfg"]).to(peers.device)
    model.train()
    called: Any = torch.compile(model) if compiled else model
    loss_of = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.2, fused=True)
    images = torch.randn(config.batch_size, 3, network.image_size, network.image_size)
    length = config.data.text_length
    text = torch.randint(1, network.text_vocab_size - 2, (config.batch_size, length))
    text[:, -1] = network.text_vocab_size - 1
    text = torch.nn.functional.pad(text, (0, network.text_length - length))  # as OpenCLIP's tokenizer does
    images, text = images.to(peers.device), text.to(peers.device)

    def run(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16, enabled=peers.gpu):
                image, caption, scale = called(images, text)
            loss_of(image.float(), caption.float(), scale).backward()
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, 4.6052)
        synchronize(peers.device)

    return Side(run, memory=torch_memory(run, peers.device, before))
