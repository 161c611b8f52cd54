"""Several processes of one program: one for each host of a pod (or for each GPU, or several on one machine)."""

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

# The one private module of JAX: the number of processes before JAX looks for devices, the coordinator's address and its
# key-value store have no public name (jax 0.10.2).
from jax._src import distributed
from jax.experimental import multihost_utils

from qwen_moe_jax.errors import ShardingError
from qwen_moe_jax.rounding import next_power_of_two
from qwen_moe_jax.sharding.watch import WatchClient, WatchServer

#: Seconds without a heartbeat after which JAX takes a process for dead: for hosts that vanish from the network.
#: Processes that die on a running host are noticed at once (see `watch`).
HEARTBEAT_TIMEOUT = 45
#: Seconds that an uncaught exception waits: if a collective raised it because another process died, the watch ends this
#: process meanwhile, with that process's name.
_DEATH_REPORT_DELAY = 1.0
_WATCH_KEY = "qwen_moe_jax/watch"

_watch: WatchServer | WatchClient | None = None


def initialize_distributed(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 300,
) -> None:
    """`jax.distributed.initialize` with early failure. Call it before any other use of JAX.

    It adds to JAX's own: CPUs get collectives between processes, a process that dies or raises an exception ends all
    others at once with a message (exit code 75, or its own), SIGTERM keeps its meaning, and every error says what to
    set. A second call does nothing.

    Args:
        coordinator_address: `host:port` of process 0, the port being a free one. None leaves it, like the other two,
            to JAX, which recognises TPU pods, Slurm, Open MPI and Kubernetes, and reads JAX_COORDINATOR_ADDRESS. Under
            Slurm and Open MPI each process takes one GPU of its host.
        num_processes: the number of processes.
        process_id: the number of this one, from 0.
        timeout: seconds in which all processes have to connect; otherwise this one ends with exit code 2.

    Raises:
        ShardingError: JAX has initialised its devices already; or no cluster was recognised and an argument is missing.
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
            initialization_timeout=timeout + 60,  # at its own timeout JAX aborts with a stack trace
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
        )
    except (RuntimeError, ValueError, TypeError, IndexError, OSError) as error:
        raise _refusal(error, coordinator_address, num_processes, process_id) from error
    finally:
        waiting.cancel()
    if threading.current_thread() is threading.main_thread():
        # JAX reserves SIGTERM for its preemption service: a process without that service could not be stopped.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    _watch = _start_watch()
    sys.excepthook = partial(_end_by_exception, sys.excepthook)
    atexit.register(_end)


def num_processes() -> int:
    """The number of processes. Unlike `jax.process_count`, it does not initialise JAX's devices."""
    return distributed.global_state.num_processes


def is_process_zero() -> bool:
    """Whether this is process 0, which writes files and prints."""
    return distributed.global_state.process_id == 0


def barrier(what: str) -> None:
    """Waits until all processes have called it; `what` names the barrier in JAX's messages."""
    if num_processes() > 1:
        multihost_utils.sync_global_devices(what)


def broadcast(text: str) -> str:
    """Process 0's text. A collective: all processes call it."""
    if num_processes() == 1:
        return text
    mine = np.frombuffer(text.encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(mine.size)))
    sent = np.zeros(next_power_of_two(length), np.uint8)  # JAX compiles a program for each size
    if is_process_zero():
        sent[:length] = mine
    return np.asarray(multihost_utils.broadcast_one_to_all(sent), np.uint8)[:length].tobytes().decode()


def require_same(what: str, text: str) -> None:
    """Checks that all processes have the same text, such as their command or a file's content. A collective.

    Raises:
        ShardingError: the texts differ; raised in all processes.
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
    """Ends all processes with an exit code; the others print `reason`, one line. A single process goes on.

    Without it, an exception in one process leaves the others waiting in their next collective.
    """
    if _watch is not None:
        _flush()
        _watch.fail(code, reason)


def _start_watch() -> WatchServer | WatchClient | None:
    state = distributed.global_state
    if state.num_processes == 1:
        return None
    if state.process_id == 0:
        watch = WatchServer()
        state.client.key_value_set(_WATCH_KEY, watch.address)
        return watch
    address = state.client.blocking_key_value_get(_WATCH_KEY, 60_000)
    host = state.coordinator_address.rsplit(":", 1)[0].strip("[]")
    try:
        return WatchClient(state.process_id, host, address)
    except OSError as error:
        warnings.warn(
            f"process {state.process_id} cannot reach port {address.split(' ')[0]} of {host} ({error}): a process that "
            f"dies will be noticed by JAX alone, after {HEARTBEAT_TIMEOUT} seconds.",
            stacklevel=3,
        )
        return None


def _end_by_exception(
    print_exception: Callable[..., object], kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """The `sys.excepthook` for uncaught exceptions: prints it and ends the other processes."""
    time.sleep(_DEATH_REPORT_DELAY)
    print_exception(kind, error, trace)
    fail(1, f"{kind.__name__}: {error}")


def _end() -> None:
    """Ends the program in step with the other processes."""
    jax.distributed.shutdown()  # waits for the others; the watch is still on
    if _watch is not None:
        _watch.done()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


def _give_up(address: str | None, count: int | None, number: int | None, timeout: int) -> NoReturn:
    # Not by an exception: the main thread waits inside JAX.
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
