"""Preferences become pairs of documents of which the completions are learned, in every form that TRL's data has."""

import json

import numpy as np
import pytest

from qwen_moe_jax.errors import ConfigError
from train.config import ColumnsConfig, DataConfig, SourceConfig
from train.data.corpus import load_corpus
from train.data.examples import example_rows, pair_batch
from train.data.messages import Conversation
from train.data.pairs import PAIRS, Preference, read_preference
from train.data.records import Completion
from train.data.sources import read_records

ASKED = {"role": "user", "content": "1 + 2?"}
RIGHT, WRONG = {"role": "assistant", "content": "3"}, {"role": "assistant", "content": "4"}


def read(record, **columns):
    return read_preference(record, "a.jsonl, line 7", ColumnsConfig(**columns)).content


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [ASKED], "chosen": [RIGHT], "rejected": [WRONG]},
        {"messages": [ASKED], "chosen": RIGHT, "rejected": WRONG},
        {"messages": [ASKED], "chosen": "3", "rejected": "4"},
        {"conversations": [{"from": "human", "value": "1 + 2?"}], "chosen": {"from": "gpt", "value": "3"},
         "rejected": {"from": "gpt", "value": "4"}},
        {"chosen": [ASKED, RIGHT], "rejected": [ASKED, WRONG]},
    ],
)  # fmt: skip
def test_published_forms_of_a_pair_of_conversations_are_the_same_pair(record):
    expected = Preference(Conversation([ASKED, RIGHT]), Conversation([ASKED, WRONG]))
    assert read(record) == expected
    assert read({**record, "margin": 2}).margin == 2.0


def test_pairs_of_texts_have_a_prompt_or_begin_with_the_same_words():
    expected = Preference(Completion("The sum is", " three."), Completion("The sum is", " thirty."))
    assert read({"prompt": "The sum is", "chosen": " three.", "rejected": " thirty."}) == expected
    assert read({"chosen": "The sum is three.", "rejected": "The sum is thirty."}) == expected
    named = read({"q": "The sum is", "yes": " three.", "no": " thirty."}, prompt="q", chosen="yes", rejected="no")
    assert named == expected
    assert read({"prompt": "a", "chosen": " b", "rejected": " b"}) is None  # nothing to prefer


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"prompt": "a", "chosen": "b"}, "found the keys prompt, chosen, expected"),
        ({"prompt": "a", "messages": [ASKED], "chosen": "b", "rejected": "c"}, "found both prompt and messages"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "tools": [{}]}, "tools: found with a prompt of text"),
        ({"prompt": "a", "chosen": 3, "rejected": "c"}, "chosen: found 3, expected a string"),
        ({"prompt": "a", "chosen": " ", "rejected": "c"}, "chosen: found ' ', expected a text after the prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "1"}, "margin: found '1', expected a number"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 10**400}, "margin: found 1000.*expected a finite"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": float("nan")}, "margin: found nan, expected a fini"),
        ({"messages": [ASKED], "chosen": [ASKED], "rejected": "c"}, "chosen: found no message of the assistant"),
    ],
)
def test_what_is_no_pair_is_refused_by_file_line_and_field(record, complaint):
    with pytest.raises(ConfigError, match="a.jsonl, line 7: " + complaint.replace("+", "\\+")):
        read(record)


def test_a_batch_has_both_completions_of_each_pair_as_targets(tmp_path):
    records = [
        {"prompt": f"{number} and {number} is", "chosen": f" {2 * number}", "rejected": " a number", "margin": number}
        for number in range(20)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = DataConfig(path=str(file), format="jsonl", vocab_size=300, seq_len=24, heldout_fraction=0.25)
    corpus = load_corpus(tmp_path / "corpus", data, PAIRS)
    [part] = corpus.parts
    rows, heldout = (example_rows(part, 24, heldout=kind) for kind in (False, True))
    assert (len(rows), len(heldout)) == (15, 5)
    batch = pair_batch([rows[number] for number in range(len(rows))])
    for pair, margin in enumerate(batch.margin_P):
        answers = []
        for side in range(2):
            tokens, mask = batch.tokens_P2T[pair, side], batch.target_mask_P2T[pair, side]
            assert (batch.targets_P2T[pair, side, :-1] == tokens[1:]).all()
            learned = batch.targets_P2T[pair, side][mask]
            assert learned[-1] == corpus.end_id
            answers.append(corpus.tokenizer.decode(list(learned[:-1])))
            real = batch.segment_ids_P2T[pair, side] == 1
            assert (batch.positions_P2T[pair, side][real] == np.arange(real.sum())).all() and not mask[~real].any()
        assert answers == [f" {2 * int(margin)}", " a number"]


def test_an_own_validation_file_is_what_is_held_out_and_nothing_else_is(tmp_path):
    lines = [json.dumps({"prompt": f"say {n}", "chosen": " yes", "rejected": " no"}) + "\n" for n in range(12)]
    (tmp_path / "train.jsonl").write_text("".join(lines[:9]))
    (tmp_path / "eval.jsonl").write_text("".join(lines[9:]))
    texts = {"path": str(tmp_path / "train.jsonl"), "format": "jsonl"}
    data = DataConfig(**texts, vocab_size=300, seq_len=16, eval_path=str(tmp_path / "eval.jsonl"))
    corpus = load_corpus(tmp_path / "corpus", data, PAIRS)
    [validation] = corpus.heldout_parts
    assert len(example_rows(corpus.parts[0], 16, heldout=False)) == 9 and not len(corpus.parts[0].heldout)
    assert len(example_rows(validation, 16, heldout=True)) == 3 and validation.name.endswith("eval.jsonl")
    with pytest.raises(ConfigError, match="heldout_fraction=0.1 is not supported: expected none with data.eval_path"):
        DataConfig(**texts, eval_path="x", heldout_fraction=0.1)


def test_pairs_that_truncation_leaves_without_an_answer_are_counted_by_name(tmp_path):
    long = " ".join(["word"] * 40)
    records = [{"prompt": long if n < 2 else f"say {n}", "chosen": " yes", "rejected": " no"} for n in range(12)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = DataConfig(path=str(file), format="jsonl", vocab_size=300, seq_len=16, heldout_fraction=0.2)
    corpus = load_corpus(tmp_path / "corpus", data, PAIRS)
    assert len(corpus.parts[0].training) + len(corpus.parts[0].heldout) == 20
    assert any(note.startswith("4 of 24 documents") and "truncated (data.too_long)" in note for note in corpus.notes)
    assert any(note.startswith(f"4 documents of {file} were left out") for note in corpus.notes)


def test_a_table_has_tool_calls_and_schemas_without_the_fields_of_other_rows(tmp_path):
    """Arrow gives each struct of a column the fields of all of them."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    calls = [{"function": {"name": name, "arguments": given}} for name, given in [("a", {"x": 1}), ("b", {"y": ["z"]})]]
    rows = [
        {"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}], "note": None, "n": 1}
        for call in calls
    ]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    read = read_records(SourceConfig(path=str(tmp_path / "a.parquet"), format="parquet"), 1)
    assert [record.content.messages for record in read] == [row["messages"] for row in rows]
