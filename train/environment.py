"""What a run ran on: commit, versions, devices, command, flags of the compiler."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy", "wandb")
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_OPTIMIZATION_LEVEL")


def describe_environment() -> dict[str, Any]:
    """Returns what `environment.json` holds."""
    root = Path(__file__).resolve().parents[1]
    return {
        "command": sys.orig_argv,
        "commit": _git(root, "rev-parse", "HEAD"),
        "dirty": bool(_git(root, "status", "--porcelain")),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "devices": [str(device) for device in jax.devices()],
        "device_kind": jax.devices()[0].device_kind,
        "processes": jax.process_count(),
        "compiler_flags": {name: os.environ[name] for name in _FLAGS if os.environ.get(name)},
    }


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command, or None outside a checkout."""
    try:
        result = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
