"""Two runs never share a folder: the second is refused before it touches anything, and a lock left behind is no bar."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from qwen_moe_jax.errors import ConfigError
from tests.train.test_run import CONFIG
from train import lock
from train.config import load_config
from train.folder import open_run_folder
from train.lock import LOCK_NAME, lock_folder


@pytest.fixture
def config(tmp_path):
    (tmp_path / "run.toml").write_text(CONFIG)
    return load_config(tmp_path / "run.toml", [f"--run.output_dir={tmp_path / 'run'}"])


def snapshot(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def foreign_lock(folder, **fields):
    folder.mkdir(exist_ok=True)
    own = {"host": socket.gethostname(), "pid": os.getpid(), "started": "2026-01-02 03:04:05", "process_start": "1"}
    (folder / LOCK_NAME).write_text(json.dumps({**own, **fields}))


@pytest.mark.parametrize("fresh", [False, True])
def test_a_second_run_in_a_folder_is_refused_before_anything_is_touched(config, fresh):
    first = open_run_folder(config, fresh=False)
    (first.path / "metrics.jsonl").write_text("of the first\n")
    before = snapshot(first.path)
    with pytest.raises(ConfigError) as refusal:
        open_run_folder(config, fresh=fresh)
    for part in (f"PID {os.getpid()} on {socket.gethostname()}, started ", "Nothing was changed", "--run.output_dir"):
        assert part in str(refusal.value)
    assert snapshot(first.path) == before
    first.unlock()
    second = open_run_folder(config, fresh=fresh)
    assert (second.path / "metrics.jsonl").exists() != fresh
    second.unlock()
    assert not (second.path / LOCK_NAME).exists() and not list(second.path.glob(".*"))


def test_a_refused_start_leaves_no_lock(config, tmp_path):
    first = open_run_folder(config, fresh=False)
    first.corpus.mkdir()
    first.unlock()
    other = load_config(tmp_path / "run.toml", [f"--run.output_dir={tmp_path / 'run'}", "--run.seed=7"])
    with pytest.raises(ConfigError, match="holds a run with other settings"):
        open_run_folder(other, fresh=False)
    assert not (tmp_path / "run" / LOCK_NAME).exists()


def test_a_start_that_was_refused_before_there_were_documents_may_be_mended(config, tmp_path):
    open_run_folder(config, fresh=False).unlock()
    other = load_config(tmp_path / "run.toml", [f"--run.output_dir={tmp_path / 'run'}", "--data.seq_len=17"])
    second = open_run_folder(other, fresh=False)
    second.unlock()
    assert "seq_len = 17" in second.config.read_text()


def test_the_lock_of_a_killed_process_is_stale(tmp_path):
    code = "import sys, time; from pathlib import Path; from train.lock import lock_folder\n"
    code += "lock_folder(Path(sys.argv[1])); print('locked', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"locked\n"
    with pytest.raises(ConfigError, match=f"in use by another run: PID {process.pid} "):
        lock_folder(tmp_path)
    process.kill()
    process.communicate()
    lock_folder(tmp_path).release()
    assert not any(tmp_path.iterdir())


def test_a_process_that_got_the_pid_of_a_dead_one_does_not_hold_its_lock(tmp_path):
    foreign_lock(tmp_path)  # this process's PID, and another start
    lock_folder(tmp_path).release()


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_damaged_lock_is_stale_unless_it_is_kept_up_to_date(tmp_path, monkeypatch, content):
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.1)
    (tmp_path / LOCK_NAME).write_text(content)
    lock_folder(tmp_path).release()


def test_the_lock_of_another_host_is_stale_once_it_is_no_longer_updated(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.5)
    foreign_lock(tmp_path, host="elsewhere", pid=12)
    alive = threading.Event()

    def run_elsewhere():
        while not alive.wait(0.05):
            os.utime(tmp_path / LOCK_NAME)

    elsewhere = threading.Thread(target=run_elsewhere)
    elsewhere.start()
    with pytest.raises(ConfigError, match="PID 12 on elsewhere, started 2026-01-02 03:04:05"):
        lock_folder(tmp_path)
    alive.set()
    elsewhere.join()
    lock_folder(tmp_path).release()


def test_a_held_lock_is_kept_up_to_date(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.02)
    held = lock_folder(tmp_path)
    before = (tmp_path / LOCK_NAME).stat().st_mtime_ns
    until = time.monotonic() + 10
    while (tmp_path / LOCK_NAME).stat().st_mtime_ns == before:
        assert time.monotonic() < until
        time.sleep(0.01)
    held.release()


def test_of_many_starts_at_once_one_gets_the_folder(tmp_path):
    """Over a stale lock, too, which all of them find."""
    foreign_lock(tmp_path)
    held, refused, begin = [], [], threading.Barrier(8)

    def attempt():
        begin.wait()
        try:
            held.append(lock_folder(tmp_path))
        except ConfigError:
            refused.append(1)

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 7)
    held[0].release()
