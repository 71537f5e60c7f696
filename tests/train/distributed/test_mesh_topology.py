"""Which rows of a batch each host of a TPU slice reads, on a slice that is not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

PROGRAM = """
import json, os, sys
from scripts.fit import ENVIRONMENT
os.environ.update(ENVIRONMENT)
from configs.common import get_defaults
from cost.compiled import topology_devices
from train.distributed.mesh import batch_sharding, make_mesh, process_rows
devices, report = topology_devices("v5e:4x4"), []
for sizes in json.loads(sys.argv[1]):
    config = get_defaults().mesh
    config.update(sizes)
    mesh = make_mesh(config, devices)
    places = [
        {"place": place, "coordinates": device.coords, "process": device.process_index}
        for place, device in zip(((d, f, t) for d in range(sizes["data"]) for f in range(sizes["fsdp"])
                                  for t in range(sizes["tensor"])), mesh.devices.flat, strict=True)
    ]
    rows = [process_rows(batch_sharding(mesh), 64, process) for process in range(4)]
    report.append({"places": places, "rows": rows})
print(json.dumps(report))
"""

MESHES = (
    {"data": 16, "fsdp": 1, "tensor": 1},
    {"data": 4, "fsdp": 4, "tensor": 1},
    {"data": 1, "fsdp": 8, "tensor": 2},
)


@pytest.mark.slow
def test_hosts_of_a_slice_read_disjoint_rows_by_their_place_in_it():
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(MESHES)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    for sizes, report in zip(MESHES, json.loads(result.stdout), strict=True):
        rows = report["rows"]
        assert sorted(row for each in rows for row in each) == list(range(64)), f"{sizes}: not disjoint, or not all"
        # A host has a block of 2 x 2 chips. A device has the rows of its place along data and fsdp.
        blocks: dict[tuple[int, int], set[int]] = {}
        hosts: dict[tuple[int, int], set[int]] = {}
        size = 64 // (sizes["data"] * sizes["fsdp"])
        for each in report["places"]:
            (data, fsdp, _), (x, y, _) = each["place"], each["coordinates"]
            first = (data * sizes["fsdp"] + fsdp) * size
            blocks.setdefault((x // 2, y // 2), set()).update(range(first, first + size))
            hosts.setdefault((x // 2, y // 2), set()).add(each["process"])
        assert len(blocks) == 4 and all(len(processes) == 1 for processes in hosts.values())
        for block, expected in blocks.items():
            (process,) = hosts[block]
            assert rows[process] == sorted(expected), f"{sizes}: host {process} at {block}"
