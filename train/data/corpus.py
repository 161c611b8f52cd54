"""Records → documents of token ids on disk: copies or trains the tokenizer, and holds some documents out.

The result is a pure function of the files and the config. Held-out documents are those whose names have the smallest
hashes, so that they are a random sample of the source.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.huggingface.fields import read_json
from qwen_moe_jax.huggingface.hub import tokenizer_folder
from qwen_moe_jax.inference.tokenizer import load_tokenizer
from train.config import DataConfig, SourceConfig
from train.data.cache import MANIFEST, Entry, tokenized
from train.data.changed import changed_files
from train.data.encode import TEXTS, Encoder, Kind, vocab_size
from train.data.fingerprints import text_fingerprint
from train.data.lengths import LengthRule
from train.data.parts import Part, describe_part, hold_out, hold_out_all, open_part
from train.data.recognised import Recognised
from train.data.sources import describe_source, read_records, texts_of
from train.data.tokenizer import END_OF_TEXT, MESSAGE_END, copy_tokenizer, save_tokenizer, train_tokenizer
from train.data.turn_ends import TurnEnds

#: The folder of the documents of `data.eval_path` within a corpus.
VALIDATION = "validation"


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
        pad_id: the token of padding, which is the tokenizer's, or `end_id`.
        summary: what the objective's kind of records noted, as JSON.
    """

    tokenizer: Tokenizer
    end_id: int
    turn_end_ids: list[int]
    parts: list[Part]
    forms: list[str]
    notes: list[str]
    validation: Part | None = None
    pad_id: int = 0
    summary: dict[str, Any] = field(default_factory=dict)

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
        return vocab_size(self.tokenizer)

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end a generation: the end of a document, of a message and of an assistant's turn."""
        found = [self.end_id, self.tokenizer.token_to_id(MESSAGE_END), *self.turn_end_ids]
        return [token for token in dict.fromkeys(found) if token is not None]

    @property
    def turn_ends(self) -> list[str]:
        """The texts of `turn_end_ids`."""
        return [self.tokenizer.id_to_token(token) for token in self.turn_end_ids]


def load_corpus(folder: Path, config: DataConfig, kind: Kind = TEXTS) -> Corpus:
    """Opens the corpus in `folder`, or makes it there at the first start of the run.

    So a resumed run reads the same rows, even if a source file or the Python version has changed since.

    Args:
        folder: in the run's folder. Documents are in its `cache`, or in `data.cache_dir`.
        config: what is read.
        kind: how records become examples.

    Raises:
        ConfigError: there is no text, too little of it to train on, or something that cannot be read.
        CheckpointError: the tokenizer or its chat template cannot be read.
    """
    resumed = folder.exists()
    if not resumed:
        partial = folder.with_name(folder.name + ".partial")  # an interrupted start leaves what it tokenized in it
        cache = Path(config.cache_dir).expanduser() if config.cache_dir else partial / "cache"
        with _unreadable_sources(folder.parent, cache):
            _make_corpus(partial, cache, config, kind)
        os.replace(partial, folder)
    try:
        described = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        end_id, turn_end_ids, notes, parts = (described[key] for key in ("end_id", "turn_end_ids", "notes", "parts"))
        opened = {place: open_part(folder, part, part["name"]) for place, part in parts.items()}
        validation = opened.pop(VALIDATION, None)
    except (FileNotFoundError, KeyError, json.JSONDecodeError) as error:
        raise ConfigError(
            f"{folder}: found {_what_is_missing(error)}, so an earlier version of this program made it, or a file was "
            "changed, or this host does not see data.cache_dir. Add --fresh to start the run anew."
        ) from None
    if resumed:
        notes = notes + _changed(folder, config, described["parts"])
    forms = described.get("forms", [])  # absent where an earlier version made the corpus
    pad_id, summary = described.get("pad_id", end_id), described.get("summary", {})
    tokenizer = load_tokenizer(folder / "tokenizer")
    return Corpus(tokenizer, end_id, turn_end_ids, [*opened.values()], forms, notes, validation, pad_id, summary)


def _changed(folder: Path, config: DataConfig, parts: dict[str, Any]) -> list[str]:
    """Lines on the sources whose files changed since the corpus in `folder` was made of them."""
    lines = list[str]()
    for place, source in _sources(config).items():
        if place not in parts:
            continue
        manifest = json.loads((folder / parts[place]["cache"] / MANIFEST).read_text(encoding="utf-8"))
        if manifest["source"]["path"] == source.path:
            lines += changed_files(source, manifest["fingerprints"]["files"], manifest["source"]["files"])
    return lines


def _what_is_missing(error: FileNotFoundError | KeyError | json.JSONDecodeError) -> str:
    if isinstance(error, KeyError):  # of corpus.json; numpy's are "NAME is not a file in the archive"
        return f"no {str(error.args[0]).split()[0]}"
    return f"no {Path(error.filename).name}" if isinstance(error, FileNotFoundError) else "no JSON in corpus.json"


