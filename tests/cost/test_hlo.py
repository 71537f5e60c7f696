"""Collectives and attention, read from HLO text that is written by hand and from compiled programs."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cost.hlo import group_size, read_attention, read_collectives, sent_bytes, shape_bytes
from models.layers.attention import attend

ROOT = Path(__file__).resolve().parents[2]
CAUSAL = np.tri(4, dtype=bool)
GROUPS = "replica_groups={{0,1,2,3},{4,5,6,7}}"


def module(*computations: str) -> str:
    return "HloModule test\n\n" + "\n\n".join(computations) + "\n"


def entry(*lines: str) -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f"ENTRY %main.1 (p: f32[8,16]) -> f32[8,16] {{\n  %p = f32[8,16]{{1,0}} parameter(0)\n{body}\n}}"


def found(text: str, devices: int = 8) -> dict[str, tuple[int, int]]:
    return {each.kind: (each.count, each.sent_bytes) for each in read_collectives(text, devices).traffic}


def loop(condition: str, step: str, start: int = 0, attributes: str = "", name: str = "") -> tuple[str, str, str]:
    """A while loop around an all-reduce of 512 bytes: condition, body, and the lines that call it."""
    tests = f"""%test{name} (c: (s32[], f32[8,16])) -> pred[] {{
  %c = (s32[], f32[8,16]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
{condition}
}}"""
    body = f"""%body{name} (b: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {{
  %b = (s32[], /*index=1*/f32[8,16]{{1,0:T(8,128)(2,1)}}) parameter(0)
  %j = s32[]{{:T(128)}} get-tuple-element(%b), index=0
  %k = s32[]{{:T(128)S(6)}} copy(%j)
  %step = s32[] constant({step})
  %next = s32[] add(%k, %step)
  %x = f32[8,16]{{1,0}} get-tuple-element(%b), index=1
  %sum = f32[8,16]{{1,0}} all-reduce(%x), channel_id=3, {GROUPS}, to_apply=%add
  ROOT %t = (s32[], f32[8,16]{{1,0}}) tuple(%next, %sum)
}}"""
    call = f"""  %start{name} = s32[] constant({start})
  %copied{name} = s32[] copy(%start{name})
  %init{name} = (s32[], f32[8,16]{{1,0}}) tuple(%copied{name}, %p)
  %loop{name} = (s32[], f32[8,16]{{1,0}}) while(%init{name}), condition=%test{name}, body=%body{name}{attributes}"""
    return tests, body, call.strip()


def limit(value: int, direction: str = "LT") -> str:
    return f"  %n = s32[] constant({value})\n  ROOT %r = pred[] compare(%i, %n), direction={direction}"


def test_each_kind_sends_what_its_definition_says():
    text = module(
        entry(
            f"%a = f32[32,16]{{1,0}} all-gather(%p), channel_id=1, {GROUPS}, dimensions={{0}}",
            f"%b = f32[8,16]{{1,0}} all-reduce(%p), channel_id=2, {GROUPS}, to_apply=%add",
            f"%c = f32[2,16]{{1,0}} reduce-scatter(%p), channel_id=3, {GROUPS}, dimensions={{0}}, to_apply=%add",
            f"%d = f32[8,16]{{1,0}} all-to-all(%p), channel_id=4, {GROUPS}, dimensions={{0}}",
            "%e = f32[8,16]{1,0} collective-permute(%p), channel_id=5, source_target_pairs={{0,1},{1,0}}",
            f"ROOT %f = f32[8,16]{{1,0}} collective-broadcast(%p), channel_id=6, {GROUPS}",
        )
    )
    assert found(text) == {
        "all-gather": (1, 2048 * 3 // 4),
        "all-reduce": (1, 2 * 512 * 3 // 4),
        "reduce-scatter": (1, 512 * 3 // 4),
        "all-to-all": (1, 512 * 3 // 4),
        "collective-permute": (1, 512),
        "collective-broadcast": (1, 512),
    }


def test_a_tuple_is_the_sum_of_its_arrays():
    text = module(
        entry(
            f"ROOT %b = (f32[8,16]{{1,0}}, bf16[4]{{0:T(8)}}, /*index=2*/pred[2]{{0}}) all-reduce(%p, %p, %p), {GROUPS}"
        )
    )
    assert found(text) == {"all-reduce": (1, 2 * (512 + 8 + 2) * 3 // 4)}


def test_start_and_done_are_one_collective():
    text = module(
        """%wrapped (q: f32[8,16]) -> f32[2,16] {
  %q = f32[8,16]{1,0} parameter(0)
  ROOT %s = f32[2,16]{1,0} reduce-scatter(%q), channel_id=9, """
        + GROUPS
        + ", dimensions={0}, to_apply=%add\n}",
        entry(
            f"%a = (f32[8,16]{{1,0}}, f32[32,16]{{1,0}}) all-gather-start(%p), {GROUPS}, dimensions={{0}}",
            "%b = f32[32,16]{1,0} all-gather-done(%a)",
            "%c = ((f32[8,16]{1,0}), f32[2,16]{1,0}, u32[]) async-start(%p), calls=%wrapped",
            "%d = ((f32[8,16]{1,0}), f32[2,16]{1,0}, u32[]) async-update(%c), calls=%wrapped",
            "ROOT %e = f32[2,16]{1,0} async-done(%d), calls=%wrapped",
        ),
    )
    assert found(text) == {"all-gather": (1, 2048 * 3 // 4), "reduce-scatter": (1, 512 * 3 // 4)}


def test_a_loop_counts_as_often_as_xla_noted():
    test, body, call = loop(
        "  ROOT %r = pred[] custom-call(%i)", "1", attributes=', backend_config={"known_trip_count":{"n":"7"}}'
    )
    assert found(module(test, body, entry(call))) == {"all-reduce": (7, 7 * 768)}


@pytest.mark.parametrize(
    ("condition", "step", "start", "times"),
    [
        (limit(64), "1", 0, 64),
        (limit(64), "1", 4, 60),
        (limit(64), "3", 0, 22),
        (limit(64, "LE"), "2", 0, 33),
        (limit(0, "GT"), "-1", 5, 5),
        (limit(0, "GE"), "-2", 5, 3),
        (limit(64, "NE"), "1", 0, 64),
        (limit(3), "1", 5, 0),
    ],
)
def test_a_loop_without_a_note_counts_by_its_counter(condition, step, start, times):
    test, body, call = loop(condition, step, start)
    assert found(module(test, body, entry(call))) == {"all-reduce": (times, times * 768)}


def test_a_limit_may_be_carried_by_the_loop():
    condition = "  %n = s32[] get-tuple-element(%c), index=2\n  ROOT %r = pred[] compare(%i, %n), direction=LT"
    test, body, call = loop(condition, "1")
    call = call.replace("tuple(%copied, %p)", "tuple(%copied, %p, %limit)")
    text = module(test, body, entry("%limit = s32[] constant(12)", call))
    assert found(text) == {"all-reduce": (12, 12 * 768)}


def test_loops_inside_loops_multiply():
    inner_test, inner_body, inner_call = loop(limit(5), "1", name=".inner")
    outer_test, outer_body, outer_call = loop(limit(3), "1", name=".outer")
    inner_call = inner_call.replace("%p)", "%x)")
    outer_body = outer_body.replace("  %sum =", f"  {inner_call}\n  %sum =")
    text = module(inner_test, inner_body, outer_test, outer_body, entry(outer_call))
    assert found(text) == {"all-reduce": (3 + 3 * 5, 18 * 768)}


def test_a_loop_of_unknown_length_is_named_and_counts_once():
    test, body, call = loop("  ROOT %r = pred[] custom-call(%i)", "1")
    collectives = read_collectives(module(test, body, entry(call)), 8)
    assert collectives.unknown_loops == 1
    assert [each.count for each in collectives.traffic] == [1]
    quiet = body.replace("all-reduce(%x)", "negate(%x)")  # without collectives its length does not matter
    assert read_collectives(module(test, quiet, entry(call)), 8).unknown_loops == 0


def test_a_collective_that_is_spread_over_fusions_counts_once():
    gather = f"f32[32,16]{{1,0}} all-gather(%q), channel_id=7, {GROUPS}, dimensions={{0}}"
    parts = [
        f"%part.{n} (q: f32[8,16]) -> f32[32,16] {{\n  %q = f32[8,16]{{1,0}} parameter(0)\n  ROOT %g.{n} = {gather}\n}}"
        for n in range(3)
    ]
    lines = [f"%f.{n} = f32[32,16]{{1,0}} fusion(%p), kind=kCustom, calls=%part.{n}" for n in range(3)]
    assert found(module(*parts, entry(*lines))) == {"all-gather": (1, 2048 * 3 // 4)}
    # The same channel outside of fusions is another collective each time.
    lines = [f"%g.{n} = {gather}".replace("%q", "%p") for n in range(3)]
    assert found(module(entry(*lines))) == {"all-gather": (3, 3 * 2048 * 3 // 4)}


def test_an_all_reduce_of_which_a_slice_is_kept_is_a_reduce_scatter():
    fused = f"""%scatter (q: f32[8,16]) -> f32[2,16] {{
  %q = f32[8,16]{{1,0}} parameter(0)
  %zero = s32[] constant(0)
  %r = f32[8,16]{{1,0}} all-reduce(%q), channel_id=7, {GROUPS}, to_apply=%add
  ROOT %s = f32[2,16]{{1,0}} dynamic-slice(%r, %zero, %zero), dynamic_slice_sizes={{2,16}}
}}"""
    text = module(fused, entry("ROOT %f = f32[2,16]{1,0} fusion(%p), kind=kCustom, calls=%scatter"))
    assert found(text) == {"reduce-scatter": (1, 512 * 3 // 4)}


def test_the_dearest_branch_of_a_conditional_counts():
    shape = "f32[8,16]{1,0}"
    cheap = f"  ROOT %r = {shape} all-to-all(%q), {GROUPS}"
    dear = f"  %s = {shape} all-reduce(%q), {GROUPS}\n  ROOT %t = {shape} all-reduce(%s), {GROUPS}"
    branches = [
        f"%{name} (q: f32[8,16]) -> f32[8,16] {{\n  %q = {shape} parameter(0)\n{lines}\n}}"
        for name, lines in (("cheap", cheap), ("dear", dear))
    ]
    index = "%i = s32[] constant(0)"
    for called in (
        "branch_computations={%cheap, %dear}",
        "true_computation=%dear, false_computation=%cheap",
    ):
        text = module(*branches, entry(index, f"ROOT %x = f32[8,16]{{1,0}} conditional(%i, %p, %p), {called}"))
        assert found(text) == {"all-reduce": (2, 2 * 768)}


@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        ("channel_id=1, replica_groups={{0,2},{1,3}}, to_apply=%add", 2),
        ("replica_groups={}, to_apply=%add", 16),
        ("replica_groups=[4,64]<=[256], dimensions={0}", 64),
        ("replica_groups=[2,8]<=[8,2]T(1,0), dimensions={0}", 8),
        ("replica_groups=mesh['a'=64,'b'=1,'c'=4], device_ids=([4,64]T(1,0)) {'a'}, dimensions={0}", 64),
        ("replica_groups=mesh['a'=64,'b'=2,'c'=4] {'a','c'}, to_apply=%add", 256),
        ("replica_groups=mesh['a'=64,'b'=2] {'a':(2)8,'b'}, to_apply=%add", 16),
    ],
)
def test_groups_are_read_in_every_notation(attributes, size):
    assert group_size(attributes, 16) == size


def test_shapes():
    assert shape_bytes("bf16[4,1280,3968]{2,1,0:T(8,128)(2,1)S(1)}") == 2 * 4 * 1280 * 3968
    assert shape_bytes("(f32[2]{0}, s32[], (pred[3]{0}, token[]), u4[3])") == 8 + 4 + 3 + 2
    assert shape_bytes("f8e4m3fn[16]{0}") == 16


def test_a_group_of_one_sends_nothing():
    assert sent_bytes("all-reduce", 512, 1) == sent_bytes("all-gather", 512, 1) == 0


@pytest.mark.parametrize("implementations", [(), ("xla",), ("splash_interpreted", "xla")])
def test_a_compiled_program_says_which_attention_it_has(implementations):
    def loss(q):
        for implementation in implementations:
            q = attend(q, q, q, CAUSAL, implementation)
        return jnp.sum(q)

    text = jax.jit(jax.grad(loss)).lower(jax.ShapeDtypeStruct((1, 4, 2, 8), jnp.float32)).compile().as_text()
    assert read_attention(text) == implementations


PROGRAM = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from cost.hlo import read_collectives
mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
def layers(x, w):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)
    return jnp.sum(x)
x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, P("a", None)))
w = jax.ShapeDtypeStruct((6, 16, 16), jnp.float32, sharding=NamedSharding(mesh, P(None, None, None)))
compiled = jax.jit(jax.grad(layers, argnums=1)).lower(x, w).compile()
for each in read_collectives(compiled.as_text(), 8).traffic:
    print(each.kind, each.count, each.sent_bytes)
"""


def test_the_gradient_of_a_scan_for_eight_cpu_devices():
    """Data parallel: of each of 6 layers the gradient, 16 x 16 floats, is summed over the 4 devices that have rows."""
    flags = "--xla_force_host_platform_device_count=8"
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    kinds = {line.split()[0]: int(line.split()[2]) for line in result.stdout.splitlines()}
    assert kinds == {"all-reduce": 2 * 6 * 16 * 16 * 4 * 3 // 4}
