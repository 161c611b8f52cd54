"""Attention and the delta rule over `context`: what one device computes, and the bytes that the formulas say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import qwen_moe_jax as qmj
from qwen_moe_jax.attention_kernels import context
from qwen_moe_jax.attention_kernels.blockwise import Blocks, attend_in_blocks
from qwen_moe_jax.attention_kernels.causal_conv import causal_conv1d
from qwen_moe_jax.attention_kernels.context import attend_over_context, sent_bytes
from qwen_moe_jax.attention_kernels.context_delta import Parts, columns_before, delta_rule_over_context
from qwen_moe_jax.attention_kernels.delta_rule import chunk_gated_delta_rule
from qwen_moe_jax.attention_kernels.splash import attend_rows_by_splash
from qwen_moe_jax.plan.collectives import collectives_of
from qwen_moe_jax.plan.hlo import Module
from qwen_moe_jax.sharding.positions import RowOrder

B, T, N, K, H = 2, 70, 4, 2, 8
LAYERS = 3
RNG = np.random.default_rng(0)
Q, KEYS, VALUES, COTANGENT = (RNG.normal(size=(B, T, heads, H)).astype(np.float32) for heads in (N, K, K, N))
#: Four documents across every cut, with padding inside and at the end; and a row whose first part is padding.
IDS = np.zeros((B, T), np.int32)
IDS[0, :19], IDS[0, 19:26], IDS[0, 29:50], IDS[0, 50:66] = 1, 2, 3, 4
IDS[1, 21:48], IDS[1, 48:70] = 1, 2
#: (devices, zig-zag, window, method). A window of 5 is a halo; one of 30 is longer than a chunk.
CASES = {
    "ring": (8, True, None, "ring"),
    "all-gather": (4, True, None, "all_gather"),
    "halo": (4, True, 5, "ring"),
    "contiguous halo": (8, False, 5, "all_gather"),
    "window of several chunks": (4, False, 30, "ring"),
}


def over_context(function, shards, arrays, rows):
    """`function` in a shard_map over `context`, arrays [B, T, …] sharded over it and `rows` whole."""
    mesh = qmj.make_mesh(context=shards)
    specs = ((P(None, "context"),) * arrays, *(P(),) * rows)
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P(None, "context"), check_vma=False)


def with_gradients(function, *arrays):
    def loss(arrays):
        out = jnp.where((IDS != 0)[..., None, None], function(*arrays), 0)
        return jnp.sum(out * COTANGENT[..., : out.shape[-1]]), out

    return jax.grad(loss, has_aux=True)(arrays)


def attention(case):
    shards, zigzag, window, method = CASES[case]
    order = RowOrder.of(T, shards, zigzag=zigzag, longest=4)
    attend = functools.partial(attend_over_context, order=order, window=window, method=method)
    local = over_context(lambda arrays, ids: attend(*arrays, ids), shards, 3, 1)

    def whole(q, k, v):
        return order.restore(local(tuple(map(order.store, (q, k, v))), order.store(jnp.asarray(IDS))))

    return with_gradients(whole, Q, KEYS, VALUES)


@pytest.mark.parametrize("case", CASES)
def test_attention_over_context_is_that_of_one_device(case):
    def one_device(q, k, v):
        return attend_in_blocks(q, k, v, jnp.asarray(IDS), Blocks.of(T, 16, CASES[case][2]))

    expected = jax.jit(lambda: with_gradients(one_device, Q, KEYS, VALUES))()
    found = jax.jit(lambda: attention(case))()
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(ours - theirs) < 2e-6 * np.linalg.norm(theirs)


@pytest.mark.parametrize("zigzag, window", [(True, None), (False, 150)])
def test_splash_over_context_is_attention_in_blocks_of_one_device(zigzag, window, monkeypatch):
    """Run as ordinary operations. The last of the four blocks is filled up; documents end in the midst of blocks."""
    monkeypatch.setattr(context, "attend_rows_by_splash", functools.partial(attend_rows_by_splash, interpret=True))
    length, shards = 500, 2
    order = RowOrder.of(length, shards, zigzag=zigzag, longest=128, multiple=128)
    q, k, v, cotangent = (RNG.normal(size=(1, length, heads, 64)).astype(np.float32) for heads in (2, 1, 1, 2))
    ids = np.ones((1, length), np.int32)
    ids[0, 140:160], ids[0, 160:400], ids[0, 400:] = 0, 2, 3
    attend = functools.partial(attend_over_context, order=order, window=window, method="all_gather", attention="splash")
    local = over_context(lambda arrays, ids: attend(*arrays, ids), shards, 3, 1)

    def over(q, k, v):
        return order.restore(local(tuple(map(order.store, (q, k, v))), order.store(jnp.asarray(ids))))

    def one_device(q, k, v):
        mixed = attend_in_blocks(q, k, v, jnp.asarray(ids), Blocks.of(length, 128, window))
        return jnp.where((ids != 0)[..., None, None], mixed, 0)

    def result_and_gradients(function):
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(jnp.asarray(cotangent))

    found, expected = (jax.jit(functools.partial(result_and_gradients, way))() for way in (over, one_device))
    for ours, theirs in zip(found, expected, strict=True):
        assert np.linalg.norm(ours - theirs) < 2e-6 * np.linalg.norm(theirs)


@pytest.mark.parametrize("case", ["all-gather", "ring", "halo"])
def test_the_compiled_program_sends_the_bytes_of_the_formula(case):
    shards, zigzag, window, method = CASES[case]
    order = RowOrder.of(T, shards, zigzag=zigzag, longest=4)
    attend = functools.partial(attend_over_context, order=order, window=window, method=method)
    local = over_context(lambda arrays, ids: attend(*arrays, ids), shards, 3, 1)

    def step(x, ids):
        def layer(x, _):
            return local((x, x[:, :, :K], x[:, :, K:]), ids), None

        # In a loop, as layers are: what is computed again is not merged with its first time.
        return jax.grad(lambda x: jnp.sum(jax.lax.scan(layer, x, length=LAYERS)[0]))(x)

    shapes = ((N, H), np.float32), ((), np.int32)
    sharding = jax.sharding.NamedSharding(qmj.make_mesh(context=shards), P(None, "context"))
    whole = jax.sharding.NamedSharding(qmj.make_mesh(context=shards), P())
    compiled = (
        jax.jit(step, in_shardings=(sharding, whole), out_shardings=sharding)
        .lower(*(jax.ShapeDtypeStruct((B, order.padded, *rest), dtype) for rest, dtype in shapes))
        .compile()
    )
    module = Module(compiled.as_text(), (), None)
    found = collectives_of(module, {"context": shards}, "cpu")
    keys_and_values = 2 * K * H * 4
    expected = LAYERS * B * sent_bytes(order, window, method, token_bytes=keys_and_values, sum_bytes=keys_and_values)
    assert sum(one.bytes * one.count for one in found) == expected


def test_the_delta_rule_and_its_convolution_over_context_are_those_of_one_device():
    """States and columns pass padding, parts without tokens and the borders of documents."""
    shards = 7
    order = RowOrder.of(T, shards, zigzag=False, longest=16)
    channels, taps = 2 * K * H + N * H, 4
    x, weight = RNG.normal(size=(B, T, channels)).astype(np.float32), RNG.normal(size=(channels, taps))
    decay, beta = -RNG.random((B, T, N)).astype(np.float32), RNG.random((B, T, N)).astype(np.float32)

    def inputs(x):
        q, k, v = jnp.split(x, [K * H, 2 * K * H], axis=-1)
        return q.reshape(*x.shape[:2], K, H), k.reshape(*x.shape[:2], K, H), v.reshape(*x.shape[:2], N, H)

    def part(arrays, row_ids):
        x, decay, beta = arrays
        parts = Parts.of(row_ids, shards)
        y, _ = causal_conv1d(x, jnp.asarray(weight, x.dtype), parts.own(), columns_before(x, parts, taps - 1)[0])
        return delta_rule_over_context((*inputs(y), decay, beta), parts, chunk_size=8)[0]

    local = over_context(part, shards, 3, 1)

    def sharded(*arrays):
        return order.restore(local(tuple(map(order.store, arrays)), order.store(jnp.asarray(IDS))))

    def one_device(x, decay, beta):
        y, _ = causal_conv1d(x, jnp.asarray(weight, x.dtype), jnp.asarray(IDS), None)
        return chunk_gated_delta_rule(*inputs(y), decay, beta, jnp.asarray(IDS), None, chunk_size=8)[0]

    found, expected = (
        jax.jit(lambda function=function: with_gradients(function, x, decay, beta))()
        for function in (sharded, one_device)
    )
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)
