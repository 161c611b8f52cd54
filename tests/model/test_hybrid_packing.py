"""Documents packed into a row of a hybrid are computed as if each stood alone: states and convolutions start anew.

transformers does not do this: there, states leak from one document into the next.
"""

import numpy as np
import pytest

from tests.distance import assert_near, relative_l2
from tests.model.hybrid_configs import hybrid_config, hybrid_model
from tests.subject import run

# Chunks that start elsewhere, matrices of .1: the same float32 sums in another order.
TOLERANCE = 1e-5
#: Rows of 150 tokens: documents by segment id and length, 0 for padding. Documents of one token, of fewer than the
#: convolution sees, across the borders of chunks and at them; ids in any order; padding before, between and inside.
ROWS = (
    ((1, 5), (2, 1), (3, 2), (4, 90), (5, 52)),
    ((7, 64), (3, 64), (9, 22)),
    ((0, 20), (2, 70), (0, 9), (1, 30), (0, 21)),
    ((1, 30), (0, 15), (1, 40), (2, 65)),
)
LENGTH = 150


def segment_ids() -> np.ndarray:
    return np.array([np.concatenate([np.full(length, number) for number, length in row]) for row in ROWS], np.int32)


def documents() -> list[tuple[int, np.ndarray]]:
    """The row of each document, and its positions in it."""
    ids_BT = segment_ids()
    return [
        (row, np.flatnonzero(ids_BT[row] == number)) for row in range(len(ROWS)) for number in set(ids_BT[row]) - {0}
    ]


@pytest.mark.parametrize("layers, taps", [("lf", 4), ("LL", 2)])
def test_packed_documents_equal_the_documents_alone(layers, taps):
    """Gaps inside a document count in its positions, as they do for attention, and not in its states."""
    model = hybrid_model(hybrid_config(layers, linear=dict(conv_kernel_dim=taps)))
    tokens_BT, ids_BT = np.random.default_rng(1).integers(0, 98, (len(ROWS), LENGTH)), segment_ids()
    found_BTV = np.asarray(run(model, tokens_BT, ids_BT).logits)
    alone = documents()
    tokens_alone_BT, positions_BT = np.zeros((2, len(alone), LENGTH), np.int32)
    mask_BT = np.zeros((len(alone), LENGTH), np.int32)
    for index, (row, where) in enumerate(alone):
        tokens_alone_BT[index, : len(where)] = tokens_BT[row, where]
        positions_BT[index, : len(where)] = where - where[0]
        mask_BT[index, : len(where)] = 1
    expected_BTV = np.asarray(run(model, tokens_alone_BT, mask_BT, positions_BT).logits)
    for index, (row, where) in enumerate(alone):
        assert_near(found_BTV[row, where], expected_BTV[index, : len(where)], TOLERANCE, f"row {row}, from {where[0]}")
    if layers == "lf":
        one_text_BTV = np.asarray(run(model, tokens_BT, (ids_BT != 0).astype(np.int32)).logits)
        assert relative_l2(one_text_BTV[0, 98:], found_BTV[0, 98:]) > 1e-2, "what a leak would look like"
