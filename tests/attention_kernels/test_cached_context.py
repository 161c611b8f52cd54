"""Attention over a cache whose slots are sharded over `context` is attention over the whole of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import qwen_moe_jax as qmj
from qwen_moe_jax.attention_kernels.cached import attend_blocks, attend_cached, write_blocks, write_slots
from qwen_moe_jax.attention_kernels.cached_context import attend_over_devices, write_own

B, N, K, H, LAYER = 3, 4, 2, 8, jnp.int32(1)
#: New tokens of each row, call by call: prompts of several lengths, one token each, a row that has ended.
COUNTS = [(9, 4, 0), (9, 9, 2), (1, 1, 1), (5, 9, 9), (1, 0, 1), (1, 1, 1)]
NEW_TOKENS = [9, 9, 1, 9, 1, 1]


def attended(write, attend, store, mesh=None, **options) -> list[np.ndarray]:
    """What the new tokens of every call are given, padding left out."""

    def step(q_BTNH, k_BTKH, v_BTKH, keys, values, lengths_B, mask_BT):
        new, table = (LAYER, lengths_B, mask_BT), [options["table_BM"]] if "table_BM" in options else []
        keys, values = write(keys, k_BTKH, *new, *table), write(values, v_BTKH, *new, *table)
        return attend(q_BTNH, keys, values, *new, **options), keys, values

    if mesh is not None:
        spec = P(None, None, "context")
        specs = P(), P(), P(), spec, spec, P(), P()
        step = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=(P(), spec, spec), check_vma=False)
    step, found, drawn = jax.jit(step), [], np.random.default_rng(0)
    keys = values = store
    lengths_B = np.zeros(B, np.int32)
    for count_B, length in zip(COUNTS, NEW_TOKENS, strict=True):
        q_BTNH, k_BTKH, v_BTKH = (drawn.normal(size=(B, length, n, H)).astype(np.float32) for n in (N, K, K))
        mask_BT = np.arange(length) < np.array(count_B)[:, None]
        out_BTNH, keys, values = step(q_BTNH, k_BTKH, v_BTKH, keys, values, lengths_B, mask_BT)
        found.append(np.asarray(out_BTNH)[mask_BT])
        lengths_B = lengths_B + np.array(count_B, np.int32)
    return found


def store(*shape: int) -> jax.Array:
    """Two layers without a token. Slots that were not written hold what must not be seen."""
    return jnp.full((2, *shape, K, H), 1e3, jnp.float32)


def assert_close(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_rings_and_whole_rows_over_devices_are_those_of_one(shards, whole):
    """A window of 6 and 9 new tokens at once need 14 slots, rounded up to whole shards: they are written over twice."""
    mesh = qmj.make_mesh(context=shards)
    for window, slots in {None: 32, 6: 16}.items():
        found = attended(write_own, attend_over_devices, store(B, slots), mesh, sliding_window=window)
        assert_close(found, whole[window])


@pytest.fixture(scope="module")
def whole():
    return {
        window: attended(write_slots, attend_cached, store(B, slots), sliding_window=window)
        for window, slots in {None: 32, 6: 14}.items()
    }


def test_blocks_over_devices_are_those_of_one(monkeypatch):
    """Blocks of 4 tokens in any order, read two at a time; the last two begin before the end of those before."""
    table_BM = jnp.asarray(np.random.default_rng(1).permutation(np.arange(1, 22)).reshape(B, 7).astype(np.int32))
    expected = attended(write_blocks, attend_blocks, store(22, 4), table_BM=table_BM)
    monkeypatch.setattr("qwen_moe_jax.attention_kernels.cached_context.GATHERED", 4)
    found = attended(write_own, attend_over_devices, store(22, 4), qmj.make_mesh(context=2), table_BM=table_BM)
    assert_close(found, expected)


def test_slots_are_read_in_parts_and_only_as_far_as_there_are_tokens(monkeypatch, whole):
    """Parts of 3 of 8 slots: the last of them begins before the end of the second."""
    for name in ("_READ_BY_ONE", "_READ_BY_MANY"):
        monkeypatch.setattr(f"qwen_moe_jax.attention_kernels.cached_context.{name}", 3)
    found = attended(write_own, attend_over_devices, store(B, 32), qmj.make_mesh(context=4), sliding_window=None)
    assert_close(found, whole[None])
