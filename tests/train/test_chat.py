"""Of a conversation, exactly the assistant's tokens are learned, by any template; held on token ids."""

import json

import numpy as np
import pytest

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.inference.chat_template import load_chat_template
from qwen_moe_jax.inference.tokenizer import load_tokenizer
from tests.inference.chat_templates import MIXTRAL, QWEN2, QWEN3
from tests.inference.tokenizer_kinds import byte_fallback, byte_level
from train.config import DataConfig
from train.data.batches import batch_at
from train.data.chat import Turns, conversation_documents
from train.data.corpus import load_corpus
from train.data.records import Conversation
from train.data.rows import pack
from train.data.tokenizer import SPECIAL_TOKENS, save_tokenizer, train_tokenizer

SYSTEM, ONE, TWO = (
    {"role": "system", "content": "Be brief."},
    *({"role": "user", "content": text} for text in ("The quick fox?", "And the dog?")),
)
YES, NO = ({"role": "assistant", "content": text} for text in ("It jumps.", "It isn't here."))
TALK = [SYSTEM, ONE, YES, TWO, NO]


def write_folder(folder, tokenizer, template):
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    end = "<|im_end|>" if tokenizer.token_to_id("<|im_end|>") else "</s>"
    config = {"bos_token": "<s>", "eos_token": end, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def documents(folder, messages, **variables):
    template, tokenizer = load_chat_template(folder), load_tokenizer(folder)
    conversation = Conversation(messages, variables)
    return tokenizer, conversation_documents(conversation, template, tokenizer, "a.jsonl, line 7")


def learned_pieces(tokenizer, turns):
    """The runs of learned ids, as ids, and all ids that are not learned."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], turns.learned, [0]])))
    return [turns.ids[start:stop].tolist() for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def ids_of(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


def test_chatml_learns_the_answers_and_the_marks_that_end_them(tmp_path):
    tokenizer, [turns] = documents(write_folder(tmp_path / "model", byte_level(), QWEN2), TALK)
    before = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nThe quick fox?<|im_end|>\n<|im_start|>assistant\n"
    )
    between = "<|im_start|>user\nAnd the dog?<|im_end|>\n<|im_start|>assistant\n"
    pieces = [before, "It jumps.<|im_end|>\n", between, "It isn't here.<|im_end|>\n"]
    assert turns.ids.tolist() == [id for piece in pieces for id in ids_of(tokenizer, piece)]
    expected = [number % 2 == 1 for number, piece in enumerate(pieces) for _ in ids_of(tokenizer, piece)]
    assert turns.learned.tolist() == expected


def test_mixtrals_template_learns_the_answers_and_the_end_of_the_text(tmp_path):
    tokenizer, [turns] = documents(write_folder(tmp_path / "model", byte_fallback(), MIXTRAL), TALK)
    whole = (
        "<s> [INST] Be brief.\n\nThe quick fox? [/INST] It jumps.</s> [INST] And the dog? [/INST] It isn't here.</s>"
    )
    assert turns.ids.tolist() == ids_of(tokenizer, whole)
    end_id = tokenizer.token_to_id("</s>")
    one, two = learned_pieces(tokenizer, turns)
    assert one[-1] == two[-1] == end_id and one.count(end_id) == two.count(end_id) == 1
    assert tokenizer.decode(one).strip() == "It jumps." and tokenizer.decode(two).strip() == "It isn't here."
    # What comes before the first learned token is what the model reads when it is asked for the answer.
    prompt = load_chat_template(tmp_path / "model").render(TALK[:2])
    assert turns.ids[: np.flatnonzero(turns.learned)[0]].tolist() == ids_of(tokenizer, prompt)


def test_a_template_that_rewrites_earlier_turns_gives_a_document_for_each(tmp_path):
    tokenizer, [first, second] = documents(write_folder(tmp_path / "model", byte_level(), QWEN3), TALK)
    thought = "<think>\n\n</think>\n\n"
    assert learned_pieces(tokenizer, first) == [ids_of(tokenizer, f"{thought}It jumps.<|im_end|>\n")]
    assert learned_pieces(tokenizer, second) == [ids_of(tokenizer, f"{thought}It isn't here.<|im_end|>\n")]
    # In the second, the first answer is written as the model will read it: without its thought.
    assert thought not in tokenizer.decode(second.ids[~second.learned], skip_special_tokens=False)


def test_tool_calls_are_learned_and_their_results_are_not(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": {"a": 1}}]}
    result, tools = {"role": "tool", "content": "stop there"}, [{"name": "add"}]
    folder = write_folder(tmp_path / "model", byte_level(), QWEN2)
    # QWEN2 writes a call right after the role, where its beginning of an answer has a line end: that is the same.
    tokenizer, [turns] = documents(folder, [ONE, call, result, YES], tools=tools)
    one, two = learned_pieces(tokenizer, turns)
    assert tokenizer.decode(one, skip_special_tokens=False).startswith('<tool_call>\n{"name": "add"')
    assert two == ids_of(tokenizer, "It jumps.<|im_end|>\n")


def test_an_answer_that_merges_with_the_prompt_is_learned_from_the_first_id_that_differs(tmp_path):
    template = "{{ messages[0].content + ' ' }}{% if messages[1] is defined %}{{ messages[1].content }}{% endif %}"
    folder = write_folder(tmp_path / "model", byte_level(), template)
    tokenizer, [turns] = documents(folder, [{**ONE, "content": "lazy"}, {**YES, "content": "dog"}])
    assert [tokenizer.id_to_token(id) for id in ids_of(tokenizer, "lazy ")] == ["laz", "y", "Ġ"]
    assert [tokenizer.id_to_token(id) for id in turns.ids] == ["laz", "y", "Ġdog"]
    assert turns.learned.tolist() == [False, False, True]


def test_a_template_that_does_not_go_on_from_its_own_prompt_is_refused_by_file_and_line(tmp_path):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"
    template += "{% if add_generation_prompt %}ANSWER{% endif %}"
    folder = write_folder(tmp_path / "model", byte_level(), template)
    with pytest.raises(ConfigError, match=r"a.jsonl, line 7: messages\[2\]: .*renders 'assistant.*answer has 'ANSWER'"):
        documents(folder, TALK)


def test_a_conversation_that_the_template_refuses_is_named(tmp_path):
    folder = write_folder(tmp_path / "model", byte_fallback(), MIXTRAL)
    with pytest.raises(ConfigError, match="a.jsonl, line 7: the chat template refuses the messages: .*must alternate"):
        documents(folder, [ONE, TWO, YES])


def test_only_the_assistants_tokens_are_targets_of_a_batch_and_a_conversation_is_held_out_whole(tmp_path):
    folder = write_folder(tmp_path / "model", byte_level(), QWEN3)
    source = tmp_path / "chats.jsonl"
    talks = [[SYSTEM, ONE, YES, {"role": "user", "content": f"{number}?"}, NO] for number in range(10)]
    source.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in talks))
    config = DataConfig(path=str(source), format="jsonl", tokenizer=str(folder), seq_len=200, heldout_fraction=0.1)
    corpus = load_corpus(tmp_path / "corpus", config)
    [part] = corpus.parts
    assert (len(part.heldout), len(part.training)) == (2, 18)  # each gives two documents
    rows = pack(part.training, 200)
    batch = batch_at(rows, 0, len(rows), seed=0)
    text = corpus.tokenizer.decode(batch.targets_BT[batch.target_mask_BT].tolist(), skip_special_tokens=False)
    assert "It jumps.<|im_end|>" in text and "It isn't here.<|im_end|>" in text
    assert "quick" not in text and "brief" not in text and "<|im_start|>" not in text


def test_messages_without_a_tokenizer_are_written_by_the_template_of_the_one_that_is_trained(tmp_path):
    source = tmp_path / "chats.jsonl"
    talks = [[SYSTEM, ONE, YES, {"role": "user", "content": f"{number}?"}, NO] for number in range(10)]
    source.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in talks))
    config = DataConfig(path=str(source), format="jsonl", vocab_size=300, seq_len=40, heldout_fraction=0.1)
    corpus = load_corpus(tmp_path / "corpus", config)
    [part] = corpus.parts
    end_id, start_id, message_end_id = (corpus.tokenizer.token_to_id(token) for token in SPECIAL_TOKENS)
    assert corpus.stop_ids == [end_id, message_end_id]
    for number in range(len(part.training)):
        ids, learned = part.training[number], part.training.learned_in(number)
        one, two = learned_pieces(corpus.tokenizer, Turns(ids, learned))
        assert one == ids_of(corpus.tokenizer, "It jumps.<|im_end|>\n")
        assert two == ids_of(corpus.tokenizer, "It isn't here.<|im_end|>\n")
        assert (ids == start_id).sum() == (ids == message_end_id).sum() == 5 and not (ids == end_id).any()


def test_transformers_renders_the_same_and_finds_the_same_answers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="not installed here")
    save_tokenizer(train_tokenizer(["It jumps. The quick fox? "], 300), tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer, [turns] = documents(tmp_path, TALK)
    found = theirs.apply_chat_template(
        TALK, return_dict=True, return_assistant_tokens_mask=True, return_tensors=None, tokenize=True
    )
    assert found["input_ids"] == turns.ids.tolist()
    # Ours is also to write the line end after each mark, as a model that is asked for more turns reads it.
    line_end = tokenizer.token_to_id("Ċ")
    assert [bool(is_theirs) for is_theirs in found["assistant_masks"]] == [
        bool(learned) and id != line_end for id, learned in zip(turns.ids, turns.learned, strict=True)
    ]
    assert theirs.apply_chat_template(TALK[:2], add_generation_prompt=True, tokenize=False) == load_chat_template(
        tmp_path
    ).render(TALK[:2])
