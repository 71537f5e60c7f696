"""Which flags of XLA a command adds to the user's."""

import importlib.metadata
import os

import pytest

from cli import accelerators, xla_flags

EIGEN = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
OTHER = "--xla_cpu_enable_fast_math=true"
OWN = "--xla_cpu_experimental_ynn_fusion_type=+individual_dot"


@pytest.mark.parametrize(
    ("own", "platforms", "version", "expected"),
    [
        ("", "cpu", "0.10.2", EIGEN),
        (OTHER, "cpu", "0.12.0.1", f"{OTHER} {EIGEN}"),
        (OWN, "cpu", "0.10.2", OWN),
        ("", "cuda", "0.10.2", ""),
        ("", "cpu", "0.13.0", ""),  # XLA would end the process at a flag that it does not have
    ],
)
def test_convolutions_go_to_eigen_on_a_cpu_that_this_was_measured_with(monkeypatch, own, platforms, version, expected):
    monkeypatch.setattr(accelerators, "DEVICES", ())
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setenv("XLA_FLAGS", own)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    xla_flags.convolve_with_eigen()
    assert os.environ["XLA_FLAGS"] == expected
