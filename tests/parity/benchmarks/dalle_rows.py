"""Rows of DALL-E: a training step and cached decoding beside dalle-pytorch's.

Both have the same width, depth, heads, vocabularies, text and image tokens, full causal attention, learned positions,
batch, precision and threads. dalle-pytorch's feed-forward layers are gated: of 4 D hidden units they have 12 D^2
weights, as 6 D units without a gate have, which is what this project's get here. A step is forward, backward, clipping
and AdamW on image tokens that are given; LayerScale stays, rotary embeddings and token shift are off. Decoding draws
whole pictures among the most likely tenth of the codes, without guidance, through a small image tokenizer.

Threads of torch wait for each other in a loop, so that other work on the machine slows it far beyond its share: there,
processor seconds of one core count what each computes, and nobody waits.
"""

import dataclasses
from typing import Any

from clip_rows import config_step
from dalle_pytorch_imports import stand_ins
from updates import Case, Peers, our_calls, synchronize, their_calls, torch_bytes, torch_memory, use_all_cores

from cost.side_by_side import Side


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
    "toy": Size(width=16, depth=1, heads=2, text_vocab=32, image_vocab=32, text=4, grid=2),
    "scenes": Size(width=160, depth=4, heads=2, text_vocab=512, image_vocab=256, text=12, grid=8),
    "medium": Size(width=512, depth=8, heads=8, text_vocab=8192, image_vocab=8192, text=64, grid=16),
    "1.3b": Size(width=2048, depth=24, heads=16, text_vocab=16384, image_vocab=8192, text=256, grid=32),
}


def training(peers: Peers, size: str, batch_size: int) -> Case:
    """Updates of both.

    Args:
      peers: what is measured beside ours.
      size: a name of `SIZES`.
      batch_size: of a step.
    """
    sides = peers.sides("dalle-pytorch", lambda compiled: torch_step(SIZES[size], batch_size, peers, compiled))
    return Case({"jax": jax_step(SIZES[size], batch_size, peers.dtype), **sides}, dtype=peers.dtype)


def decoding(peers: Peers, size: str, batch_size: int, measured: bool = True) -> Case:
    """Drawing of a batch of pictures by both; what is counted is a picture.

    Args:
      peers: what is measured beside ours.
      size: a name of `SIZES`.
      batch_size: pictures.
      measured: whether dalle-pytorch is, whose decoding takes minutes at large sizes.
    """
    sides = {"jax": jax_decoding(SIZES[size], batch_size, peers.dtype)}
    if measured:
        sides["dalle-pytorch"] = torch_decoding(SIZES[size], batch_size, peers)
    return Case(sides, units=batch_size, dtype=peers.dtype)


def read_config(size: Size, batch_size: int, dtype: str) -> Any:
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
                "dtype": dtype,
            }
        )
        config.loss.caption_dropout = 0.0
        config.sample.update({"guidance": 1.0, "temperature": 1.0, "top_k": size.image_vocab // 10, "top_p": 1.0})
        config.ema.decay = 0.0
        config.optimizer.rules = ({"pattern": ".*"},)  # AdamW for every kernel, as the peer has it; the recipe has Muon
    return config


def jax_step(size: Size, batch_size: int, dtype: str) -> Side:
    """Updates of this project."""
    import jax
    import numpy as np

    example = {
        "text": ((size.text,), np.dtype(np.int32)),
        "image_tokens": ((size.grid**2,), np.dtype(np.int32)),
        "index": ((), np.dtype(np.int32)),
    }
    rng = np.random.default_rng(0)
    batch = {
        "text": jax.numpy.asarray(rng.integers(1, size.text_vocab, (batch_size, size.text)), np.int32),
        "image_tokens": jax.numpy.asarray(rng.integers(0, size.image_vocab, (batch_size, size.grid**2)), np.int32),
        "index": jax.numpy.arange(batch_size),
    }
    return config_step(read_config(size, batch_size, dtype), example, batch)


def jax_decoding(size: Size, batch_size: int, dtype: str) -> Side:
    """Draws of a batch of pictures."""
    import jax
    import numpy as np

    from sample.samplers.dalle import DalleSampler
    from weights.sources import load_frozen

    config = read_config(size, batch_size, dtype)
    sampler, frozen = DalleSampler.from_config(config), load_frozen(config)
    inputs = [jax.numpy.zeros(x.shape, x.dtype) for x in sampler.model.example_inputs(1)]
    params = {"dalle": jax.jit(sampler.model.init)(jax.random.key(0), *inputs)["params"]}
    request = sampler.request(np.random.default_rng(0).integers(1, size.text_vocab, (batch_size, size.text)))
    keys = jax.random.split(jax.random.key(0), batch_size)
    read = decoding_bytes(sampler.model, batch_size, params["dalle"])
    return our_calls(sampler, params, {}, frozen, request, keys, reads=lambda: read)


def decoding_bytes(model: Any, batch_size: int, params: Any) -> int:
    """What drawing a batch of pictures cannot but read of memory, in the dtype of the computation.

    For each image token all kernels of the blocks and of the image's head, and keys and values of the positions before
    it. Tables, of which a row is read, the caption's own pass and the image tokenizer are left out.
    """
    import jax

    blocks = {name: tree for name, tree in params.items() if name.startswith("blocks") or name == "image_head"}
    weights = sum(leaf.size for leaf in jax.tree.leaves(blocks))
    steps = model.image_length - 1  # the last token is chosen and never read
    positions = sum(model.text_block + step for step in range(steps)) * batch_size
    cached = 2 * model.depth * (model.head_dim or model.width // model.heads) * model.heads
    return jax.numpy.dtype(model.dtype).itemsize * (steps * weights + positions * cached)


def torch_step(size: Size, batch_size: int, peers: Peers, compiled: bool) -> Side:
    """Updates of dalle-pytorch, as its training script makes them."""
    import torch

    use_all_cores()
    before = torch_bytes(peers.device)
    model = torch_model(size).to(peers.device)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.96), weight_decay=0.045, fused=True)
    text = torch.randint(1, size.text_vocab, (batch_size, size.text)).to(peers.device)
    tokens = torch.randint(0, size.image_vocab, (batch_size, size.grid**2)).to(peers.device)
    called: Any = torch.compile(model) if compiled else model

    def run(count: int) -> None:
        for _ in range(count):
            with torch.autocast("cuda", torch.bfloat16, enabled=peers.gpu):
                loss = called(text, tokens, return_loss=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        synchronize(peers.device)

    return Side(run, memory=torch_memory(run, peers.device, before))


def torch_decoding(size: Size, batch_size: int, peers: Peers) -> Side:
    """Draws of a batch of pictures with dalle-pytorch's cache."""
    import torch

    model = torch_model(size).to(peers.device)
    text = torch.randint(1, size.text_vocab, (batch_size, size.text)).to(peers.device)
    # It keeps a share of all its logits, those of text among them, which are hidden: so many codes are left.
    share = (size.image_vocab // 10) / (size.text_vocab + size.text + size.image_vocab)
    return their_calls(lambda: model.generate_images(text, filter_thres=1 - share, use_cache=True), peers.device)


def torch_model(size: Size) -> Any:
    """dalle-pytorch's network."""
    with stand_ins():
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
