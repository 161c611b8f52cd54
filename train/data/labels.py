"""Labelled texts: `{"text" or "prompt" or "messages", "label"}`, or words with a label each: `{"tokens", "labels"}`.

A label is stored as the number of its name in `Labels.names`, in the order in which they came.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from qwen_moe_jax.errors import ConfigError, RequestError
from qwen_moe_jax.inference.tokenizer import encode
from qwen_moe_jax.suggest import did_you_mean
from train.config import ClassificationConfig, ColumnsConfig
from train.data.chat import Example, Turns
from train.data.encode import Encoder, Kind
from train.data.messages import Conversation, checked_messages, finite_number, refuse, refuse_surrogates
from train.data.records import Read
from train.data.sources import Record

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]

SINGLE: ProblemType = "single_label_classification"
MULTI: ProblemType = "multi_label_classification"
REGRESSION: ProblemType = "regression"

#: The label of a token that has none; ignored, as in transformers.
IGNORED = -100
#: Labels of one corpus, at most.
MOST_LABELS = 1024

_WANTED = {
    "sequence": '{"text" or "prompt" or "messages": …, "label": …}',
    "token": '{"tokens": ["a", "word"], "labels": ["its", "label"]}',
}


@dataclass(frozen=True)
class Labelled:
    """A text, messages or words, with their label: a name, names, a number; or a name for each word."""

    content: str | list[dict[str, Any]] | list[str]
    label: str | list[str] | float

    @property
    def texts(self) -> list[str]:
        """All texts."""
        if isinstance(self.content, str):
            return [self.content]
        return [part if isinstance(part, str) else part.get("content") or "" for part in self.content]


@dataclass(frozen=True)
class Labels:
    """The labels of a corpus.

    Attributes:
        problem_type: transformers' name.
        names: as they came; one for a number.
    """

    problem_type: ProblemType
    names: tuple[str, ...]


def reader(settings: ClassificationConfig) -> Callable[..., Read]:
    """(record, place, columns) → a labelled text, of the level of the settings."""

    def read(found: Any, place: str, columns: ColumnsConfig = ColumnsConfig()) -> Read:
        if not isinstance(found, dict):
            refuse(f"{place}: found {found!r:.80}, expected {_WANTED[settings.level]}.")
        names = {field: columns.given.get(field, field) for field in ("text", "prompt", "messages", "label", "tokens")}
        names["labels"] = columns.given.get("labels", "labels" if "labels" in found else "ner_tags")
        wanted = ("tokens", "labels") if settings.level == "token" else ("text", "prompt", "messages", "label")
        values = {field: found[names[field]] for field in wanted if found.get(names[field]) is not None}
        refuse_surrogates({names[field]: value for field, value in values.items()}, place)
        content, label = [field for field in wanted[:-1] if field in values], wanted[-1]
        if len(content) != 1 or label not in values:
            refuse(f"{place}: found the keys {', '.join(found) or '(none)'}, expected {_WANTED[settings.level]}.")
        used = frozenset((names[content[0]], names[label]))
        if settings.level == "token":
            return Read("words with labels", _words(values, names, place), used)
        return Read("labelled texts", _text(content[0], values, names, place, settings), used)

    return read


def _words(values: dict[str, Any], names: dict[str, str], place: str) -> Labelled | None:
    words, labels = values["tokens"], values["labels"]
    for field, items, kinds in (("tokens", words, (str,)), ("labels", labels, (str, int))):
        if not isinstance(items, list) or not all(isinstance(item, kinds) for item in items):
            refuse(f"{place}: {names[field]}: found {items!r:.80}, expected a list of {field}.")
    if len(words) != len(labels):
        refuse(f"{place}: found {len(words)} {names['tokens']} and {len(labels)} {names['labels']}, expected as many.")
    unlabelled = all(label == IGNORED for label in labels)
    return None if unlabelled else Labelled(words, [str(label) for label in labels])


def _text(
    field: str, values: dict[str, Any], names: dict[str, str], place: str, settings: ClassificationConfig
) -> Labelled | None:
    found = values[field]
    if field == "messages" or isinstance(found, list):
        content: Any = checked_messages(found, place, names[field])
    elif not isinstance(found, str):
        refuse(f"{place}: {names[field]}: found {found!r:.80}, expected a string.")
    elif not found.strip():
        return None
    else:
        content = found
    label = values["label"]
    if isinstance(label, list) and all(isinstance(item, str | int) for item in label):
        return Labelled(content, [str(item) for item in label])
    number = isinstance(label, int | float) and not isinstance(label, bool)
    if number and (isinstance(label, float) or settings.problem_type == REGRESSION):
        return Labelled(content, finite_number(label, f"{place}: {names['label']}"))
    if not isinstance(label, str | int):
        refuse(f"{place}: {names['label']}: found {label!r:.80}, expected a name, a number, or a list of names.")
    return Labelled(content, str(label))


def labelled_kind(settings: ClassificationConfig) -> Kind:
    """The records of a classifier; what the corpus notes of them is its `Labels`."""
    numbering = _Numbering(settings)
    name = f"labels {dataclasses.asdict(settings)}"
    return Kind(name, reader(settings), numbering.examples, summary=numbering.summary, memory=numbering)


class _Numbering:
    """Numbers labels as they come, over all sources."""

    def __init__(self, settings: ClassificationConfig) -> None:
        self._settings = settings
        self._names: dict[str, int] = {name: number for number, name in enumerate(settings.labels)}
        self._problem_type: ProblemType | None = settings.problem_type or (SINGLE if settings.labels else None)
        self._found = settings.problem_type is not None

    def examples(self, records: Iterable[Record], encoder: Encoder) -> Iterator[tuple[Record, Example]]:
        """The examples of one source; a label of a name has its number, several names have a row of zeros and ones."""
        for record in records:
            content = record.content
            if isinstance(content, Conversation):
                content = of_question(content)
            self._check_kind(content, record.place)
            if self._settings.level == "token":
                numbers = [self._number(name, record.place) for name in content.label]
                yield record, Example((word_document(content.content, numbers, encoder),))
                continue
            numbers_of = {"label": self._label(content, record.place)}
            yield record, Example((text_document(content, encoder, record.place),), numbers_of)

    def state(self) -> dict[str, Any]:
        """The labels so far; see `train.data.encode.Memory`."""
        return {"names": [*self._names], "problem_type": self._problem_type, "found": self._found}

    def restore(self, state: dict[str, Any]) -> None:
        """See `train.data.encode.Memory`."""
        self._names = {name: number for number, name in enumerate(state["names"])}
        self._problem_type, self._found = state["problem_type"], state["found"]

    def summary(self) -> dict[str, Any]:
        """The fields of `Labels`."""
        return {"problem_type": self._problem_type, "names": [*self._names] or ["LABEL_0"]}

    def _label(self, content: Labelled, place: str) -> np.ndarray:
        if isinstance(content.label, float):
            return np.float32(content.label)  # type: ignore[return-value]
        if isinstance(content.label, str):
            return np.int32(self._number(content.label, place))  # type: ignore[return-value]
        row = np.zeros(MOST_LABELS, bool)
        row[[self._number(name, place) for name in content.label]] = True
        return np.packbits(row)

    def _check_kind(self, content: Labelled, place: str) -> None:
        several = isinstance(content.label, list) and self._settings.level == "sequence"
        kind = MULTI if several else REGRESSION if isinstance(content.label, float) else SINGLE
        if not self._found:
            self._problem_type, self._found = kind, True
        if kind != self._problem_type:
            refuse(f"{place}: label: found {content.label!r:.80}, expected one for {self._problem_type}.")

    def _number(self, name: str, place: str) -> int:
        if name == str(IGNORED) and self._settings.level == "token":
            return IGNORED
        if name not in self._names:
            if self._settings.labels:
                known = ", ".join(self._names)
                refuse(f"{place}: label: found {name!r}; {did_you_mean(name, self._names)}expected one of {known}.")
            if len(self._names) == MOST_LABELS:
                refuse(f"{place}: label: found more than {MOST_LABELS} different labels, expected no more.")
            self._names[name] = len(self._names)
        return self._names[name]


def sorted_names(names: Iterable[str]) -> tuple[str, ...]:
    """Names in the order of the logits: numbers by size, everything else by letter."""
    return tuple(sorted(names, key=lambda name: (0, int(name), "") if name.lstrip("-").isdecimal() else (1, 0, name)))


def of_question(conversation: Conversation) -> Labelled:
    """Of a question about Python's names with its answer, the answer, labelled as a function's or another's."""
    asked, answer = (message["content"] for message in conversation.messages[-2:])
    return Labelled(answer, "function" if asked.startswith("What does") else "class or module")


