"""Where JAX is told to stay on the CPU."""

import importlib.util

import pytest

from cli import accelerators

ANYTHING, NOTHING = ("/dev/nul?",), ("/dev/no-such-device[0-9]*",)


@pytest.mark.parametrize(
    ("devices", "platforms", "libtpu", "expected"),
    [
        (NOTHING, "", True, "cpu"),
        (NOTHING, "", False, ""),  # nothing to search with: JAX finds out by itself
        (ANYTHING, "", True, ""),
        (NOTHING, "cuda", True, "cuda"),  # what the user says stays
    ],
)
def test_the_search_is_spared_where_it_is_in_vain(monkeypatch, devices, platforms, libtpu, expected):
    monkeypatch.setattr(accelerators, "DEVICES", devices)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if libtpu else None)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    accelerators.spare_the_search_for_a_tpu()
    assert accelerators.os.environ.get("JAX_PLATFORMS", "") == expected
