"""Matrix FLOPs from the traced program, against closed forms and the compiler."""

import jax
import jax.numpy as jnp
import pytest

from cost.flops import matrix_flops
from models.layers.convolution import UpsampledConv


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_a_matmul_and_its_gradient():
    assert matrix_flops(jnp.dot, shape(4, 5), shape(5, 6)) == 2 * 4 * 5 * 6
    gradient = jax.grad(lambda a, b: jnp.sum(a @ b * (a @ b)), argnums=(0, 1))
    # One product forward (the two are traced apart: two), and one for each of four cotangents.
    assert matrix_flops(gradient, shape(4, 5), shape(5, 6)) == 6 * 2 * 4 * 5 * 6


def test_a_convolution_with_stride_and_groups():
    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
        )

    # 4 x 4 outputs of 6 features, each over 3 x 3 x (4 / 2) inputs.
    assert matrix_flops(convolve, shape(3, 8, 8, 4), shape(3, 3, 2, 6)) == 2 * (3 * 4 * 4 * 6) * (3 * 3 * 2)


def test_a_scan_counts_as_often_as_it_iterates():
    def program(x, w):
        return jax.lax.scan(lambda carry, _: (carry @ w, None), x, None, length=7)[0]

    assert matrix_flops(program, shape(4, 5), shape(5, 5)) == 7 * 2 * 4 * 5 * 5


def test_calls_inside_calls_are_seen():
    inner = jax.checkpoint(jax.jit(lambda x, w: x @ w))
    assert matrix_flops(jax.jit(lambda x, w: inner(x, w)), shape(4, 5), shape(5, 6)) == 240
    branches = lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)  # noqa: E731
    assert matrix_flops(branches, shape(4, 5), shape(5, 5)) == 2 * 2 * 4 * 5 * 5


def test_the_compiler_agrees_on_a_matmul_chain():
    def chain(x, w):
        for _ in range(4):
            x = x @ w
        return x

    compiled = jax.jit(chain).lower(shape(64, 64), shape(64, 64)).compile().cost_analysis()
    assert matrix_flops(chain, shape(64, 64), shape(64, 64)) == pytest.approx(compiled["flops"], rel=0.01)


def test_a_network_has_the_same_flops_where_a_cpu_computes_fewer():
    layer = UpsampledConv(6, (3, 3))
    x = jnp.ones((5, 8, 8, 4))
    params = layer.init(jax.random.key(0), x)
    assert matrix_flops(layer.apply, params, x) == 2 * 5 * 16 * 16 * 9 * 4 * 6
    assert str(jax.make_jaxpr(layer.apply)(params, x)).count("conv_general_dilated[") == 4