@contextmanager
def _unreadable_sources(*own: str | Path) -> Iterator[None]:
    """Refuses a file or folder of the text that cannot be read; an error of the run's `own` folders passes."""
    try:
        yield
    except OSError as error:
        if not isinstance(error.filename, str | Path):
            raise
        if any(Path(error.filename).absolute().is_relative_to(Path(folder).absolute()) for folder in own):
            raise
        raise ConfigError(
            f"data: {error.filename}: it cannot be read: {error.strerror}. Make it readable, or leave it out by "
            "data.path or data.pattern."
        ) from None


def _make_corpus(folder: Path, cache: Path, config: DataConfig, kind: Kind) -> None:
    shutil.rmtree(folder / "tokenizer", ignore_errors=True)
    if config.tokenizer:
        copy_tokenizer(tokenizer_folder(config.tokenizer), folder / "tokenizer")
    else:
        copy_tokenizer(_trained_tokenizer(cache, config, kind), folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    end_id = end_of_text(tokenizer, folder / "tokenizer", config)
    turn_ends = TurnEnds(tokenizer)
    described: dict[str, Any] = {"end_id": end_id}
    notes, forms, parts = list[str](), list[str](), dict[str, Any]()
    for place, source in _sources(config).items():
        name = describe_source(source)
        encoder = Encoder(tokenizer, end_id, folder / "tokenizer")
        entry = tokenized(cache, source, config, kind, encoder, folder / "tokenizer")
        if place == VALIDATION:
            division = hold_out_all(entry, config)
        else:
            division = hold_out(entry, name, config, whole=kind.whole)
        parts[place] = {"name": name, **describe_part(entry, folder, division)}
        turn_ends.found.update(entry.turn_ends)
        forms += entry.forms
        notes += [f"read {how_much} of {name} (data.megabytes)" for how_much in entry.read]
        notes += _length_notes(entry, config, kind, name)
    notes += turn_ends.notes()
    described |= {"turn_end_ids": turn_ends.ids(), "parts": parts, "forms": forms, "notes": notes}
    pad_token = _token(folder / "tokenizer", "pad_token")
    pad_id = None if pad_token is None else tokenizer.token_to_id(pad_token)
    described["pad_id"] = end_id if pad_id is None else pad_id
    described["summary"] = kind.summary()
    (folder / "corpus.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    if not config.cache_dir:
        _remove_others(cache, {Path(part["cache"]).name for part in parts.values()})


def _trained_tokenizer(cache: Path, config: DataConfig, kind: Kind) -> Path:
    """The folder in the cache of the tokenizer that is trained on the text of all sources."""
    folder = cache / f"tokenizer-{text_fingerprint(config, kind)}"
    if not folder.exists():
        partial = cache / f".{folder.name}.{os.getpid()}.partial"
        save_tokenizer(train_tokenizer(_texts(config, kind), config.vocab_size), partial)
        try:
            os.replace(partial, folder)
        except OSError:  # another process was faster
            shutil.rmtree(partial)
    return folder


def _length_notes(entry: Entry, config: DataConfig, kind: Kind, name: str) -> list[str]:
    lengths = LengthRule(config.too_long, config.seq_len, whole=kind.whole)
    lengths.restore(entry.lengths)
    if lengths.longest_kept is None:  # what is split is the same for rows of any length, and so is not counted before
        arrays = (np.load(entry.folder / shard.name / "lengths.npy") for shard in entry.shards)
        lengths.too_long = sum(int((array > config.seq_len).sum()) for array in arrays)
    return lengths.notes(name)


def _remove_others(cache: Path, used: set[str]) -> None:
    """Removes what interrupted starts on other text have left in the run's own cache, and the trained tokenizer."""
    for path in cache.iterdir():
        if path.is_file():
            path.unlink()
        elif path.name not in used:
            shutil.rmtree(path)


def _sources(config: DataConfig) -> dict[str, SourceConfig]:
    """What is read, by the name of its folder in the corpus."""
    sources = {str(number): source for number, source in enumerate(config.mixture)}
    return sources if config.validation is None else {**sources, VALIDATION: config.validation}


def _texts(config: DataConfig, kind: Kind) -> Iterator[str]:
    """The training text of the tokenizer: all texts of all sources."""
    for source in config.mixture:
        for record in read_records(source, config.megabytes, recognised=Recognised(source.columns, kind.read)):
            if not isinstance(record.content, np.ndarray):
                yield from texts_of(record.content)


def end_of_text(tokenizer: Tokenizer, folder: Path, config: DataConfig) -> int:
    """The id of the token that ends a document: tokenizer_config.json's eos_token."""
    token = _token(folder, "eos_token")
    end_id = tokenizer.token_to_id(token or END_OF_TEXT)
    if end_id is None:
        raise ConfigError(
            f"data.tokenizer: {config.tokenizer}: found {token!r} as eos_token in tokenizer_config.json, expected a "
            f"token of tokenizer.json that ends a document."
        )
    return end_id


def _token(folder: Path, name: str) -> str | None:
    """A token that tokenizer_config.json names."""
    file = folder / "tokenizer_config.json"
    found = read_json(file).get(name) if file.exists() else None
    return found.get("content") if isinstance(found, dict) else found
