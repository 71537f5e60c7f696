"""A faster memory allocator for training on a CPU.

XLA's CPU backend takes its temporary buffers from malloc at every step and gives them back after it. glibc returns such
large pieces to the kernel, so that every step touches fresh pages. The settings below make glibc keep what it has and
ask for huge pages. A step of the demo's transformer goes from 35,000 page faults to none, and from 383 to 292 ms of
processor time; the process grows little (docs/performance.md has the command).

glibc reads them once, before Python starts; so a command sets them and executes itself again, as its first act.
"""

import ctypes
import os
import re
import sys

from cli.accelerators import runs_on_cpu

# Tunable of glibc -> (value, the older variable that sets the same thing).
TUNABLES = {
    "glibc.malloc.hugetlb": ("1", ""),  # transparent huge pages; glibc 2.35 and later
    "glibc.malloc.arena_max": ("1", "MALLOC_ARENA_MAX"),  # one heap: other arenas cannot grow past 64 MB
    "glibc.malloc.mmap_max": ("0", "MALLOC_MMAP_MAX_"),  # large pieces come from the heap too
    "glibc.malloc.trim_threshold": ("100000000000", "MALLOC_TRIM_THRESHOLD_"),  # and are not given back
    "glibc.malloc.top_pad": ("268435456", "MALLOC_TOP_PAD_"),  # the heap grows by 256 MB at a time
}
SWITCH = "TESSERA_ALLOCATOR"  # `default` leaves malloc as it is
ORIGINAL = "TESSERA_ORIGINAL_GLIBC_TUNABLES"  # set from one execution to the next

_done = False


_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # of mallopt


def keep_freed_memory() -> None:
    """Makes glibc keep what this process frees, without another execution: for one that reads pictures.

    Shrinking a picture of 640 x 480 takes some large arrays; with fresh pages for each of them it took 7 times as long.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and os.environ.get(SWITCH) != "default":
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def reexec_with_fast_allocator() -> None:
    """Executes the running command again with malloc tuned for XLA, or returns.

    To be called before anything imports jax, by a command's main module. The process keeps its id, arguments, working
    directory, standard streams and exit code. The second execution finds that it is one, gives the environment back its
    former state, so that child processes start as they would have, and returns.

    It returns at once where it would not help or could do harm: not glibc 2.35 or later (others are untested), jax
    already imported, an accelerator to be used, a spawned worker, an interactive session, a debugger,
    TESSERA_ALLOCATOR=default. What the user set in GLIBC_TUNABLES or the MALLOC_ variables stays.
    """
    global _done
    if ORIGINAL in os.environ:
        original = os.environ.pop(ORIGINAL)
        if original:
            os.environ["GLIBC_TUNABLES"] = original
        else:
            os.environ.pop("GLIBC_TUNABLES", None)
        _done = True
    if _done or not _wanted():
        return
    original = os.environ.get("GLIBC_TUNABLES", "")
    environment = {**os.environ, "GLIBC_TUNABLES": tunables(os.environ), ORIGINAL: original}
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    except OSError:  # the interpreter has moved, say: the default allocator is slower, not wrong
        _done = True


def tunables(environment: os._Environ[str] | dict[str, str]) -> str:
    """The value of GLIBC_TUNABLES: the user's, and then each of ours that the user did not set either way."""
    own = environment.get("GLIBC_TUNABLES", "")
    added = [
        f"{name}={value}"
        for name, (value, variable) in TUNABLES.items()
        if f"{name}=" not in own and not environment.get(variable)
    ]
    return ":".join([own, *added] if own else added)


def _wanted() -> bool:
    """True if this process can be executed again, and gains by it."""
    main = sys.modules.get("__main__")
    return (
        os.environ.get(SWITCH, "") != "default"
        and _glibc() >= (2, 35)
        and "jax" not in sys.modules
        and runs_on_cpu()
        and bool(sys.executable)
        # Not a prompt, a notebook, `-c` or standard input, nor a spawned worker, which imports the main module too.
        and getattr(main, "__name__", "") == "__main__"
        and getattr(main, "__file__", None) is not None
        and sys.gettrace() is None
    )


def _glibc() -> tuple[int, int]:
    """(major, minor) of the C library if it is glibc, (0, 0) otherwise."""
    try:
        found = re.fullmatch(r"glibc (\d+)\.(\d+).*", os.confstr("CS_GNU_LIBC_VERSION") or "")
    except (AttributeError, OSError, ValueError):
        found = None
    return (int(found[1]), int(found[2])) if found else (0, 0)
