"""The examples of one source on disk: their token ids, what is learned of them, and which are held out."""

import hashlib
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qwen_moe_jax.errors import ConfigError
from train.config import DataConfig
from train.data.batches import Documents
from train.data.chat import Example
from train.data.sources import Record

_NUMBER = "number."  # before the name of a number in documents.npz


@dataclass(frozen=True)
class Part:
    """The examples of one source, or of the file that is held out (`data.eval_path`).

    Attributes:
        name: of the source.
        training, heldout: their documents, those of one example one after the other.
        documents: in one example.
        training_numbers, heldout_numbers: arrays [examples, …] by name.
    """

    name: str
    training: Documents
    heldout: Documents
    documents: int = 1
    training_numbers: dict[str, np.ndarray] = field(default_factory=dict)
    heldout_numbers: dict[str, np.ndarray] = field(default_factory=dict)


def write_part(folder: Path, examples: Iterable[tuple[Record, Example]]) -> None:
    """Writes examples one by one, so that memory holds only one at a time.

    All have the same number of documents and the same numbers; all documents have labels, or none.
    """
    folder.mkdir(parents=True)
    lengths, digests, fully_learned, documents = [], [], True, 1
    numbers: dict[str, list[np.ndarray]] = {}
    with ExitStack() as stack:
        tokens_file = stack.enter_context((folder / "tokens.uint32").open("wb"))
        learned_file = stack.enter_context((folder / "learned.bool").open("wb"))
        labels_file = None
        for record, example in examples:
            documents = len(example.documents)
            for turns in example.documents:
                tokens_file.write(turns.ids.astype(np.uint32).tobytes())
                learned_file.write(turns.learned.tobytes())
                if turns.labels is not None:
                    labels_file = labels_file or stack.enter_context((folder / "labels.int32").open("wb"))
                    labels_file.write(turns.labels.astype(np.int32).tobytes())
                lengths.append(len(turns.ids))
                fully_learned = fully_learned and bool(turns.learned.all())
            for name, value in example.numbers.items():
                numbers.setdefault(name, []).append(value)
            digests.append(int.from_bytes(hashlib.sha256(record.name.encode()).digest()[:8], "big"))
    np.savez(
        folder / "documents.npz",
        lengths=np.array(lengths, np.int64),
        digests=np.array(digests, np.uint64),
        fully_learned=np.array(fully_learned),
        documents=np.array(documents),
        **{_NUMBER + name: np.array(values) for name, values in numbers.items()},  # type: ignore[arg-type]
    )


def hold_out(folder: Path, name: str, config: DataConfig, *, whole: bool) -> None:
    """Chooses the held-out examples; all examples of one record are on the same side.

    Args:
        folder: of the part.
        name: of the source, for messages.
        config: what share is held out.
        whole: whether a row has one example; else documents are packed into rows.

    Raises:
        ConfigError: too little is left to train on.
    """
    arrays = dict(np.load(folder / "documents.npz"))
    names, name_of = np.unique(arrays.pop("digests"), return_inverse=True)
    count = 0 if config.eval_path else max(1, round(len(names) * config.heldout_fraction))
    heldout = name_of < count
    training_tokens = int(arrays["lengths"].reshape(len(heldout), -1)[~heldout].sum())
    if not len(names) or training_tokens < (1 if whole else config.seq_len):
        remedy = "Read more text."
        if config.too_long == "drop":
            remedy = 'Read more text, raise data.seq_len, or set data.too_long to "truncate" or "split".'
        raise ConfigError(
            f"data.megabytes: found {config.megabytes}, which gives {len(names)} documents of "
            f"{name}; with {count} of them held out, {training_tokens} tokens are left to train on, "
            f"fewer than one row of {config.seq_len}. {remedy}"
        )
    np.savez(folder / "documents.npz", heldout=heldout, **arrays)


def hold_out_all(folder: Path, config: DataConfig) -> None:
    """Holds all examples of `data.eval_path` out.

    Raises:
        ConfigError: there are none.
    """
    arrays = dict(np.load(folder / "documents.npz"))
    heldout = np.ones(len(arrays.pop("digests")), bool)
    if not heldout.size:
        raise ConfigError(f"data.eval_path: found no document in {config.eval_path}, expected some to evaluate on.")
    np.savez(folder / "documents.npz", heldout=heldout, **arrays)


def open_part(folder: Path, name: str) -> Part:
    """The part in a folder, its token ids as memory-mapped files.

    Raises:
        FileNotFoundError, KeyError: something is missing.
    """
    arrays = np.load(folder / "documents.npz")
    lengths, heldout = arrays["lengths"], arrays["heldout"]
    count = int(arrays["documents"]) if "documents" in arrays else 1  # absent in corpora of earlier versions
    labels = folder / "labels.int32"
    documents = Documents(
        tokens=np.memmap(folder / "tokens.uint32", np.uint32, mode="r"),
        learned=np.memmap(folder / "learned.bool", bool, mode="r"),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        fully_learned=bool(arrays["fully_learned"]),
        labels=np.memmap(labels, np.int32, mode="r") if labels.exists() else None,
    )
    numbers = {key.removeprefix(_NUMBER): arrays[key] for key in arrays.files if key.startswith(_NUMBER)}
    of_document = np.repeat(heldout, count)
    return Part(
        name,
        training=documents.select(~of_document),
        heldout=documents.select(of_document),
        documents=count,
        training_numbers={key: values[~heldout] for key, values in numbers.items()},
        heldout_numbers={key: values[heldout] for key, values in numbers.items()},
    )
