"""What a program needs on the way: small programs by hand, and networks against XLA's plan."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from cli.config import load_config
from cost.temporaries import FACTOR, MARGIN, temporary_bytes
from train.distributed.mesh import make_mesh
from train.program import create_program

ROOT = Path(__file__).resolve().parents[2]
SIDE = 64
ARRAY = 4 * SIDE * SIDE  # bytes of the only size of array below


def arrays(function, count=2, dtype=jnp.float32, **options):
    """Temporaries of a function of so many square matrices, in arrays of their size."""
    return temporary_bytes(function, *[jax.ShapeDtypeStruct((SIDE, SIDE), dtype)] * count, **options) / MARGIN / ARRAY


def test_elementwise_work_is_fused_and_products_are_not():
    assert arrays(lambda x, w: jnp.sum(jnp.tanh(x + w) * 2)) < 0.01
    assert arrays(lambda x, w: jnp.sum(x @ w + 1)) == pytest.approx(1, abs=0.01)
    # The operand of the second product, made in the place of the first one's result, and the second one's result.
    assert arrays(lambda x, w: jnp.sum(jax.nn.relu(x @ w) @ w)) == pytest.approx(2, abs=0.01)
    # Each sum of two products takes their place; a chain of them never holds more than three.
    assert arrays(lambda x, w: jnp.sum(x @ w + (x @ x) + (w @ w))) <= 3.01
    # A result takes a donated argument's place.
    assert arrays(lambda x, w: x + w) == 0


def test_what_is_expensive_is_kept_for_its_second_reader():
    product = lambda x, w: jnp.sum((y := x @ w) * 2) + jnp.max(y + 1)  # noqa: E731
    assert arrays(product) == pytest.approx(1, abs=0.01)
    exponential = lambda x, w: jnp.sum(y := jnp.exp(x @ w)) + jnp.max(y + 1)  # noqa: E731
    assert arrays(exponential) == pytest.approx(1, abs=0.01)  # in the product's place
    of_argument = lambda x, w: jnp.sum(y := jnp.exp(x)) + jnp.max(y + 1)  # noqa: E731
    assert arrays(of_argument) == pytest.approx(1, abs=0.01)


def layers(depth, wrap, scan=False):
    def loss(x, w):
        layer = wrap(lambda x: jax.nn.relu(jax.nn.relu(jax.nn.relu(x @ w) @ w) @ w))
        if scan:
            x, _ = jax.lax.scan(lambda x, _: (layer(x), None), x, length=depth)
        else:
            for _ in range(depth):
                x = layer(x)
        return jnp.sum(x * x)

    # One by one, the layers' gradients of the matrix that they share would wait for their sum.
    return jax.grad(loss, argnums=(0, 1) if scan else 0)


@pytest.mark.parametrize("scan", [False, True])
def test_recomputation_keeps_a_layers_input_alone(scan):
    kept, longer = (arrays(layers(depth, lambda layer: layer, scan)) for depth in (8, 16))
    assert 8 * 3 <= longer - kept <= 8 * 6  # inputs of its three products, and masks of relu or what these are made of
    recomputed, longer = (arrays(layers(depth, jax.checkpoint, scan)) for depth in (8, 16))
    assert longer - recomputed == pytest.approx(8, abs=0.6)
    assert recomputed < kept - 8


def test_a_split_divides_what_it_names():
    function = lambda x, w: jnp.sum(x @ w)  # noqa: E731
    assert arrays(function, split=lambda shape: 4 if len(shape) == 2 else 1) == pytest.approx(arrays(function) / 4)


def test_the_fused_kernel_keeps_its_scores():
    def attention(q, k, bias=None):
        with jax.named_scope("attention_xla"):
            scores = jnp.einsum("blnk,bmnk->bnlm", q, k, preferred_element_type=jnp.float32)
            weights = jax.nn.softmax(scores if bias is None else scores + bias).astype(q.dtype)
            return jnp.sum(jnp.einsum("bnlm,bmnk->blnk", weights, k))

    def scores(width, *more, dtype=jnp.bfloat16, **options):
        x = jax.ShapeDtypeStruct((2, 128, 1, width), dtype)
        return temporary_bytes(attention, x, x, *more, **options) / (4 * 2 * 128**2)

    assert scores(8) > 1 and scores(8, fused_attention=True) < 0.1
    bias = jax.ShapeDtypeStruct((128, 128), jnp.float32)
    for arguments, options in ((([8, bias]), {}), ([8], {"dtype": jnp.float32}), ([136], {})):
        assert scores(*arguments, **options, fused_attention=True) == scores(*arguments, **options)


DALLE = (
    *("paper/dalle_12b.py:debug", "batch_size=64", "models.dalle.remat=full", "models.dalle.scan=true"),
    *("models.dalle.dtype=float32", "models.dalle.depth=6"),
)
UNET = ("scenes/ddpm_unet.py:debug", "batch_size=32", "models.denoiser.blocks=1")


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [DALLE, ("scenes/clip.py:debug", "batch_size=128"), ("scenes/ddpm_uvit.py:debug", "batch_size=64"), UNET],
    ids=["dalle", "clip", "uvit", "unet"],
)
def test_the_estimate_is_within_its_factor_of_the_compilers_plan(config):
    config = load_config([f"--config={ROOT}/configs/{config[0]}", *(f"--config.{each}" for each in config[1:])])
    program = create_program(config, make_mesh(config.mesh, jax.devices()[:1]))
    arguments = program.abstract_state, program.abstract_frozen, program.abstract_batch
    with program.in_mesh():
        estimate = temporary_bytes(program.train_step, *arguments)
        planned = program.train_step.lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    print(f"estimate / planned {estimate / planned:.2f}")
    assert planned / FACTOR < estimate < planned * FACTOR, (estimate, planned)
