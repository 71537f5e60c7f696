"""Numbers beside what the mathematics allows."""

import pytest

from cli.errors import UserError
from cli.ranges import check_range, check_ranges, check_seed


@pytest.mark.parametrize(
    ("value", "interval", "fits"),
    [
        *((value, "[0, 1)", value in (0, 0.999)) for value in (-0.001, 0, 0.999, 1)),
        *((value, "(0, 1]", value in (1e-30, 1.0)) for value in (0.0, 1e-30, 1.0, 1.001)),
        *((value, "[1, inf)", value in (1, 10**40)) for value in (0, 1, 10**40, -1)),
        *((value, "[0, 1)", False) for value in (0.99999999, 1 - 1e-12)),  # 1 in float32
        *((value, "(0, inf)", value == 1e-40) for value in (1e-46, 1e-40, 1e40)),  # 0, itself, inf
        *((value, "[0.1, 0.3]", True) for value in (0.1, 0.3)),  # ends that float32 has not
        *((value, "[0, inf)", False) for value in (float("nan"), float("inf"), -float("inf"), True, "1", None)),
    ],
)
def test_a_number_lies_in_its_interval_or_is_named(value, interval, fits):
    if fits:
        check_range("config.a", value, interval)
        return
    with pytest.raises(UserError, match="^config.a must be (at least|above) [01].*, not"):
        check_range("config.a", value, interval)


def test_only_numbers_with_an_interval_are_looked_at():
    check_ranges("config", {"a": 1.0, "b": -5}, {"a": "[0, 1]", "c": "[0, 1]"})
    with pytest.raises(UserError, match="config.b must be at least 0 and at most 1, not -5"):
        check_ranges("config", {"a": 1.0, "b": -5}, {"b": "[0, 1]"})
    with pytest.raises(UserError, match="b must be above 0.5 and below 2147483648, not -5"):
        check_ranges("config", {"b": -5}, {"b": "(0.5, 2147483648)"})


def test_seeds_are_those_that_the_generators_tell_apart():
    assert [check_seed("--seed", seed) for seed in (0, 2**32 - 1)] == [0, 4294967295]
    for seed in (-1, 2**32, 2**63, 10**20):
        with pytest.raises(
            UserError, match=f"--seed={seed} is impossible; a seed is a whole number from 0 to 4294967295"
        ):
            check_seed("--seed", seed)
