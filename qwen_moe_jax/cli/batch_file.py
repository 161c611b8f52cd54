"""Batch files: requests by id, one a line of JSON, and a file to which each answer is added when it is done."""

import dataclasses
import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qwen_moe_jax.cli.prompts import Prompt, Render
from qwen_moe_jax.config import GenerationConfig
from qwen_moe_jax.errors import ConfigError, RequestError
from qwen_moe_jax.inference.tokenizer import require_unicode
from qwen_moe_jax.suggest import did_you_mean
from qwen_moe_jax.text_files import read_text

_EXPECTED = 'expected {"prompt": "…"} or {"messages": […]}, the latter also with "tools", and with "id" and settings'
#: Fields of a record that are settings of its own; `stop` is short for `stop_strings`.
_SETTINGS = tuple(field.name for field in dataclasses.fields(GenerationConfig) if field.name != "hub_fields")

Id = str | int


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchRecord:
    """One request of a batch file.

    Attributes:
        id: its own, or else the number of its line, from 1.
        prompt: a text, or a conversation.
        settings: fields of `GenerationConfig` that it has of its own.
    """

    id: Id
    prompt: Prompt
    settings: Mapping[str, Any]

    def config(self, generation: GenerationConfig) -> GenerationConfig:
        """The record's settings, where it has some, before those of all.

        Raises:
            RequestError: a value outside its range.
        """
        settings = dict(self.settings)
        if "temperature" in settings:
            settings.setdefault("do_sample", settings["temperature"] != 0)
        elif settings.keys() & {"top_k", "top_p", "min_p"}:
            settings.setdefault("do_sample", True)
        try:
            return dataclasses.replace(generation, **settings)
        except (ConfigError, TypeError) as error:
            raise RequestError(str(error)) from None

    def text(self, render: Render | None) -> str:
        """The prompt's text; raises RequestError where the template refuses it."""
        return self.prompt.rendered(render)


def read_batch(path: Path) -> list[BatchRecord]:
    """The records of a file, in order.

    Raises:
        RequestError: it cannot be read, a line is no record, or two have the same id.
    """
    try:
        lines = read_text(path).split("\n")  # JSON strings may have other line ends
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: cannot be read ({error}).") from None
    records: dict[Id, BatchRecord] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            record = _record(f"{path}, line {number}", number, line)
            if record.id in records:
                raise RequestError(f"{path}, line {number}: the id {record.id!r} is that of an earlier line.")
            records[record.id] = record
    if not records:
        raise RequestError(f"{path}: found no request, expected one a line: {_EXPECTED}.")
    return list(records.values())


def _record(where: str, number: int, line: str) -> BatchRecord:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}: is not JSON ({error}), {_EXPECTED}.") from None
    if not isinstance(found, dict) or ("prompt" in found) == ("messages" in found):
        raise RequestError(f"{where}: found {line.strip():.60}, {_EXPECTED}.")
    own_id = found.pop("id", number)
    if type(own_id) not in (str, int):
        raise RequestError(f"{where}: id is {own_id!r:.60}, expected a string or an integer.")
    require_unicode(f"{where}: id", str(own_id))
    if "stop" in found:
        stop = found.pop("stop")
        found["stop_strings"] = [stop] if isinstance(stop, str) else stop
    names = {"prompt"} if "prompt" in found else {"messages", "tools"}
    for name in found.keys() - names:
        if name not in _SETTINGS:
            hint = did_you_mean(name, [*names, *_SETTINGS])
            raise RequestError(f"{where}: found the field {name!r}; {hint}{_EXPECTED}.")
    settings = {name: found.pop(name) for name in list(found) if name not in names}
    if "messages" in found:
        return BatchRecord(id=own_id, prompt=Prompt(request=found), settings=settings)
    if not isinstance(found["prompt"], str):
        raise RequestError(f"{where}: prompt is of type {type(found['prompt']).__name__}, expected a string.")
    return BatchRecord(id=own_id, prompt=Prompt(text=found["prompt"]), settings=settings)


class AnswerFile:
    """The answers of a batch, one a line, in the order in which they were done; by one process at a time.

    What is in it when it is opened was answered before. A last line that is cut off, by a kill while it was written, is
    taken off again.

    Args:
        path: of the file, which need not be there.
        ids: of the batch.

    Attributes:
        answered: ids of the lines that it has.

    Raises:
        RequestError: it is in use, cannot be written, or is the answer to another batch.
    """

    def __init__(self, path: Path, ids: Iterable[Id]):
        self._path = path
        self.answered: set[Id] = set()
        try:
            self._file = open(path, "a+b")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise RequestError(f"{path}: another process is writing it.") from None
        except OSError as error:
            raise RequestError(f"{path}: cannot be written ({error.strerror}).") from None
        try:
            self._read(set(ids))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._file.close()

    def add(self, answers: Iterable[Mapping[str, Any]]) -> None:
        """Adds answers, with their ids; they are on the disk when it returns."""
        lines = b"".join(json.dumps(answer, ensure_ascii=False).encode() + b"\n" for answer in answers)
        if lines:
            self._file.write(lines)
            self._file.flush()
            os.fsync(self._file.fileno())

    def _read(self, ids: set[Id]) -> None:
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                found = json.loads(line)["id"]
            except (ValueError, KeyError, TypeError):
                raise RequestError(
                    f"{self._path}, line {number}: is no answer of a batch. Name another --output."
                ) from None
            if found not in ids:
                raise RequestError(
                    f"{self._path}, line {number}: answers {found!r:.60}, which the input does not have. Name another "
                    "--output, or the input that it was made from."
                )
            self.answered.add(found)
            whole += len(line)
        self._file.truncate(whole)
        self._file.seek(0, os.SEEK_END)
