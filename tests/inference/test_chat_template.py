"""Chat templates render as in transformers, and cannot leave their sandbox."""

import json
import re

import pytest
import tokenizers

from qwen_moe_jax.errors import CheckpointError, RequestError
from qwen_moe_jax.inference.chat_template import load_chat_template
from qwen_moe_jax.inference.tokenizer import encode, load_tokenizer
from tests.inference.chat_templates import MIXTRAL, ODDITIES, QWEN2, QWEN3
from tests.inference.tokenizer_kinds import KINDS

SYSTEM = {"role": "system", "content": "Be brief.\n"}
USER = {"role": "user", "content": "Add <1> & 'two' — 你好 👍🏽\n\n"}
THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nThree."}
REASONED = {"role": "assistant", "content": "Three.", "reasoning": "hm", "tool_calls": None}
ARGUMENTS = {"a": 1, "b": [2.5, None, "ü<"], "c": True}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": ARGUMENTS}}]}
RESULT = {"role": "tool", "content": "3"}
TOOL = {"type": "function", "function": {"name": "add", "description": 'Adds "two" <numbers>', "parameters": {}}}

CONVERSATIONS = {
    "question": [USER],
    "system": [SYSTEM, USER],
    "turns": [SYSTEM, USER, THOUGHT, USER],
    "answered": [USER, THOUGHT],
    "reasoning": [USER, REASONED],
    "tools": [USER, {**CALL, "content": None}, RESULT, RESULT, THOUGHT, USER, {**CALL, "content": "So:"}, RESULT],
}
TEMPLATES = {"qwen2": QWEN2, "qwen3": QWEN3, "mixtral": MIXTRAL, "oddities": ODDITIES}
SPECIAL = {"bos_token": "<s>", "eos_token": {"content": "</s>", "__type": "AddedToken"}, "name_token": "<n>"}


def write_folder(folder, template, kind="byte_level", **config):
    folder.mkdir(exist_ok=True)
    tokenizer = tokenizers.Tokenizer.from_str(KINDS[kind].to_str())
    tokenizer.add_special_tokens(["<s>", "</s>", "<n>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **SPECIAL, "chat_template": template, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def reference():
    """transformers' tokenizer of a folder."""
    transformers = pytest.importorskip("transformers", reason="the referee is transformers")
    return transformers.AutoTokenizer.from_pretrained


def rendered(template, messages, **variables) -> str:
    """What comes out, be it a refusal."""
    try:
        return template.render(messages, **variables)
    except RequestError:
        return "refused"


def expected(tokenizer, messages, **variables) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **{"add_generation_prompt": True, **variables})
    except Exception:
        return "refused"


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_text_and_tokens_are_those_of_transformers(tmp_path, reference, name, kind):
    folder = write_folder(tmp_path / "checkpoint", TEMPLATES[name], kind)
    template, tokenizer, referee = load_chat_template(folder), load_tokenizer(folder), reference(folder)
    settings = [
        {},
        {"add_generation_prompt": False},
        {"enable_thinking": False},
        {"enable_thinking": True, "tools": [TOOL, TOOL]},
        {"documents": [{"title": "<a>", "text": "b"}, {"skip": True}], "bos_token": "other"},
    ]
    texts = set()
    for messages in CONVERSATIONS.values():
        for variables in settings:
            text = rendered(template, messages, **variables)
            assert text == expected(referee, messages, **variables)
            if text == "refused":
                continue
            texts.add(text)
            variables = {"add_generation_prompt": True, **variables}
            ids = referee.apply_chat_template(messages, tokenize=True, return_dict=False, **variables)
            assert encode(tokenizer, text, add_special_tokens=False) == ids
    assert len(texts) > 8
    if (name, kind) == ("mixtral", "byte_fallback"):
        ids = encode(tokenizer, text := rendered(template, [USER]), add_special_tokens=False)
        assert ids.count(tokenizer.token_to_id("<s>")) == 1
        assert encode(tokenizer, text).count(tokenizer.token_to_id("<s>")) == 2, "the tokenizer adds another by itself"


def test_template_that_refuses(tmp_path):
    template = load_chat_template(write_folder(tmp_path / "checkpoint", MIXTRAL))
    with pytest.raises(
        RequestError, match="refuses the messages: After the optional system message, roles must altern"
    ):
        template.render([USER, USER])
    with pytest.raises(RequestError, match="the chat template fails on these messages .UndefinedError: .*content"):
        template.render([{"role": "user"}])


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template.jinja": "A"},
        {"chat_template.jinja": "A", "tokenizer_config.json": {"chat_template": "B"}},
        {"tokenizer_config.json": {"chat_template": "A"}, "chat_template.json": {"chat_template": "B"}},
        {"tokenizer_config.json": {"chat_template": [{"name": n, "template": n} for n in ("rag", "default")]}},
        {"tokenizer_config.json": {"chat_template": [{"name": n, "template": n} for n in ("tool_use", "default")]}},
        {"tokenizer_config.json": {"chat_template": [{"name": n, "template": n} for n in ("rag", "other")]}},
        {"chat_template.jinja": "A", "additional_chat_templates/tool_use.jinja": "B\r\n"},
        {"additional_chat_templates/tool_use.jinja": "B", "tokenizer_config.json": {"chat_template": "A"}},
        {
            "tokenizer_config.json": {"chat_template": "{{ bos_token }}{{ image_token }}", "bos_token": "b"},
            "special_tokens_map.json": {"bos_token": {"content": "m"}, "extra_special_tokens": {"image_token": "i"}},
        },
        {
            "tokenizer_config.json": {
                "chat_template": "{{ bos_token }}{{ add_bos_token }}",
                "bos_token": "b",
                "add_bos_token": True,
                "added_tokens_decoder": {},
            },
            "special_tokens_map.json": {"bos_token": "m"},
        },
    ],
)
def test_template_and_special_tokens_are_read_from_the_files_that_transformers_reads(tmp_path, reference, files):
    folder = write_folder(tmp_path / "checkpoint", None)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        if name == "tokenizer_config.json":
            content = {"tokenizer_class": "PreTrainedTokenizerFast", **content}
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_bytes(text.encode())
    template, referee = load_chat_template(folder), reference(folder)
    for tools in (None, [TOOL]):
        found = rendered(template, [USER], tools=tools)
        assert found == expected(referee, [USER], tools=tools)


