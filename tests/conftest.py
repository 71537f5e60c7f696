"""What every test runs under: the CPU, no network logging, and shapes checked at every call.

Shape annotations (jaxtyping) cost nothing in production; here an import hook makes beartype enforce them in every
package of the project. Both must happen before anything imports JAX or the project, hence at import of this file.
"""

import atexit
import contextlib
import fcntl
import functools
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path


def _version(package: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", metadata.version(package))[:3])


WORKER = "PYTEST_XDIST_WORKER" in os.environ  # a worker has the environment of the process that started it, as below
# "1": JAX takes the accelerator that the machine has; "rehearsal": the CPU stands in for one; "": for all other tests.
ACCELERATOR = os.environ.get("TESSERA_TESTS_ACCELERATOR", "")

if not WORKER:
    if ACCELERATOR == "1":
        os.environ.pop("JAX_PLATFORMS", None)  # with what there is comes the CPU, which is compared with
    else:
        os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["WANDB_MODE"] = "disabled"
    os.environ["MPLBACKEND"] = "agg"
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's matrices are small here: threads would wait for each other
    # Compiling takes most of a tiny program's time; what optimizing and the newer emitters of fusions would change of
    # the arithmetic is not what tests are about, nor are parts of a program that threads compile apart.
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    quick += " --xla_cpu_parallel_codegen_split_count=1"
    if _version("jaxlib") <= (0, 10, 2):  # 0.12.0.1 has no such choice, and XLA aborts on a flag that it does not know
        quick += " --xla_cpu_use_fusion_emitters=false"
    # Commands that tests start round as the tests themselves do: `cli/xla_flags.py` leaves alone what is there.
    quick += " --xla_cpu_experimental_ynn_fusion_type=+individual_convolution"
    if ACCELERATOR != "1":  # whose compiler some of them would slow down too
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}"

    # Programs that many tests compile are compiled once, also by the commands that tests start and by both suites of
    # `.ci/run`, which gives a folder for all; nobody's own cache is used.
    cache = os.environ.get("TESSERA_TESTS_CACHE") or tempfile.mkdtemp(prefix="tessera-tests-")
    if "TESSERA_TESTS_CACHE" not in os.environ:
        atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# Whoever starts the tests may ignore SIGINT (a shell's background job, many CI systems). Child processes inherit that,
# and bash cannot trap what it was started to ignore.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

from .object_store import ObjectStore  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PARITY = ROOT / "tests" / "parity"
PACKAGES = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))

install_import_hook(PACKAGES, "beartype.beartype")


def pytest_addoption(parser: pytest.Parser) -> None:
    """How many malformed inputs are tried, and which."""
    parser.addoption("--malformed", type=int, default=400, help="malformed inputs, of all kinds together")
    parser.addoption("--malformed_seed", type=int, default=0, help="which ones")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves tests/parity alone unless it is named: its tests import torch, which `make parity` installs."""
    start = config.invocation_params.dir
    named = any((start / argument.split("::")[0]).resolve().is_relative_to(PARITY) for argument in config.args)
    return True if collection_path == PARITY and not named else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what stands under tests/parity, and leaves out what needs an accelerator where none is asked for."""
    for item in items:
        if item.get_closest_marker("accelerator") and not ACCELERATOR:
            item.add_marker(pytest.mark.skip(reason="needs a GPU or TPU, and this run is of the CPU"))
        if item.path.is_relative_to(PARITY):
            item.add_marker(pytest.mark.parity)


@pytest.fixture
def start_process() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`subprocess.Popen` in a session of its own, for text; what a failed test leaves running is killed with it."""
    with contextlib.ExitStack() as stack:

        def start(command: list[str], **options: object) -> subprocess.Popen[str]:
            process = subprocess.Popen(command, text=True, start_new_session=True, **options)
            stack.callback(_end, process)
            return process

        yield start


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()


MakeOnce = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> MakeOnce:
    """`make_once(name, make)`: the folder of that name, which `make` filled once for all processes of the suite."""
    base = tmp_path_factory.getbasetemp()
    common = (base.parent if WORKER else base) / "made_once"
    common.mkdir(exist_ok=True)

    def folder(name: str, make: Callable[[Path], None]) -> Path:
        path, done = common / name, common / f"{name}.done"
        with (common / f"{name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(path, ignore_errors=True)  # of an attempt that failed
                make(path)
                done.touch()
        return path

    return folder


@pytest.fixture(scope="session")
def scenes_dir(make_once: MakeOnce) -> Path:
    """A data folder with a small `scenes/single32` and its tokenizer."""
    from data import scenes
    from scripts.prepare import prepare

    def make(folder: Path) -> None:
        scenes.prepare("single32", str(folder), train=300, validation=60, held_out=40)
        prepare("scenes/single32", str(folder), 512)

    return make_once("data", make)


@pytest.fixture(scope="session")
def debug_run(scenes_dir: Path, make_once: MakeOnce, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`debug_run("scenes/dvae.py")`: a run of that config's debug variant, trained once for all who look at it.

    `debug_run("paper/uvit.py:debug_coco")` is one of its other variants.

    Each process of the suite has a copy, since evaluation writes into the folder.
    """
    from cli.config import load_config
    from cli.errors import EXIT_OK
    from train.loop import train

    @functools.cache
    def folder(name: str) -> Path:
        variant = name if ":" in name else f"{name}:debug"
        config = load_config([f"--config={ROOT}/configs/{variant}", f"--config.data.data_dir={scenes_dir}"])

        def make(workdir: Path) -> None:
            assert train(config, workdir) == EXIT_OK

        path = make_once(name.removesuffix(".py").replace("/", "_").replace(":", "_"), make)
        return Path(shutil.copytree(path, tmp_path_factory.mktemp("runs") / Path(name).stem))

    return folder


@pytest.fixture(scope="session")
def object_store() -> Iterator[ObjectStore]:
    """A store of objects on this machine, to which gs:// leads here and in commands that tests start."""
    store = ObjectStore()
    with store.serve() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield store


@pytest.fixture
def bucket(object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of an empty bucket of its own; copies that are made on this machine are a test's own too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    name = f"bucket-{len(object_store.buckets)}"
    object_store.buckets.add(name)
    yield name
    object_store.forbidden, object_store.unknown = "", False
