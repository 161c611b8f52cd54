"""`python -m train.pod N CONFIG …`: the run of `python -m train CONFIG …` by N processes on this machine.

This tests a multi-host run on one machine: simulated devices are divided among the processes. Each output line is
prefixed with the number of its process. Ctrl-C and SIGTERM are forwarded to all; once one has failed, the others are
killed after a minute.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

_GRACE_SECONDS = 60.0


def main(words: list[str]) -> int:
    """Starts the processes and waits for them; returns 0, or the exit code of the first that failed."""
    if len(words) < 2 or not words[0].isdecimal() or int(words[0]) < 1:
        print("usage: python -m train.pod N CONFIG [--section.key value ...]", file=sys.stderr)
        return 2
    count, coordinator = int(words[0]), f"127.0.0.1:{_free_port()}"
    command = [sys.executable, "-u", "-m", "train", *words[1:], f"--coordinator={coordinator}"]
    processes = [
        subprocess.Popen(
            [*command, f"--num-processes={count}", f"--process-id={number}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # or Ctrl-C would reach them twice: from the terminal and by `forward`
        )
        for number in range(count)
    ]

    def forward(asked: int, _: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(asked)

    for asked in (signal.SIGINT, signal.SIGTERM):
        signal.signal(asked, forward)
    readers = [threading.Thread(target=_show, args=[number, process]) for number, process in enumerate(processes)]
    for reader in readers:
        reader.start()
    code = _wait_for(processes)
    for reader in readers:
        reader.join()
    return code


def _wait_for(processes: list[subprocess.Popen[bytes]]) -> int:
    first, until = 0, float("inf")
    while any(process.poll() is None for process in processes):
        failed = [process.returncode for process in processes if process.returncode]
        if failed and not first:
            first, until = failed[0], time.monotonic() + _GRACE_SECONDS
        if time.monotonic() > until:
            for process in processes:
                process.kill()
        time.sleep(0.05)
    codes = [first, *(process.returncode for process in processes)]
    code = next((code for code in codes if code), 0)
    return 128 - code if code < 0 else code  # the exit code of shells for a signal


def _show(number: int, process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if b"peer ranks" in line:
            continue  # Gloo's log of connections, one line for each device and group
        os.write(1, f"[{number}] ".encode() + line)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
