"""A chat model's text, while it is decoded, as its parts: thoughts, content and tool calls."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen_moe_jax.server.chat_form import ToolForm

_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_WORDS = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}


@dataclass(frozen=True)
class Call:
    """A tool call: the function's name, and its arguments as JSON."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Part:
    """What is new of an answer: one of the three."""

    reasoning: str = ""
    content: str = ""
    call: Call | None = None


class AnswerParts:
    """Splits a streamed text. The parts do not depend on how the text is divided into pieces.

    Text that may be the beginning of a tag is held back, and so is white space that goes away where a tag follows. What
    looks like a tool call and is none stays content: nothing that the model writes is lost.

    Args:
        thinking: the text begins within a thought, because its prompt ended with <think>.
        tool_form: how calls are written; None leaves them in the content.
        schemas: of the arguments, by the function's name: in XML, only they tell a number from its digits.
    """

    def __init__(
        self, *, thinking: bool, tool_form: ToolForm | None, schemas: Mapping[str, Mapping[str, Any]] | None = None
    ):
        self._form = tool_form
        self._schemas = schemas or {}
        self._held = ""
        self._state = "thought" if thinking else "start"
        self._skips_space = thinking

    def push(self, text: str) -> list[Part]:
        """Takes the next piece; returns what is new."""
        self._held += text
        parts: list[Part] = []
        while self._advance(parts):
            pass
        return parts

    def finish(self) -> list[Part]:
        """The rest, after the last piece."""
        held, self._held = self._held, ""
        if self._skips_space:
            held = held.lstrip()
        if self._state == "call":
            calls = self._calls(held)
            return [Part(call=call) for call in calls] if calls else [Part(content="<tool_call>" + held)]
        if not held:
            return []
        return [Part(reasoning=held.rstrip())] if self._state == "thought" else [Part(content=held)]

    def _advance(self, parts: list[Part]) -> bool:
        """One step; False where it waits for more text."""
        if self._skips_space:
            self._held = self._held.lstrip()
            self._skips_space = not self._held
        if not self._held:
            return False
        if self._state == "start":
            return self._start()
        if self._state == "thought":
            return self._until("</think>", parts, "reasoning", "content")
        if self._state == "call":
            return self._call(parts)
        if self._form is None:
            parts.append(Part(content=self._held))
            self._held = ""
            return False
        return self._until("<tool_call>", parts, "content", "call")

    def _start(self) -> bool:
        found = self._held.lstrip()
        if found.startswith("<think>"):
            self._held, self._state, self._skips_space = found.removeprefix("<think>"), "thought", True
            return True
        if "<think>".startswith(found):
            return False
        self._state = "content"
        return True

    def _until(self, tag: str, parts: list[Part], kind: str, after: str) -> bool:
        """Text up to a tag, without the white space before it."""
        before, found, rest = self._held.partition(tag)
        if found:
            if text := before.rstrip():
                parts.append(_part(kind, text))
            self._held, self._state, self._skips_space = rest, after, after == "content"
            return True
        safe = _before_tag(before, tag)
        if safe:
            parts.append(_part(kind, before[:safe]))
            self._held = before[safe:]
        return False

    def _call(self, parts: list[Part]) -> bool:
        inside, found, rest = self._held.partition("</tool_call>")
        if not found:
            return False
        calls = self._calls(inside)
        parts += [Part(call=call) for call in calls] or [Part(content=f"<tool_call>{inside}</tool_call>")]
        self._held, self._state, self._skips_space = rest, "content", True
        return True

    def _calls(self, text: str) -> list[Call]:
        """The calls between two tags; none, if it is not of the form."""
        if self._form == "json":
            call = json_call(text)
            return [call] if call else []
        return [
            Call(name.strip(), json.dumps(self._arguments(name.strip(), body), ensure_ascii=False))
            for name, body in _FUNCTION.findall(text)
        ]

    def _arguments(self, name: str, body: str) -> dict[str, Any]:
        properties = self._schemas.get(name, {}).get("properties", {})
        return {
            key.strip(): _value(text, properties.get(key.strip(), {}) if isinstance(properties, dict) else {})
            for key, text in _PARAMETER.findall(body)
        }


def _part(kind: str, text: str) -> Part:
    return Part(reasoning=text) if kind == "reasoning" else Part(content=text)


def json_call(text: str) -> Call | None:
    """A call of the form {"name": …, "arguments": {…}}; None for anything else."""
    try:
        found = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", {})
    if isinstance(arguments, str):
        return Call(found["name"], arguments)
    return Call(found["name"], json.dumps(arguments, ensure_ascii=False))


def _value(text: str, schema: Any) -> Any:
    """The value that a parameter's text means."""
    kind = schema.get("type") if isinstance(schema, dict) else None
    if kind == "string":
        return text
    if text.strip() in _WORDS:
        return _WORDS[text.strip()]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _before_tag(text: str, tag: str) -> int:
    """How many characters come before white space or a part of the tag at the end."""
    for size in range(min(len(tag) - 1, len(text)), 0, -1):
        if tag.startswith(text[-size:]):
            return len(text[:-size].rstrip())
    return len(text.rstrip())
