"""Records of every published form are recognised by their keys, and refused where they have none or several."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_moe_jax.errors import ConfigError
from tests.inference.tokenizer_kinds import byte_fallback
from train.config import ColumnsConfig, DataConfig, SourceConfig, load_config
from train.data.chat import completion_document
from train.data.corpus import load_corpus
from train.data.messages import Conversation
from train.data.recognised import Recognised
from train.data.records import Completion, checked_content
from train.data.sources import read_records
from train.data.tokenizer import END_OF_TEXT, save_tokenizer, train_tokenizer

USER, ANSWER = {"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "3"}
SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [USER, ANSWER]
CALL = {"name": "add", "arguments": {"a": 1}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}
RESULT = {"role": "tool", "content": "3"}


def share(*turns):
    return [{"from": sender, "value": value} for sender, value in turns]


SHARED = share(("human", "1 + 2?"), ("gpt", "3"))


def refusal(record, **columns):
    with pytest.raises(ConfigError) as refused:
        checked_content(record, "a.jsonl, line 7", ColumnsConfig(**columns))
    assert str(refused.value).startswith("a.jsonl, line 7: ")
    return str(refused.value)


def write(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(file)


def read(path, recognised=None, **source):
    config = SourceConfig(path=str(path), format="jsonl", **source)
    return list(read_records(config, 1.0, recognised=recognised))


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"id": "x", "conversations": SHARED}, TALK),
        ({"conversations": [*share(("system", "Be brief.")), *SHARED], "source": "web"}, [SYSTEM, *TALK]),
        ({"system": "Be brief.", "conversations": SHARED}, [SYSTEM, *TALK]),
        ({"system": "Be brief.", "messages": [SYSTEM, *TALK]}, [SYSTEM, *TALK]),
        ({"system": "", "conversations": TALK}, TALK),
        (
            {"conversations": share(("human", "1 + 2?"), ("function_call", json.dumps(CALL)), ("observation", "3"),
                                    ("gpt", "3"))},
            [USER, CALLED, RESULT, ANSWER],
        ),
        ({"messages": share(("user", "1 + 2?"), ("tool_call", json.dumps([CALL])), ("function", "3"), ("model", "3"))},
         [USER, CALLED, RESULT, ANSWER]),
        ({"instruction": "1 + 2?", "input": "", "output": "3", "category": "sums"}, TALK),
        ({"instruction": "1 +", "input": "2?", "output": "3"}, [{**USER, "content": "1 +\n2?"}, ANSWER]),
        ({"instruction": "1 + 2?", "output": "3", "system": "Be brief.", "history": []}, [SYSTEM, *TALK]),
        ({"instruction": "1 + 2?", "output": "3", "history": [["a", "b"]]},
         [{**USER, "content": "a"}, {**ANSWER, "content": "b"}, *TALK]),
        ({"prompt": [USER], "completion": [ANSWER]}, TALK),
        ({"prompt": share(("human", "1 + 2?")), "completion": [ANSWER], "label": None}, TALK),
    ],
)  # fmt: skip
def test_published_forms_of_a_conversation_are_the_same_conversation(record, messages):
    content = checked_content(record, "line 1")
    assert content == Conversation(messages)


def test_answers_of_a_prompt_are_context_of_its_completion():
    record = {"prompt": [*TALK, USER], "completion": [ANSWER], "tools": [{"name": "add"}]}
    content = checked_content(record, "line 1")
    assert content.messages == [*TALK, *TALK] and content.not_learned == {1}
    assert content.variables == {"tools": [{"name": "add"}]}


def test_a_weight_of_sharegpt_is_the_messages_weight():
    record = {"conversations": [*SHARED, {"from": "human", "value": "?", "weight": 0}, {**SHARED[1], "weight": 0}]}
    assert checked_content(record, "line 1").not_learned == {3}


@pytest.mark.parametrize(
    ("record", "columns", "content"),
    [
        ({"question": "1 + 2?", "answer": "3"}, {"instruction": "question", "output": "answer"}, Conversation(TALK)),
        ({"question": "a", "answer": "b"}, {"prompt": "question", "completion": "answer"}, Completion("a", "b")),
        ({"prompt": "a", "answer": "b"}, {"completion": "answer"}, Completion("a", "b")),
        ({"dialog": TALK, "text": "1 + 2? 3"}, {"messages": "dialog"}, Conversation(TALK)),
        ({"conversations": TALK, "messages": "?"}, {"messages": "conversations"}, Conversation(TALK)),
        ({"content": "one", "title": "t"}, {"text": "content"}, "one"),
        ({"instruction": "1 + 2?", "output": "3", "text": "1 + 2? 3"}, {"text": "text"}, "1 + 2? 3"),
        ({"instruction": "1 + 2?", "output": "3", "text": "1 + 2? 3"}, {"output": "output"}, Conversation(TALK)),
        ({"query": "1 +", "context": "2?", "response": "3"},
         {"instruction": "query", "input": "context", "output": "response"},
         Conversation([{**USER, "content": "1 +\n2?"}, ANSWER])),
        ({"functions": '[{"name": "add"}]', "messages": TALK}, {"tools": "functions"},
         Conversation(TALK, {"tools": [{"name": "add"}]})),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"completion": "chosen"}, Completion("a", "b")),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}, {"completion": "chosen"}, Conversation(TALK)),
        ({"prompt": "1 + 2?", "chosen": TALK, "rejected": TALK}, {"messages": "chosen"}, Conversation(TALK)),
        ({"prompt": "a", "completion": "b", "label": True}, {"completion": "completion"}, Completion("a", "b")),
    ],
)  # fmt: skip
def test_columns_are_read_as_the_fields_that_they_are_named_for(record, columns, content):
    assert checked_content(record, "line 1", ColumnsConfig(**columns)) == content


@pytest.mark.parametrize(
    ("record", "parts"),
    [
        ({"question": "a", "answer": "b"}, ["found the keys question, answer", "[data.columns]"]),
        ({"prompt": "a"}, ["found the keys prompt, expected"]),
        ({"text": "a", "instruction": "b", "output": "c"},
         ["found both text and instruction, output", '[data.columns] text = "text"']),
        ({"messages": TALK, "conversations": TALK}, ["found both messages and conversations", 'messages = "messages"']),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, ["preferences", '[data.columns] completion = "chosen"']),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}, ['[data.columns] completion = "chosen"']),
        ({"chosen": TALK, "rejected": TALK}, ['[data.columns] messages = "chosen"']),
        ({"chosen": "Human: a", "rejected": "Human: b"}, ['[data.columns] text = "chosen"']),
        ({"messages": TALK, "chosen": TALK, "rejected": TALK}, ["found both messages and chosen, rejected"]),
        ({"prompt": "a", "completion": "b", "label": False}, ["label: found False", "all would be learned"]),
        ({"prompt": [USER], "completion": "b"}, ["found messages as prompt and text as completion"]),
        ({"prompt": "a", "completion": 3}, ["completion: found 3, expected a string"]),
        ({"prompt": "a", "completion": "b", "tools": [{}]}, ["tools: found with a prompt of text"]),
        ({"prompt": TALK, "completion": [USER]}, ["completion: found no message of the assistant"]),
        ({"prompt": [{"role": "me"}], "completion": [ANSWER]}, ["prompt[0].role: found 'me'"]),
        ({"instruction": 3, "output": "b"}, ["instruction: found 3, expected a string"]),
        ({"instruction": "a", "output": "b", "history": ["x"]}, ["history: found ['x'], expected a list of pairs"]),
        ({"conversations": share(("narrator", "x"))}, ["conversations[0].from: found 'narrator'", "human", "gpt"]),
        ({"conversations": share(("human", None))}, ["conversations[0].value: found None, expected a string"]),
        ({"conversations": share(("human", "x"), ("function_call", "add"))},
         ["conversations[1].value: found 'add', expected the JSON of a call"]),
        ({"conversations": share(("gpt", "x"))}, ["conversations[0].role: found 'assistant', expected a message that"]),
        ({"system": "a", "messages": [SYSTEM, *TALK]}, ["system: found 'a' with a system message"]),
        ({"conversations": share(("human", "\ud83d"), ("gpt", "b"))}, ["value: found half of a surrogate pair"]),
        ({"conversations": share(("human", "a"), ("tool_call", '{"name": "f", "arguments": {"q": "\\ud83d"}}'))},
         ["conversations[1].value[0]: function: arguments: q: found half of a surrogate pair"]),
    ],
)  # fmt: skip
def test_what_is_no_form_or_several_is_refused_with_the_way_out(record, parts):
    message = refusal(record)
    for part in parts:
        assert part in message


def test_a_named_column_that_a_record_lacks_is_refused_by_line_and_name():
    message = refusal({"q": "a", "answer": "b"}, prompt="question", completion="answer")
    assert "found the keys q, answer, expected 'question', which is read as data.columns.prompt" in message


def test_a_named_column_that_no_record_has_is_refused_by_file_and_name(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"messages": TALK, "functions": None}] * 3)
    with pytest.raises(ConfigError, match=r"data.columns.tools: none of the 3 records of .*a.jsonl has 'functions'"):
        read(file, columns=ColumnsConfig(tools="functions"))


def test_a_file_of_several_forms_is_refused_by_line_with_both_forms(tmp_path):
    records = [{"text": "one"}, {"messages": TALK}, {"conversations": SHARED}]
    with pytest.raises(ConfigError) as refused:
        read(write(tmp_path / "a.jsonl", records))
    for part in ("a.jsonl, line 3: found conversations in ShareGPT's form", "expected texts, as in", "line 1"):
        assert part in str(refused.value)
    (tmp_path / "folder").mkdir()
    for number, record in enumerate(records):  # files of one folder may have different forms
        write(tmp_path / "folder" / f"{number}.jsonl", [record])
    assert len(read(tmp_path / "folder")) == 3


def test_the_start_says_what_was_recognised_for_how_many_and_which_keys_are_not_read(tmp_path):
    records = [{"conversations": SHARED, "id": 1}, {"conversations": SHARED, "category": "sums", "idx": None}] * 600
    file = write(tmp_path / "a.jsonl", records)
    save_tokenizer(train_tokenizer(["1 + 2? 3"], 300), tmp_path / "tokenizer")
    config = DataConfig(path=file, format="jsonl", tokenizer=str(tmp_path / "tokenizer"), seq_len=16)
    said = load_corpus(tmp_path / "corpus", config).forms
    expected = (
        "1,200 records of {}: conversations in ShareGPT's form (from, value); keys that are not read: id, category"
    )
    assert said == [expected.format(file)]
    assert load_corpus(tmp_path / "corpus", config).forms == said  # of a resumed run, too


def test_the_start_names_the_keys_of_messages_that_only_a_template_may_read():
    recognised = Recognised(ColumnsConfig())
    message = {"role": "user", "content": "a", "mood": "good", "tool_calls": None, "weight": None, "id": 3}
    recognised.content({"messages": [message, {"role": "developer", "content": "b"}, ANSWER]}, "a", "line 1")
    assert recognised.notes("a")[0].endswith("keys of messages that are read where the chat template does: id, mood")


def test_the_developers_message_is_the_systems():
    read_as = checked_content({"messages": [{**SYSTEM, "role": "developer"}, *TALK]}, "line 1")
    assert read_as == Conversation([SYSTEM, *TALK])


def test_of_many_unread_keys_some_are_named(tmp_path):
    recognised = Recognised(ColumnsConfig())
    recognised.content({"text": "a", **{f"key{number}": 1 for number in range(20)}}, "a", "line 1")
    assert recognised.notes("a")[0].endswith("key11 and 8 more")


def test_the_array_of_a_json_file_is_read_item_by_item(tmp_path):
    file = tmp_path / "a.json"
    items = [{"text": "one"}, {"text": " "}, {"text": "t\nwo"}]
    file.write_text(json.dumps(items, indent=2))
    one, two = read(file)
    assert (one.content, two.content) == ("one", "t\nwo")
    assert two.place == f"{file}, line 8 (item 3)" and two.name == "a.json:3"
    assert [record.content for record in read(tmp_path, pattern="*.json")] == ["one", "t\nwo"]
    write(file, items)  # some name their lines so
    assert [record.content for record in read(file)] == ["one", "t\nwo"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('[{"text": "a"},\n {"text": 3}]', ["line 2 (item 2): text: found 3, expected a string"]),
        ('[{"text": "a"},\n {"text" "b"}]', ["line 2 (item 2): this is no JSON"]),
        ('[{"text": "a"}\n {"text": "b"}]', ['line 1 (item 1): found \'{"text": "b"}]\' after it, expected a comma']),
        ('[{"text": "a"},\n', ["line 2 (item 2): this is no JSON"]),
        ("[]", ["holds no readable jsonl"]),
    ],
)
def test_a_bad_array_is_refused_by_line_and_item(tmp_path, text, parts):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ConfigError) as refused:
        read(tmp_path / "a.json")
    for part in parts:
        assert part in str(refused.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_byte_order_mark_is_no_text_and_says_which_utf_it_is(tmp_path, encoding, name):
    text = "".join(json.dumps({"text": word}, ensure_ascii=False) + "\n" for word in ("one", "zwölf 🦉"))
    text = text if name == "a.jsonl" else "[" + ",".join(text.splitlines()) + "]"
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    (tmp_path / name).write_bytes((mark + text).encode(encoding))
    assert [record.content for record in read(tmp_path / name)] == ["one", "zwölf 🦉"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
KEYS = "text messages conversations prompt completion instruction input output history system tools chosen label id"


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from(KEYS.split()), JSON, max_size=5), st.sampled_from([{}, {"completion": "chosen"}])
)
def test_any_record_is_read_or_refused_by_its_place(record, columns):
    try:
        checked_content(record, "line 1", ColumnsConfig(**columns))
    except ConfigError as error:
        assert str(error).startswith("line 1: ")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.fixed_dictionaries({"text": st.text(min_size=1)}), min_size=1, max_size=5), st.integers(0, 3))
def test_an_array_and_lines_of_the_same_records_are_the_same(tmp_path_factory, records, indent):
    folder = tmp_path_factory.mktemp("same")
    write(folder / "a.jsonl", records)
    (folder / "a.json").write_text(json.dumps(records, indent=indent or None))
    found = []
    for name in ("a.jsonl", "a.json"):
        try:
            found.append([record.content for record in read(folder / name)])
        except ConfigError as error:  # blank ones only, or half of a surrogate pair
            found.append(str(error).split(": ", 1)[1][:20])
    assert found[0] == found[1]


@pytest.mark.parametrize("tokenizer", [byte_fallback(), train_tokenizer(["the fox jumps"], 300)])
def test_of_a_completion_the_tokens_after_the_prompts_and_the_end_are_learned(tokenizer):
    end_id = tokenizer.token_to_id("</s>") or tokenizer.token_to_id(END_OF_TEXT)
    turns = completion_document(Completion("the fox", " jumps"), tokenizer, end_id)
    whole = tokenizer.encode("the fox jumps").ids
    assert turns.ids.tolist() == [*whole, end_id]
    prompt, context = tokenizer.encode("the fox").ids, turns.ids[~turns.learned].tolist()
    assert context == prompt[: len(context)] and not turns.learned[: len(context)].any()
    assert len(context) == len(prompt) or whole[len(context)] != prompt[len(context)]
    merged = completion_document(Completion("the fo", "x"), tokenizer, end_id)
    assert merged.learned[-2:].all() and not merged.learned[0]


def test_a_corpus_of_completions_learns_the_completions(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"prompt": "the fox", "completion": " jumps"}] * 20)
    corpus = load_corpus(tmp_path / "corpus", DataConfig(path=file, format="jsonl", vocab_size=300, seq_len=4))
    part = corpus.parts[0].training
    assert corpus.tokenizer.decode(part[0][part.learned_in(0)][:-1]) == " jumps" and part[0][-1] == corpus.end_id


@pytest.mark.parametrize(
    ("columns", "parts"),
    [
        ({"promt": "q"}, ["data.columns.promt: unknown key", "did you mean 'prompt'"]),
        ({"prompt": 3}, ["data.columns.prompt: found 3 (integer), expected text"]),
        ({"prompt": ""}, ["data.columns.prompt: found '', expected the name of a column"]),
        ({"prompt": "q", "completion": "q"}, ["data.columns.prompt: found 'q'", "also that of completion"]),
        ({"text": "t", "messages": "m"}, ["data.columns.messages: found 'm', expected none with text"]),
    ],
)
def test_columns_that_cannot_be_are_refused_by_name(tmp_path, columns, parts):
    with pytest.raises(ConfigError) as refused:
        config_of(tmp_path, columns=columns)
    for part in parts:
        assert part in str(refused.value)


def test_columns_are_set_in_a_file_and_on_the_command_line(tmp_path):
    config = config_of(tmp_path, ["--data.columns.completion=answer"], columns={"prompt": "question"})
    assert config.data.mixture[0].columns == ColumnsConfig(prompt="question", completion="answer")
    with pytest.raises(ConfigError, match="--data.columns.completio: unknown key"):
        config_of(tmp_path, ["--data.columns.completio=answer"], columns={"prompt": "question"})
    with pytest.raises(ConfigError, match="data.columns: found text, expected none with format text"):
        config_of(tmp_path, format="text", columns={"text": "body"})


def config_of(tmp_path, overrides=(), format="jsonl", columns=None):
    table = ", ".join(f"{name} = {json.dumps(value)}" for name, value in columns.items())
    file = tmp_path / "run.toml"
    file.write_text(
        f'[model]\nmodel_type = "qwen3_moe"\n[data]\npath = "a"\nformat = "{format}"\ncolumns = {{ {table} }}\n'
    )
    return load_config(file, list(overrides))
