"""What a machine needs before the suite of a GPU can run there, and the commands that bring it: `--prepare`."""

import re
import sys
import textwrap
from pathlib import Path

from packaging.markers import Marker, default_environment

from cli.errors import UserError
from cost.commands import ROOT

LOCK, MAKEFILE = ROOT / "requirements.lock", ROOT / "Makefile"
EXTRAS = "dev,drawings,parity,cuda,tokamax"
_OF_CUDA = re.compile(r"(jax|jaxlib|jax-cuda.*|nvidia-.*|cuda-.*|torch|triton|tokamax)==")


def locked_wheels(lock: str, python: str) -> list[str]:
    """`NAME==VERSION` of everything that a lock file holds for Linux on x86-64.

    Args:
      lock: its text.
      python: version of the interpreter, such as "3.11".
    """
    machine = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64"}
    environment = {**default_environment(), **machine, "python_version": python, "python_full_version": f"{python}.0"}
    environment |= {"implementation_name": "cpython", "platform_python_implementation": "CPython", "extra": ""}
    found = []
    for line in lock.splitlines():
        if written := re.match(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^ ;]+)(?: *; *(.*))?$", line):
            name, version, marker = written.groups()
            if marker is None or Marker(marker).evaluate(environment):
                found.append(f"{name}=={version}")
    return found


def describe_preparation() -> str:
    """Wheels, data, and commands, as text.

    Raises:
      UserError: if the checkout lacks the lock file.
    """
    if not LOCK.is_file():
        raise UserError(f"{LOCK} is missing; the suite is a part of the checkout")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    wheels = locked_wheels(LOCK.read_text(encoding="utf-8"), python)
    cuda = [wheel for wheel in wheels if _OF_CUDA.match(wheel)]
    others = [wheel for wheel in wheels if wheel not in cuda]
    # Not in the lock file: the Makefile says why.
    apart = _makefile_variable(MAKEFILE, "DALL_E")
    return "\n".join(
        [
            f"The suite needs, on Linux x86-64 with Python {python} and an NVIDIA driver for CUDA 13 (580 or later):",
            "",
            f"{len(wheels)} wheels of requirements.lock, for CUDA:",
            *_wrapped(cuda),
            "and",
            *_wrapped(others),
            f"and, without what they ask for, {apart}.",
            "",
            "Data: scenes/single32, which is drawn and needs no network; nobody's weights.",
            "",
            "On a machine with a network, the GPU's own one too:",
            "    make .venv/.parity && scripts/launch/gpu.sh install",
            "    .venv/bin/pip install -c requirements.lock -e '.[tokamax]'",
            "",
            f"Or, for a GPU machine without a network, on one of the same kind with Python {python}, in a checkout:",
            f"    python{python} -m pip wheel -w wheels -c requirements.lock setuptools '.[{EXTRAS}]'",
            f"    python{python} -m pip wheel -w wheels --no-deps {apart}",
            "and with the checkout and the folder `wheels` there:",
            f"    python{python} -m venv .venv",
            f"    .venv/bin/pip install --no-index --find-links=wheels 'tessera-jax[{EXTRAS}]'",
            f"    .venv/bin/pip install --no-index --find-links=wheels --no-deps {apart}",
            "",
            "Then, with a GPU:",
            "    .venv/bin/python -m scripts.prepare --dataset=scenes/single32",
            "    .venv/bin/python -m scripts.benchmark --suite=gpu --minutes=12",
        ]
    )


def _wrapped(words: list[str]) -> list[str]:
    return textwrap.wrap(", ".join(words), 116, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def _makefile_variable(makefile: Path, name: str) -> str:
    """What a line `NAME := ...` gives."""
    found = re.search(rf"^{name} := (.*)$", makefile.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1].strip() if found else ""
