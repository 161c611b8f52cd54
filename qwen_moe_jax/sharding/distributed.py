"""Several processes that compute together, one for each host of a pod (or for each GPU, or several on one machine)."""

import atexit
import hashlib
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import NoReturn

import jax
import numpy as np
from jax._src import distributed  # the coordinator's address and its table of keys have no public name
from jax.experimental import multihost_utils

from qwen_moe_jax.errors import ShardingError
from qwen_moe_jax.sharding.watch import FirstWatch, OtherWatch

#: Seconds without a sign of life after which JAX takes a process for dead: for hosts that vanish from the network.
#: Processes that die on a host which lives are noticed at once (see `watch`).
HEARTBEAT_TIMEOUT = 45
#: Seconds in which the watch hears of a death whose first sign was an exception in a collective, and ends this process.
_ECHO = 1.0
_WATCH_KEY = "qwen_moe_jax/watch"

_watch: FirstWatch | OtherWatch | None = None


def initialize_distributed(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 300,
) -> None:
    """Makes this process one of several that compute together. To be called before anything else uses JAX.

    `jax.distributed.initialize`, and what it leaves to others: CPUs get collectives between processes, a process that
    dies or raises an exception ends all others at once with a message (exit code 75, or its own), SIGTERM keeps its
    meaning, and every refusal says what to set. Where it was called already, nothing happens.

    Args:
        coordinator_address: `host:port` of process 0, the port being a free one. None leaves it, like the other two,
            to JAX, which knows TPU pods, Slurm, Open MPI and Kubernetes, and reads JAX_COORDINATOR_ADDRESS. Under Slurm
            and Open MPI each process takes one GPU of its host.
        num_processes: how many there are.
        process_id: the number of this one, from 0.
        timeout: seconds in which all processes have to come; otherwise this one ends with exit code 2.

    Raises:
        ShardingError: JAX runs already; no cluster was recognised, and the arguments do not say what is missing.
    """
    global _watch
    if jax.distributed.is_initialized():
        return
    if jax.config.jax_cpu_collectives_implementation in (None, "none"):  # type: ignore[attr-defined]
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    waiting = threading.Timer(timeout, _give_up, [coordinator_address, num_processes, process_id, timeout])
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            initialization_timeout=timeout + 60,  # JAX would abort, at length
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
        )
    except (RuntimeError, ValueError, TypeError, IndexError, OSError) as error:
        raise _refusal(error, coordinator_address, num_processes, process_id) from error
    finally:
        waiting.cancel()
    if threading.current_thread() is threading.main_thread():
        # JAX takes SIGTERM for its preemption service, and a process that does not ask that service cannot be stopped.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    _watch = _begin_to_watch()
    sys.excepthook = partial(_end_by_exception, sys.excepthook)
    atexit.register(_end)


def num_processes() -> int:
    """How many processes there are. Unlike `jax.process_count`, it may be asked before JAX has looked for devices."""
    return distributed.global_state.num_processes


def is_process_zero() -> bool:
    """Whether this process is the one that writes and speaks for all."""
    return distributed.global_state.process_id == 0


def barrier(what: str) -> None:
    """Returns when all processes have come here."""
    if num_processes() > 1:
        multihost_utils.sync_global_devices(what)


def broadcast(text: str) -> str:
    """The text that process 0 brings here. All processes call it together."""
    if num_processes() == 1:
        return text
    mine = np.frombuffer(text.encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(mine.size)))
    sent = mine if is_process_zero() else np.zeros(length, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(sent), np.uint8).tobytes().decode()


def require_same(what: str, text: str) -> None:
    """Compares what the processes were started with, or see. All processes call it together.

    Raises:
        ShardingError: it is not the same everywhere; on all processes.
    """
    if num_processes() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest()[:4], np.uint32)
    digests = np.asarray(multihost_utils.process_allgather(digest)).reshape(num_processes())
    others = [process for process, found in enumerate(digests) if found != digests[0]]
    if others:
        raise ShardingError(
            f"{what}: found another one in process {', '.join(map(str, others))} than in process 0, expected the same "
            "in all. Start every process with the same command, but for its number."
        )


def fail(code: int, reason: str) -> None:
    """Where there are several processes, ends them all with an exit code. The others give `reason`, a line, as theirs.

    An exception in one process alone leaves the others waiting for it.
    """
    if _watch is not None:
        _flush()
        _watch.fail(code, reason)


def _begin_to_watch() -> FirstWatch | OtherWatch | None:
    state = distributed.global_state
    if state.num_processes == 1:
        return None
    if state.process_id == 0:
        watch = FirstWatch()
        state.client.key_value_set(_WATCH_KEY, watch.address)
        return watch
    address = state.client.blocking_key_value_get(_WATCH_KEY, 60_000)
    host = state.coordinator_address.rsplit(":", 1)[0].strip("[]")
    try:
        return OtherWatch(state.process_id, host, address)
    except OSError as error:
        warnings.warn(
            f"process {state.process_id} cannot reach port {address.split(' ')[0]} of {host} ({error}): a process that "
            f"dies will be noticed by JAX alone, after {HEARTBEAT_TIMEOUT} seconds.",
            stacklevel=3,
        )
        return None


def _end_by_exception(
    tell: Callable[..., object], kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Instead of `sys.excepthook`: nobody caught it."""
    time.sleep(_ECHO)
    tell(kind, error, trace)
    fail(1, f"{kind.__name__}: {error}")


def _end() -> None:
    """At the end of the program, with the others."""
    jax.distributed.shutdown()  # waits for the others, whom the watch still sees
    if _watch is not None:
        _watch.done()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


def _give_up(address: str | None, count: int | None, number: int | None, timeout: int) -> NoReturn:
    # Not by an exception: the main thread waits inside JAX, which would abort at the end.
    state = distributed.global_state
    where = address or state.coordinator_address or "the coordinator"
    os.write(
        2,
        f"ShardingError: process {state.process_id if number is None else number}: not all "
        f"{count or state.num_processes} processes have met at {where} within {timeout} s. Start every one of them, "
        "with the same coordinator (a host and a port that all can reach), the same number of processes, and a number "
        "of its own.\n".encode(),
    )
    os._exit(2)


def _refusal(error: Exception, address: str | None, count: int | None, number: int | None) -> ShardingError:
    if "before any JAX calls" in str(error):
        return ShardingError(
            "initialize_distributed: JAX has already looked for its devices, which are those of this process alone. "
            "Call it first, before models, meshes, arrays or jax.devices()."
        )
    found = f"coordinator_address={address!r}, num_processes={count}, process_id={number}"
    said = str(error).strip().rstrip(".") or type(error).__name__
    return ShardingError(
        f"initialize_distributed: found {found}, which JAX refuses ({said}). On TPU pods, under Slurm's srun and Open "
        "MPI's mpirun, leave all three out (--distributed); elsewhere give all of them: host:port of process 0, how "
        "many processes there are, and the number of this one, from 0 (--coordinator, --num-processes, --process-id)."
    )
