"""What a diffusion's captions are worth to it: its loss with the right ones, with others', and with none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from cli.errors import UserError
from data.preprocess import transform_pair
from data.records import CAPTIONS, first_captions, open_records
from evaluation.records import Record
from sample.samplers.diffusion import DiffusionSampler
from sample.trained import TrainedSampler

CAPTION_LOSS = "caption_loss"


def caption_loss(trained: TrainedSampler, split: str, num: int, seed: int) -> Record:
    """Squared error of the denoiser's output on a split's first records, each at one time and with one noise.

    The three conditions see the same noise at the same times, so that their difference is the captions' alone. Times
    are spread evenly over the process, as training draws them.

    Args:
      trained: a diffusion of pictures that reads captions.
      split: of its dataset.
      num: records, at least 2.
      seed: of the noise; record i gets that of `fold_in(key(seed), i)`.

    Returns:
      values: mse with each picture's own caption; mse_shuffled, with the next record's; mse_blank, with none; and
      own_better, the share of pictures that their own caption denoises better than the next one's.

    Raises:
      UserError: if num is 1, the split has fewer records, or a record has no caption.
    """
    if num < 2:
        raise UserError(f"{CAPTION_LOSS} gives each picture another one's caption; --num must be at least 2, not {num}")
    config = trained.config
    first_captions(config.data, split, num)  # a record without one is named before pictures are read
    source = open_records(config.data, split, fields=(), needs=(CAPTIONS,))
    records = [source[index] for index in range(num)]
    text = trained.encode([record[CAPTIONS][0] for record in records])["text"]
    transform = transform_pair(config.data.transform).evaluation
    images = np.stack([transform(record["image"], config.data.image_size, None) for record in records])
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), np.arange(num, dtype=np.int32))
    shares = (np.random.default_rng(seed).permutation(num) + 0.5) / num
    blank = np.broadcast_to(trained.sampler.text.blank, text.shape)
    errors = {}
    for name, told in (("mse", text), ("mse_shuffled", np.roll(text, -1, axis=0)), ("mse_blank", blank)):
        parts = []
        for start in range(0, num, trained.chunk):
            places = np.minimum(np.arange(start, start + trained.chunk), num - 1)  # one program for every chunk
            rows = (images[places], told[places].astype(np.int32), shares[places].astype(np.float32), keys[places])
            parts.append(_errors(trained.sampler, trained.weights.params, trained.frozen, *rows))
        errors[name] = np.concatenate(jax.device_get(parts))[:num].astype(np.float64)
    better = errors["mse"] < errors["mse_shuffled"]
    values = {name: float(error.mean()) for name, error in errors.items()}
    return {"values": values | {"own_better": float(better.mean())}, "counted": {"own_better": num}}


@functools.partial(jax.jit, static_argnums=0)
def _errors(
    sampler: DiffusionSampler,
    params: dict,
    frozen: dict,
    images: Array,
    text: Int[Array, "b l"],
    shares: Float[Array, "b"],
    keys: Key[Array, "b"],
) -> Float[Array, "b"]:
    """Squared error of the output for each picture."""
    process = sampler.process
    x_0 = sampler.data(frozen, {"image": images}, jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, 4))
    t = process.draw_time(shares)
    eps = jax.vmap(lambda key: jax.random.normal(key, x_0.shape[1:]))(keys)
    x_t = process.noised(x_0, eps, t)
    told = sampler.conditioning(params, frozen, sampler.blank({"text": text}, len(t)))
    seen = process.network_input(x_t, t)
    output = sampler.model.apply({"params": params["denoiser"]}, seen, process.network_time(t), told)
    prediction, *_ = jnp.split(output, [x_0.shape[-1]], axis=-1)  # learned variances come behind it
    return jnp.mean(jnp.square(prediction - process.target(x_0, eps, t)), axis=(1, 2, 3))
