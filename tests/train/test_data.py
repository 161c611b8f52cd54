"""Packing keeps every token once, keeps documents apart, and the order of rows depends on (seed, step) alone."""

import itertools
from collections import Counter

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import qwen_moe_jax as qmj
from train.data.batches import (
    Mixture,
    batch_at,
    batch_of,
    describe_batch,
    heldout_batches,
    rows_of_devices,
)
from train.data.best_fit import best_fit_decreasing
from train.data.documents import Documents, ShardedDocuments, as_documents
from train.data.rows import pack

documents_of_any_length = st.lists(st.integers(1, 23), min_size=1, max_size=12).map(
    lambda lengths: np.split(np.arange(1, sum(lengths) + 1), np.cumsum(lengths)[:-1])  # every token is another
)


def stacked(rows, name):
    return np.stack([getattr(rows[number], name) for number in range(len(rows))])


@settings(max_examples=60, deadline=None)
@given(documents_of_any_length, st.integers(2, 9))
def test_packing_loses_no_token_and_repeats_none(documents, seq_len):
    rows = pack(documents, seq_len)
    tokens_NT, real_NT = stacked(rows, "tokens_T"), stacked(rows, "segment_ids_T") > 0
    np.testing.assert_array_equal(tokens_NT[real_NT], np.concatenate(documents))
    assert rows.num_tokens == real_NT.sum()
    assert real_NT[:-1].all()  # only the last row is padded
    assert not tokens_NT[~real_NT].any() and not stacked(rows, "positions_T")[~real_NT].any()


@settings(max_examples=60, deadline=None)
@given(documents_of_any_length, st.integers(2, 9))
def test_segments_count_from_1_and_positions_from_0_in_each_row(documents, seq_len):
    document_of = np.concatenate([[0], *([number + 1] * len(doc) for number, doc in enumerate(documents))])
    rows = pack(documents, seq_len)
    for row in (rows[number] for number in range(len(rows))):
        expected_segment, expected_position, last_document = 0, 0, None
        for token, segment, position in zip(row.tokens_T, row.segment_ids_T, row.positions_T, strict=True):
            if token == 0:
                assert segment == 0
                continue
            if document_of[token] != last_document:
                expected_segment, expected_position, last_document = expected_segment + 1, 0, document_of[token]
            assert (segment, position) == (expected_segment, expected_position)
            expected_position += 1


@settings(max_examples=60, deadline=None)
@given(documents_of_any_length, st.integers(2, 9), st.integers(1, 5), st.integers(0, 7))
def test_targets_are_the_next_tokens_of_the_same_document(documents, seq_len, batch_size, step):
    document_of = np.concatenate([[0], *([number + 1] * len(doc) for number, doc in enumerate(documents))])
    batch = batch_at(pack(documents, seq_len), step, batch_size, seed=0)
    tokens, targets, mask = batch.tokens_BT, batch.targets_BT, batch.target_mask_BT
    assert (targets[mask] == tokens[mask] + 1).all()  # the tokens are numbered through
    assert (document_of[targets[mask]] == document_of[tokens[mask]]).all()
    # And the mask leaves out no more than that: the last token of every segment, and padding.
    last = np.ones(tokens.shape, bool)
    last[:, :-1] = batch.segment_ids_BT[:, 1:] != batch.segment_ids_BT[:, :-1]
    np.testing.assert_array_equal(mask, ~last & (batch.segment_ids_BT > 0))


@settings(max_examples=30, deadline=None)
@given(documents_of_any_length, st.integers(2, 9), st.integers(0, 99))
def test_a_target_counts_only_where_it_is_to_be_learned(documents, seq_len, seed):
    everything = as_documents(documents)
    learned = np.random.default_rng(seed).random(len(everything.tokens)) < 0.5
    masked = Documents(everything.tokens, learned, everything.starts, everything.lengths)
    rows, unmasked = pack(masked, seq_len), pack(documents, seq_len)
    batch, all_batch = (batch_at(some, 0, len(rows), seed=0) for some in (rows, unmasked))
    np.testing.assert_array_equal(batch.tokens_BT, all_batch.tokens_BT)
    expected = all_batch.target_mask_BT & learned[np.maximum(batch.targets_BT, 1) - 1]  # token n is at index n - 1
    np.testing.assert_array_equal(batch.target_mask_BT, expected)


def test_documents_may_lie_apart_and_in_any_order():
    everything = as_documents([np.arange(1, 4), np.arange(4, 9), np.arange(9, 11)])
    rows = pack(everything.select(np.array([2, 0])), 4)
    np.testing.assert_array_equal(stacked(rows, "tokens_T"), [[9, 10, 1, 2], [3, 0, 0, 0]])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 20), st.integers(1, 7), st.integers(0, 3))
