"""Ctrl-C ends a program at once, without a traceback or a crash: while it imports, computes or compiles."""

import os
import signal
import subprocess
import sys
import time

import pytest

from qwen_moe_jax.cli.interrupts import INTERRUPTED

#: Programs that say "ready" and are then busy where Python cannot raise a KeyboardInterrupt, or must not.
BUSY = {
    "in an import": "import sys, types\nclass Slow:\n def find_spec(self, name, *_):\n  begin()\n  time.sleep(60)\n"
    "sys.meta_path.insert(0, Slow())\nimport absent_module",
    "in a callback that swallows exceptions": "import gc\ngc.callbacks.append(lambda *_: (begin(), time.sleep(60)))\n"
    "gc.collect()",
    "in a compilation": "import jax, jax.numpy as jnp\nbegin()\n"
    "def f(x):\n for _ in range(3000): x = jnp.sin(x @ x) + jnp.cos(x)\n return x\njax.jit(f)(jnp.ones((8, 8)))",
}
PROGRAM = """
import time
from qwen_moe_jax.cli.interrupts import leaving_on_interrupt
def begin(said=[]):
    if not said: said.append(print("ready", flush=True))
with leaving_on_interrupt("left", lambda: print("freed", flush=True)):
    exec({busy!r})
"""


def interrupted(command, ready: bytes, presses: int = 1, **streams):
    """(exit code, output, seconds it took) of a program that gets Ctrl-C once it has written `ready`."""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL) | streams
    with subprocess.Popen(command, **pipes, env=environment) as process:
        said = b""
        try:
            while ready not in said and (more := os.read(process.stdout.fileno(), 4096)):
                said += more
            began = time.perf_counter()
            for _ in range(presses):
                process.send_signal(signal.SIGINT)
                time.sleep(0.2)
            rest, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    return process.returncode, (said + rest).decode(), time.perf_counter() - began


@pytest.mark.parametrize("busy", BUSY)
def test_a_program_ends_at_once_wherever_it_is(busy):
    code, said, seconds = interrupted([sys.executable, "-c", PROGRAM.format(busy=BUSY[busy])], b"ready\n")
    assert (code, said) == (INTERRUPTED, "ready\nfreed\nleft\n")
    assert seconds < 10


def test_code_that_handles_interrupts_has_them_raised_again():
    code = """
from qwen_moe_jax.cli.interrupts import leaving_on_interrupt, raise_interrupts
import time
with leaving_on_interrupt("left"):
    raise_interrupts()
    try:
        print("ready", flush=True); time.sleep(60)
    except KeyboardInterrupt:
        print("handled")
"""
    assert interrupted([sys.executable, "-c", code], b"ready\n")[:2] == (0, "ready\nhandled\n")


def test_a_run_finishes_its_step_at_the_first_and_ends_at_the_second():
    code = """
import time
from train.stopping import stop_requests
with stop_requests(lambda: print("freed", flush=True)) as asked:
    print("ready", flush=True)
    while not asked(): time.sleep(0.01)
    print("saving", flush=True)
    {then}
"""
    first = [sys.executable, "-c", code.format(then="pass")]
    assert interrupted(first, b"ready\n")[:2] == (0, "ready\nsaving\n")
    terminal, stderr = os.openpty()
    found, said, _ = interrupted(first, b"ready\n", stderr=stderr)
    assert (found, said) == (0, "ready\nsaving\n")
    assert os.read(terminal, 999) == b"Finishing this step, then saving; Ctrl-C again stops at once.\r\n"
    os.close(terminal), os.close(stderr)
    found, said, _ = interrupted([sys.executable, "-c", code.format(then="time.sleep(60)")], b"ready\n", presses=2)
    assert (found, said) == (INTERRUPTED, "ready\nsaving\nfreed\n")


def test_handlers_are_put_back():
    from qwen_moe_jax.cli.interrupts import leaving_on_interrupt

    before = signal.getsignal(signal.SIGINT)
    with leaving_on_interrupt():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
    assert signal.set_wakeup_fd(-1) == -1
