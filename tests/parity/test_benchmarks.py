"""Every kind of row runs at toy size, so that benchmarks do not rot; what the figures are, nobody looks at here.

Both sides of a row are compared by it before they are timed.
"""

import importlib
import sys
from pathlib import Path

import pytest

from models import create_model

BENCHMARKS = Path(__file__).with_name("benchmarks")

# One row of each function that makes rows and is not a part of another's; the cheapest.
KINDS = (
    *("uvit_s_step", "ddpm_uvit_sampling", "autoencoder_step", "stable_diffusion_sampling", "unidiffuser_sampling"),
    *("llama_step", "vision_adapter_decoding", "clip_vit_b32_step", "dalle_decoding"),
)


@pytest.fixture(scope="module")
def one_row():
    """The program, whose modules stand beside it and not in a package."""
    before = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("one_row")
    sys.path[:] = before


@pytest.fixture
def suites(one_row):
    return importlib.import_module("rows").SUITES


@pytest.mark.parametrize("name", KINDS)
def test_a_row(name, one_row, suites):
    row = next(row for row in suites["cpu"] if row.name == name)
    record = one_row.measure(row, "cpu", True, "processor", False)
    assert record["toy"] and record["row"] == name and len(record["commit"]) == 40
    assert {"jax", "torch"} <= record["versions"].keys()
    (ours, figures), (peer, _) = record["sides"].items()
    assert ours == "jax" and record["ratios"].keys() == {peer}
    assert 0 < figures["seconds"]["low"] <= figures["seconds"]["high"]


def test_every_row_of_both_suites_has_a_network_and_a_function(suites):
    networks, kinds = importlib.import_module("denoiser_rows").NETWORKS, set()
    for rows in suites.values():
        assert len({row.name for row in rows}) == len(rows)
        for row in rows:
            module, function = row.make.split(":")
            assert callable(getattr(importlib.import_module(module), function))
            kinds.add(row.make)
            for sizes in (row.sizes, {**row.sizes, **row.toy}):
                network = sizes.get("network", "toy_unet")
                assert network in networks or Path(network).is_file()
    assert kinds >= {row.make for row in suites["cpu"] if row.name in KINDS}
    for fields in networks.values():
        create_model(**fields)


def test_reading_pictures(one_row, capsys):
    importlib.import_module("pictures").main(
        ["--width=64", "--num=8", "--size=16", "--batch_size=2", "--workers=1", "--windows=1", "--steps=1"]
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[-5:]] == [
        "processes, draft",
        "processes",
        "threads, draft",
        "threads",
        "torch",
    ]
