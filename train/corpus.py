"""Text → documents of token ids: reads source files, trains a byte-level BPE on them, keeps some documents held out.

Everything is a pure function of the files and the config. Files are taken in the order of a hash of their names, so
that a bounded amount of text is a fair sample of the whole, and held-out documents are spread over all packages.
"""

import hashlib
import json
import os
import sysconfig
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from qwen_moe_jax.errors import ConfigError
from train.config import DataConfig

END_OF_TEXT = "<|endoftext|>"

# Installed packages, tests, generated tables and copies of other tools: not what a student of Python should read.
_SKIPPED_IN_STDLIB = (
    "__*__", "config-*", "dist-packages", "encodings", "ensurepip", "idlelib", "lib-dynload", "lib2to3", "pydoc_data",
    "site-packages", "test", "tests", "turtledemo",
)  # fmt: skip

# Qwen's own way to cut text into words before the BPE merges bytes within each: a run of spaces before a word keeps its
# last space with the word, line ends and the indentation after them stay together, digits stand alone.
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Corpus:
    """Documents of token ids, each a uint32 [length] that ends with the end-of-text id, and their tokenizer."""

    tokenizer: Tokenizer
    training: list[np.ndarray]
    heldout: list[np.ndarray]

    @property
    def end_id(self) -> int:
        """The id that ends every document."""
        return self.tokenizer.token_to_id(END_OF_TEXT)


def load_corpus(folder: Path, config: DataConfig) -> Corpus:
    """Opens the corpus that an earlier start of this run left in `folder`, or makes it and leaves it there.

    A run that is resumed must see the very same rows, even if a source file or the Python version has changed since.

    Raises:
        ConfigError: there is no text, or too little of it to train on.
    """
    tokenizer_file, documents_file = folder / "tokenizer.json", folder / "documents.npz"
    if tokenizer_file.exists() and documents_file.exists():
        arrays = np.load(documents_file)
        return Corpus(
            Tokenizer.from_file(str(tokenizer_file)),
            *(np.split(arrays[part], arrays[f"{part}_starts"][1:]) for part in ("training", "heldout")),
        )

    corpus = make_corpus(config)
    folder.mkdir(parents=True, exist_ok=True)
    corpus.tokenizer.save(str(tokenizer_file))
    arrays = {}
    for part in ("training", "heldout"):
        documents = getattr(corpus, part)
        arrays[part] = np.concatenate(documents)
        arrays[f"{part}_starts"] = np.cumsum([0, *(len(document) for document in documents[:-1])])
    beside = folder / "documents.partial.npz"
    np.savez(beside, **arrays)
    beside.rename(documents_file)
    return corpus


def make_corpus(config: DataConfig) -> Corpus:
    """Reads, tokenizes and divides the text that `config` describes. Raises ConfigError when there is too little."""
    texts = read_texts(config)
    tokenizer = train_tokenizer(texts, config.vocab_size)
    end_id = tokenizer.token_to_id(END_OF_TEXT)
    encodings = tokenizer.encode_batch_fast(texts)
    documents = [np.array([*encoding.ids, end_id], np.uint32) for encoding in encodings]

    # The order is that of a hash already, so the first documents are as good a choice as any, and the same every time.
    count = max(1, round(len(documents) * config.heldout_fraction))
    training_tokens = sum(len(document) for document in documents[count:])
    if training_tokens < config.seq_len:
        raise ConfigError(
            f"data.megabytes: found {config.megabytes}, which gives {len(documents)} documents; with {count} of them "
            f"held out, {training_tokens} tokens are left to train on, fewer than one row of {config.seq_len}. "
            f"Read more text."
        )
    return Corpus(tokenizer, training=documents[count:], heldout=documents[:count])


def read_texts(config: DataConfig) -> list[str]:
    """The documents: all matching files below the folder, in the order of a hash of their paths, up to `megabytes`.

    Raises:
        ConfigError: the folder holds no matching file.
    """
    root = Path(config.folder or sysconfig.get_path("stdlib"))
    skipped = () if config.folder else _SKIPPED_IN_STDLIB
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not any(fnmatch(name, pattern) for pattern in skipped)]
        files += [Path(folder, name) for name in names if fnmatch(name, config.pattern)]
    files.sort(key=lambda file: hashlib.sha256(file.relative_to(root).as_posix().encode()).digest())

    texts, size = [], 0
    for file in files:
        raw = file.read_bytes()
        if size + len(raw) > config.megabytes * 1e6:
            continue  # too long for the room that is left; a shorter one may still fit
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            texts.append(text)
            size += len(raw)
    if not texts:
        raise ConfigError(
            f"data.folder: {root} holds no readable {config.pattern} file of at most {config.megabytes} MB; "
            f"point data.folder and data.pattern at some text."
        )
    return texts


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with Qwen's word pattern and one special token; it can spell any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json and a tokenizer_config.json with which transformers' AutoTokenizer opens the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
