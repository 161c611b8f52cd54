"""A run that cannot write ends with one line: what failed, what is complete, and what the next start does."""

import errno
import json
import logging
import os
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.train.test_run import CONFIG, metrics, start
from train.checkpoint import Checkpoints
from train.config import load_config
from train.errors import SaveError
from train.folder import open_run_folder
from train.write_errors import complete_steps, quiet_write_errors, write_errors

TENSORSTORE = (
    'RESOURCE_EXHAUSTED: Failed writing: "/run/checkpoints/4.orbax-checkpoint-tmp/d/a7a5": Failed to write 180865 '
    "bytes to file 26: No space left on device [os_error_code='28']"
)


@pytest.fixture
def largest_file():
    """A function that limits the size of this process's files from then on, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def message_of(folder, error, when="step 8"):
    with pytest.raises(SaveError) as found, write_errors(folder, when):
        raise error
    return str(found.value)


@pytest.mark.usefixtures("programs_compiled_once")
def test_a_failed_checkpoint_ends_the_run_with_one_line_and_the_next_start_changes_nothing(
    tmp_path, monkeypatch, largest_file
):
    file = tmp_path / "run.toml"
    file.write_text(CONFIG)
    words = ["--run.save_steps=2", "--run.eval_steps=20", "--run.sample_steps=0", "--run.max_steps=8"]
    assert start(file, tmp_path / "whole", *words)[0] == 0
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    save = Checkpoints.save

    def save_on_a_full_disk(self, step, state, **best):
        if step == 4:
            self.wait()  # the checkpoint of step 2
            largest_file(50_000)
        save(self, step, state, **best)

    monkeypatch.setattr(Checkpoints, "save", save_on_a_full_disk)
    code, _, complaint = start(file, tmp_path / "run", *words)
    monkeypatch.undo()
    largest_file(unlimited)

    assert code == 74
    assert len(complaint.splitlines()) == 1
    for part in (
        f"SaveError: the checkpoint of step 4: cannot write to {tmp_path / 'run'}: File too large.",
        "The checkpoint of step 2 is complete.",
        "then give the same command again: it goes on from there.",
    ):
        assert part in complaint
    assert complete_steps(tmp_path / "run" / "checkpoints") == [2]

    code, output, complaint = start(file, tmp_path / "run", *words)
    assert code == 0, complaint
    assert "going on from the checkpoint of step 2" in output
    for kind in ("loss", "heldout_loss"):
        runs = [[one[kind] for one in metrics(tmp_path / run) if kind in one] for run in ("whole", "run")]
        assert runs[0] == runs[1]
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "whole" / "hub" / name).read_bytes() == (tmp_path / "run" / "hub" / name).read_bytes()


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (ValueError(TENSORSTORE), "No space left on device ("),
        (OSError(errno.ENOSPC, "No space left on device"), "Free some space on that disk, then give the same command"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded. "),
        (PermissionError(errno.EACCES, "Permission denied", "{run}/metrics.jsonl"), "Make that folder writable"),
        (PermissionError(errno.EACCES, "Permission denied", "{run}/.."), "Make that folder writable"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "{run}"), "--run.output_dir FOLDER"),
    ],
)
def test_every_kind_of_failed_write_is_named(tmp_path, error, part):
    if isinstance(error, OSError) and error.filename:
        error.filename = str(Path(error.filename.format(run=tmp_path)).resolve())
    message = message_of(tmp_path, error)
    assert message.startswith(f"step 8: cannot write to {tmp_path}: ") and part in message
    assert "There is no complete checkpoint yet." in message
    wrapped = RuntimeError("the background thread failed")
    wrapped.__cause__ = error
    assert message_of(tmp_path, wrapped) == message


def test_the_newest_complete_checkpoint_is_named_and_an_incomplete_one_is_not(tmp_path):
    for name in ("4", "12", "16.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert "The checkpoint of step 12 is complete. " in message_of(tmp_path, ValueError(TENSORSTORE))


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied", "/somewhere/else/data.jsonl"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "x"),
        ValueError("RESOURCE_EXHAUSTED: out of memory"),
        TimeoutError(),
    ],
)
def test_other_exceptions_pass(tmp_path, error):
    with pytest.raises(type(error)) as found, write_errors(tmp_path, "step 8"):
        raise error
    assert found.value is error


def test_what_failed_first_is_reported_though_closing_fails_again(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(SaveError, match="^the checkpoint of step 4: "), write_errors(tmp_path, "step 6"):
        try:
            with write_errors(tmp_path, "the checkpoint of step 4"):
                raise full
        finally:
            raise OSError(errno.ENOSPC, "No space left on device")


def test_a_failing_write_does_not_damage_the_config_of_a_run(tmp_path, largest_file):
    (tmp_path / "run.toml").write_text(CONFIG)
    config = load_config(tmp_path / "run.toml", [f"--run.output_dir={tmp_path / 'run'}"])
    open_run_folder(config, fresh=False).unlock()
    before = (tmp_path / "run" / "config.toml").read_bytes()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    largest_file(600)  # the lock is smaller, the config is larger
    with pytest.raises(SaveError, match="^the start: cannot write to "):
        open_run_folder(config, fresh=False)
    largest_file(unlimited)
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()} == {"config.toml": before}


def test_only_traces_of_failed_writes_are_kept_from_the_log(tmp_path, caplog, monkeypatch):
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: reported.append(unraisable.exc_value))
    absl, late, other = logging.getLogger("absl"), RuntimeError("Event loop is closed"), RuntimeError("something else")
    monkeypatch.setattr(absl, "propagate", True)
    with quiet_write_errors(tmp_path):
        for error in (ValueError(TENSORSTORE), other):
            absl.error("the thread failed", exc_info=error)
            for unraisable in (late, error):
                sys.unraisablehook(SimpleNamespace(exc_type=type(unraisable), exc_value=unraisable))
    assert [record.exc_info[1] for record in caplog.records] == [other]
    assert [str(error) for error in reported] == [TENSORSTORE, "something else"]
    absl.error("afterwards", exc_info=ValueError(TENSORSTORE))
    assert len(caplog.records) == 2


def test_metrics_survive_a_failed_rewrite(tmp_path, largest_file):
    from train.reporting.progress import _reopen

    file = tmp_path / "metrics.jsonl"
    _reopen(file, 0).close()
    records = [{"step": step, "loss": 1.0} for step in range(100)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    before, unlimited = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    largest_file(500)
    with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
        _reopen(file, 80)
    largest_file(unlimited)
    assert file.read_bytes() == before
    with _reopen(file, 80) as opened:
        opened.write("{}\n")
    assert file.read_text().splitlines() == [json.dumps(record) for record in records[:81]] + ["{}"]


class Save:
    """A save in the background that does not end, or has ended with an error."""

    def __init__(self, error=None):
        self.error = error

    def result(self, timeout):
        raise self.error or TimeoutError


@pytest.mark.parametrize("look", [Checkpoints.check, Checkpoints.wait])
def test_a_failed_write_is_reported_while_orbax_waits_for_other_processes(tmp_path, look):
    with (
        pytest.raises(SaveError, match="^the checkpoint of step 4: .*: No space left on device "),
        Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints,
    ):
        checkpoints._writing = 4, Save()
        checkpoints.check()  # nothing failed so far
        logging.getLogger("absl").error("the thread failed", exc_info=ValueError(TENSORSTORE))
        look(checkpoints)


def test_a_save_that_ended_with_a_timeout_of_its_own_raises_it(tmp_path):
    error = TimeoutError("a barrier")
    with (
        pytest.raises(TimeoutError, match="a barrier"),
        Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints,
    ):
        checkpoints._writing = 4, Save(error)
        checkpoints.wait()
