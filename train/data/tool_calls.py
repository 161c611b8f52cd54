"""Arguments of tool calls, which OpenAI's format has as JSON strings, for chat templates that want objects."""

import dataclasses
import json
from typing import Any

from qwen_moe_jax.errors import RequestError
from qwen_moe_jax.inference.chat_template import ChatTemplate, argument_strings
from train.data.messages import Conversation, refuse, refuse_surrogates


def with_arguments_as_rendered(conversation: Conversation, template: ChatTemplate, place: str) -> Conversation:
    """The conversation with arguments as objects where the template fails on strings, or writes them as JSON once more.

    Raises:
        ConfigError: such a string is no JSON object; the message names file, line and field.
    """
    messages = list(conversation.messages)
    for number, message in enumerate(messages):
        strings = argument_strings(message)
        if not strings:
            continue
        text = _render(template, messages[: number + 1], conversation)
        if text is not None and not any(json.dumps(one, ensure_ascii=False) in text for one in strings):
            continue
        calls = [_with_object(call, template, f"{place}: messages[{number}]") for call in message["tool_calls"]]
        messages[number] = {**message, "tool_calls": calls}
    return dataclasses.replace(conversation, messages=messages)


def _with_object(call: dict[str, Any], template: ChatTemplate, place: str) -> dict[str, Any]:
    function = call.get("function", call)
    if not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (json.JSONDecodeError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        refuse(
            f"{place}.tool_calls: arguments: found {function['arguments']!r:.80}, expected an object, or one as a JSON "
            f"string: the chat template of {template.folder} writes it as an object."
        )
    refuse_surrogates(arguments, f"{place}.tool_calls: arguments")  # the escapes of the JSON string are read now
    replaced = {**function, "arguments": arguments}
    return {**call, "function": replaced} if "function" in call else replaced


def _render(template: ChatTemplate, messages: list[dict[str, Any]], conversation: Conversation) -> str | None:
    try:
        return template.render(messages, add_generation_prompt=False, **conversation.variables)
    except RequestError:
        return None
