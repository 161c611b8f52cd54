"""What a conversation holds is learned or refused: tools, tool calls, thoughts and weights."""

import json

import numpy as np
import pytest

from qwen_moe_jax.errors import ConfigError, RequestError
from qwen_moe_jax.inference.chat_template import load_chat_template
from qwen_moe_jax.inference.tokenizer import load_tokenizer
from tests.inference.chat_templates import MIXTRAL, QWEN2, QWEN3
from tests.inference.tokenizer_kinds import byte_fallback, byte_level
from tests.train.test_chat import documents, write_folder
from train.data.chat import conversation_documents
from train.data.records import checked_content
from train.data.tokenizer import CHAT_TEMPLATE, save_tokenizer, train_tokenizer

USER, ANSWER = {"role": "user", "content": "add 1 and 2"}, {"role": "assistant", "content": "3"}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
RESULT = {"role": "tool", "content": "3"}
THOUGHT = {"role": "assistant", "content": "3", "reasoning_content": "One and two."}
BARE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}{% endfor %}"
BARE += "{% if add_generation_prompt %}<|assistant|>{% endif %}"


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A tokenizer that was trained here, with the built-in template."""
    folder = tmp_path_factory.mktemp("own")
    tokenizer = train_tokenizer(["add 1 and 2"], 300)
    save_tokenizer(tokenizer, folder)
    return tokenizer, load_chat_template(folder)


def pieces(own, record):
    """The text of all documents of a record, and of the runs of learned tokens."""
    tokenizer, template = own
    found = []
    for turns in conversation_documents(checked_content(record, "line 1"), template, tokenizer, "line 1"):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], turns.learned, [0]])))
        learned = [turns.ids[start:stop] for start, stop in zip(edges[::2], edges[1::2], strict=True)]
        decoded = [tokenizer.decode(ids.tolist(), skip_special_tokens=False) for ids in (turns.ids, *learned)]
        found.append((decoded[0], decoded[1:]))
    return found


def test_the_built_in_template_learns_calls_and_thoughts_in_qwens_forms(own):
    record = {"tools": TOOLS, "messages": [SYSTEM, USER, {**CALL, "reasoning_content": "Call it."}, RESULT, THOUGHT]}
    [(text, learned)] = pieces(own, record)
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert learned == [
        f"<think>\nCall it.\n</think>\n\n{call}<|im_end|>\n",
        "<think>\nOne and two.\n</think>\n\n3<|im_end|>\n",
    ]
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n")
    assert f"<tools>\n{json.dumps(TOOLS[0])}\n</tools>" in text
    assert "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n" in text
    assert text.count("Be brief.") == 1


def test_the_built_in_template_joins_several_calls_and_several_results(own):
    calls = {**CALL, "content": "Both.", "tool_calls": [*CALL["tool_calls"], {"name": "mul", "arguments": "{}"}]}
    [(text, learned)] = pieces(own, {"messages": [USER, calls, RESULT, {**RESULT, "content": "2"}, ANSWER]})
    assert learned[0].startswith(
        'Both.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n<tool_call>'
    )
    assert '{"name": "mul", "arguments": {}}' in learned[0]
    response = "\n<tool_response>\n{}\n</tool_response>".format
    assert f"<|im_start|>user{response(3)}{response(2)}<|im_end|>\n" in text


@pytest.mark.parametrize(
    ("template", "messages", "variables", "field"),
    [
        (BARE, [USER, CALL, RESULT, ANSWER], {}, r"messages\[1\].tool_calls"),
        (BARE, [USER, THOUGHT], {}, r"messages\[1\].reasoning_content"),
        (BARE, [USER, {**ANSWER, "thinking": "One and two."}], {}, r"messages\[1\].thinking"),
        (BARE, [USER, ANSWER], {"tools": TOOLS}, "tools"),
        (QWEN2, [USER, THOUGHT], {}, r"messages\[1\].reasoning_content"),
        (BARE.replace("m in messages", "m in messages if m.role != 'tool'"), [USER, ANSWER, RESULT, ANSWER], {},
         r"messages\[2\].content"),
        (BARE.replace("m in messages", "m in messages if m.role != 'system'"), [SYSTEM, USER, ANSWER], {},
         r"messages\[0\].content"),
    ],
)  # fmt: skip
def test_a_field_that_the_template_does_not_write_is_refused_by_file_line_and_name(
    tmp_path, template, messages, variables, field
):
    folder = write_folder(tmp_path / "model", byte_level(), template)
    with pytest.raises(ConfigError, match=f"^a.jsonl, line 7: {field}: the chat template of .* with and without"):
        documents(folder, messages, **variables)


@pytest.mark.parametrize(
    ("tokenizer", "template", "messages", "variables"),
    [
        (byte_level, QWEN3, [USER, THOUGHT, USER, THOUGHT], {}),  # it removes the first thought once a turn follows it
        (byte_level, QWEN2, [SYSTEM, USER, ANSWER], {"tools": TOOLS}),
        (byte_fallback, MIXTRAL, [SYSTEM, USER, ANSWER], {}),  # it writes the system message with the user's
        (byte_level, BARE, [USER, {**ANSWER, "tool_calls": [], "reasoning": "", "id": "x"}], {}),
    ],
)
def test_a_field_that_is_written_somewhere_or_empty_is_not_refused(tmp_path, tokenizer, template, messages, variables):
    assert documents(write_folder(tmp_path / "model", tokenizer(), template), messages, **variables)[1]


def test_an_answer_of_weight_0_is_read_and_not_learned(own):
    wrong = {**ANSWER, "content": "4", "weight": 0}
    [(text, learned)] = pieces(own, {"messages": [USER, wrong, USER, {**ANSWER, "weight": 1}]})
    assert learned == ["3<|im_end|>\n"] and "<|im_start|>assistant\n4<|im_end|>" in text


def test_tools_may_be_a_json_string_and_content_may_be_parts_of_text(own):
    parts = {**USER, "content": [{"type": "text", "text": "add 1"}, {"type": "text", "text": " and 2"}]}
    assert pieces(own, {"tools": json.dumps(TOOLS), "messages": [parts, ANSWER]}) == pieces(
        own, {"tools": TOOLS, "messages": [USER, ANSWER]}
    )


def test_a_record_sets_the_variables_of_its_template(tmp_path):
    folder = write_folder(tmp_path / "model", byte_level(), QWEN3)
    record = {"messages": [USER, ANSWER], "chat_template_kwargs": {"enable_thinking": True}}
    conversation = checked_content(record, "line 1")
    assert conversation.variables == {"enable_thinking": True}
    assert documents(folder, conversation.messages, **conversation.variables)[1]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"text": None}, "text: found null, expected {"),
        ({"tools": "{"}, "tools: found a string that is no JSON"),
        ({"tools": {"name": "add"}}, "tools: found {'name': 'add'}, expected a list of objects"),
        ({"tools": '["add"]'}, "expected a list of objects, or that as a JSON string"),
        ({"tools": [{"name": "\udc00"}]}, "tools[0]: name: found half of a surrogate pair at character 0"),
        ({"chat_template_kwargs": 3}, "chat_template_kwargs: found 3, expected an object"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "every message of the assistant has weight 0"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "messages[1].weight: found 0.5, expected 0 or 1"),
        ({"messages": [{**USER, "weight": 1}, ANSWER]}, "messages[0].weight: found 1, expected none"),
        ({"messages": [USER, {**ANSWER, "reasoning_content": "x \ud83d"}]}, "reasoning_content: found half of a surr"),
        (
            {"messages": [USER, {**CALL, "content": [{"type": "image"}]}]},
            "messages[1].content: part 0 is of type 'image', expected text",
        ),
        ({"messages": [USER, {**ANSWER, "tool_calls": "add"}]}, "messages[1].tool_calls: found 'add', expected [{"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"function": "add"}]}]}, "tool_calls: found [{'function': 'ad"),
        ({"messages": [USER, {**ANSWER, "function_call": {"name": "add"}}]}, "expected it as one of tool_calls"),
    ],
)
def test_a_field_of_another_kind_is_refused_by_name(record, expected):
    if "text" not in record:
        record = {"messages": [USER, ANSWER], **record}
    with pytest.raises(ConfigError) as refusal:
        checked_content(record, "a.jsonl, line 7")
    assert str(refusal.value).startswith("a.jsonl, line 7: ") and expected in str(refusal.value)


def with_arguments(arguments):
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    return {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}, RESULT, ANSWER]}


LOOPS = """{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for call in m.tool_calls or [] %}
{%- for name, value in call.function.arguments | items %}<{{ name }}>{{ value }}{% endfor %}
{%- endfor %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""


@pytest.mark.parametrize(
    "template", [LOOPS, QWEN2, CHAT_TEMPLATE], ids=["loops over them", "writes JSON", "takes either"]
)
def test_arguments_as_a_json_string_are_learned_as_the_object(template, tmp_path):
    folder = write_folder(tmp_path / "model", byte_level(), template)
    own = load_tokenizer(folder), load_chat_template(folder)
    found = pieces(own, with_arguments(json.dumps({"a": 1, "b": "é"}, ensure_ascii=False)))
    assert found == pieces(own, with_arguments({"a": 1, "b": "é"}))
    assert "\\" not in found[0][0]


def test_arguments_that_are_no_object_are_refused_where_the_template_wants_one(tmp_path):
    folder = write_folder(tmp_path / "model", byte_level(), LOOPS)
    own = load_tokenizer(folder), load_chat_template(folder)
    with pytest.raises(ConfigError, match=r"^line 1: messages\[1\].tool_calls: arguments: found 'a=1', expected an ob"):
        pieces(own, with_arguments("a=1"))
    with pytest.raises(ConfigError, match="tool_calls: arguments: q: found half of a surrogate pair"):
        pieces(own, with_arguments('{"q": "\\ud83d"}'))
    with pytest.raises(RequestError, match=r"fails on these messages .* Are the arguments '\{\}' wanted as an object"):
        own[1].render(with_arguments("{}")["messages"])
