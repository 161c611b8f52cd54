"""Messages, tools and template variables of a record → `Conversation`, checked and refused by file, line and field."""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.inference.message_content import joined_parts
from train.data.sharegpt import is_sharegpt, to_role_and_content

_ROLES = ("system", "user", "assistant", "tool")
_MESSAGE = '{"role": …, "content": …}'


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them.

    Attributes:
        messages: with `role`, `content` and whatever else the template reads.
        variables: of the template: `tools`, and those of the record's `chat_template_kwargs`.
        not_learned: the numbers of the assistant's messages that are context only, as with `"weight": 0`.
    """

    messages: list[dict[str, Any]]
    variables: dict[str, Any] = field(default_factory=dict)
    not_learned: frozenset[int] = frozenset()


def as_conversation(
    messages: list[dict[str, Any]], variables: dict[str, Any], place: str, column: str, context: Collection[int] = ()
) -> Conversation:
    """A conversation of checked messages.

    Args:
        messages: as `checked_messages` returns them.
        variables: of the template.
        place, column: of the messages, for refusals.
        context: the numbers of messages that are not learned whatever their weight.
    """
    roles = [message["role"] for message in messages]
    if roles[0] == "assistant":
        refuse(f"{place}: {column}[0].role: found 'assistant', expected a message that it answers.")
    if "assistant" not in roles:
        refuse(f"{place}: found no message of the assistant ({', '.join(roles)}), expected one to learn from.")
    answers = {number for number, role in enumerate(roles) if role == "assistant"}
    not_learned = frozenset(n for n in answers if n in context or messages[n].get("weight") == 0)
    if answers == not_learned:
        refuse(f"{place}: every message of the assistant has weight 0, expected one to learn from.")
    messages = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    return Conversation(messages, variables, not_learned)


def checked_messages(messages: Any, place: str, column: str) -> list[dict[str, Any]]:
    """Messages with role and content, those of ShareGPT's form (from and value) translated."""
    if not isinstance(messages, list) or not messages:
        refuse(f"{place}: {column}: found {messages!r:.80}, expected a list of {_MESSAGE}.")
    return [_checked_message(message, f"{place}: {column}[{number}]") for number, message in enumerate(messages)]


def template_variables(tools: Any, variables: Any, place: str, tools_column: str, column: str) -> dict[str, Any]:
    """The variables of the chat template: `tools`, and what the record's `chat_template_kwargs` sets."""
    if variables is None:
        variables = {}
    if not isinstance(variables, dict):
        refuse(f'{place}: {column}: found {variables!r:.80}, expected an object: {{"enable_thinking": …}}.')
    tools = _checked_tools(tools, f"{place}: {tools_column}")
    return {**variables, "tools": tools} if tools else variables


def refuse_template_fields(values: Mapping[str, Any], names: Mapping[str, str], place: str) -> None:
    """Refuses tools and variables of the chat template with a prompt of text, which no template renders."""
    for name in ("tools", "chat_template_kwargs"):
        if values.get(name):
            refuse(f"{place}: {names[name]}: found with a prompt of text, expected it with messages only.")


def refuse_surrogates(value: Any, place: str) -> None:
    """Refuses half of a surrogate pair anywhere in JSON data, which no tokenizer can encode."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            refuse(f"{place}: found half of a surrogate pair at character {error.start}, expected Unicode text.")
    elif isinstance(value, dict):
        for key, item in value.items():
            refuse_surrogates(key, place)
            refuse_surrogates(item, f"{place}: {key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            refuse_surrogates(item, f"{place}[{number}]")


def finite_number(value: Any, place: str) -> float:
    """A number of JSON, in which Python reads NaN, infinities and integers of any size."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        refuse(f"{place}: found {value!r:.80}, expected a number.")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        refuse(f"{place}: found {value!r:.80}, expected a finite number.")
    return found


def refuse(message: str) -> NoReturn:
    """Raises a `ConfigError` without the exception that led to it."""
    raise ConfigError(message) from None


def _checked_message(message: Any, place: str) -> dict[str, Any]:
    """A message whose content is a string, or null next to tool calls; text parts are joined."""
    if not isinstance(message, dict):
        refuse(f"{place}: found {message!r:.80}, expected {_MESSAGE}.")
    if is_sharegpt(message):
        message = to_role_and_content(message, place)
        refuse_surrogates(message.get("tool_calls"), f"{place}.value")  # the escapes of a JSON string are read now
    if message.get("role") == "developer":  # OpenAI's new name, which templates do not know
        message = {**message, "role": "system"}
    if message.get("role") not in _ROLES:
        refuse(f"{place}.role: found {message.get('role')!r}, expected one of {', '.join(_ROLES)}.")
    content = message.get("content")
    if isinstance(content, list):
        try:
            message = {**message, "content": joined_parts(content)}
        except ValueError as error:
            refuse(f"{place}.content: {error}.")
    elif not isinstance(content, str) and (content is not None or not message.get("tool_calls")):
        refuse(f"{place}.content: found {content!r:.80}, expected a string.")
    _check_weight(message, place)
    _check_calls(message, place)
    return message


def _check_weight(message: dict[str, Any], place: str) -> None:
    """1 or 0 for a message of the assistant, as in OpenAI's format; others are never learned."""
    weight, is_assistant = message.get("weight"), message["role"] == "assistant"
    if weight is not None and (isinstance(weight, str) or weight not in ((0, 1) if is_assistant else (0,))):
        expected = "0 or 1" if is_assistant else "none: only the assistant's messages are learned"
        refuse(f"{place}.weight: found {weight!r}, expected {expected}.")


def _check_calls(message: dict[str, Any], place: str) -> None:
    """A list of calls, each with the name of a function; templates write any other value as an empty call."""
    if message.get("function_call"):
        refuse(f"{place}.function_call: found {message['function_call']!r:.80}, expected it as one of tool_calls.")
    calls = message.get("tool_calls")
    if calls is not None and (not isinstance(calls, list) or not all(map(_is_call, calls))):
        expected = '[{"type": "function", "function": {"name": …, "arguments": …}}]'
        refuse(f"{place}.tool_calls: found {calls!r:.80}, expected {expected}.")


def _is_call(call: Any) -> bool:
    function = call.get("function", call) if isinstance(call, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _checked_tools(tools: Any, place: str) -> list[dict[str, Any]]:
    """A list of objects, or the same as a JSON string."""
    found = tools
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            refuse(f"{place}: found a string that is no JSON ({error}): {found!r:.80}.")
        refuse_surrogates(tools, place)
    if tools is None:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        refuse(f"{place}: found {found!r:.80}, expected a list of objects, or that as a JSON string.")
    return tools
