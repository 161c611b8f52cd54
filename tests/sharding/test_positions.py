"""Which positions of a row a device of `context` has, and which blocks of keys its queries meet."""

import numpy as np
import pytest

from qwen_moe_jax.attention_kernels.context import block_pairs, halo_blocks
from qwen_moe_jax.sharding.positions import RowOrder

ORDERS = [
    RowOrder.of(length, shards, zigzag=zigzag, longest=longest)
    for length, shards, longest in ((64, 2, 8), (131, 4, 7), (1000, 8, 16), (5, 8, 128))
    for zigzag in (False, True)
]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_every_position_is_stored_once_and_restored(order):
    assert sorted(order.positions()) == list(range(order.padded)) and order.padded >= order.length
    assert np.array_equal(order.positions()[order.stored_at()], np.arange(order.padded))
    rows = np.arange(3 * order.length).reshape(3, order.length)
    assert np.array_equal(order.restore(order.store(rows)), rows)


@pytest.mark.parametrize("window", [None, 1, 9, 50])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_the_devices_meet_every_pair_of_blocks_that_may_see_each_other_once(order, window):
    everywhere = [block for device in range(order.shards) for block in order.blocks_of(device)]
    found = [
        (query, key)
        for pairs in block_pairs(order, [everywhere] * order.shards, window)
        for i, j, query, key in pairs.tolist()
        if (query, key) != (0, 1) and everywhere[j] == key
    ]
    reach = order.padded if window is None else window
    positions = np.arange(order.padded)
    blocks = positions // order.block
    distance = positions[:, None] - positions
    needed = np.nonzero((distance >= 0) & (distance < reach))
    assert len(set(found)) == len(found)
    assert set(found) == set(zip(blocks[needed[0]].tolist(), blocks[needed[1]].tolist(), strict=True))


def test_zigzag_gives_every_device_as_many_pairs():
    order = RowOrder.of(4096, 8, zigzag=True, longest=64)
    counts = [
        sum(query >= key for query in order.blocks_of(device) for key in range(order.shards * 2 * order.count))
        for device in range(order.shards)
    ]
    assert len(set(counts)) == 1
    contiguous = RowOrder.of(4096, 8, zigzag=False, longest=64)
    first, *_, last = (sum(block + 1 for block in contiguous.blocks_of(device)) for device in range(8))
    assert last > 10 * first


def test_a_halo_is_as_long_as_the_window_and_never_longer_than_a_chunk():
    order = RowOrder.of(1024, 4, zigzag=True, longest=16)  # chunks of 8 blocks
    assert [halo_blocks(order, window) for window in (None, 1, 2, 17, 18, 129, 130)] == [0, 0, 1, 1, 2, 8, 0]
