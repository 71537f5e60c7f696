"""Several processes as one run: how they find each other, agree, and end together."""

import json
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from cli.accelerators import has_tpu
from cli.errors import UserError

# A process that says nothing for this long is taken for dead, and the others end.
HEARTBEAT_SECONDS = 60
# How long processes wait for each other at the start, and at the end.
START_SECONDS = 300
END_SECONDS = 60


def join_processes(where: str) -> None:
    """Connects this process with the others of its run; to be called before anything asks JAX for devices.

    Args:
      where: `HOST:PORT,PROCESSES,INDEX`, the address of process 0, the number of processes, and which one this is;
        `auto` for what the cluster says (Cloud TPU, SLURM, and the others that JAX knows); `none` for a process on its
        own; "" for `auto` inside an srun step of several tasks and on Cloud TPU, `none` elsewhere.

    Raises:
      UserError: if `where` is none of these, or the processes do not find each other.
    """
    if where == "none" or (not where and not _in_cluster()):
        return
    arguments: dict[str, Any] = {}
    if where not in ("", "auto"):
        arguments = _parse(where)
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=END_SECONDS,
        )
    except ValueError as error:  # no cluster was found
        raise UserError(
            f"--distributed={where} finds no cluster to take the processes from ({error}); "
            "give --distributed=HOST:PORT,PROCESSES,INDEX"
        ) from error
    except RuntimeError as error:
        raise UserError(
            f"the processes of this run did not find each other within {START_SECONDS} s "
            f"({str(error).splitlines()[0]}); check that all were started and reach the address of process 0"
        ) from error


def is_first() -> bool:
    """True in the one process that writes logs and pictures, and speaks."""
    return jax.process_index() == 0


def from_first(function: Callable[[], Any]) -> Any:
    """Calls a function on process 0 and returns its result, a JSON value, on all of them.

    Raises:
      UserError: on every process, if the function raised one.
    """
    if jax.process_count() == 1:
        return function()
    message, unexpected = b"", None
    if is_first():
        try:
            answer = {"value": function()}
        except UserError as error:
            answer = {"error": str(error)}
        except Exception as error:  # the others must not wait for an answer in vain
            answer, unexpected = {"error": f"process 0 failed: {error!r}"}, error
        message = json.dumps(answer).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    buffer = np.zeros(size, np.uint8)
    if is_first():
        buffer[:] = np.frombuffer(message, np.uint8)
    answer = json.loads(bytes(multihost_utils.broadcast_one_to_all(buffer)))
    if unexpected is not None:
        raise unexpected
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["value"]


def all_agree(value: bool) -> bool:
    """True if `value` is true on every process."""
    return bool(np.all(multihost_utils.process_allgather(np.asarray(value))))


def _parse(where: str) -> dict[str, Any]:
    address, _, rest = where.partition(",")
    host, colon, port = address.rpartition(":")
    numbers = rest.split(",")
    if not (host and colon and port.isdigit() and len(numbers) == 2 and all(number.isdigit() for number in numbers)):
        raise UserError(f"--distributed={where} must be HOST:PORT,PROCESSES,INDEX, or auto, or none")
    count, index = map(int, numbers)
    if index >= count:
        raise UserError(f"--distributed={where}: the index of {count} processes is 0 to {count - 1}")
    return {"coordinator_address": address, "num_processes": count, "process_id": index}


def _in_cluster() -> bool:
    """Whether this process was started as one of several, or on a Cloud TPU, where one process is the special case."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return _in_step() or (("tpu" in platforms.split(",") or not platforms) and has_tpu())


def _in_step() -> bool:
    """Inside an srun step of several tasks. A batch script itself has SLURM's other variables, but is one process."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
