"""Two real processes of one run, on this machine."""

import functools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from weights.run import read_metrics

ROOT = Path(__file__).resolve().parents[3]


class Pair:
    """Two processes of one run with four devices each; both execute the statement `before` first."""

    def __init__(
        self,
        start_process: Callable[..., subprocess.Popen[str]],
        scenes_dir: Path,
        config: str,
        workdir: Path,
        *overrides: str,
        before: str = "",
    ):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.workdir = workdir
        run = "import runpy, sys; sys.argv = sys.argv[1:]; "
        run += "runpy.run_module('train', run_name='__main__', alter_sys=True)"
        module = ["-c", f"{before}; {run}", "train"] if before else ["-m", "train"]
        command = [sys.executable, *module, f"--config={config}"]
        command += [f"--workdir={workdir}", f"--config.data.data_dir={scenes_dir}", *overrides]
        flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
        self.logs = [workdir.with_name(f"{workdir.name}.{index}.log") for index in range(2)]
        self.processes = []
        for index, log in enumerate(self.logs):
            with log.open("w") as file:
                process = start_process(
                    [*command, f"--distributed={address},2,{index}"],
                    cwd=ROOT,
                    env={**os.environ, "XLA_FLAGS": flags},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            self.processes.append(process)

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 300
        while not any(row["step"] >= step for row in read_metrics(self.workdir)):
            assert time.monotonic() < deadline and all(p.poll() is None for p in self.processes), self.output()
            time.sleep(0.1)

    def codes(self, seconds: float = 300) -> list[int]:
        return [process.wait(seconds) for process in self.processes]

    def output(self, index: int | None = None) -> str:
        return "\n".join(log.read_text() for log in (self.logs if index is None else [self.logs[index]]))


@pytest.fixture
def start_pair(scenes_dir: Path, start_process: Callable[..., subprocess.Popen[str]]) -> Callable[..., Pair]:
    """Starts `start_pair(config, workdir, *overrides)` as two processes over loopback."""
    return functools.partial(Pair, start_process, scenes_dir)
