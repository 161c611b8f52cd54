"""Preferences: a prompt with a chosen and a rejected answer → pairs of documents. For DPO and reward models.

The forms are TRL's: `{"prompt" or "messages", "chosen", "rejected"}`, of texts or of messages, or `{"chosen",
"rejected"}` with the prompt in both. `margin` is optional.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from train.config import ColumnsConfig
from train.data.chat import Example, Turns, common_length
from train.data.encode import Encoder, Kind
from train.data.messages import (
    Conversation,
    as_conversation,
    checked_messages,
    finite_number,
    refuse,
    refuse_surrogates,
    refuse_template_fields,
    template_variables,
)
from train.data.records import Completion, Read
from train.data.sources import Record, texts_of

WANTED = '{"prompt" or "messages": …, "chosen": …, "rejected": …}, or {"chosen": …, "rejected": …}'


@dataclass(frozen=True)
class Preference:
    """Two completions of one prompt, the better one first."""

    chosen: Completion | Conversation
    rejected: Completion | Conversation
    margin: float = 0.0

    @property
    def texts(self) -> list[str]:
        """All texts of both."""
        return [*texts_of(self.chosen), *texts_of(self.rejected)]


def read_preference(found: Any, place: str, columns: ColumnsConfig = ColumnsConfig()) -> Read:
    """Recognises and reads a preference, as `read_record` does a text.

    Raises:
        ConfigError: it is none, or has a value of another kind; the message begins with `place` and names the field.
    """
    if not isinstance(found, dict):
        refuse(f"{place}: found {found!r:.80}, expected {WANTED}.")
    names = {field: columns.given.get(field, field) for field in _FIELDS}
    values = {field: found[name] for field, name in names.items() if found.get(name) is not None}
    if "messages" not in values and "messages" not in columns.given and found.get("conversations") is not None:
        names["messages"], values["messages"] = "conversations", found["conversations"]
    if not {"chosen", "rejected"} <= values.keys():
        refuse(f"{place}: found the keys {', '.join(found) or '(none)'}, expected {WANTED}.")
    if {"prompt", "messages"} <= values.keys():
        refuse(f"{place}: found both {names['prompt']} and {names['messages']}, expected one of them, the prompt.")
    refuse_surrogates({names[field]: value for field, value in values.items()}, place)
    margin = finite_number(values.get("margin", 0.0), f"{place}: {names['margin']}")
    sides = [values["chosen"], values["rejected"]]
    if isinstance(values.get("prompt"), list) or "messages" in values or all(isinstance(side, list) for side in sides):
        form, (chosen, rejected) = "pairs of conversations", _conversations(values, names, place)
    else:
        form, (chosen, rejected) = "pairs of texts", _texts(values, names, place)
    content = None if chosen == rejected else Preference(chosen, rejected, margin)
    return Read(form, content, frozenset(names[field] for field in values))


_FIELDS = ("prompt", "messages", "chosen", "rejected", "margin", "tools", "chat_template_kwargs")


def _texts(values: Mapping[str, Any], names: Mapping[str, str], place: str) -> list[Any]:
    refuse_template_fields(values, names, place)
    texts = {field: values.get(field, "") for field in ("prompt", "chosen", "rejected")}
    for field, text in texts.items():
        if not isinstance(text, str):
            refuse(f"{place}: {names[field]}: found {text!r:.80}, expected a string, as the others are.")
    prompt = texts["prompt"]
    if not prompt:
        prompt = texts["chosen"][: common_length(texts["chosen"], texts["rejected"])]
        prompt = prompt[: prompt.rfind(" ") + 1].rstrip()  # whole words: what follows is tokenized with its space
    answers = [texts[side].removeprefix(prompt) if not texts["prompt"] else texts[side] for side in _SIDES]
    for side, answer in zip(_SIDES, answers, strict=True):
        if not answer.strip():
            refuse(f"{place}: {names[side]}: found {texts[side]!r:.80}, expected a text after the prompt.")
    return [Completion(prompt, answer) for answer in answers]


_SIDES = ("chosen", "rejected")


def _conversations(values: Mapping[str, Any], names: Mapping[str, str], place: str) -> list[Any]:
    asked = "messages" if "messages" in values else "prompt"
    prompt = checked_messages(values[asked], place, names[asked]) if asked in values else []
    sides = [_answer(values[side], names[side], place) for side in _SIDES]
    if not prompt:
        same = common_length(sides[0], sides[1])  # type: ignore[arg-type]
        prompt, sides = sides[0][:same], [side[same:] for side in sides]
    tools, kwargs = values.get("tools"), values.get("chat_template_kwargs")
    variables = template_variables(tools, kwargs, place, names["tools"], names["chat_template_kwargs"])
    for side, messages in zip(_SIDES, sides, strict=True):
        if not any(message["role"] == "assistant" for message in messages):
            refuse(f"{place}: {names[side]}: found no message of the assistant after the prompt, expected its answer.")
    context = range(len(prompt))
    return [
        as_conversation([*prompt, *messages], variables, place, names[side], context=context)
        for side, messages in zip(_SIDES, sides, strict=True)
    ]


def _answer(found: Any, column: str, place: str) -> list[dict[str, Any]]:
    """Messages of an answer that is a list of them, one of them, or its text."""
    if isinstance(found, str):
        return [{"role": "assistant", "content": found}]
    return checked_messages([found] if isinstance(found, dict) else found, place, column)


def pair_examples(records: Iterable[Record], encoder: Encoder) -> Iterator[tuple[Record, Example]]:
    """The two documents of each preference, the chosen one first; learned are the completions.

    A record that is a question with its answer (`data.format = "docstrings"`) becomes a preference for that answer over
    the same words in reverse order.
    """
    for record in records:
        content = record.content
        if isinstance(content, Conversation):
            words = content.messages[-1]["content"].split()
            if words == words[::-1]:
                continue
            reverse = {**content.messages[-1], "content": " ".join(reversed(words))}
            content = Preference(content, Conversation([*content.messages[:-1], reverse]))
        encode = partial(_document, encoder=encoder, place=record.place)
        documents = (encode(content.chosen), encode(content.rejected))
        yield record, Example(documents, {"margin": np.float32(content.margin)})  # type: ignore[dict-item]


def _document(side: Completion | Conversation, encoder: Encoder, place: str) -> Turns:
    if isinstance(side, Completion):
        return encoder.completion(side)
    documents = encoder.conversation(side, place)
    if len(documents) > 1:
        refuse(
            f"{place}: the chat template renders an earlier turn of this answer differently once others follow it, so "
            "that the answer is no one text. Make each turn of the assistant a pair of its own, with the turns before "
            "it as the prompt."
        )
    return documents[0]


#: The records of DPO and of reward models.
PAIRS = Kind("preferences", read_preference, pair_examples)
