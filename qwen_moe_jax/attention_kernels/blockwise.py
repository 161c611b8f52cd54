"""Attention over blocks of queries and keys: the scores of a whole row are never in memory.

A block of queries meets one block of keys after the other, and keeps of them the largest score, the sum of exponentials
and the weighted sum of values so far. The backward pass computes the scores again, from what is kept for each query
alone: its result and the logarithm of its sum. So memory grows with the length of a row and not with its square, and
blocks that no query of theirs may see are never computed.

Source: Rabe and Staats, arXiv 2112.05682; the backward pass is FlashAttention-2's, Dao, arXiv 2307.08691.

Letters of this file: n blocks of a row, C tokens of a block, M = G * C queries of a block that share a key head,
where G query heads do.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from qwen_moe_jax.nn.bits import rows_at
from qwen_moe_jax.nn.matmul import matmul_precision

#: The name that remat policies know the result by, and its logarithms.
ATTENDED = "attended"
#: A score that is not seen. Minus infinity would make a query that sees nothing NaN.
UNSEEN = -1e30


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How rows are split into blocks.

    Attributes:
        count: n, blocks of a row.
        length: C, tokens of a block.
        window: keys that a query sees, itself included; None sees all before it.
    """

    count: int
    length: int
    window: int | None

    @classmethod
    def of(cls, tokens: int, longest: int, window: int | None, multiple: int = 1) -> "Blocks":
        """The fewest blocks that are not longer than `longest`, all of one length: the last one is filled up.

        The length is a multiple of `multiple`, of which `longest` is at least one.
        """
        count = math.ceil(tokens / (longest - longest % multiple))
        length = math.ceil(tokens / count)
        return cls(count=count, length=length + -length % multiple, window=window)

    def pairs(self) -> np.ndarray:
        """(block of queries, block of keys) of all pairs where a query may see a key, int32 [pairs, 2]."""
        return np.array(
            [
                (queries, keys)
                for queries in range(self.count)
                for keys in range(queries + 1)
                if self.window is None or queries * self.length - ((keys + 1) * self.length - 1) < self.window
            ],
            np.int32,
        )

    def split(self, x_BTKGH: jax.Array) -> jax.Array:
        """[B, T, K, G, H] to [n, B, K, M, H]; the filling is zeros."""
        batch, tokens, kv_heads, shared, width = x_BTKGH.shape
        x_BTKGH = jnp.pad(x_BTKGH, ((0, 0), (0, self.count * self.length - tokens), *[(0, 0)] * 3))
        x_BnCKGH = x_BTKGH.reshape(batch, self.count, self.length, kv_heads, shared, width)
        return x_BnCKGH.transpose(1, 0, 3, 4, 2, 5).reshape(self.count, batch, kv_heads, shared * self.length, width)

    def join(self, x_nBKMH: jax.Array, tokens: int) -> jax.Array:
        """The inverse of `split`, without the filling."""
        _, batch, kv_heads, queries, width = x_nBKMH.shape
        x_nBKGCH = x_nBKMH.reshape(self.count, batch, kv_heads, queries // self.length, self.length, width)
        x_BnCKGH = x_nBKGCH.transpose(1, 0, 4, 2, 3, 5)
        return x_BnCKGH.reshape(batch, self.count * self.length, kv_heads, -1, width)[:, :tokens]

    def split_ids(self, ids_BT: jax.Array) -> jax.Array:
        """[B, T] to [n, B, C]; the filling is padding."""
        batch, tokens = ids_BT.shape
        ids_BT = jnp.pad(ids_BT, ((0, 0), (0, self.count * self.length - tokens)))
        return ids_BT.reshape(batch, self.count, self.length).transpose(1, 0, 2)


def attend_in_blocks(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array, blocks: Blocks
) -> jax.Array:
    """Causal grouped-query attention within segments, on one device's rows and heads.

    Scores, softmax and sums are float32; products are of the arrays' dtype. What a padding query gives is finite, means
    nothing, and passes no gradient on.

    Args:
        q_BTNH: queries, N a multiple of K.
        k_BTKH: keys.
        v_BTKH: values.
        segment_ids_BT: int32; 0 is padding.
        blocks: `Blocks.of` T.

    Returns:
        [B, T, N, H] in the dtype of the queries.
    """
    pairs = jnp.asarray(np.tile(blocks.pairs(), 2))
    return attend_pairs(q_BTNH, k_BTKH, v_BTKH, (segment_ids_BT, segment_ids_BT), pairs, blocks, blocks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def attend_pairs(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_ids: tuple[jax.Array, jax.Array],
    pairs_P4: jax.Array,
    blocks: Blocks,
    key_blocks: Blocks,
) -> jax.Array:
    """`attend_in_blocks` of some blocks of a row with others, in any order.

    Args:
        q_BTNH: queries.
        k_BSKH: keys.
        v_BSKH: values.
        segment_ids: of the queries and of the keys, int32 [B, T] and [B, S].
        pairs_P4: int32; of each pair of blocks to be computed the block of queries and the block of keys, as they are
            stored, and then both as they are numbered in the row. Each query sees at least one key.
        blocks: of the queries; its window counts.
        key_blocks: of the keys, of the same length.
    """
    return _forward(q_BTNH, k_BSKH, v_BSKH, segment_ids, pairs_P4, blocks, key_blocks)[0]


class Met(NamedTuple):
    """What blocks of queries keep of the keys they have met: the largest score, and the two sums; float32."""

    largest_nBKM: jax.Array
    sum_nBKM: jax.Array
    mixed_nBKMH: jax.Array

    @classmethod
    def nothing(cls, q_nBKMH: jax.Array) -> "Met":
        """Before the first key."""
        per_query = q_nBKMH.shape[:-1]
        largest_nBKM, sum_nBKM = jnp.full(per_query, UNSEEN, jnp.float32), jnp.zeros(per_query, jnp.float32)
        return cls(largest_nBKM, sum_nBKM, jnp.zeros(q_nBKMH.shape, jnp.float32))

    def result(self) -> tuple[jax.Array, jax.Array]:
        """The weighted means of the values [n, B, K, M, H], and the logarithm of each query's sum."""
        return self.mixed_nBKMH / self.sum_nBKM[..., None], self.largest_nBKM + jnp.log(self.sum_nBKM)


class Arrays(NamedTuple):
    """Keys and values in blocks, with their segments."""

    k_nBKCH: jax.Array
    v_nBKCH: jax.Array
    ids_nBC: jax.Array


def meet(met: Met, q_nBKMH: jax.Array, ids_nBC: jax.Array, keys: Arrays, pairs_P4: jax.Array, blocks: Blocks) -> Met:
    """Queries in blocks meet the keys of the pairs; see `attend_pairs`."""

    def step(met: Met, pair: jax.Array) -> tuple[Met, None]:
        i, j = pair[0], pair[1]
        scores_BKMC = _scores(
            blocks, _at(q_nBKMH, i), _at(keys.k_nBKCH, j), (_at(ids_nBC, i), _at(keys.ids_nBC, j)), pair
        )
        before_BKM = _at(met.largest_nBKM, i)
        largest_BKM = jnp.maximum(before_BKM, jnp.max(scores_BKMC, axis=-1))
        shrink_BKM = jnp.exp(before_BKM - largest_BKM)
        weights_BKMC = jnp.exp(scores_BKMC - largest_BKM[..., None])
        sum_BKM = shrink_BKM * _at(met.sum_nBKM, i) + jnp.sum(weights_BKMC, axis=-1)
        values_BKMH = _product("BKMC,BKCH->BKMH", weights_BKMC.astype(keys.v_nBKCH.dtype), _at(keys.v_nBKCH, j))
        mixed_BKMH = shrink_BKM[..., None] * _at(met.mixed_nBKMH, i) + values_BKMH
        new = (largest_BKM, sum_BKM, mixed_BKMH)
        return Met(*(_put(x, value, i) for x, value in zip(met, new, strict=True))), None

    return jax.lax.scan(step, met, pairs_P4)[0]


class Queries(NamedTuple):
    """What the backward pass reads of queries in blocks.

    Attributes:
        q_nBKMH: queries.
        gradient_nBKMH: of their results, zeros for padding.
        together_nBKM: how much a query's weights would grow together; they sum to one, so each grows by what it does
            beyond this.
        logsumexp_nBKM: as `Met.result` gives it.
        ids_nBC: segments.
    """

    q_nBKMH: jax.Array
    gradient_nBKMH: jax.Array
    together_nBKM: jax.Array
    logsumexp_nBKM: jax.Array
    ids_nBC: jax.Array

    @classmethod
    def of(cls, q_BTNH, out_BTNH, logsumexp_nBKM, gradient_BTNH, ids_BT, blocks: Blocks, kv_heads: int) -> "Queries":
        """From arrays [B, T, …]."""
        gradient_BTNH = jnp.where((ids_BT != 0)[..., None, None], gradient_BTNH, 0)
        q_nBKMH, out_nBKMH, gradient_nBKMH = (split(blocks, x, kv_heads) for x in (q_BTNH, out_BTNH, gradient_BTNH))
        together_nBKM = jnp.sum(gradient_nBKMH.astype(jnp.float32) * out_nBKMH.astype(jnp.float32), axis=-1)
        return cls(q_nBKMH, gradient_nBKMH, together_nBKM, logsumexp_nBKM, blocks.split_ids(ids_BT))


#: Gradients of queries, keys and values in blocks, float32.
Gradients = tuple[jax.Array, jax.Array, jax.Array]


def no_gradients(q_nBKMH: jax.Array, k_nBKCH: jax.Array, v_nBKCH: jax.Array) -> Gradients:
    """Zeros of their shapes."""
    of_q, of_k, of_v = (jnp.zeros(x.shape, jnp.float32) for x in (q_nBKMH, k_nBKCH, v_nBKCH))
    return of_q, of_k, of_v


def meet_backward(sums: Gradients, queries: Queries, keys: Arrays, pairs_P4: jax.Array, blocks: Blocks) -> Gradients:
    """Adds the gradients of the pairs to those of queries, keys and values."""
    scale = queries.q_nBKMH.shape[-1] ** -0.5

    def step(sums: Gradients, pair: jax.Array) -> tuple[Gradients, None]:
        of_q_nBKMH, of_k_nBKCH, of_v_nBKCH = sums
        i, j = pair[0], pair[1]
        q_BKMH, k_BKCH, gradient_BKMH = _at(queries.q_nBKMH, i), _at(keys.k_nBKCH, j), _at(queries.gradient_nBKMH, i)
        scores_BKMC = _scores(blocks, q_BKMH, k_BKCH, (_at(queries.ids_nBC, i), _at(keys.ids_nBC, j)), pair)
        weights_BKMC = jnp.exp(scores_BKMC - _at(queries.logsumexp_nBKM, i)[..., None])
        of_weights_BKMC = _product("BKMH,BKCH->BKMC", gradient_BKMH, _at(keys.v_nBKCH, j))
        of_scores_BKMC = weights_BKMC * (of_weights_BKMC - _at(queries.together_nBKM, i)[..., None]) * scale
        weights_BKMC, of_scores_BKMC = weights_BKMC.astype(keys.v_nBKCH.dtype), of_scores_BKMC.astype(q_BKMH.dtype)
        of_q_BKMH = _product("BKMC,BKCH->BKMH", of_scores_BKMC, k_BKCH)
        of_k_BKCH = _product("BKMC,BKMH->BKCH", of_scores_BKMC, q_BKMH)
        of_v_BKCH = _product("BKMC,BKMH->BKCH", weights_BKMC, gradient_BKMH)
        return (_add(of_q_nBKMH, of_q_BKMH, i), _add(of_k_nBKCH, of_k_BKCH, j), _add(of_v_nBKCH, of_v_BKCH, j)), None

    return jax.lax.scan(step, sums, pairs_P4)[0]


def _forward(q_BTNH, k_BSKH, v_BSKH, segment_ids, pairs_P4, blocks: Blocks, key_blocks: Blocks):
    kv_heads = k_BSKH.shape[2]
    q_nBKMH = split(blocks, q_BTNH, kv_heads)
    keys = keys_in_blocks(key_blocks, k_BSKH, v_BSKH, segment_ids[1])
    met = meet(Met.nothing(q_nBKMH), q_nBKMH, blocks.split_ids(segment_ids[0]), keys, pairs_P4, blocks)
    out_nBKMH, logsumexp_nBKM = met.result()
    out_nBKMH = out_nBKMH.astype(q_BTNH.dtype)
    out_BTNH = checkpoint_name(blocks.join(out_nBKMH, q_BTNH.shape[1]).reshape(q_BTNH.shape), ATTENDED)
    logsumexp_nBKM = checkpoint_name(logsumexp_nBKM, ATTENDED)
    return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, segment_ids, pairs_P4, out_BTNH, logsumexp_nBKM)


def _backward(blocks: Blocks, key_blocks: Blocks, saved, gradient_BTNH):
    q_BTNH, k_BSKH, v_BSKH, segment_ids, pairs_P4, out_BTNH, logsumexp_nBKM = saved
    queries = Queries.of(
        q_BTNH, out_BTNH, logsumexp_nBKM, gradient_BTNH, segment_ids[0], blocks, kv_heads=k_BSKH.shape[2]
    )
    keys = keys_in_blocks(key_blocks, k_BSKH, v_BSKH, segment_ids[1])
    nothing = no_gradients(queries.q_nBKMH, keys.k_nBKCH, keys.v_nBKCH)
    of_q, of_k, of_v = meet_backward(nothing, queries, keys, pairs_P4, blocks)
    of_inputs = (
        into.join(x, like.shape[1]).reshape(like.shape).astype(like.dtype)
        for into, x, like in ((blocks, of_q, q_BTNH), (key_blocks, of_k, k_BSKH), (key_blocks, of_v, v_BSKH))
    )
    return *of_inputs, None, None


attend_pairs.defvjp(_forward, _backward)


def keys_in_blocks(blocks: Blocks, k_BSKH: jax.Array, v_BSKH: jax.Array, ids_BS: jax.Array) -> Arrays:
    """Keys and values in blocks."""
    kv_heads = k_BSKH.shape[2]
    return Arrays(split(blocks, k_BSKH, kv_heads), split(blocks, v_BSKH, kv_heads), blocks.split_ids(ids_BS))


def _scores(
    blocks: Blocks, q_BKMH: jax.Array, k_BKCH: jax.Array, ids: tuple[jax.Array, jax.Array], pair: jax.Array
) -> jax.Array:
    """Scaled scores [B, K, M, C] of a block of queries with a block of keys, `UNSEEN` where a key is not seen.

    Args:
        blocks: of the row.
        q_BKMH: queries.
        k_BKCH: keys.
        ids: segments of both, [B, C].
        pair: see `attend_pairs`.
    """
    scores_BKMC = _product("BKMH,BKCH->BKMC", q_BKMH, k_BKCH) * q_BKMH.shape[-1] ** -0.5
    within_C = jnp.arange(blocks.length, dtype=jnp.int32)
    distance_CC = (pair[2] * blocks.length + within_C)[:, None] - (pair[3] * blocks.length + within_C)
    near_CC = distance_CC >= 0 if blocks.window is None else (distance_CC >= 0) & (distance_CC < blocks.window)
    query_ids_BC, key_ids_BC = ids
    seen_BCC = near_CC & (query_ids_BC[:, :, None] == key_ids_BC[:, None, :]) & (key_ids_BC != 0)[:, None, :]
    batch, kv_heads, queries, length = scores_BKMC.shape
    scores_BKGCC = scores_BKMC.reshape(batch, kv_heads, queries // length, length, length)
    return jnp.where(seen_BCC[:, None, None], scores_BKGCC, UNSEEN).reshape(scores_BKMC.shape)


def _product(letters: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """An einsum with float32 sums."""
    with matmul_precision(left.dtype):
        return jnp.einsum(letters, left, right, preferred_element_type=jnp.float32)


def split(blocks: Blocks, x_BTNH: jax.Array, kv_heads: int) -> jax.Array:
    """Heads apart by the key head that they share, then in blocks."""
    batch, tokens, heads, width = x_BTNH.shape
    return blocks.split(x_BTNH.reshape(batch, tokens, kv_heads, heads // kv_heads, width))


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    return rows_at(x, index, 1)[0]


def _put(x: jax.Array, value: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, value, index, 0)


def _add(x: jax.Array, value: jax.Array, index: jax.Array) -> jax.Array:
    return _put(x, _at(x, index) + value, index)
