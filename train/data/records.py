"""One record of a JSON file or a dataset → a text or a conversation, checked and refused by file, line and field."""

import json
from dataclasses import dataclass, field
from typing import Any, NoReturn

from qwen_moe_jax.errors import ConfigError

#: The keys of a record that are read; others are ignored.
FIELDS = ("text", "messages", "tools", "chat_template_kwargs")

#: What a record has to be, for messages.
WANTED = '{"text": …} or {"messages": [{"role": …, "content": …}, …]}'

_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them.

    Attributes:
        messages: with `role`, `content` and whatever else the template reads.
        variables: of the template: `tools`, and those of the record's `chat_template_kwargs`.
        not_learned: the numbers of the assistant's messages with `"weight": 0`.
    """

    messages: list[dict[str, Any]]
    variables: dict[str, Any] = field(default_factory=dict)
    not_learned: frozenset[int] = frozenset()


def checked_content(found: Any, place: str) -> str | Conversation | None:
    """The content of a record; None for a blank text.

    Raises:
        ConfigError: it is neither a text nor a conversation; the message begins with `place` and names the field.
    """
    if not isinstance(found, dict):
        refuse(f"{place}: found {found!r:.80}, expected {WANTED}.")
    given = {key: value for key, value in found.items() if value is not None and key in FIELDS}
    for name in ("text", "messages"):
        if name in found and found[name] is None and not {"text", "messages"} & given.keys():
            refuse(f"{place}: {name}: found null, expected {WANTED}.")
    if ("text" in given) == ("messages" in given):
        both = "both text and messages" if "text" in given else f"the keys {', '.join(found) or '(none)'}"
        refuse(f"{place}: found {both}, expected {WANTED}.")
    _refuse_surrogates(given, place)
    if "messages" in given:
        return _conversation(given, place)
    text = given["text"]
    if not isinstance(text, str):
        refuse(f"{place}: text: found {text!r:.80}, expected a string.")
    return text if text.strip() else None


def _conversation(given: dict[str, Any], place: str) -> Conversation:
    messages = _checked_messages(given["messages"], place)
    variables = given.get("chat_template_kwargs", {})
    if not isinstance(variables, dict):
        refuse(f'{place}: chat_template_kwargs: found {variables!r:.80}, expected an object: {{"enable_thinking": …}}.')
    tools = _checked_tools(given.get("tools"), place)
    if tools:
        variables = {**variables, "tools": tools}
    not_learned = frozenset(number for number, message in enumerate(messages) if _weight(message, number, place) == 0)
    if not any(message["role"] == "assistant" and number not in not_learned for number, message in enumerate(messages)):
        refuse(f"{place}: every message of the assistant has weight 0, expected one to learn from.")
    messages = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    return Conversation(messages, variables, not_learned)


def _checked_messages(messages: Any, place: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        refuse(f'{place}: messages: found {messages!r:.80}, expected a list of {{"role": …, "content": …}}.')
    checked = [_checked_message(message, f"{place}: messages[{number}]") for number, message in enumerate(messages)]
    roles = [message["role"] for message in checked]
    if roles[0] == "assistant":
        refuse(f"{place}: messages[0].role: found 'assistant', expected a message that it answers.")
    if "assistant" not in roles:
        refuse(f"{place}: found no message of the assistant ({', '.join(roles)}), expected one to learn from.")
    return checked


def _checked_message(message: Any, place: str) -> dict[str, Any]:
    """A message whose content is a string, or null next to tool calls; text parts are joined."""
    if not isinstance(message, dict):
        refuse(f'{place}: found {message!r:.80}, expected {{"role": …, "content": …}}.')
    if message.get("role") not in _ROLES:
        refuse(f"{place}.role: found {message.get('role')!r}, expected one of {', '.join(_ROLES)}.")
    content = message.get("content")
    if isinstance(content, list) and all(_is_text_part(part) for part in content):
        message = {**message, "content": "".join(part["text"] for part in content)}
    elif not isinstance(content, str) and (content is not None or not message.get("tool_calls")):
        refuse(f"{place}.content: found {content!r:.80}, expected a string.")
    return message


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _weight(message: dict[str, Any], number: int, place: str) -> int:
    """1 or 0 for a message of the assistant, as in OpenAI's format; others are never learned."""
    weight = message.get("weight")
    if weight is None or (weight == 1 and message["role"] == "assistant"):
        return 1
    if weight != 0 or isinstance(weight, str):
        expected = "0 or 1" if message["role"] == "assistant" else "none: only the assistant's messages are learned"
        refuse(f"{place}: messages[{number}].weight: found {weight!r}, expected {expected}.")
    return 0


def _checked_tools(tools: Any, place: str) -> list[dict[str, Any]]:
    """A list of objects, or the same as a JSON string."""
    found = tools
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            refuse(f"{place}: tools: found a string that is no JSON ({error}): {found!r:.80}.")
        _refuse_surrogates(tools, f"{place}: tools")
    if tools is None:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        refuse(f"{place}: tools: found {found!r:.80}, expected a list of objects, or that as a JSON string.")
    return tools


def _refuse_surrogates(value: Any, place: str) -> None:
    """Refuses half of a surrogate pair anywhere in JSON data, which no tokenizer can encode."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            refuse(f"{place}: found half of a surrogate pair at character {error.start}, expected Unicode text.")
    elif isinstance(value, dict):
        for key, item in value.items():
            _refuse_surrogates(key, place)
            _refuse_surrogates(item, f"{place}: {key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            _refuse_surrogates(item, f"{place}[{number}]")


def refuse(message: str) -> NoReturn:
    """Raises a `ConfigError` without the exception that led to it."""
    raise ConfigError(message) from None
