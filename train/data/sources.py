"""Files → records: texts, completions, conversations or arrays of token ids, each with its file and line.

A record that cannot be read is refused by file and line, with what was found and what was expected.
"""

import hashlib
import itertools
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.storage.git_lfs import lfs_problem
from train.config import FORMATS, SourceConfig
from train.data.compressed import COMPRESSED
from train.data.docstrings import questions_of
from train.data.documents import FileArray
from train.data.json_files import decode, read_json_file
from train.data.messages import Conversation, refuse
from train.data.recognised import Recognised
from train.data.records import Completion

_Say = Callable[[str], None]

_IDS_AT_ONCE = 1 << 20
#: Most files of a folder that a message names.
_LISTED = 10

# Left out of the standard library: installed packages, tests, generated tables and copies of other tools.
_SKIPPED_IN_STDLIB = (
    "__*__", "config-*", "dist-packages", "encodings", "ensurepip", "idlelib", "lib-dynload", "lib2to3", "pydoc_data",
    "site-packages", "test", "tests", "turtledemo",
)  # fmt: skip


@dataclass(frozen=True)
class Record:
    """The content of one document; with some chat templates, of several.

    Attributes:
        content: a text, a completion, a conversation, an integer array of token ids, or an example of an objective,
            which has `texts`.
        place: the file and line, for messages.
        name: the same, relative to the source's folder; its hash decides whether the record is held out.
        size: in the file, in bytes, about.
    """

    content: Any
    place: str
    name: str
    size: int = 0


def read_records(
    source: SourceConfig,
    megabytes: float,
    end_id: int | None = None,
    truncated: Callable[[str], None] = lambda how_much: None,
    recognised: Recognised | None = None,
) -> Iterator[Record]:
    """The records of a source, in a deterministic order. Blank files, lines and texts are skipped.

    Args:
        source: the files.
        megabytes: the size of the text to read; token ids are read to the end.
        end_id: the id that ends a document in arrays of token ids.
        truncated: called at the end with how much was read of how much, if that is not all.
        recognised: told the form of every record of JSON files and datasets.

    Raises:
        ConfigError: the source does not exist, is empty, holds a record that cannot be read, or has no record with a
            column that `source.columns` names.
    """
    empty = True
    recognised = recognised or Recognised(source.columns)
    for record in _READERS[source.format](source, megabytes * 1e6, end_id, truncated, recognised):
        empty = False
        yield record
    recognised.require_columns(str(_root(source)))
    if empty:
        raise ConfigError(_nothing_read(source, megabytes))


def _nothing_read(source: SourceConfig, megabytes: float) -> str:
    """That a source has no record, and what to set, in words."""
    root, pattern = _root(source), source.pattern or FORMATS[source.format]
    found = f"data.path: {root} holds no readable {source.format} of at most {megabytes} MB"
    if not root.is_dir():
        return f"{found}; point data.path at some text, or raise data.megabytes."
    found += f" in files named {pattern}" + ("" if source.pattern else f", which format {source.format} reads")
    if files_of(source):
        return f"{found}; point data.path and data.pattern at some text, or raise data.megabytes."
    others = sorted(path.name for path in root.iterdir() if path.is_file())
    if not others:
        return f"{found}: no file of this name is in it or below. Point data.path at some text."
    listed = ", ".join(others[:_LISTED] + ["…"] * (len(others) > _LISTED))
    ending = next((Path(name).suffix for name in others if Path(name).suffix), "")
    return f'{found}, but {listed}. Set data.pattern to the names of the files to read, as "*{ending}".'


def texts_of(content: Any) -> list[str]:
    """The texts of a record, from which a tokenizer can be trained."""
    if hasattr(content, "texts"):
        return list(content.texts)
    if isinstance(content, Conversation):
        return [message.get("content") or "" for message in content.messages]
    return [content.prompt, content.completion] if isinstance(content, Completion) else [content]


def describe_source(source: SourceConfig) -> str:
    """The source's name for messages."""
    return source.path or "Python's standard library"


def _read_texts(
    source: SourceConfig, remaining: float, end_id: int | None, truncated: _Say, recognised: Recognised
) -> Iterator[Record]:
    for file, name, text in _fitting_texts(source, remaining, truncated):
        yield Record(text, str(file), name, file.stat().st_size)


def _read_docstrings(
    source: SourceConfig, remaining: float, end_id: int | None, truncated: _Say, recognised: Recognised
) -> Iterator[Record]:
    """Questions about the public names of Python files, answered by the first paragraph of their docstrings."""
    for file, name, text in _fitting_texts(source, remaining, truncated):
        for asked, answer in questions_of(text, name, str(file)):
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            yield Record(Conversation(messages), f"{file}, {asked}", f"{name}:{asked}", len(asked) + len(answer))


