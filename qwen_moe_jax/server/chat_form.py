"""How a checkpoint's chat template writes conversations: prompts, and where thoughts and tool calls are in answers."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qwen_moe_jax.errors import RequestError
from qwen_moe_jax.inference.chat_template import ChatTemplate
from qwen_moe_jax.server.protocol import Message

#: Where an answer's thought is: begun by the prompt, begun by the answer if it likes, or nowhere.
Thought = Literal["open", "possible", "none"]
#: How tool calls are written between <tool_call> and </tool_call>: as JSON, or as <function=…><parameter=…>.
ToolForm = Literal["json", "xml"]

_PROBE = "probe_name"
_PROBE_TOOL = {"type": "function", "function": {"name": _PROBE, "description": "", "parameters": {"type": "object"}}}
_PROBE_CALL = {"id": "probe", "type": "function", "function": {"name": _PROBE, "arguments": {"probe_key": 1}}}


@dataclass(frozen=True)
class ChatPrompt:
    """A rendered conversation, with all its special tokens, and where the answer's thought is."""

    text: str
    thought: Thought


class ChatForm:
    """The form of conversations in a checkpoint's chat template, found by rendering a few.

    Attributes:
        tool_form: of tool calls; None where the template writes them in no known form.
        thinks: whether the template writes thoughts between <think> and </think>.
    """

    def __init__(self, template: ChatTemplate):
        self._template = template
        self.tool_form = self._tool_form()
        self.thinks = self._thinks()

    def prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
        *,
        add_generation_prompt: bool = True,
    ) -> ChatPrompt:
        """Renders a conversation.

        Raises:
            RequestError: the template refuses it.
        """
        given = {**({"tools": list(tools)} if tools else {}), **variables}
        plain = [as_plain(message) for message in messages]
        text = self._template.render(plain, add_generation_prompt=add_generation_prompt, **given)
        return ChatPrompt(text, self._thought(text))

    def _thought(self, text: str) -> Thought:
        end = text.rstrip()
        if end.endswith("<think>"):
            return "open"
        return "possible" if self.thinks and not end.endswith("</think>") else "none"

    def _tool_form(self) -> ToolForm | None:
        call = {"role": "assistant", "content": "", "tool_calls": [_PROBE_CALL]}
        text = self._rendered([{"role": "user", "content": "probe"}, call], tools=[_PROBE_TOOL])
        if f"<function={_PROBE}>" in text:
            return "xml"
        return "json" if re.search(rf'<tool_call>\s*{{"name": "{_PROBE}"', text) else None

    def _thinks(self) -> bool:
        answer = {"role": "assistant", "content": "probe", "reasoning_content": "thought of the probe"}
        text = self._rendered([{"role": "user", "content": "probe"}, answer])
        return "thought of the probe" in text and "</think>" in text

    def _rendered(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        try:
            return self._template.render(messages, add_generation_prompt=False, **variables)
        except RequestError:
            return ""


def as_plain(message: Message) -> dict[str, Any]:
    """A message as templates read it: arguments of tool calls as objects, the developer as the system."""
    plain = message.model_dump(exclude_none=True)
    plain["role"] = "system" if message.role == "developer" else message.role
    plain.setdefault("content", "")
    for call in plain.get("tool_calls") or []:
        call.pop("index", None)
        try:
            found = json.loads(call["function"]["arguments"] or "{}")
        except (ValueError, RecursionError):
            continue  # what a model once wrote goes back to it as it was
        if isinstance(found, dict):
            call["function"]["arguments"] = found
    return plain
