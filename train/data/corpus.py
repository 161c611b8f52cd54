"""Records → documents of token ids on disk: copies or trains the tokenizer, and holds some documents out.

The result is a pure function of the files and the config. Held-out documents are those whose names have the smallest
hashes, so that they are a random sample of the source.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.huggingface.fields import read_json
from qwen_moe_jax.huggingface.hub import tokenizer_folder
from qwen_moe_jax.inference.chat_template import ChatTemplate, load_chat_template
from qwen_moe_jax.inference.tokenizer import load_tokenizer
from train.config import DataConfig, SourceConfig
from train.data.batches import Documents
from train.data.chat import Turns, completion_document, conversation_documents
from train.data.lengths import LengthRule
from train.data.messages import Conversation
from train.data.recognised import Recognised
from train.data.records import Completion
from train.data.sources import Record, describe_source, read_records, texts_of
from train.data.tokenizer import END_OF_TEXT, MESSAGE_END, copy_tokenizer, save_tokenizer, train_tokenizer
from train.data.turn_ends import TurnEnds

#: The folder of the documents of `data.eval_path` within a corpus.
VALIDATION = "validation"

_BATCH_OF_TEXTS = 256  # texts that are tokenized in parallel, on all cores


@dataclass(frozen=True)
class Part:
    """The documents of one source, or of the file that is held out (`data.eval_path`)."""

    name: str
    training: Documents
    heldout: Documents


@dataclass(frozen=True)
class Corpus:
    """Documents of token ids, in the order of the config's sources, and their tokenizer.

    Attributes:
        tokenizer: of all documents.
        end_id: the token that ends a document.
        turn_end_ids: the tokens with which the chat template ends an assistant's turn; none without conversations.
        parts: the documents of each source.
        validation: those of `data.eval_path`, all of which are held out; None without it.
        forms: lines for the start of the run on what the records of each source were recognised as.
        notes: lines for the start of the run, such as one on every source that was not read to its end.
    """

    tokenizer: Tokenizer
    end_id: int
    turn_end_ids: list[int]
    parts: list[Part]
    forms: list[str]
    notes: list[str]
    validation: Part | None = None

    @property
    def heldout_parts(self) -> list[Part]:
        """The parts whose held-out documents the held-out metrics are of."""
        return self.parts if self.validation is None else [self.validation]

    def heldout_weights(self, weights: list[float]) -> list[float]:
        """The weight of each of the `heldout_parts`, from those of the sources."""
        return weights if self.validation is None else [1.0]

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that the tokenizer knows."""
        return _vocab_size(self.tokenizer)

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end a generation: the end of a document, of a message and of an assistant's turn."""
        found = [self.end_id, self.tokenizer.token_to_id(MESSAGE_END), *self.turn_end_ids]
        return [token for token in dict.fromkeys(found) if token is not None]

    @property
    def turn_ends(self) -> list[str]:
        """The texts of `turn_end_ids`."""
        return [self.tokenizer.id_to_token(token) for token in self.turn_end_ids]


def load_corpus(folder: Path, config: DataConfig) -> Corpus:
    """Opens the corpus in `folder`, or makes it there at the first start of the run.

    So a resumed run reads the same rows, even if a source file or the Python version has changed since.

    Raises:
        ConfigError: there is no text, too little of it to train on, or something that cannot be read.
        CheckpointError: the tokenizer or its chat template cannot be read.
    """
    if not folder.exists():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        with _unreadable_sources(folder.parent):
            _make_corpus(partial, config)
        os.replace(partial, folder)
    try:
        described = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        parts = [open_part(folder / str(number), name) for number, name in enumerate(described["sources"])]
        name = described.get("validation")  # absent without data.eval_path, and in corpora of earlier versions
        validation = None if name is None else open_part(folder / VALIDATION, name)
        end_id, turn_end_ids, notes = (described[key] for key in ("end_id", "turn_end_ids", "notes"))
    except (FileNotFoundError, KeyError, json.JSONDecodeError) as error:
        raise ConfigError(
            f"{folder}: found {_what_is_missing(error)}, so an earlier version of this program made it, or a file was "
            "changed. Add --fresh to start the run anew."
        ) from None
    forms = described.get("forms", [])  # absent where an earlier version made the corpus
    return Corpus(load_tokenizer(folder / "tokenizer"), end_id, turn_end_ids, parts, forms, notes, validation)


