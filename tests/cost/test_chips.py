"""The table of TPUs against JAX's own, and the bound of a step against closed forms."""

import pytest
from jax.experimental.pallas import tpu as pallas_tpu

from cli.errors import UserError
from cost.chips import CHIPS, GIB, chip_of, roofline

VERSIONS = {"v3": "v3", "v4": "v4", "v5e": "v5e", "v5p": "v5p", "v6e": "v6e", "tpu7x": "7x"}


@pytest.mark.parametrize("name", CHIPS)
def test_rates_agree_with_those_that_jax_has_for_its_kernels(name):
    chip, version = CHIPS[name], pallas_tpu.ChipVersion(VERSIONS[name])
    whole = chip.devices == 1 and version.num_physical_tensor_cores_per_chip == 2  # JAX's own figures are of a core
    core = pallas_tpu.get_tpu_info_for_chip(version, 2 if whole else 1)
    cores = 2 if whole else 1
    assert chip.flops == pytest.approx(core.bf16_ops_per_second * cores, rel=0.15)
    assert chip.hbm_rate == pytest.approx(core.mem_bw_bytes_per_second * cores, rel=0.15)
    # A program may use most of the memory, never more than there is.
    assert 0.9 < chip.hbm_bytes / (core.hbm_capacity_bytes * cores) <= 1


def test_a_topology_names_its_chip():
    assert chip_of("v5e:4x4").name == "v5e" and chip_of("v5p:4x4x4").hbm_bytes > 95 * GIB
    for name in ("v5e", "v5litepod:4x4", "v5e:4", "h100:2x2", "v5e:4x4x4x4", ""):
        with pytest.raises(UserError, match="choose one of v3:2x2 .* v5e:1x1 v5e:2x2 .* v5p:2x2x1"):
            chip_of(name)


def test_a_bound_is_the_largest_of_its_three_times():
    chip = CHIPS["v5e"]
    bound = roofline(chip, flops=197e12, hbm_bytes=819e9 / 2, sent_bytes=200e9 / 4)
    assert (bound.compute, bound.memory, bound.interconnect) == pytest.approx((1, 0.5, 0.25))
    assert (bound.name, bound.seconds) == ("compute", 1)
    assert roofline(chip, flops=197e12, hbm_bytes=819e9 * 3, sent_bytes=0).name == "memory"
    assert roofline(chip, flops=0, hbm_bytes=0, sent_bytes=200).name == "interconnect"


def test_utilization_counts_each_product_once():
    chip = CHIPS["v4"]  # two devices a chip: 137.5 TFLOP/s each
    bound = roofline(chip, flops=275e12, hbm_bytes=0, sent_bytes=0)
    assert bound.seconds == pytest.approx(2)
    assert bound.utilization(chip, 275e12 * 3 / 4) == pytest.approx(0.75)