def test_template_of_processors_is_the_last_resort(tmp_path):
    folder = write_folder(tmp_path / "checkpoint", None)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}!"}))
    assert load_chat_template(folder).render([{"role": "user", "content": "x"}]) == "x!"


def test_folder_without_a_template(tmp_path):
    with pytest.raises(CheckpointError, match=f"{re.escape(str(tmp_path))}: found no chat template"):
        load_chat_template(tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{% if x %}", "tokenizer_config.json: the chat template 'default' is malformed, line 1"),
        ("\n{{ x | unknown }}", "malformed, line 2 .No filter named 'unknown'"),
        (7, "chat_template is neither a string nor a list"),
        ([{"name": "default"}], "chat_template is neither a string nor a list"),
        ([{"name": "default", "template": 3}], "chat_template is neither a string nor a list"),
    ],
)
def test_damaged_template(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=message):
        load_chat_template(write_folder(tmp_path / "checkpoint", content))


@pytest.mark.parametrize(
    "messages, variables, message",
    [
        ([], {}, "the conversation is empty"),
        ("hello", {}, "messages is of type str, expected a list"),
        (USER, {}, "messages is of type dict"),
        ([USER, "hello"], {}, "message 1 is 'hello', expected"),
        ([USER, {"content": "x"}], {}, r"message 1 is \{'content': 'x'\}"),
        (
            [{"role": "user", "content": [{"image": b"x"}]}],
            {},
            "message 0, content, item 0, image: found a value of ty",
        ),
        ([USER], {"tools": [print]}, "tools, item 0: found a value of type builtin_function_or_method"),
    ],
)
def test_messages_of_a_wrong_form(tmp_path, messages, variables, message):
    template = load_chat_template(write_folder(tmp_path / "checkpoint", QWEN2))
    with pytest.raises(RequestError, match=message):
        template.render(messages, **variables)


@pytest.mark.parametrize(
    "attempt",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}{{ messages.__class__.__base__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ self._TemplateReference__context.environment.globals }}",
        "{{ ('{0.__class__}' | string).format(messages) }}",
        "{% set f = '{0.__class__.__mro__}'.format %}{{ f('') }}",
        "{{ (messages | map(attribute='__class__') | list)[0].mro() }}",
        "{{ messages.append(1) }}",
        "{{ dict.__init__.__globals__ }}{{ dict.mro() }}",
        "{% set n = namespace(__class__=1) %}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ range(10 ** 9) | list }}",
        "{% include '/etc/passwd' %}",
        "{{ 'x' * (2 ** 62) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_the_sandbox_cannot_be_left(tmp_path, attempt):
    template = load_chat_template(write_folder(tmp_path / "checkpoint", attempt))
    messages = [dict(USER)]
    assert rendered(template, messages) in (
        "refused",
        "",
    )  # forbidden attributes are undefined, which prints as nothing
    assert messages == [USER]


def test_template_cannot_change_the_messages_of_its_caller(tmp_path):
    """Nor do later renderings see what an earlier one set."""
    source = (
        "{% set n = namespace(x=messages[0].content) %}{% set n.x = n.x ~ '!' %}{{ n.x }}{{ seen }}{% set seen=1 %}"
    )
    template = load_chat_template(write_folder(tmp_path / "checkpoint", source))
    messages = [{"role": "user", "content": "x"}]
    assert [template.render(messages) for _ in range(2)] == ["x!", "x!"]


def test_padding_and_truncation_settings_are_ignored(tmp_path):
    """They would truncate a long prompt silently; transformers' tokenizers ignore them, too."""
    tokenizer = tokenizers.Tokenizer.from_str(KINDS["byte_level"].to_str())
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=20)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "def add(a, b): return a + b"
    assert encode(load_tokenizer(tmp_path), text) == KINDS["byte_level"].encode(text).ids
