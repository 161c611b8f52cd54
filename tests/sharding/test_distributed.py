"""Errors before processes are connected, and the collectives of a single process."""

import subprocess
import sys

import jax
import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.sharding import distributed


def test_a_start_after_jax_has_initialised_its_devices_is_refused():
    jax.devices()
    with pytest.raises(qmj.ShardingError, match="Call it first, before models, meshes, arrays"):
        qmj.initialize_distributed("127.0.0.1:1", 2, 0)


REFUSED = """
import qwen_moe_jax as qmj
for arguments in ((), ("host:1",), ("host", 2, 0), ("host:1", 2, 2)):
    try:
        qmj.initialize_distributed(*arguments)
    except qmj.ShardingError as error:
        print(error)
"""


def test_missing_arguments_are_refused_with_the_options_to_set():
    """In a process of its own: this one's JAX runs already."""
    ended = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True)
    lines = ended.stdout.splitlines()
    assert len(lines) == 4 and all("(--coordinator, --num-processes, --process-id)" in line for line in lines)
    assert "found coordinator_address=None, num_processes=None, process_id=None" in lines[0]
    assert "Number of processes must be defined" in lines[1]
    assert "coordinator_address='host', num_processes=2, process_id=0" in lines[2]
    assert "process_id < num_processes" in lines[3]


def test_processes_that_cannot_connect_end_with_a_message():
    program = "import qwen_moe_jax as qmj; qmj.initialize_distributed('127.0.0.1:9', 2, 1, timeout=1)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr.startswith("ShardingError: process 1: not all 2 processes have met at 127.0.0.1:9 within 1 s.")


def test_a_single_process_is_process_zero_and_its_collectives_return_at_once():
    assert (
        distributed.num_processes() == 1 and distributed.is_process_zero() and distributed.broadcast("mine") == "mine"
    )
    distributed.require_same("anything", "mine")
    distributed.barrier("barrier")
    distributed.fail(1, "a single process goes on")


WATCHED = """
import socket
from qwen_moe_jax.sharding.watch import WatchServer, WatchClient
server = WatchServer()
with socket.create_connection(("127.0.0.1", int(server.address.split(" ")[0]))) as unknown:
    unknown.sendall(b"no-token process 1\\n")
    assert unknown.recv(100) == b""
client = WatchClient(1, "127.0.0.1", server.address)
client.done()
server.done()
print("fine")
"""


def test_a_watch_accepts_reported_ends_and_refuses_connections_without_its_token():
    ended = subprocess.run([sys.executable, "-c", WATCHED], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "fine\n", "")
