"""XLA's compiled programs, kept from one command to the next in the user's cache folder.

Compiling takes most of a short command's time. JAX can keep what took it a second or more (its persistent compilation
cache); the environment variables that switch this on are read when jax is imported, so a command sets them first.

JAX finds an entry by program, versions, flags and kind of device, but not by the processor that XLA compiled for, nor
by the number of its cores, over which a CPU program is split when it is compiled. A home folder may be shared by
machines that differ in both: each kind gets a folder of its own. It is as trusted as code, and nobody else's to write.

An entry is written in place, and its time of use after it. A command killed in between leaves a torn entry that has
none; JAX would warn of it at every use, and never replace it. The next command removes it.
"""

import hashlib
import os
import platform
import sys
from pathlib import Path

SWITCH = "TESSERA_COMPILATION_CACHE"  # `off` leaves JAX as it is
FOLDER = "JAX_COMPILATION_CACHE_DIR"
SIZE = "JAX_COMPILATION_CACHE_MAX_SIZE"
MAX_BYTES = 10 * 2**30  # of one folder; what was used least recently goes first

# Lines of /proc/cpuinfo that say what code a processor runs, on x86 and on Arm.
_PROCESSOR = (
    *("vendor_id", "cpu family", "model", "flags"),
    *("CPU implementer", "CPU architecture", "CPU part", "Features"),
)


def keep_compiled_programs() -> None:
    """Lets JAX keep compiled programs under `${XDG_CACHE_HOME:-~/.cache}/tessera/xla`, or returns.

    To be called before anything imports jax. It changes the environment, so child processes share the folder.

    It returns at once where the user set JAX_COMPILATION_CACHE_DIR (to a folder, or to nothing for none) or
    TESSERA_COMPILATION_CACHE=off, and where there is no home or the folder cannot be written or locked.
    """
    if os.environ.get(SWITCH, "") == "off" or FOLDER in os.environ or "jax" in sys.modules:
        return
    try:
        folder = cache_home() / "tessera" / "xla" / machine()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_torn_entries(folder)
    except (ImportError, OSError, RuntimeError):  # no fcntl; not writable; no home
        return
    os.environ[FOLDER] = str(folder)
    os.environ.setdefault(SIZE, str(MAX_BYTES))


def machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """A name for what XLA compiles CPU programs for: two machines with the same one can run each other's.

    Args:
      cpuinfo: description of the processors; where there is none, the name is this machine's alone.
    """
    try:
        first = cpuinfo.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
        processor = [line for line in first.splitlines() if line.partition(":")[0].strip() in _PROCESSOR]
    except OSError:
        processor = [platform.node()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    described = [platform.machine(), *processor, str(cores), os.environ.get("NPROC", "")]  # NPROC: XLA's threads
    return f"{platform.machine()}-{hashlib.sha256('|'.join(described).encode()).hexdigest()[:12]}"


def cache_home() -> Path:
    """The user's folder for what can be made again (XDG Base Directory Specification); a relative one is ignored."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return given if given.is_absolute() else Path("~").expanduser() / ".cache"


def _remove_torn_entries(folder: Path) -> None:
    """Removes entries without a time of use, under the lock that JAX holds while it writes one.

    Another command that holds the lock may be writing one; they are then left for the next command.

    Raises:
      ImportError, OSError: if there is no such lock here, or the folder cannot be written.
    """
    import fcntl  # not on Windows

    with open(folder / ".lockfile", "a", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        for entry in folder.glob("*-cache"):
            if not entry.with_name(f"{entry.name.removesuffix('-cache')}-atime").exists():
                entry.unlink(missing_ok=True)
