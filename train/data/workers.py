"""Groups of records → examples, in order: tokenized in this process, or in worker processes."""

import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.inference.tokenizer import load_tokenizer
from train.config import DataConfig, SourceConfig
from train.data.chat import Example
from train.data.encode import Encoder, Kind
from train.data.sources import Record

#: A group ends with the record that brings it to one of these sizes.
_RECORDS_OF_A_GROUP, _BYTES_OF_A_GROUP = 256, 1 << 20
#: Bytes of text from which worker processes are started: below, their start takes longer than they save.
_WORTH_WORKERS = 64e6
#: Groups that are waiting or tokenized, for each worker.
_GROUPS_AHEAD = 4


@dataclass(frozen=True)
class Encoded:
    """What a group of records became.

    Attributes:
        records: how many there were.
        size: of their text, in bytes.
        examples: with the names of their records, in order.
        turn_ends: how often each token ended an assistant's turn.
    """

    records: int
    size: int
    examples: list[tuple[str, Example]]
    turn_ends: Counter[int]


def in_groups(records: Iterable[Record]) -> Iterator[list[Record]]:
    """The records in lists; where a list begins, the lists after it do not depend on those before."""
    group: list[Record] = []
    size = 0
    for record in records:
        group.append(record)
        size += record.size
        if len(group) == _RECORDS_OF_A_GROUP or size >= _BYTES_OF_A_GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def encode_group(kind: Kind, encoder: Encoder, group: list[Record]) -> Encoded:
    """The examples of a group."""
    encoder.turn_ends.found.clear()
    examples = [(record.name, example) for record, example in kind.examples(group, encoder)]
    size = sum(record.size for record in group)
    return Encoded(len(group), size, examples, Counter(encoder.turn_ends.found))


def encoded(
    groups: Iterable[list[Record]], kind: Kind, encoder: Encoder, tokenizer: Path, workers: int
) -> Iterator[Encoded]:
    """What the groups became, in their order, whatever the number of workers.

    Args:
        groups: of records.
        kind: how they become examples.
        encoder: of this process.
        tokenizer: its folder, from which each worker makes its own.
        workers: processes; with less than two, this process does it.

    Raises:
        ConfigError: a record is refused; or a worker has died.
    """
    if workers < 2:
        for group in groups:
            yield encode_group(kind, encoder, group)
        return
    # New Python interpreters, not forks: a fork of a program that runs JAX may deadlock.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (kind, tokenizer, encoder.end_id))
    waiting: deque[Future[Encoded]] = deque()
    try:
        for group in groups:
            waiting.append(pool.submit(_encode, group))
            if len(waiting) > _GROUPS_AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ConfigError(
            f"data.num_proc: one of {workers} processes that tokenize has died, for lack of memory, say. Start again: "
            "what was tokenized is kept. Fewer processes need less memory."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def num_workers(config: DataConfig, source: SourceConfig, kind: Kind, size: float) -> int:
    """The worker processes for a source of so many bytes (0: not known); 1: the trainer's own process does it."""
    if kind.memory is not None or source.format == "tokens":
        return 1
    small = 0 < size < _WORTH_WORKERS or source.format == "docstrings"
    return config.num_proc or (1 if small else _cores())


def _cores() -> int:
    """Those that this process may use, where the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_OWN: tuple[Kind, Encoder] | None = None  # of a worker


def _start(kind: Kind, tokenizer: Path, end_id: int) -> None:
    global _OWN
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process is one core
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _OWN = kind, Encoder(load_tokenizer(tokenizer), end_id, tokenizer)


def _end_with_parent() -> None:
    """Ends this process once the trainer has ended, even if that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(group: list[Record]) -> Encoded:
    assert _OWN is not None
    return encode_group(*_OWN, group)
