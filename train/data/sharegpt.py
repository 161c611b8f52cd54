"""Messages in ShareGPT's form, with from and value → messages with role and content."""

import json
from typing import Any

from qwen_moe_jax.errors import ConfigError

#: The senders of published data sets. `function` sends the result of a call, as in OpenAI's first form.
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "function_response"), "tool"),
}
#: The assistant's call of tools: its value is the JSON of one call or of a list of calls.
_CALLS = ("function_call", "tool_call")


def is_sharegpt(message: Any) -> bool:
    """Whether a message has ShareGPT's keys and no role."""
    return isinstance(message, dict) and "from" in message and "role" not in message


def to_role_and_content(message: dict[str, Any], place: str) -> dict[str, Any]:
    """The same message with role and content; keys besides from and value are kept.

    Raises:
        ConfigError: another sender, a value that is no string, or calls that are no JSON; it begins with `place`.
    """
    sender, value = message["from"], message.get("value")
    rest = {key: item for key, item in message.items() if key not in ("from", "value")}
    if not isinstance(value, str):
        raise ConfigError(f"{place}.value: found {value!r:.80}, expected a string.")
    if sender in _CALLS:
        return {**rest, "role": "assistant", "content": "", "tool_calls": _calls(value, f"{place}.value")}
    if not isinstance(sender, str) or sender not in _ROLES:
        raise ConfigError(f"{place}.from: found {sender!r}, expected one of {', '.join([*_ROLES, *_CALLS])}.")
    return {**rest, "role": _ROLES[sender], "content": value}


def _calls(value: str, place: str) -> list[dict[str, Any]]:
    try:
        found = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: found {value!r:.80}, expected the JSON of a call ({error}).") from None
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise ConfigError(f'{place}: found {value!r:.80}, expected {{"name": …, "arguments": …}} or a list of these.')
    return [{"type": "function", "function": {"arguments": {}, **call}} for call in calls]
