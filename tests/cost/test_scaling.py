"""Which steps a table of scaling compiles, what its rows say, and where it puts the turn to communication."""

import pytest

from cli.errors import UserError
from configs.common import get_defaults
from cost.chips import CHIPS, GIB
from cost.scaling import Point, points, refused, scaling_row, scaling_table, turn_rows, turns_table

CHIP = CHIPS["v5e"]


def config_of(batch_size=64, fsdp=1, microbatches=1):
    config = get_defaults()
    config.batch_size = batch_size
    config.mesh.fsdp, config.mesh.microbatches = fsdp, microbatches
    return config


def report_of(compute, sent_bytes):
    bound = {"by": "compute", "compute_seconds": compute, "memory_seconds": 0.002, "interconnect_seconds": 0.0125}
    return {
        "fits": True,
        "memory_bytes": 12 * GIB,
        "hbm_bytes": CHIP.hbm_bytes,
        "mesh": {"data": 2, "fsdp": 8, "tensor": 1},
        "collectives": {"all-reduce": {"sent_bytes": sent_bytes}, "all-gather": {"sent_bytes": sent_bytes}},
        "bound": bound,
        "compile_seconds": 61.2,
        "versions": {"jax": "1.2.3", "libtpu": "4.5.6"},
    }


def test_devices_grow_with_their_examples_and_the_largest_slice_also_has_fewer():
    found = points(config_of(), CHIP, 4, (1, 4, 16), ())
    own = [Point("v5e:1x1", 1, 16), Point("v5e:2x2", 4, 16), Point("v5e:4x4", 16, 16)]
    assert found == [*own, Point("v5e:4x4", 16, 4), Point("v5e:4x4", 16, 1)]
    # A microbatch has an example at least.
    assert [each.examples for each in points(config_of(microbatches=2), CHIP, 4, (4,), ())] == [16, 4]
    assert points(config_of(), CHIP, 4, (16,), (3, 2)) == [Point("v5e:4x4", 16, 3), Point("v5e:4x4", 16, 2)]
    # Slices that there are of the kind, unless some are asked for.
    assert [each.topology for each in points(config_of(), CHIP, 4, (), (1,))] == [
        f"v5e:{shape}" for shape in ("1x1", "2x2", "4x4", "8x8", "16x16")
    ]
    cubes = points(config_of(), CHIPS["v5p"], 4, (), (1,))
    assert [each.topology for each in cubes] == ["v5p:2x2x1", "v5p:2x2x4", "v5p:4x4x4", "v5p:4x8x8"]
    with pytest.raises(UserError, match="no slice of v5e has 5 chips; choose of 1, 4, 8"):
        points(config_of(), CHIP, 4, (5,), ())
    with pytest.raises(UserError, match="batch_size=3 does not divide over 4 devices; give --examples"):
        points(config_of(batch_size=3), CHIP, 4, (1,), ())


def test_a_point_splits_parameters_as_far_as_there_are_devices():
    for devices, fsdp in ((1, 1), (4, 4), (16, 8)):
        changed = Point("v5e:any", devices, 3).apply(config_of(fsdp=8))
        assert (changed.batch_size, changed.mesh.fsdp, changed.mesh.data) == (3 * devices, fsdp, -1)
        assert changed.mesh.topology == "v5e:any"
    assert Point("v5e:any", 4, 3).apply(config_of(fsdp=-1)).mesh.fsdp == 4


def test_a_row_says_what_the_report_says():
    row = scaling_row("c.py", Point("v5e:4x4", 16, 4), report_of(0.05, 1_250_000_000), CHIP, "aa bb")
    assert (row["config"], row["topology"], row["examples a device"]) == ("c.py", "v5e:4x4", "4")
    assert (row["memory / HBM, GiB"], row["fits"], row["sent, GB"]) == ("12.00 / 15.75", "yes", "2.5")
    assert (row["TFLOPs a device"], row["compute, ms"], row["memory, ms"]) == ("9.85", "50", "2")  # 197 TFLOP/s
    assert (row["interconnect, ms"], row["bound"], row["compiled in"]) == ("12.5", "compute", "61 s")
    failed = {**report_of(0.05, 0), "fits": False, "collectives": None, "bound": None}
    row = scaling_row("c.py", Point("v5e:4x4", 16, 4), failed, CHIP, "aa bb")
    assert (row["fits"], row["sent, GB"], row["bound"], row["compiled in"]) == ("no", "-", "-", "61 s")


def test_what_arithmetic_refuses_is_a_row_too(tmp_path):
    config = Point("v5e:2x2", 4, 1).apply(config_of(fsdp=2))
    row = scaling_row("c.py", Point("v5e:2x2", 4, 1), refused(config, 4, 20 * GIB, CHIP), CHIP, "aa bb")
    assert (row["fits"], row["memory / HBM, GiB"]) == ("no, arguments alone", "20.00 / 15.75")
    assert (row["data x fsdp x tensor"], row["compiled in"]) == ("2 x 2 x 1", "not compiled")
    page = tmp_path / "page.md"
    tables = scaling_table(page), turns_table(page)
    page.write_text("\n\n".join(f"| {' | '.join(each.columns)} |\n{'|---' * len(each.columns)}|" for each in tables))
    tables[0].write(row)
    assert tables[0].find("c.py", "v5e:2x2", "1") == row and tables[1].read() == []


def rows_of(topology, *figures):
    keys = ("config", "topology", "examples a device", "interconnect, ms", "compute, ms", "bound")
    return [dict(zip(keys, ("c.py", topology, *map(str, each), "compute"), strict=True)) for each in figures]


def test_the_turn_is_where_products_take_as_long_as_what_is_sent():
    """20 ms and 1 an example are sent; products take 5 an example: equal at 5 examples."""
    rows = rows_of("v5e:4x4", (16, 36, 80), (4, 24, 20), (8, 28, 40))
    (turn,) = turn_rows(rows)
    assert (turn["topology"], turn["turns at"]) == ("v5e:4x4", "5 examples")
    assert (turn["interconnect"], turn["compute"]) == ("20 + 1 n ms", "0 + 5 n ms")
    (turn,) = turn_rows(rows_of("v5e:4x4", (4, 24, 2), (16, 96, 8)))
    assert turn["turns at"] == "no batch: traffic grows as fast"
    (turn,) = turn_rows(rows_of("v5e:4x4", (4, 1, 20), (16, 4, 80)))
    assert turn["turns at"] == "any batch computes"
    refused_row = {**rows[0], "topology": "v5e:2x2", "bound": "-"}
    assert turn_rows([*rows[:1], refused_row]) == turn_rows(rows_of("v5e:1x1", (4, 0, 2), (16, 0, 8))) == []