def _what_is_missing(error: FileNotFoundError | KeyError | json.JSONDecodeError) -> str:
    if isinstance(error, KeyError):  # of corpus.json; numpy's are "NAME is not a file in the archive"
        return f"no {str(error.args[0]).split()[0]}"
    return f"no {Path(error.filename).name}" if isinstance(error, FileNotFoundError) else "no JSON in corpus.json"


@contextmanager
def _unreadable_sources(run: Path) -> Iterator[None]:
    """Refuses a file or folder of the text that cannot be read; an error of the run's own files passes."""
    try:
        yield
    except OSError as error:
        if not isinstance(error.filename, str | Path) or Path(error.filename).absolute().is_relative_to(run.absolute()):
            raise
        raise ConfigError(
            f"data: {error.filename}: it cannot be read: {error.strerror}. Make it readable, or leave it out by "
            "data.path or data.pattern."
        ) from None


def _make_corpus(folder: Path, config: DataConfig) -> None:
    if config.tokenizer:
        copy_tokenizer(tokenizer_folder(config.tokenizer), folder / "tokenizer")
    else:
        save_tokenizer(train_tokenizer(_texts(config), config.vocab_size), folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    end_id = end_of_text(tokenizer, folder / "tokenizer", config)
    notes: list[str] = []
    forms: list[str] = []
    turn_ends = TurnEnds(tokenizer)
    for place, source in _sources(config).items():
        name, read = describe_source(source), list[str]()
        recognised = Recognised(source.columns)
        records = read_records(source, config.megabytes, end_id, read.append, recognised)
        documents = _encode(records, tokenizer, end_id, folder / "tokenizer", turn_ends)
        lengths = LengthRule(config.too_long, config.seq_len)
        _write_part(folder / place, lengths.apply(documents))
        forms += recognised.notes(name)
        notes += [f"read {how_much} of {name} (data.megabytes)" for how_much in read] + lengths.notes(name)
        _hold_out(folder / place, source, config, all_of_it=place == VALIDATION)
    sources = [describe_source(source) for source in config.mixture]
    notes += turn_ends.notes()
    described = {"end_id": end_id, "turn_end_ids": turn_ends.ids(), "sources": sources, "forms": forms, "notes": notes}
    if config.eval_path:
        described["validation"] = config.eval_path
    (folder / "corpus.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def _sources(config: DataConfig) -> dict[str, SourceConfig]:
    """What is read, by the name of its folder in the corpus."""
    sources = {str(number): source for number, source in enumerate(config.mixture)}
    return sources if config.validation is None else {**sources, VALIDATION: config.validation}


def _texts(config: DataConfig) -> Iterator[str]:
    """The training text of the tokenizer: all texts of all sources."""
    for source in config.mixture:
        for record in read_records(source, config.megabytes):
            if not isinstance(record.content, np.ndarray):
                yield from texts_of(record.content)


def end_of_text(tokenizer: Tokenizer, folder: Path, config: DataConfig) -> int:
    """The id of the token that ends a document: tokenizer_config.json's eos_token."""
    file = folder / "tokenizer_config.json"
    found = read_json(file).get("eos_token") if file.exists() else None
    token = found.get("content") if isinstance(found, dict) else found
    end_id = tokenizer.token_to_id(token or END_OF_TEXT)
    if end_id is None:
        raise ConfigError(
            f"data.tokenizer: {config.tokenizer}: found {token!r} as eos_token in tokenizer_config.json, expected a "
            f"token of tokenizer.json that ends a document."
        )
    return end_id


def _encode(
    records: Iterable[Record], tokenizer: Tokenizer, end_id: int, folder: Path, turn_ends: TurnEnds
) -> Iterator[tuple[Record, Turns]]:
    """The documents of each record; `folder` is the tokenizer's."""

    @cache
    def template() -> ChatTemplate:  # loaded with the first conversation: tokenizers of base models have none
        return load_chat_template(folder)

    vocab_size = _vocab_size(tokenizer)
    records = iter(records)
    while group := list(islice(records, _BATCH_OF_TEXTS)):
        texts = [record.content for record in group if isinstance(record.content, str)]
        encodings = iter(tokenizer.encode_batch_fast(texts))
        for record in group:
            if isinstance(record.content, Conversation):
                for turns in conversation_documents(record.content, template(), tokenizer, record.place):
                    turn_ends.add(turns)
                    yield record, turns
                continue
            if isinstance(record.content, Completion):
                yield record, completion_document(record.content, tokenizer, end_id)
                continue
            if isinstance(record.content, str):
                ids = np.array(next(encodings).ids, np.int64)
                ids = ids if ids.size and ids[-1] == end_id else np.append(ids, end_id)
            else:
                ids = _checked_ids(record.content, record.place, vocab_size)
            yield record, Turns(ids, np.ones(len(ids), bool))


def _checked_ids(ids: np.ndarray, place: str, vocab_size: int) -> np.ndarray:
    outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if outside.size:
        raise ConfigError(
            f"{place}: found token id {ids[outside[0]]}, expected ids from 0 to {vocab_size - 1}, "
            f"those of data.tokenizer. Check that these ids were made with that tokenizer."
        )
    return ids


def _vocab_size(tokenizer: Tokenizer) -> int:
    return 1 + max(tokenizer.get_vocab().values())


def _write_part(folder: Path, documents: Iterable[tuple[Record, Turns]]) -> None:
    """Writes documents one by one, so that memory holds only one at a time."""
    folder.mkdir(parents=True)
    lengths, digests, fully_learned = [], [], True
    with ExitStack() as stack:
        tokens_file = stack.enter_context((folder / "tokens.uint32").open("wb"))
        learned_file = stack.enter_context((folder / "learned.bool").open("wb"))
        for record, turns in documents:
            tokens_file.write(turns.ids.astype(np.uint32).tobytes())
            learned_file.write(turns.learned.tobytes())
            lengths.append(len(turns.ids))
            fully_learned = fully_learned and bool(turns.learned.all())
            digests.append(int.from_bytes(hashlib.sha256(record.name.encode()).digest()[:8], "big"))
    np.savez(
        folder / "documents.npz",
        lengths=np.array(lengths, np.int64),
        digests=np.array(digests, np.uint64),
        fully_learned=np.array(fully_learned),
    )


def _hold_out(folder: Path, source: SourceConfig, config: DataConfig, *, all_of_it: bool) -> None:
    """Chooses the held-out documents; all documents of one record are on the same side."""
    arrays = dict(np.load(folder / "documents.npz"))
    names, name_of = np.unique(arrays.pop("digests"), return_inverse=True)
    count = len(names) if all_of_it else max(1, round(len(names) * config.heldout_fraction))
    if config.eval_path and not all_of_it:
        count = 0
    heldout = name_of < count
    training_tokens = int(arrays["lengths"][~heldout].sum())
    if all_of_it and not len(names):
        raise ConfigError(f"data.eval_path: found no document in {config.eval_path}, expected some to evaluate on.")
    if not all_of_it and (not len(names) or training_tokens < config.seq_len):
        remedy = "Read more text."
        if config.too_long == "drop":
            remedy = 'Read more text, raise data.seq_len, or set data.too_long to "truncate" or "split".'
        raise ConfigError(
            f"data.megabytes: found {config.megabytes}, which gives {len(names)} documents of "
            f"{describe_source(source)}; with {count} of them held out, {training_tokens} tokens are left to train on, "
            f"fewer than one row of {config.seq_len}. {remedy}"
        )
    np.savez(folder / "documents.npz", heldout=heldout, **arrays)


def open_part(folder: Path, name: str) -> Part:
    arrays = np.load(folder / "documents.npz")
    lengths, heldout = arrays["lengths"], arrays["heldout"]
    documents = Documents(
        tokens=np.memmap(folder / "tokens.uint32", np.uint32, mode="r"),
        learned=np.memmap(folder / "learned.bool", bool, mode="r"),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        fully_learned=bool(arrays["fully_learned"]),
    )
    return Part(name, training=documents.select(~heldout), heldout=documents.select(heldout))
