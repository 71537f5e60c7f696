"""What every test runs under: the CPU, no network logging, and shapes checked at every call.

Shape annotations (jaxtyping) cost nothing in production; here an import hook makes beartype enforce them in every
package of the project. Both must happen before anything imports JAX or the project, hence at import of this file.
"""

import atexit
import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["WANDB_MODE"] = "disabled"
os.environ["MPLBACKEND"] = "agg"
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's matrices are small here: threads would wait for each other
# Optimizing takes most of a tiny program's time; the arithmetic it would change is not what tests are about.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

# Programs that many tests compile are compiled once, also by the commands that tests start; nobody's own cache is used.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="tessera-tests-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PARITY = ROOT / "tests" / "parity"
PACKAGES = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))

install_import_hook(PACKAGES, "beartype.beartype")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves tests/parity alone unless it is named: its tests import torch, which `make parity` installs."""
    start = config.invocation_params.dir
    named = any((start / argument.split("::")[0]).resolve().is_relative_to(PARITY) for argument in config.args)
    return True if collection_path == PARITY and not named else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what stands under tests/parity."""
    for item in items:
        if item.path.is_relative_to(PARITY):
            item.add_marker(pytest.mark.parity)


@pytest.fixture(scope="session")
def scenes_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with a small `scenes/single32` and its tokenizer."""
    from data import scenes
    from scripts.prepare import prepare

    folder = tmp_path_factory.mktemp("data")
    scenes.prepare("single32", str(folder), train=300, validation=60, held_out=40)
    prepare("scenes/single32", str(folder), 512)
    return folder


@pytest.fixture(scope="session")
def debug_run(scenes_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`debug_run("scenes/dvae.py")`: the folder of that config's debug variant, trained once for all who look at it."""
    from cli.config import load_config
    from cli.errors import EXIT_OK
    from train.loop import train

    @functools.cache
    def folder(name: str) -> Path:
        workdir = tmp_path_factory.mktemp("runs") / Path(name).stem
        config = load_config([f"--config={ROOT}/configs/{name}:debug", f"--config.data.data_dir={scenes_dir}"])
        assert train(config, workdir) == EXIT_OK
        return workdir

    return folder
