"""A mask lets through what a schema, or the form of tool calls, allows, and nothing else."""

import numpy as np
import pytest

from qwen_moe_jax.errors import RequestError
from qwen_moe_jax.server.grammar import Grammars
from tests.inference.tokenizer_kinds import byte_level
from tests.server.scripted import STOP, TOKENIZER, VOCABULARY

SCHEMA = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "y": {"type": "string"}, "z": {"enum": ["a", "b"], "type": "string"}},
    "required": ["x"],
    "additionalProperties": False,
}
TOOLS = {"add": SCHEMA, "now": {}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'
_PARAMETERS = "<parameter=x>\n1\n</parameter>\n<parameter=y>\na <b>\n\n</parameter>\n"
XML = f"<tool_call>\n<function=add>\n{_PARAMETERS}</function>\n</tool_call>"


@pytest.fixture(scope="module")
def grammars():
    return Grammars(TOKENIZER, VOCABULARY + 7, [STOP])  # a model's vocabulary may be larger than its tokenizer's


def allows(mask, token):
    words = mask.allowed()
    assert words.dtype == np.uint32 and words.shape == ((VOCABULARY + 7 + 31) // 32,)
    return bool(words[token // 32] >> (token % 32) & 1)


def accepts(grammars, grammar, text, tokenizer=TOKENIZER):
    """Whether a text is a whole answer, token by token."""
    mask = grammars.mask(grammar)
    for token in tokenizer.encode(text, add_special_tokens=False).ids:
        if not allows(mask, token):
            return False
        mask.accept(token)
    return allows(mask, STOP)


@pytest.mark.parametrize(
    "thought, text, expected",
    [
        ("none", '{"x": 1}', True),
        ("none", '{\n  "x": 1, "y": "é", "z": "a"\n}', True),
        ("none", '{"x": 1', False),
        ("none", '{"y": "a"}', False),
        ("none", '{"x": 1, "z": "c"}', False),
        ("none", '<think>\nhm\n</think>\n\n{"x": 1}', False),
        ("possible", '<think>\nhm {}\n</think>\n\n{"x": 1}', True),
        ("possible", '{"x": 1}', True),
        ("open", 'hm\n</think>\n\n{"x": 1}', True),
        ("open", '{"x": 1}', False),
    ],
)
def test_json_of_a_schema(grammars, thought, text, expected):
    assert accepts(grammars, grammars.json(SCHEMA, thought), text) == expected


@pytest.mark.parametrize(
    "form, several, text, expected",
    [
        ("json", True, CALL, True),
        ("json", True, f"{CALL}\n{CALL}", True),
        ("json", False, f"{CALL}\n{CALL}", False),
        ("json", True, CALL.replace("add", "sub"), False),
        ("json", True, CALL.replace('"x": 1', '"y": "1"'), False),
        ("json", True, '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>', True),
        ("json", True, "no call", False),
        ("xml", False, XML, True),
        ("xml", False, XML.replace("\n1\n", "\none\n"), False),
        ("xml", False, XML.replace("=y", "=w"), False),
        ("xml", False, "<tool_call>\n<function=now>\n</function>\n</tool_call>", True),
    ],
)
def test_tool_calls(grammars, form, several, text, expected):
    assert accepts(grammars, grammars.calls(TOOLS, form, "none", several=several), text) == expected


def test_tags_that_are_no_tokens_of_the_vocabulary_are_text():
    tokenizer = byte_level()  # of the tags, it has <think> alone
    grammars = Grammars(tokenizer, VOCABULARY + 7, [STOP])
    text = f"<think>\nhm\n</think>\n\n{CALL}"
    assert accepts(grammars, grammars.calls(TOOLS, "json", "possible", several=False), text, tokenizer)


@pytest.mark.parametrize("schema, message", [({"type": "thing"}, "thing"), ({"not": {"type": "string"}}, "not")])
def test_a_schema_that_cannot_be_served_is_refused(grammars, schema, message):
    with pytest.raises(RequestError, match=message):
        grammars.mask(grammars.json(schema, "none"))


def test_masks_of_one_grammar_do_not_see_each_other(grammars):
    first, second = (grammars.mask(grammars.json({"type": "object"}, "none")) for _ in range(2))
    [token] = TOKENIZER.encode("{").ids
    first.accept(token)
    assert allows(second, token) and not allows(first, token)
    with pytest.raises(RequestError, match="cannot go on"):
        first.accept(token)
