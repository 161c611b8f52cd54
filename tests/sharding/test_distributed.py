"""What is refused before processes meet, and what one process alone makes of the words for several."""

import subprocess
import sys

import jax
import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.sharding import distributed


def test_it_is_too_late_once_jax_has_looked_for_its_devices():
    jax.devices()
    with pytest.raises(qmj.ShardingError, match="Call it first, before models, meshes, arrays"):
        qmj.initialize_distributed("127.0.0.1:1", 2, 0)


REFUSED = """
import qwen_moe_jax as qmj
for words in ((), ("host:1",), ("host", 2, 0), ("host:1", 2, 2)):
    try:
        qmj.initialize_distributed(*words)
    except qmj.ShardingError as error:
        print(error)
"""


def test_what_is_missing_is_named_with_what_to_set():
    """In a process of its own: this one's JAX runs already."""
    ended = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True)
    lines = ended.stdout.splitlines()
    assert len(lines) == 4 and all("(--coordinator, --num-processes, --process-id)" in line for line in lines)
    assert "found coordinator_address=None, num_processes=None, process_id=None" in lines[0]
    assert "Number of processes must be defined" in lines[1]
    assert "coordinator_address='host', num_processes=2, process_id=0" in lines[2]
    assert "process_id < num_processes" in lines[3]


def test_processes_that_do_not_meet_end_with_a_message():
    program = "import qwen_moe_jax as qmj; qmj.initialize_distributed('127.0.0.1:9', 2, 1, timeout=1)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr.startswith("ShardingError: process 1: not all 2 processes have met at 127.0.0.1:9 within 1 s.")


def test_one_process_leads_and_agrees_with_itself():
    assert (
        distributed.num_processes() == 1 and distributed.is_process_zero() and distributed.broadcast("mine") == "mine"
    )
    distributed.require_same("anything", "mine")
    distributed.barrier("nobody")
    distributed.fail(1, "there is nobody to end, and this process goes on")


WATCHED = """
import socket
from qwen_moe_jax.sharding.watch import FirstWatch, OtherWatch
first = FirstWatch()
with socket.create_connection(("127.0.0.1", int(first.address.split(" ")[0]))) as stranger:
    stranger.sendall(b"no-token process 1\\n")
    assert stranger.recv(100) == b""
other = OtherWatch(1, "127.0.0.1", first.address)
other.done()
first.done()
print("fine")
"""


def test_a_watch_lets_processes_go_that_say_so_and_keeps_strangers_out():
    ended = subprocess.run([sys.executable, "-c", WATCHED], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "fine\n", "")
