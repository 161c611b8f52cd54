"""Refuses fields of a conversation that the chat template does not write: their absence would be learned."""

from typing import Any

from qwen_moe_jax.errors import ConfigError, RequestError
from qwen_moe_jax.inference.chat_template import ChatTemplate
from train.data.messages import Conversation

#: The fields of an assistant's message that a template may ignore. The last three are names of the same thing.
_ASSISTANT_FIELDS = ("content", "tool_calls", "reasoning_content", "thinking", "reasoning")


def require_rendered(conversation: Conversation, template: ChatTemplate, place: str) -> None:
    """Renders the conversation with and without each field that a template may ignore, up to the message with it.

    The fields are `tools`, the content of tools' and system messages, and the content, tool calls and thoughts of the
    assistant. A template that fails without a field writes it.

    Raises:
        ConfigError: the two renderings are the same; the message names file, line and field.
    """
    messages, variables = conversation.messages, conversation.variables
    if variables.get("tools"):
        without = {name: value for name, value in variables.items() if name != "tools"}
        if _render(template, messages, variables) == _render(template, messages, without):
            raise _not_rendered(place, "tools", template)
    for number, message in enumerate(messages):
        fields = _ASSISTANT_FIELDS if message["role"] == "assistant" else ("content",)
        if message["role"] == "user":
            continue
        # A system message may be written with the first message of the user only.
        until = number + 1 if message["role"] == "assistant" else _next_turn(messages, number)
        for name in fields:
            if not message.get(name) or not str(message[name]).strip():
                continue
            without_field = {key: value for key, value in message.items() if key != name}
            if name == "content":
                without_field["content"] = ""
            shown = _render(template, messages[:until], variables)
            replaced = [*messages[:number], without_field, *messages[number + 1 : until]]
            if shown is not None and shown == _render(template, replaced, variables):
                raise _not_rendered(place, f"messages[{number}].{name}", template)


def _next_turn(messages: list[dict[str, Any]], number: int) -> int:
    """The number after the next message of the assistant, or the end."""
    later = (index + 1 for index in range(number, len(messages)) if messages[index]["role"] == "assistant")
    return next(later, len(messages))


def _render(template: ChatTemplate, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str | None:
    try:
        return template.render(messages, add_generation_prompt=False, **variables)
    except RequestError:
        return None


def _not_rendered(place: str, field: str, template: ChatTemplate) -> ConfigError:
    return ConfigError(
        f"{place}: {field}: the chat template of {template.folder} renders the same with and without this field, so "
        "the model would learn to do without it. Choose a tokenizer whose template writes it (data.tokenizer), or "
        "remove the field from the data."
    )