def _fitting_texts(source: SourceConfig, remaining: float, truncated: _Say) -> Iterator[tuple[Path, str, str]]:
    """(file, name, text) of the matching files that fit into the remaining bytes; files that do not fit are skipped."""
    read = left_out = 0
    for file, name in files_of(source):
        size = file.stat().st_size
        if size > remaining - read:
            left_out += size
            continue
        text = decode(file.read_bytes(), str(file))
        if text.strip():
            read += size
            yield file, name, text
    if left_out:
        truncated(f"{_megabytes(read)} of {_megabytes(read + left_out)} MB")


def _read_jsonl(
    source: SourceConfig, remaining: float, end_id: int | None, truncated: _Say, recognised: Recognised
) -> Iterator[Record]:
    files, read = files_of(source), 0
    for file, name in files:
        for value in read_json_file(file):
            if read + value.size > remaining:
                truncated(f"{_megabytes(read)} of {_megabytes(sum(one.stat().st_size for one, _ in files))} MB")
                return
            read += value.size
            content = recognised.content(value.found, str(file), value.place)
            if content is not None:
                yield Record(content, value.place, f"{name}:{value.number}", value.size)


def _read_datasets(
    source: SourceConfig, remaining: float, end_id: int | None, truncated: _Say, recognised: Recognised
) -> Iterator[Record]:
    rows = open_dataset(source)

    def records() -> Iterator[tuple[Record, str]]:
        for number, row in enumerate(rows):
            place = f"{source.path}, row {number} of {source.split}"
            content = recognised.content(_without_absent(dict(row)), source.path, place)
            if content is not None:
                yield Record(content, place, str(number), _text_size(content)), f"{number:,} of {len(rows):,} rows"

    yield from _fitting(records(), remaining, truncated)


def _fitting(records: Iterator[tuple[Record, str]], remaining: float, truncated: _Say) -> Iterator[Record]:
    """The first records, as many as fit into the remaining bytes; each comes with what was read before it, in words."""
    for record, read in records:
        remaining -= record.size
        if remaining < 0:
            truncated(read)
            return
        yield record


def _text_size(content: Any) -> int:
    return len("".join(texts_of(content)).encode())


def _read_parquet(
    source: SourceConfig, remaining: float, end_id: int | None, truncated: _Say, recognised: Recognised
) -> Iterator[Record]:
    """The rows of parquet files, some at a time, so that memory holds a row group at most."""
    parquet = _parquet()
    files = files_of(source)

    def records() -> Iterator[tuple[Record, str]]:
        for number, (file, name) in enumerate(files):
            rows = itertools.chain.from_iterable(_rows_of(file, parquet))
            for row, found in enumerate(rows, start=1):
                place = f"{file}, row {row}"
                content = recognised.content(_without_absent(found), str(file), place)
                if content is not None:
                    read = f"{number} of {len(files)} files, and {row - 1:,} rows of {name}"
                    yield Record(content, place, f"{name}:{row}", _text_size(content)), read

    yield from _fitting(records(), remaining, truncated)


