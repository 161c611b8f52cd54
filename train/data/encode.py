"""Records → examples: how the records of an objective become token ids. Those of language modelling are here."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.inference.chat_template import ChatTemplate, load_chat_template
from train.data.chat import Example, Turns, completion_document, conversation_documents
from train.data.messages import Conversation
from train.data.records import Completion, Read, read_record
from train.data.sources import Record
from train.data.turn_ends import TurnEnds

_BATCH_OF_TEXTS = 256  # texts that are tokenized in parallel, on all cores


class Encoder:
    """The tokenizer of a corpus with its chat template.

    Attributes:
        tokenizer: of all documents.
        end_id: the token that ends a document.
        turn_ends: collects what ends an assistant's turn.
    """

    def __init__(self, tokenizer: Tokenizer, end_id: int, folder: Path) -> None:
        """`folder` is the tokenizer's."""
        self.tokenizer, self.end_id = tokenizer, end_id
        self.turn_ends = TurnEnds(tokenizer)
        self._folder = folder

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return vocab_size(self.tokenizer)

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template, loaded with the first conversation: tokenizers of base models have none."""
        return load_chat_template(self._folder)

    def conversation(self, conversation: Conversation, place: str) -> list[Turns]:
        """The documents of a conversation; see `conversation_documents`."""
        documents = conversation_documents(conversation, self.template, self.tokenizer, place)
        for turns in documents:
            self.turn_ends.add(turns)
        return documents

    def completion(self, completion: Completion) -> Turns:
        """The document of a prompt and what follows it."""
        return completion_document(completion, self.tokenizer, self.end_id)


class Memory(Protocol):
    """What the examples of a record depend on besides the record: the numbers of labels that came before, say."""

    def state(self) -> dict[str, Any]:
        """As JSON."""

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a `state`."""


@dataclass(frozen=True)
class Kind:
    """What the records of an objective are.

    Attributes:
        name: of the objective's records, with the settings on which their tokens depend.
        read: (record, place, columns) → what it is, as `read_record` does.
        examples: the examples of records.
        whole: whether a document has to stay in one row.
        summary: called once all were read: what the corpus notes of them, as JSON.
        memory: what examples depend on besides their own record; None where each record is independent of the others,
            so that several processes can read them.
    """

    name: str
    read: Callable[..., Read]
    examples: Callable[[Iterable[Record], Encoder], Iterator[tuple[Record, Example]]]
    whole: bool = True
    summary: Callable[[], dict[str, Any]] = dict
    memory: "Memory | None" = None


def text_examples(records: Iterable[Record], encoder: Encoder) -> Iterator[tuple[Record, Example]]:
    """The documents of each record, for language modelling: texts, completions, conversations and token ids."""
    tokenizer, end_id, size = encoder.tokenizer, encoder.end_id, encoder.vocab_size
    records = iter(records)
    while group := list(islice(records, _BATCH_OF_TEXTS)):
        texts = [record.content for record in group if isinstance(record.content, str)]
        encodings = iter(tokenizer.encode_batch_fast(texts))
        for record in group:
            if isinstance(record.content, Conversation):
                for turns in encoder.conversation(record.content, record.place):
                    yield record, Example((turns,))
                continue
            if isinstance(record.content, Completion):
                yield record, Example((encoder.completion(record.content),))
                continue
            if isinstance(record.content, str):
                ids = np.array(next(encodings).ids, np.int64)
                ids = ids if ids.size and ids[-1] == end_id else np.append(ids, end_id)
            else:
                ids = _checked_ids(record.content, record.place, size)
            yield record, Example((Turns(ids, np.ones(len(ids), bool)),))


def vocab_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id that a tokenizer knows."""
    return 1 + max(tokenizer.get_vocab().values())


def _checked_ids(ids: np.ndarray, place: str, vocab_size: int) -> np.ndarray:
    outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if outside.size:
        raise ConfigError(
            f"{place}: found token id {ids[outside[0]]}, expected ids from 0 to {vocab_size - 1}, "
            f"those of data.tokenizer. Check that these ids were made with that tokenizer."
        )
    return ids


#: The records of language modelling.
TEXTS = Kind("language modelling", read_record, text_examples, whole=False)
