"""Thoughts, content and tool calls are found in a text, however it is divided into pieces."""

import json

import pytest

from qwen_moe_jax.server.answer_parts import AnswerParts

CALL = '<tool_call>\n{"name": "add", "arguments": {"x": 1, "y": "<b> é"}}\n</tool_call>'
_PARAMETERS = "<parameter=x>\n1\n</parameter>\n<parameter=y>\na\nb\n</parameter>\n"
XML = f"<tool_call>\n<function=add>\n{_PARAMETERS}</function>\n</tool_call>"
SCHEMAS = {"add": {"properties": {"x": {"type": "integer"}, "y": {"type": "string"}, "z": {"type": "string"}}}}


def split(text, size, **settings):
    """Reasoning, content and calls of a text that comes in pieces."""
    parts = AnswerParts(**{"thinking": False, "tool_form": "json", "schemas": SCHEMAS, **settings})
    found = [part for at in range(0, len(text), size) for part in parts.push(text[at : at + size])] + parts.finish()
    calls = [(part.call.name, json.loads(part.call.arguments)) for part in found if part.call]
    return "".join(part.reasoning for part in found), "".join(part.content for part in found), calls


ADD = ("add", {"x": 1, "y": "<b> é"})


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    "text, settings, expected",
    [
        ("plain text\n", {}, ("", "plain text\n", [])),
        ("a < b <t <tool", {}, ("", "a < b <t <tool", [])),
        ("<think>\nhm < 3\n</think>\n\nyes", {}, ("hm < 3", "yes", [])),
        ("hm\n</think>\n\nyes", {"thinking": True}, ("hm", "yes", [])),
        ("\nhm, cut of", {"thinking": True}, ("hm, cut of", "", [])),
        ("yes <think> is a word", {}, ("", "yes <think> is a word", [])),
        (f"I will.\n{CALL}\n{CALL}", {}, ("", "I will.", [ADD, ADD])),
        (f"<think>\nhm\n</think>\n\n{CALL}", {}, ("hm", "", [ADD])),
        (CALL, {"tool_form": None}, ("", CALL, [])),
        ("<tool_call>\nnot json\n</tool_call>", {}, ("", "<tool_call>\nnot json\n</tool_call>", [])),
        ("<tool_call>\n[1]</tool_call>", {}, ("", "<tool_call>\n[1]</tool_call>", [])),
        ('x <tool_call>{"name": "add"', {}, ("", 'x<tool_call>{"name": "add"', [])),
        (CALL.removesuffix("</tool_call>"), {}, ("", "", [ADD])),
        (XML, {"tool_form": "xml"}, ("", "", [("add", {"x": 1, "y": "a\nb"})])),
        (
            XML.replace("\n1\n", "\nTrue\n").replace("=y", "=w"),
            {"tool_form": "xml"},
            ("", "", [("add", {"x": True, "w": "a\nb"})]),
        ),
        ("<tool_call>\n<func</tool_call>", {"tool_form": "xml"}, ("", "<tool_call>\n<func</tool_call>", [])),
    ],
)
def test_parts_do_not_depend_on_the_pieces(text, settings, expected, size):
    assert split(text, size, **settings) == expected


def test_text_is_shown_as_soon_as_it_can_be_no_tag():
    parts = AnswerParts(thinking=False, tool_form="json")
    shown = [[part.content for part in parts.push(piece)] for piece in ("one ", "two", " <tool", "box> three")]
    assert shown == [["one"], [" two"], [], [" <toolbox> three"]]