def test_an_epoch_sees_every_row_once_in_an_order_of_its_own_seed(num_rows, batch_size, seed):
    rows = pack([np.arange(1, 3 * num_rows + 1)], 3)

    def first_tokens(steps, seed):
        return np.concatenate([batch_at(rows, step, batch_size, seed).tokens_BT[:, 0] for step in steps])

    two_epochs = first_tokens(range(-(-2 * num_rows // batch_size)), seed)[: 2 * num_rows]
    for epoch in np.split(two_epochs, 2):
        np.testing.assert_array_equal(np.sort(epoch), stacked(rows, "tokens_T")[:, 0])
    # Step n alone, as a resumed run asks for it, is the same as step n after all steps before it.
    np.testing.assert_array_equal(first_tokens([1], seed), first_tokens([0, 1], seed)[batch_size:])


def test_other_seeds_and_epochs_give_other_orders():
    rows = pack([np.arange(1, 301)], 3)
    # Neighbours too: seed 0 has the order of seed 1 in no epoch.
    orders = [tuple(batch_at(rows, step, 100, seed).tokens_BT[:, 0]) for step in range(3) for seed in range(3)]
    assert len(set(orders)) == 9


@pytest.mark.parametrize("weights", [[1, 1], [3, 1], [0.7, 0.2]])
def test_a_mixture_has_its_proportions_and_each_source_its_epochs(weights):
    sources = [pack([np.arange(30)], 3, "few"), pack([np.arange(300)], 3, "many")]
    mixture = Mixture(sources, weights)
    met = [
        reference
        for step in range(50)
        for reference in map(mixture.references(5).__getitem__, range(step * 8, step * 8 + 8))
    ]
    counts = Counter(reference.rows.name for reference in met)
    assert abs(counts["few"] / len(met) - weights[0] / sum(weights)) < 0.01
    for rows in sources:
        numbers = [reference.number for reference in met if reference.rows is rows]
        epochs = [reference.epoch for reference in met if reference.rows is rows]
        assert epochs == [place // len(rows) for place in range(len(numbers))]
        for epoch in range(len(numbers) // len(rows)):
            assert sorted(numbers[epoch * len(rows) :][: len(rows)]) == list(range(len(rows)))
    # They are mixed everywhere, not one after the other.
    assert all({reference.rows.name for reference in met[start : start + 8]} == {"few", "many"} for start in (0, 200))


def test_a_batch_can_be_named_in_a_message():
    mixture = Mixture([pack([np.arange(1, 7)], 3, "books"), pack([np.arange(7, 28)], 3, "chats.jsonl")], [3, 1])
    batch = batch_at(mixture, 1, 4, seed=0)
    described = describe_batch(mixture, 1, 4, seed=0)
    first_books = [token for token in batch.tokens_BT[:, 0] if token < 7]
    first_chats = [token for token in batch.tokens_BT[:, 0] if token >= 7]
    named = {part.split(": rows ")[0]: part.split(": rows ")[1] for part in described.split("; ")}
    books = [int(row) for name, rows in named.items() if "books" in name for row in rows.split(", ")]
    assert [3 * row + 1 for row in books] == first_books
    assert named["epoch 0 of chats.jsonl"] == str((first_chats[0] - 7) // 3)
    assert set(named) == {"epoch 1 of books", "epoch 2 of books", "epoch 0 of chats.jsonl"}


@pytest.mark.parametrize("axes", [{"data": 4}, {"data": 2, "expert": 4}, {"data": 2, "tensor": 4}, {"fsdp": 8}])
@pytest.mark.parametrize("processes", [2, 4])
def test_the_parts_of_all_processes_make_the_batch(axes, processes):
    mesh = qmj.make_mesh(**axes)
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert")))
    hosts = np.split(mesh.devices.ravel(), processes)  # neighbours on the mesh share a host
    parts = [rows_of_devices(set(host), sharding, 16) for host in hosts]
    shards = mesh.size // mesh.shape["tensor"]
    assert all(len(part) == max(16 // processes, 16 // shards) for part in parts)
    assert sorted(set().union(*parts)) == list(range(16))
    if shards >= processes:  # otherwise hosts share rows, of which each holds some columns of the weights
        assert sum(len(part) for part in parts) == 16
    rows = pack([np.arange(1, 301)], 3)
    whole = batch_at(rows, 2, 16, seed=1)
    for part in parts:
        for its_field, field in zip(vars(batch_at(rows, 2, 16, 1, part)).values(), vars(whole).values(), strict=True):
            np.testing.assert_array_equal(its_field, field[part])


def test_one_process_reads_the_whole_batch():
    mesh = qmj.make_mesh(data=2, expert=4)
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert")))
    assert rows_of_devices(jax.local_devices(), sharding, 8) == list(range(8))


def test_heldout_rows_are_spread_and_padded_to_whole_batches():
    rows = pack([np.arange(1, 31)], 3)  # ten rows
    batches = heldout_batches(rows, num_rows=5, batch_size=4)
    tokens = np.concatenate([batch.tokens_BT for batch in batches])
    np.testing.assert_array_equal(tokens[:, 0], [1, 7, 13, 19, 28, 0, 0, 0])
    assert not batches[1].target_mask_BT[1:].any()
    assert len(heldout_batches(rows, num_rows=100, batch_size=4)) == 3
    [first, second] = heldout_batches(rows, 5, 4, part=[2, 3])
    np.testing.assert_array_equal([first.tokens_BT[:, 0], second.tokens_BT[:, 0]], [[13, 19], [0, 0]])


def test_heldout_rows_of_a_mixture_are_shared_out_by_weight():
    mixture = Mixture([pack([np.arange(1, 301)], 3), pack([np.arange(1001, 1301)], 3)], [3, 1])
    [batch] = heldout_batches(mixture, num_rows=16, batch_size=16)
    assert (batch.tokens_BT[:, 0] < 1000).sum() == 12


# ---- best-fit decreasing ---------------------------------------------------------------------------------------------


def in_shards(documents, cuts):
    """The documents in shards of those between the cuts, with some of their tokens learned."""
    everything = as_documents(documents)
    learned = np.random.default_rng(len(documents)).random(len(everything.tokens)) < 0.3
    whole = Documents(everything.tokens, learned, everything.starts, everything.lengths)
    bounds = sorted({0, len(documents), *(cut % (len(documents) + 1) for cut in cuts)})
    shards = [whole.select(np.arange(*span)) for span in itertools.pairwise(bounds)]
    counts = [len(shard) for shard in shards], [shard.num_tokens for shard in shards]
    return ShardedDocuments(shards.__getitem__, *counts, labelled=False), learned


@settings(max_examples=100, deadline=None)
@given(documents_of_any_length, st.lists(st.integers(0, 12), max_size=2), st.integers(2, 9))
def test_best_fit_loses_no_token_and_splits_no_document_that_fits_into_a_row(documents, cuts, seq_len):
    packed, learned = in_shards(documents, cuts)
    rows = pack(packed, seq_len, strategy="bfd")
    tokens_NT, segments_NT = stacked(rows, "tokens_T"), stacked(rows, "segment_ids_T")
    assert sorted(tokens_NT[segments_NT > 0]) == list(range(1, packed.num_tokens + 1))
    segments = [
        row[ids == number]
        for row, ids in zip(tokens_NT, segments_NT, strict=True)
        for number in range(1, ids.max() + 1)
    ]
    expected = [
        document[start : start + seq_len] for document in documents for start in range(0, len(document), seq_len)
    ]
    assert sorted(map(list, segments)) == sorted(map(list, expected))
    assert (np.diff(segments_NT, axis=1) <= 1).all() and not tokens_NT[segments_NT == 0].any()
    for row in (rows[number] for number in range(len(rows))):  # padding is behind, positions count within a segment
        real = row.segment_ids_T > 0
        assert (real == (np.arange(seq_len) < real.sum())).all()
        first = np.flatnonzero(np.diff(row.segment_ids_T, prepend=0))[: row.segment_ids_T.max()]
        assert (row.positions_T[first] == 0).all() and (row.learned_T[real] == learned[row.tokens_T[real] - 1]).all()
    assert rows.num_tokens == packed.num_tokens and rows.padding == pytest.approx(1 - rows.num_tokens / tokens_NT.size)


@settings(max_examples=100, deadline=None)
@given(documents_of_any_length, st.lists(st.integers(0, 12), max_size=2), st.integers(2, 9))
def test_rows_that_best_fit_leaves_out_have_no_target_and_the_others_have_one(documents, cuts, seq_len):
    rows = pack(in_shards(documents, cuts)[0], seq_len, strategy="bfd")
    kept = rows.with_targets()
    with_target = [number for number in range(len(rows)) if batch_of([rows[number]]).target_mask_BT.any()]
    assert [list(kept[number].tokens_T) for number in range(len(kept))] == [list(rows[n].tokens_T) for n in with_target]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 12), max_size=30))
def test_best_fit_is_that_of_its_definition(lengths):
    """Each item, the longest first, joins the fullest row that has room for it."""
    expected: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [size for size in expected if size + length <= 12]
        if fitting:
            expected.remove(max(fitting))
        expected.append(max(fitting, default=0) + length)
    order, per_row = best_fit_decreasing(np.array(lengths, np.int64), 12)
    assert sorted(order) == list(range(len(lengths)))
    rows = np.split(order, np.cumsum(per_row)[:-1]) if lengths else []
    assert sorted(sum(lengths[item] for item in row) for row in rows) == sorted(expected)


def test_documents_of_equal_lengths_are_packed_in_their_order():
    rows = pack([np.arange(1, 4), np.arange(4, 9), np.arange(9, 12)], 6, strategy="bfd")
    np.testing.assert_array_equal(stacked(rows, "tokens_T"), [[1, 2, 3, 9, 10, 11], [4, 5, 6, 7, 8, 0]])
    np.testing.assert_array_equal(stacked(rows, "segment_ids_T"), [[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 0]])
