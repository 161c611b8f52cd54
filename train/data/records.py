"""One record of a JSON file or a dataset → a text, a completion or a conversation, by the form that its keys show.

A record is refused by file, line and field, with what was found and what was expected.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from train.config import ColumnsConfig
from train.data.messages import (
    Conversation,
    as_conversation,
    checked_messages,
    refuse,
    refuse_surrogates,
    refuse_template_fields,
    template_variables,
)
from train.data.sharegpt import is_sharegpt

#: What a record has to be, for messages.
WANTED = (
    '{"text": …} or {"messages": [{"role": …, "content": …}, …]}, one of the other forms of docs/data.md, or the '
    "names of its columns in [data.columns]"
)

#: The keys under which a field is looked for, where that is not the field's name alone.
_NAMES = {"messages": ("messages", "conversations")}


@dataclass(frozen=True)
class Completion:
    """A text of which only the second part is learned."""

    prompt: str
    completion: str


Content = str | Completion | Conversation


@dataclass(frozen=True)
class Form:
    """What the records of a source are.

    Attributes:
        name: for messages.
        required: the fields that make a record one of this form.
        optional: further fields that are read.
        content: (field → value, field → column, place) → the content, None for a blank one.
    """

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    content: Callable[[dict[str, Any], dict[str, str], str], Content | None]


@dataclass(frozen=True)
class Read:
    """A record that was read: the name of its form, its content (None for a blank one) and the columns used for it."""

    form: str
    content: Any
    columns: frozenset[str]


def checked_content(found: Any, place: str, columns: ColumnsConfig = ColumnsConfig()) -> Content | None:
    """The content of a record; None for a blank one. Raises ConfigError as `read_record` does."""
    return read_record(found, place, columns).content


def read_record(found: Any, place: str, columns: ColumnsConfig = ColumnsConfig()) -> Read:
    """Recognises the form of a record by its keys, or by the columns that are named, and reads it.

    Raises:
        ConfigError: it has no form, several, or a value of another kind; the message begins with `place` and names the
            field.
    """
    if not isinstance(found, dict):
        refuse(f"{place}: found {found!r:.80}, expected {WANTED}.")
    given = {key: value for key, value in found.items() if value is not None}
    form = _chosen(given, columns, place) or _recognised(found, given, columns, place)
    names = _columns(form, given, columns, place)
    values = {field: given[column] for field, column in names.items()}
    refuse_surrogates({column: given[column] for column in names.values()}, place)
    content = form.content(values, {**{field: field for field in form.optional}, **names}, place)
    return Read(_name(form, values), content, frozenset(names.values()))


def _chosen(given: Mapping[str, Any], columns: ColumnsConfig, place: str) -> Form | None:
    """The form whose columns the config names; None where it names none."""
    if columns.form is None:
        return None
    [form] = [form for form in FORMS if form.required == columns.form]
    for field in form.required:
        column = columns.given.get(field, field)
        if column not in given and not any(name in given for name in _columns_of(field, columns)):
            found = ", ".join(given) or "(none)"
            refuse(f"{place}: found the keys {found}, expected {column!r}, which is read as data.columns.{field}.")
    return form


def _recognised(found: Mapping[str, Any], given: Mapping[str, Any], columns: ColumnsConfig, place: str) -> Form:
    """The one form whose required fields are all there."""
    forms = [form for form in FORMS if all(_present(field, given, columns) for field in form.required)]
    if [form.required for form in forms] == [_PREFERENCES.required]:
        _refuse_preferences(given, place)
    if len(forms) == 1:
        _refuse_judged(forms[0], given, place)
        return forms[0]
    if forms:
        several = [", ".join(_present(field, given, columns)[0] for field in form.required) for form in forms]
        example = next(form for form in forms if form is not _PREFERENCES).required[0]
        column = _present(example, given, columns)[0]
        refuse(
            f"{place}: found both {' and '.join(several)}, expected one of these forms. Choose it by naming its "
            f'columns, as in [data.columns] {example} = "{column}".'
        )
    for name in ("text", "messages"):
        if name in found and found[name] is None:
            refuse(f"{place}: {name}: found null, expected {WANTED}.")
    refuse(f"{place}: found the keys {', '.join(found) or '(none)'}, expected {WANTED}.")


def _refuse_preferences(given: Mapping[str, Any], place: str) -> None:
    chosen = given["chosen"]
    begins_with_an_answer = isinstance(chosen, list) and chosen and _role(chosen[0]) in ("assistant", "gpt")
    if isinstance(chosen, list) and not begins_with_an_answer:
        field = "messages"
    else:
        field = "completion" if "prompt" in given else "text"
    refuse(
        f"{place}: found chosen and rejected, a pair of preferences, of which this trainer can learn the chosen answer "
        f'alone. To ask for that, set [data.columns] {field} = "chosen".'
    )


def _refuse_judged(form: Form, given: Mapping[str, Any], place: str) -> None:
    """Refuses answers that are marked as good or bad, of which the bad ones would be learned, too."""
    if form is _COMPLETIONS and isinstance(given.get("label"), bool):
        refuse(
            f"{place}: label: found {given['label']} with a prompt and a completion, which marks completions as good "
            "or bad, and all would be learned. Keep the good ones, and set [data.columns] completion = "
            '"completion" to learn all that are left.'
        )


def _role(message: Any) -> Any:
    return (message.get("role") or message.get("from")) if isinstance(message, dict) else None


def _columns_of(field: str, columns: ColumnsConfig) -> tuple[str, ...]:
    """The keys under which a field is looked for."""
    named = columns.given.get(field)
    return (named,) if named is not None else _NAMES.get(field, (field,))


def _present(field: str, given: Mapping[str, Any], columns: ColumnsConfig) -> list[str]:
    return [name for name in _columns_of(field, columns) if name in given]


def _columns(form: Form, given: Mapping[str, Any], columns: ColumnsConfig, place: str) -> dict[str, str]:
    """Field → column, of the fields that the record has."""
    names = {}
    for field in (*form.required, *form.optional):
        present = _present(field, given, columns)
        if len(present) > 1:
            refuse(
                f"{place}: found both {' and '.join(present)}, expected one of them. Choose it by [data.columns] "
                f'{field} = "{present[0]}".'
            )
        if present:
            names[field] = present[0]
    return names


def _name(form: Form, values: Mapping[str, Any]) -> str:
    """The form's name, with that of its messages' form."""
    if form is _MESSAGES and isinstance(values["messages"], list) and any(map(is_sharegpt, values["messages"])):
        return "conversations in ShareGPT's form (from, value)"
    if form is _COMPLETIONS and isinstance(values["prompt"], list):
        return "prompts and completions of messages"
    return form.name


def _text(values: dict[str, Any], names: dict[str, str], place: str) -> str | None:
    text = _string(values, names, "text", place)
    return text if text.strip() else None


def _conversation(values: dict[str, Any], names: dict[str, str], place: str) -> Conversation:
    messages = checked_messages(values["messages"], place, names["messages"])
    if "system" in values:
        system = _string(values, names, "system", place)
        own = [message["content"] for message in messages if message["role"] == "system"]
        if own and system.strip() and own[0] != system:
            refuse(
                f"{place}: {names['system']}: found {system!r:.80} with a system message of the conversation, "
                "expected one of them."
            )
        if not own and system.strip():
            messages = [{"role": "system", "content": system}, *messages]
    return as_conversation(messages, _variables(values, names, place), place, names["messages"])


def _completion(values: dict[str, Any], names: dict[str, str], place: str) -> Completion | Conversation | None:
    prompt, completion = values["prompt"], values["completion"]
    if isinstance(prompt, list) != isinstance(completion, list):
        kinds = [("messages" if isinstance(value, list) else "text") for value in (prompt, completion)]
        refuse(
            f"{place}: found {kinds[0]} as {names['prompt']} and {kinds[1]} as {names['completion']}, expected both to "
            "be text or both to be lists of messages."
        )
    if isinstance(prompt, list):
        before = checked_messages(prompt, place, names["prompt"])
        after = checked_messages(completion, place, names["completion"])
        if not any(message["role"] == "assistant" for message in after):
            refuse(f"{place}: {names['completion']}: found no message of the assistant, expected one to learn from.")
        messages, variables = [*before, *after], _variables(values, names, place)
        return as_conversation(messages, variables, place, names["prompt"], context=range(len(before)))
    refuse_template_fields(values, names, place)
    prompt, completion = (_string(values, names, field, place) for field in ("prompt", "completion"))
    return Completion(prompt, completion) if completion.strip() else None


def _alpaca(values: dict[str, Any], names: dict[str, str], place: str) -> Conversation:
    texts = {field: _string(values, names, field, place) for field in values if field != "history"}
    messages = []
    if texts.get("system", "").strip():
        messages.append({"role": "system", "content": texts["system"]})
    for turn in _pairs(values.get("history", []), place, names["history"]):
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    asked = "\n".join(part for part in (texts["instruction"], texts.get("input", "")) if part.strip())
    messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": texts["output"]}]
    return as_conversation(messages, {}, place, names["instruction"])


def _pairs(history: Any, place: str, column: str) -> list[list[str]]:
    pairs = history if isinstance(history, list) else [None]
    if not all(isinstance(pair, list) and [type(text) for text in pair] == [str, str] for pair in pairs):
        refuse(f"{place}: {column}: found {history!r:.80}, expected a list of pairs of an instruction and its output.")
    return pairs


def _variables(values: dict[str, Any], names: dict[str, str], place: str) -> dict[str, Any]:
    tools, variables = values.get("tools"), values.get("chat_template_kwargs")
    return template_variables(tools, variables, place, names["tools"], names["chat_template_kwargs"])


def _string(values: dict[str, Any], names: dict[str, str], field: str, place: str) -> str:
    if not isinstance(values[field], str):
        refuse(f"{place}: {names[field]}: found {values[field]!r:.80}, expected a string.")
    return values[field]


_TEXTS = Form("texts", ("text",), (), _text)
_MESSAGES = Form("conversations", ("messages",), ("system", "tools", "chat_template_kwargs"), _conversation)
_COMPLETIONS = Form(
    "prompts and completions of text", ("prompt", "completion"), ("tools", "chat_template_kwargs"), _completion
)
_ALPACA = Form("Alpaca's instructions and outputs", ("instruction", "output"), ("input", "history", "system"), _alpaca)
_PREFERENCES = Form("preferences", ("chosen", "rejected"), (), lambda values, names, place: None)

FORMS = (_TEXTS, _MESSAGES, _COMPLETIONS, _ALPACA, _PREFERENCES)
#: The names of forms that may stand in one file.
MIXABLE = {_TEXTS.name, _MESSAGES.name}
