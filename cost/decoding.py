"""What one token costs a transformer that decodes with a cache, by the token's position."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cli.errors import UserError
from cost.timing import Spread
from models import create_model

_POSITIONS = 5


def measure_decoding(
    config: ConfigDict, *, windows: int, tokens: int = 8, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Times decoding steps at positions from the first image token to the last, in turn, with random weights.

    Guidance, the choice of tokens and the prompt are not in it.

    Args:
      config: of a DALL-E; `batch_size` is the number of pictures.
      windows: how many times to measure each position.
      tokens: in a window.
      clock: seconds.

    Returns:
      image_tokens, pictures; positions: {position: seconds of a token as {"median", "low", "high"}};
      last_over_first: of the medians.

    Raises:
      UserError: if the config is of something else, or has too few image tokens.
    """
    if "dalle" not in config.models:
        raise UserError(f"a {config.objective} decodes no tokens; leave decode out of --measure")
    model = create_model(**config.models.dalle)
    steps = model.image_length - 1  # the last token is chosen and never read
    if steps <= tokens:
        raise UserError(f"{model.image_length} image tokens are too few to time; raise config.models.dalle.image_grid")
    inputs = [jnp.zeros(x.shape, x.dtype) for x in model.example_inputs(1)]
    params = jax.jit(model.init)(jax.random.key(config.seed), *inputs)["params"]
    text = jax.ShapeDtypeStruct((config.batch_size, model.text_length), jnp.int32)
    _, shapes = jax.eval_shape(lambda text: model.apply({"params": params}, text, method="prefill"), text)
    cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def decode(params: Any, cache: Any, start: Any) -> tuple[Any, Any]:
        def step(number: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            token, cache = carry
            logits, cache = model.apply({"params": params}, token, start + number, cache, method="decode_step")
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

        return jax.lax.fori_loop(0, tokens, step, (jnp.zeros(config.batch_size, jnp.int32), cache))

    program = jax.jit(decode, donate_argnums=1)
    positions = np.linspace(0, steps - tokens, _POSITIONS).astype(int).tolist()
    seconds: dict[int, list[float]] = {position: [] for position in positions}
    for window in range(windows + 1):
        for position in positions:
            begin = clock()
            _, cache = jax.block_until_ready(program(params, cache, jnp.int32(position)))
            if window:  # the first is a warm-up
                seconds[position].append((clock() - begin) / tokens)
    spreads = {position: Spread.of(values) for position, values in seconds.items()}
    return {
        "image_tokens": model.image_length,
        "pictures": config.batch_size,
        "positions": {position: dataclasses.asdict(spread) for position, spread in spreads.items()},
        "last_over_first": spreads[positions[-1]].median / spreads[positions[0]].median,
    }
