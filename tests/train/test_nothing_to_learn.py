"""No step without a token to learn: such rows are left out, long documents are counted, and the weights stay."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import qwen_moe_jax as qmj
from qwen_moe_jax.errors import ConfigError
from tests.train.test_step import HUB_CONFIG
from train.config import DataConfig, build_config
from train.data.batches import batch_at
from train.data.corpus import load_corpus
from train.data.documents import Documents
from train.data.feed import make_feed
from train.data.lengths import position_notes
from train.data.rows import pack
from train.data.tokenizer import save_tokenizer, train_tokenizer
from train.program import assemble, batch_sharding


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 23), min_size=1, max_size=12), st.integers(2, 9), st.floats(0, 1), st.integers(0, 9))
def test_the_rows_that_are_kept_are_those_with_a_target(lengths, seq_len, share, seed):
    lengths = np.array(lengths)
    tokens = np.arange(1, lengths.sum() + 1)
    learned = np.random.default_rng(seed).random(len(tokens)) < share
    starts = np.cumsum(lengths) - lengths
    rows = pack(Documents(tokens, learned, starts, lengths, fully_learned=bool(learned.all())), seq_len)
    targets = [_targets(rows[number]) for number in range(len(rows))]
    kept = rows.with_targets()
    assert [kept[number].tokens_T.tolist() for number in range(len(kept))] == [
        rows[number].tokens_T.tolist() for number in range(len(rows)) if targets[number]
    ]
    assert kept.num_tokens == sum(int((kept[number].segment_ids_T > 0).sum()) for number in range(len(kept)))


def _targets(row):
    same = (row.segment_ids_T[:-1] == row.segment_ids_T[1:]) & (row.segment_ids_T[1:] > 0)
    return int((same & row.learned_T[1:]).sum())


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Forty conversations with questions of some 80 tokens and answers of three, and their tokenizer."""
    folder = tmp_path_factory.mktemp("chats")
    question = "why does the quick brown fox jump over the lazy dog " * 4
    save_tokenizer(train_tokenizer([question], 300), folder / "tokenizer")
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "yes"}]
    lines = [json.dumps({"messages": messages})] * 40
    (folder / "chats.jsonl").write_text("\n".join(lines))
    return folder


def data(chats, **settings):
    own = {"path": str(chats / "chats.jsonl"), "format": "jsonl", "tokenizer": str(chats / "tokenizer")}
    return DataConfig(**{**own, "seq_len": 16, "batch_size": 4, "heldout_rows": 4, "heldout_fraction": 0.2, **settings})


def feed_of(config, folder):
    mesh = qmj.make_mesh()
    corpus = load_corpus(folder, config)
    return corpus, make_feed(config, corpus, mesh, batch_sharding(mesh), seed=0)


def test_rows_without_a_learned_token_are_left_out_and_their_share_is_said(chats, tmp_path):
    _, feed = feed_of(data(chats), tmp_path / "corpus")
    [note] = feed.notes
    assert note.startswith("left out ") and "chats.jsonl" in note and "which have no token to learn" in note
    for step in range(6):
        assert np.asarray(feed.training(step, {}).target_mask_BT).any(axis=1).all()
    [heldout] = feed.heldout
    assert np.asarray(heldout.target_mask_BT).any(axis=1).all()


@pytest.mark.parametrize(
    ("rule", "done"), [("split", "split over rows"), ("truncate", "truncated"), ("drop", "left out")]
)
def test_documents_longer_than_a_row_are_counted_and_cut_by_the_chosen_rule(chats, tmp_path, rule, done):
    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        "\n".join(json.dumps({"text": "the dog " * (40 if number % 4 == 0 else 1)}) for number in range(40))
    )
    config = data(chats, path=str(texts), too_long=rule)
    corpus = load_corpus(tmp_path / "corpus", config)
    [note] = corpus.notes
    assert "10 of 40 documents of " in note and "longer than a row of 16 tokens" in note and f"{done} (data" in note
    lengths = [len(part[n]) for part in (corpus.parts[0].training, corpus.parts[0].heldout) for n in range(len(part))]
    assert len(lengths) == (30 if rule == "drop" else 40)
    assert max(lengths) > 16 if rule == "split" else max(lengths) <= 16
    assert lengths.count(16) == (10 if rule == "truncate" else 0)


def test_a_source_without_any_token_to_learn_is_refused_with_what_to_raise(chats, tmp_path):
    config = data(chats, too_long="truncate")
    with pytest.raises(ConfigError, match="none of the .* rows of .* has a token to learn.*Raise data.seq_len"):
        feed_of(config, tmp_path / "corpus")


def test_a_step_without_targets_changes_no_weight_and_no_moment(tmp_path):
    tables = {"model": {**HUB_CONFIG, "vocab_size": 300, "eos_token_id": 0}, "optimizer": {"warmup_steps": 0}}
    config = build_config({**tables, "data": {"seq_len": 8, "batch_size": 2, "vocab_size": 300}}, {}, "test")
    mesh = qmj.make_mesh()
    program = assemble(config, qmj.ModelConfig.from_pretrained(config.model), mesh)
    model = qmj.CausalLM(program.model.config, rngs=0, mesh=mesh, execution=program.model.execution)
    state = program.begin(nnx.to_pure_dict(nnx.state(model)))
    batch = batch_at(pack([np.arange(1, 17)], 8), 0, 2, seed=0)
    blank = type(batch)(**{**vars(batch), "target_mask_BT": np.zeros_like(batch.target_mask_BT)})
    before = jax.tree.map(np.array, (state.params, state.optimizer))
    state, metrics = program.train_step(state, {}, blank)
    assert int(metrics.learned_tokens) == 0 and bool(metrics.finite) and int(state.step) == 1
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, (state.params, state.optimizer)))
    state, metrics = program.train_step(state, {}, batch)
    assert int(metrics.learned_tokens) == 14
    assert not np.array_equal(jax.tree.leaves(before[0])[0], jax.tree.leaves(state.params)[0])


def test_rows_beyond_the_models_positions_are_named():
    assert position_notes(64, 64) == []
    [note] = position_notes(128, 64)
    assert "128 tokens (data.seq_len), more than the 64 positions" in note and "max_position_embeddings" in note