def _without_absent(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a table without the fields of its structs that are null.

    Arrow gives every struct of a column the fields of all of them: tool calls come with the arguments of all other
    tools, as nulls, which a chat template would write and the model would learn.
    """
    return {column: _without_nulls(value) for column, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _rows_of(file: Path, parquet: Any) -> Iterator[list[dict[str, Any]]]:
    try:
        with parquet.ParquetFile(file) as opened:
            for rows in opened.iter_batches(batch_size=256):
                yield rows.to_pylist()
    except (ValueError, OSError) as error:  # pyarrow's errors of a file's content, OSErrors without a number
        if isinstance(error, OSError) and error.errno is not None:
            raise
        refuse(f"{file}: this is no parquet file ({str(error).splitlines()[0]}).")


def _parquet() -> Any:
    try:
        import pyarrow.parquet  # an optional dependency that is slow to import
    except ImportError:
        refuse("data.format: parquet needs pyarrow, which is not installed: pip install pyarrow.")
    return pyarrow.parquet


def open_dataset(source: SourceConfig) -> Any:
    """The rows of a source of format datasets, as a `datasets.Dataset`.

    Raises:
        ConfigError: the library is missing or cannot open it.
    """
    try:
        import datasets  # an optional dependency that is slow to import
    except ImportError:
        refuse(
            "data.format: datasets needs Hugging Face's library, which is not installed: "
            "pip install 'qwen-moe-jax[hf]', or datasets by itself."
        )
    folder = Path(source.path)
    try:
        if (folder / "dataset_dict.json").exists():
            return datasets.load_from_disk(str(folder))[source.split]
        if (folder / "state.json").exists():
            return datasets.load_from_disk(str(folder))
        if folder.exists():
            files = [str(file) for file, _ in files_of(source)]
            return datasets.load_dataset("parquet", data_files=files, split="train") if files else []
        return datasets.load_dataset(source.path, split=source.split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        refuse(f"data.path: {source.path}: datasets cannot open it ({type(error).__name__}: {error}).")


def _read_tokens(
    source: SourceConfig, remaining: float, end_id: int | None, truncated: _Say, recognised: Recognised
) -> Iterator[Record]:
    for file, name in files_of(source):
        try:
            ids: Any = np.load(file, mmap_mode="r")
        except (ValueError, OSError) as error:
            refuse(f"{file}: this is no .npy file ({error}), expected one array of token ids.")
        if not isinstance(ids, np.ndarray) or ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            found = f"{ids.dtype} of shape {ids.shape}" if isinstance(ids, np.ndarray) else "several arrays"
            refuse(f"{file}: found {found}, expected one row of integer token ids.")
        ids = FileArray(file)
        start = 0
        for number, stop in enumerate(_ends(ids, end_id)):
            if stop > start:
                yield Record(
                    ids[start:stop],
                    f"{file}, document {number} (ids {start} to {stop - 1})",
                    f"{name}:{number}",
                    (stop - start) * ids.dtype.itemsize,
                )
            start = stop


def _ends(ids: FileArray, end_id: int | None) -> Iterator[int]:
    """Where documents end; the last may lack its end."""
    stop = 0
    for start in range(0, len(ids), _IDS_AT_ONCE):
        for end in np.flatnonzero(ids[start : start + _IDS_AT_ONCE] == end_id):
            stop = start + int(end) + 1
            yield stop
    if stop < len(ids):
        yield len(ids)


_READERS: dict[str, Callable[[SourceConfig, float, int | None, _Say, Recognised], Iterator[Record]]] = {
    "text": _read_texts,
    "docstrings": _read_docstrings,
    "jsonl": _read_jsonl,
    "tokens": _read_tokens,
    "datasets": _read_datasets,
    "parquet": _read_parquet,
}


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}" if size >= 1e6 else f"{size / 1e6:.2g}"


def _root(source: SourceConfig) -> Path:
    return Path(source.path or sysconfig.get_path("stdlib"))


def files_of(source: SourceConfig) -> list[tuple[Path, str]]:
    """The matching files and their names below the folder, ordered by a hash of these names.

    So a bounded amount of text is a random sample of the whole. Linked folders are followed, each once.
    """
    root = _root(source)
    if root.is_file():
        _refuse_pointer(root)
        return [(root, root.name)]
    if not root.is_dir():
        refuse(f"data.path: {root}: there is no such file or folder.")
    skipped = () if source.path else _SKIPPED_IN_STDLIB
    patterns = _patterns(source)
    files, seen = [], set()
    for folder, subfolders, names in os.walk(root, onerror=_fail, followlinks=True):
        if (own := os.path.realpath(folder)) in seen:  # a link to a folder above, or a second one to the same
            subfolders.clear()
            continue
        seen.add(own)
        subfolders[:] = sorted(name for name in subfolders if not any(fnmatch(name, skip) for skip in skipped))
        files += [Path(folder, name) for name in names if any(fnmatch(name, pattern) for pattern in patterns)]
    for file in files:
        _refuse_pointer(file)
    named = [(file, file.relative_to(root).as_posix()) for file in files]
    return sorted(named, key=lambda one: hashlib.sha256(one[1].encode()).digest())


def _patterns(source: SourceConfig) -> list[str]:
    """The names of the files to read: those of the format, compressed ones too, where none are set."""
    if source.pattern:
        return [source.pattern]
    own = FORMATS[source.format]
    return [own, *(own + ending for ending in COMPRESSED)] if source.format == "jsonl" else [own]


def _fail(error: OSError) -> NoReturn:
    """Raises the error: a folder that cannot be listed would be left out in silence otherwise."""
    raise error


def _refuse_pointer(file: Path) -> None:
    if (problem := lfs_problem(file)) is not None:
        refuse(f"data.path: {file}: {problem}.")