def text_document(labelled: Labelled, encoder: Encoder, place: str) -> Turns:
    """The tokens of a text, or of messages by the chat template, as transformers' users tokenize them."""
    text: Any = labelled.content
    special = True
    if not isinstance(text, str):
        try:
            text, special = encoder.template.render(text, add_generation_prompt=False), False
        except RequestError as error:
            raise ConfigError(f"{place}: {error}") from None
    ids = np.array(encode(encoder.tokenizer, text, add_special_tokens=special), np.int64)
    return Turns(ids, np.ones(len(ids), bool))


def word_document(words: Sequence[Any], labels: Sequence[int], encoder: Encoder) -> Turns:
    """The tokens of words with spaces between them; the first token of each word has its label."""
    text, starts = "", []
    for word in words:
        text += " " if text else ""
        starts.append(len(text))
        text += word
    encoding = encoder.tokenizer.encode(text)
    token_labels = np.full(len(encoding.ids), IGNORED, np.int32)
    ends = np.array([end for _, end in encoding.offsets])
    for start, label in zip(starts, labels, strict=True):
        first = int(np.searchsorted(ends, start, side="right"))
        if first < len(token_labels) and token_labels[first] == IGNORED:
            token_labels[first] = label
    ids = np.array(encoding.ids, np.int64)
    return Turns(ids, np.ones(len(ids), bool), token_labels)
