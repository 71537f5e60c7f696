"""Measures one row of a suite, in a process of its own; `python -m scripts.benchmark --suite=...` starts it for each.

A process of its own, so that a row's memory is free again behind it, and a row that fails takes no other with it.
"""

import argparse
import dataclasses
import datetime
import importlib.util
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path[:0] = [str(ROOT), str(HERE), str(HERE.parent), str(ROOT / "tests" / "models")]

from cli.allocator import reexec_with_fast_allocator  # noqa: E402

_LIBRARIES = ("jax", "flax", "tokamax", "torch", "diffusers", "transformers", "open-clip-torch", "dalle-pytorch")


def main() -> None:
    """Parses the command line, and writes a JSON to --out: a record, or with --list the rows and what they run on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", required=True)
    parser.add_argument("--row", default="")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--clock", default="wall")
    parser.add_argument("--compiled", action="store_true", help="measure torch.compile too")
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch has the same GPU
    import jax
    from rows import SUITES

    if options.suite == "gpu" and not options.toy and jax.default_backend() != "gpu":
        sys.exit("JAX sees no GPU, which --suite=gpu is of; --toy rehearses its rows at toy size without one")
    rows = SUITES[options.suite]
    if options.list:
        on = describe(options.suite, options.toy, options.clock, options.compiled)
        plan = {row.name: {"seconds": row.seconds, "compiles": row.compiles} for row in rows}
        found: Any = {"rows": [*plan], "plan": plan, "on": on}
    else:
        if importlib.util.find_spec("torch") is None:
            sys.exit("the peers of this suite need torch and friends: `make parity` installs them")
        importlib.import_module("conftest")  # of the parity tests; makes torchvision importable
        row = next(row for row in rows if row.name == options.row)
        found = measure(row, options.suite, options.toy, options.clock, options.compiled)
    Path(options.out).write_text(json.dumps(found), encoding="utf-8")


def measure(row: Any, suite: str, toy: bool, clock: str, compiled: bool) -> dict[str, Any]:
    """The record of a row.

    Args:
      row: of `rows`.
      suite: that it is of; "gpu" measures on a GPU unless the sizes are toys.
      toy: whether sizes are toys, and windows few.
      clock: a key of `cost.side_by_side.CLOCKS`.
      compiled: whether torch.compile is a peer.
    """
    import jax
    from updates import Peers

    from cost.chips import published_memory_rate
    from cost.peak_flops import peak_flops
    from cost.side_by_side import CLOCKS, Effort, measure_side_by_side

    gpu = suite == "gpu" and jax.default_backend() == "gpu"
    case = row.case(Peers("cuda" if gpu else "cpu", compiled), toy)
    effort = Effort(windows=2, steps=1, warmup=1, attempts=1) if toy else row.effort
    peak = peak_flops(jax.local_devices()[0], case.dtype).flops if gpu else None
    memory_rate = published_memory_rate(jax.local_devices()[0].device_kind) if gpu else None
    sides = {label: dataclasses.replace(side, flops=None) if toy else side for label, side in case.sides.items()}
    rates = {"peak": peak, "memory_rate": memory_rate}
    report = measure_side_by_side(sides, effort, units=case.units, **rates, clock=CLOCKS[clock])
    now = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"row": row.name, "what": row.what, **describe(suite, toy, clock, compiled), "date": now, **report}


def describe(suite: str, toy: bool, clock: str, compiled: bool) -> dict[str, Any]:
    """What figures depend on."""
    import jax

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = jax.devices()[0]
    name = _processor() if device.platform == "cpu" else device.device_kind
    return {
        **{"suite": suite, "toy": toy, "clock": clock, "compiled": compiled},
        "machine": {"device": name, "cores": cores},
        "versions": {name: metadata.version(name) for name in _LIBRARIES if _installed(name)},
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", ":!docs")),  # results are written there
    }


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _processor() -> str:
    """The processor's name where the system tells."""
    path = Path("/proc/cpuinfo")
    fields = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    named = fields.get("model name") or platform.processor() or platform.machine()
    family = f" (family {fields['cpu family']})" if "cpu family" in fields else ""
    return f"{named}{family}"


def _git(*arguments: str) -> str:
    try:
        result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip()


if __name__ == "__main__":
    reexec_with_fast_allocator()
    main()
