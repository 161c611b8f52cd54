"""The run folder: its files, and which settings may change when a run in it is resumed."""

import json
import shutil
from os import PathLike
from pathlib import Path
from typing import Any

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.whole_file import write_whole
from train.config import OBJECTIVE_TABLES, TrainConfig, differences, load_config, to_toml
from train.lock import LOCK_NAME, RunLock, lock_folder
from train.write_errors import write_errors

# The settings that a resumed run must keep. Mesh, execution and intervals between reports may change; the model, its
# text and its optimization may not. The run may become longer.
_FIXED_SECTIONS = ("model", "data", "loss", "optimizer", "lora", *OBJECTIVE_TABLES)
_FIXED_RUN_KEYS = (
    "max_steps", "num_train_epochs", "seed", "model_name_or_path", "drop_mtp", "metric_for_best_model",
    "greater_is_better", "early_stopping_patience",
)  # fmt: skip
# Of the fixed sections: the documents of the run are made by then, and a memory changes no number.
_FREE_KEYS = ("data.cache_dir", "data.num_proc", "optimizer.memory_kind")
_LENGTH_KEYS = ("max_steps", "num_train_epochs")
_WAYS_OUT = "Add --fresh to delete that run and start anew, or choose another folder: --run.output_dir FOLDER."

#: The name of the exported Hub folder within a run folder.
HUB_FOLDER = "hub"


class RunFolder:
    """The paths of one run, and its result.

    Attributes:
        lengthened: where this start made an earlier run longer, the key and its old and new value:
            "run.max_steps: 12 → 24"; else "".
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = path = Path(path)
        self.config = path / "config.toml"
        self.metrics = path / "metrics.jsonl"
        self.corpus = path / "corpus"
        self.checkpoints = path / "checkpoints"
        self.hub = path / HUB_FOLDER
        self.adapter = path / "adapter"
        self.tensorboard = path / "tensorboard"
        self.profile = path / "profile"
        self.lengthened = ""
        self._result = path / "result.json"
        self._lock: RunLock | None = None

    def lock(self) -> None:
        """Locks the folder until `unlock`.

        Raises:
            ConfigError: another run is using it.
        """
        self._lock = lock_folder(self.path)

    def unlock(self) -> None:
        """Releases the lock, if this process has it."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()

    def clear(self) -> None:
        """Deletes everything but the lock."""
        for path in self.path.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK_NAME:
                path.unlink()

    @property
    def finished(self) -> bool:
        """Whether the run has a result."""
        return self._result.exists()

    @property
    def has_begun(self) -> bool:
        """Whether the run has documents or steps; a start that was refused before has left its settings alone."""
        return any(path.exists() for path in (self.corpus, self.metrics, self.checkpoints))

    def finish(self, result: dict[str, Any]) -> None:
        """Writes the result, which marks the run as finished. A run without one is resumed by the next start."""
        write_whole(self._result, json.dumps(result, indent=2) + "\n")

    def reopen(self) -> None:
        """Removes the result: the run is not finished any more."""
        self._result.unlink(missing_ok=True)

    def result(self) -> dict[str, Any]:
        """The dict that `finish` was given."""
        return json.loads(self._result.read_text(encoding="utf-8"))

    def describe_result(self) -> str:
        """The result in words, for the terminal."""
        result = self.result()
        dtype = f" ({result['export_dtype']})" if result.get("export_dtype") else ""
        hub = f", Hub folder in {self.hub}{dtype}" if self.hub.exists() else ""
        hub += f", adapters in {self.adapter}" if self.adapter.exists() else ""
        speed = f" at {result['tokens_per_second']:,.0f} tokens/s" if result["tokens_per_second"] else ""
        others = "".join(f", {name} {value:.3f}" for name, value in result.get("heldout", {}).items() if name != "loss")
        best = f", the best of {result['best_metric']}" if result.get("best_metric") else ""
        said = (
            f"Held-out loss {result['heldout_loss']:.3f}{others} after {result['steps']} steps{best}{speed}.\n"
            f"Metrics in {self.metrics}, checkpoints in {self.checkpoints}{hub}."
        )
        if result.get("sample") is None:  # of a classifier
            return said
        return f"{said}\n\nThe model goes on from {result['prompt']!r}:\n{result['prompt']}{result['sample']}"


def open_run_folder(config: TrainConfig, *, fresh: bool) -> RunFolder:
    """Creates the folder of this run, or opens that of an earlier start. It is locked: call `RunFolder.unlock`.

    Args:
        fresh: delete an earlier run in the folder first.

    Raises:
        ConfigError: the folder holds a run with other settings or files that are no run, or another run is using it.
        SaveError: it cannot be created or written.
    """
    path = Path(config.run.output_dir)
    with write_errors(path, "the start"):
        return _open(RunFolder(path), config, fresh=fresh)


def _open(folder: RunFolder, config: TrainConfig, *, fresh: bool) -> RunFolder:
    path = folder.path
    if not folder.config.exists() and path.exists() and (not path.is_dir() or _has_files(path)):
        raise ConfigError(
            f"run.output_dir: {path} exists and holds no config.toml, so it is no run of this program and is left "
            "alone. Choose another with --run.output_dir."
        )
    path.mkdir(parents=True, exist_ok=True)
    folder.lock()
    try:
        if fresh:
            folder.clear()
        elif folder.config.exists():
            earlier = _earlier_config(folder)
            folder.lengthened = _check_same_run(earlier, config, path) if folder.has_begun else ""
            if folder.lengthened:
                folder.reopen()
        write_whole(folder.config, to_toml(config))
    except BaseException:
        folder.unlock()
        raise
    return folder


def _has_files(path: Path) -> bool:
    return any(not file.name.removeprefix(".").startswith(LOCK_NAME) for file in path.iterdir())


def _earlier_config(folder: RunFolder) -> TrainConfig:
    try:
        return load_config(folder.config)
    except ConfigError as error:
        raise ConfigError(
            f"run.output_dir: {folder.path} holds a run whose config this version cannot read, so an earlier version "
            f"made it, or the file was changed:\n{error}\n{_WAYS_OUT}"
        ) from None


def _check_same_run(old: TrainConfig, new: TrainConfig, path: Path) -> str:
    """Refuses other settings than the earlier start's; returns the line of what makes the run longer, or ""."""
    length, changed = "", differences(old, new, _FIXED_SECTIONS)
    changed = [line for line in changed if line.partition(":")[0] not in _FREE_KEYS]
    for line in differences(old, new, ("run",)):
        key = line.partition(":")[0].removeprefix("run.")
        if key in _LENGTH_KEYS and _is_more(getattr(old.run, key), getattr(new.run, key)):
            length = line
        elif key in _FIXED_RUN_KEYS:
            changed.append(line)
    if changed:
        raise ConfigError(
            f"run.output_dir: {path} holds a run with other settings:\n  " + "\n  ".join(changed) + f"\n{_WAYS_OUT}"
        )
    return length


def _is_more(old: float | None, new: float | None) -> bool:
    return old is not None and new is not None and new > old
