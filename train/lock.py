"""The lock of a run folder: one run at a time, with the host, PID and start of its process 0."""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

from qwen_moe_jax.errors import ConfigError

#: The lock's file in the run folder.
LOCK_NAME = "run.lock"

#: Seconds between two updates of the lock's modification time, by which other hosts see that its run is alive.
HEARTBEAT_SECONDS = 10.0

#: Seconds without an update after which a lock of another host is stale.
STALE_SECONDS = 60.0


class RunLock:
    """A run folder's lock, held until `release`; a thread keeps its modification time up to date."""

    def __init__(self, file: Path, content: str) -> None:
        self._file, self._content = file, content
        self._released = threading.Event()
        self._heartbeat = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._heartbeat.start()

    def release(self) -> None:
        """Removes the lock, if it is still this one."""
        self._released.set()
        self._heartbeat.join()
        if _read(self._file) == self._content:
            self._file.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            try:
                os.utime(self._file)
            except OSError:
                continue  # the folder was removed, or its file system cannot be reached for now


def lock_folder(folder: Path) -> RunLock:
    """Locks an existing folder for this process. A stale lock, whose process is gone, is replaced.

    Of a lock of this host, the process is looked up by PID and start time. Of another host's, the modification time is
    watched for `STALE_SECONDS`.

    Raises:
        ConfigError: another run is using the folder. Nothing in it was changed.
    """
    file = folder / LOCK_NAME
    content = json.dumps(
        {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            "process_start": _process_start(os.getpid()),
            "id": secrets.token_hex(8),
        }
    )
    while not _create(file, content):
        found = _read(file)
        if found is None:
            continue  # it was released in the meantime
        if _is_alive(file, found):
            raise _in_use(folder, found)
        _remove_stale(file, found)
    return RunLock(file, content)


def _create(file: Path, content: str) -> bool:
    """Creates the lock with its content in one atomic step; False where there is one."""
    partial = file.with_name(f".{LOCK_NAME}.{secrets.token_hex(8)}")
    partial.write_text(content, encoding="utf-8")
    try:
        os.link(partial, file)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        return _create_empty_first(file, content)
    finally:
        partial.unlink()
    return True


def _create_empty_first(file: Path, content: str) -> bool:
    try:
        with file.open("x", encoding="utf-8") as opened:
            opened.write(content)
    except FileExistsError:
        return False
    return True


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _fields(content: str) -> dict[str, Any]:
    try:
        fields = json.loads(content)
    except json.JSONDecodeError:
        return {}
    return fields if isinstance(fields, dict) else {}


def _is_alive(file: Path, content: str) -> bool:
    fields = _fields(content)
    if fields.get("host") == socket.gethostname() and isinstance(fields.get("pid"), int):
        return _process_exists(fields["pid"]) and _process_start(fields["pid"]) == fields.get("process_start")
    before, until = _modified(file), time.monotonic() + STALE_SECONDS
    while time.monotonic() < until:
        if _modified(file) != before:
            return True
        time.sleep(min(1.0, STALE_SECONDS / 10))
    return False


def _modified(file: Path) -> int | None:
    try:
        with file.open("rb") as opened:  # on NFS, opening a file fetches its attributes anew
            return os.fstat(opened.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # of another user
    return True


def _process_start(pid: int) -> str | None:
    """When a process started, in ticks since the boot; None where the system has no /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]  # field 22; the name in parentheses may contain spaces


def _remove_stale(file: Path, content: str) -> None:
    """Removes a lock with this content, unless another process of this host has replaced it in the meantime."""
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(folder, fcntl.LOCK_EX)
        if _read(file) == content:
            file.unlink(missing_ok=True)
    finally:
        os.close(folder)


def _in_use(folder: Path, content: str) -> ConfigError:
    fields = _fields(content)
    return ConfigError(
        f"run.output_dir: {folder} is in use by another run: PID {fields.get('pid', '?')} on "
        f"{fields.get('host', '?')}, started {fields.get('started', '?')}. Nothing was changed. Wait for its end or "
        "stop it, or choose another folder: --run.output_dir FOLDER."
    )
