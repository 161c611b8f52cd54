"""Records → documents of token ids on disk: copies or trains the tokenizer, and holds some documents out.

The result is a pure function of the files and the config. Held-out documents are those whose names have the smallest
hashes, so that they are a random sample of the source.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.huggingface.hub import tokenizer_folder
from qwen_moe_jax.inference.chat_template import ChatTemplate, load_chat_template
from qwen_moe_jax.inference.tokenizer import load_tokenizer
from train.config import DataConfig, SourceConfig
from train.data.batches import Documents
from train.data.chat import Turns, conversation_documents
from train.data.sources import Conversation, Record, describe_source, read_records

# The special tokens and the chat template (ChatML, as Qwen's) of a tokenizer that is trained here. The `generation`
# tags mark the assistant's tokens for transformers and TRL; this trainer does not need them.
SPECIAL_TOKENS = END_OF_TEXT, _, MESSAGE_END = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {{- message.content + '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# The files of a tokenizer in a Hub folder. special_tokens_map.json is read in old folders only.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja",
)  # fmt: skip

_BATCH_OF_TEXTS = 256  # texts that are tokenized in parallel, on all cores

# Qwen's pre-tokenization pattern, which splits text into words before the BPE: a word takes the last of the spaces
# before it, line ends and the indentation after them are one piece, and each digit is a piece.
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Part:
    """The documents of one source."""

    name: str
    training: Documents
    heldout: Documents


@dataclass(frozen=True)
class Corpus:
    """Documents of token ids, in the order of the config's sources, and their tokenizer.

    Attributes:
        tokenizer: of all documents.
        end_id: the token that ends a document.
        parts: the documents of each source.
        notes: lines for the start of the run, such as one on every source that was not read to its end.
    """

    tokenizer: Tokenizer
    end_id: int
    parts: list[Part]
    notes: list[str]

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that the tokenizer knows."""
        return _vocab_size(self.tokenizer)

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end a generation: the end of a document and, if there is one, the end of a message."""
        message_end = self.tokenizer.token_to_id(MESSAGE_END)
        return [self.end_id] if message_end in (None, self.end_id) else [self.end_id, message_end]


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
        _make_corpus(partial, config)
        os.replace(partial, folder)
    if not (folder / "corpus.json").exists():
        raise ConfigError(
            f"{folder}: found no corpus.json, so an earlier version of this program made it, or the file was removed. "
            f"Add --fresh to start the run anew."
        )
    described = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
    parts = [_open_part(folder / str(number), name) for number, name in enumerate(described["sources"])]
    return Corpus(load_tokenizer(folder / "tokenizer"), described["end_id"], parts, described["notes"])


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies the files of a tokenizer, its chat templates included, from one Hub folder to another."""
    for pattern in _TOKENIZER_FILES:
        for file in source.glob(pattern):
            target = folder / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def _make_corpus(folder: Path, config: DataConfig) -> None:
    if config.tokenizer:
        copy_tokenizer(tokenizer_folder(config.tokenizer), folder / "tokenizer")
    else:
        save_tokenizer(train_tokenizer(_texts(config), config.vocab_size), folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    end_id = _end_id(tokenizer, folder / "tokenizer", config)
    notes: list[str] = []
    for number, source in enumerate(config.mixture):

        def note(how_much: str, source: SourceConfig = source) -> None:
            notes.append(f"read {how_much} of {describe_source(source)} (data.megabytes)")

        records = read_records(source, config.megabytes, end_id, note)
        _write_part(folder / str(number), _encode(records, tokenizer, end_id, folder / "tokenizer"))
        _hold_out(folder / str(number), source, config)
    sources = [describe_source(source) for source in config.mixture]
    described = {"end_id": end_id, "sources": sources, "notes": notes}
    (folder / "corpus.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def _texts(config: DataConfig) -> Iterator[str]:
    """The training text of the tokenizer: the texts of all sources and the messages of their conversations."""
    for source in config.mixture:
        for record in read_records(source, config.megabytes):
            if isinstance(record.content, str):
                yield record.content
            elif isinstance(record.content, Conversation):
                yield from (message.get("content") or "" for message in record.content.messages)


def _end_id(tokenizer: Tokenizer, folder: Path, config: DataConfig) -> int:
    """The id of the token that ends a document: tokenizer_config.json's eos_token."""
    file = folder / "tokenizer_config.json"
    found = json.loads(file.read_text(encoding="utf-8")).get("eos_token") if file.exists() else None
    token = found.get("content") if isinstance(found, dict) else found
    end_id = tokenizer.token_to_id(token or END_OF_TEXT)
    if end_id is None:
        raise ConfigError(
            f"data.tokenizer: {config.tokenizer}: found {token!r} as eos_token in tokenizer_config.json, expected a "
            f"token of tokenizer.json that ends a document."
        )
    return end_id


def _encode(
    records: Iterable[Record], tokenizer: Tokenizer, end_id: int, folder: Path
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
                    yield record, turns
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
    lengths, digests = [], []
    with ExitStack() as stack:
        tokens_file = stack.enter_context((folder / "tokens.uint32").open("wb"))
        learned_file = stack.enter_context((folder / "learned.bool").open("wb"))
        for record, turns in documents:
            tokens_file.write(turns.ids.astype(np.uint32).tobytes())
            learned_file.write(turns.learned.tobytes())
            lengths.append(len(turns.ids))
            digests.append(int.from_bytes(hashlib.sha256(record.name.encode()).digest()[:8], "big"))
    np.savez(folder / "documents.npz", lengths=np.array(lengths), digests=np.array(digests, np.uint64))


def _hold_out(folder: Path, source: SourceConfig, config: DataConfig) -> None:
    """Chooses the held-out documents; all documents of one record are on the same side."""
    arrays = dict(np.load(folder / "documents.npz"))
    names, name_of = np.unique(arrays.pop("digests"), return_inverse=True)
    count = max(1, round(len(names) * config.heldout_fraction))
    heldout = name_of < count
    training_tokens = int(arrays["lengths"][~heldout].sum())
    if training_tokens < config.seq_len:
        raise ConfigError(
            f"data.megabytes: found {config.megabytes}, which gives {len(names)} documents of "
            f"{describe_source(source)}; with {count} of them held out, {training_tokens} tokens are left to train on, "
            f"fewer than one row of {config.seq_len}. Read more text."
        )
    np.savez(folder / "documents.npz", heldout=heldout, **arrays)


def _open_part(folder: Path, name: str) -> Part:
    arrays = np.load(folder / "documents.npz")
    lengths, heldout = arrays["lengths"], arrays["heldout"]
    documents = Documents(
        tokens=np.memmap(folder / "tokens.uint32", np.uint32, mode="r"),
        learned=np.memmap(folder / "learned.bool", bool, mode="r"),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
    )
    return Part(name, training=documents.select(~heldout), heldout=documents.select(heldout))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with Qwen's word pattern and three special tokens; it can encode any text."""
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
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the files with which transformers' AutoTokenizer opens the folder, its chat template included."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
