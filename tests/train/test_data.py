"""Packing keeps every token once, keeps documents apart, and the order of rows depends on (seed, step) alone."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data import batch_at, heldout_batches, pack

documents_of_any_length = st.lists(st.integers(1, 23), min_size=1, max_size=12).map(
    lambda lengths: np.split(np.arange(1, sum(lengths) + 1), np.cumsum(lengths)[:-1])  # every token is another
)


@settings(max_examples=60, deadline=None)
@given(documents_of_any_length, st.integers(2, 9))
def test_packing_loses_no_token_and_repeats_none(documents, seq_len):
    rows = pack(documents, seq_len)
    real = rows.segment_ids_NT > 0
    np.testing.assert_array_equal(rows.tokens_NT[real], np.concatenate(documents))
    assert real[:-1].all()  # only the last row is padded
    assert not rows.tokens_NT[~real].any() and not rows.positions_NT[~real].any()


@settings(max_examples=60, deadline=None)
@given(documents_of_any_length, st.integers(2, 9))
def test_segments_count_from_1_and_positions_from_0_in_each_row(documents, seq_len):
    document_of = np.concatenate([[0], *([number + 1] * len(doc) for number, doc in enumerate(documents))])
    rows = pack(documents, seq_len)
    for tokens, segments, positions in zip(rows.tokens_NT, rows.segment_ids_NT, rows.positions_NT, strict=True):
        expected_segment, expected_position, last_document = 0, 0, None
        for token, segment, position in zip(tokens, segments, positions, strict=True):
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


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 7), st.integers(0, 3))
def test_an_epoch_sees_every_row_once_in_an_order_of_its_own_seed(num_rows, batch_size, seed):
    rows = pack([np.arange(1, 3 * num_rows + 1)], 3)

    def first_tokens(steps, seed):
        return np.concatenate([batch_at(rows, step, batch_size, seed).tokens_BT[:, 0] for step in steps])

    two_epochs = first_tokens(range(-(-2 * num_rows // batch_size)), seed)[: 2 * num_rows]
    for epoch in np.split(two_epochs, 2):
        np.testing.assert_array_equal(np.sort(epoch), rows.tokens_NT[:, 0])
    # Step n alone is the same as step n after all steps before it.
    np.testing.assert_array_equal(first_tokens([1], seed), first_tokens([0, 1], seed)[batch_size:])


def test_other_seeds_and_epochs_give_other_orders():
    rows = pack([np.arange(1, 301)], 3)
    orders = [batch_at(rows, step, 100, seed).tokens_BT[:, 0] for step, seed in [(0, 0), (1, 0), (0, 1)]]
    for one, other in [(0, 1), (0, 2), (1, 2)]:
        assert (orders[one] != orders[other]).any()


def test_heldout_rows_are_spread_and_padded_to_whole_batches():
    rows = pack([np.arange(1, 31)], 3)  # ten rows
    batches = heldout_batches(rows, num_rows=5, batch_size=4)
    tokens = np.concatenate([batch.tokens_BT for batch in batches])
    np.testing.assert_array_equal(tokens[:, 0], [1, 7, 13, 19, 28, 0, 0, 0])
    assert not batches[1].target_mask_BT[1:].any()
    assert len(heldout_batches(rows, num_rows=100, batch_size=4)) == 3
