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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
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
    return _forward(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, blocks)[0]


def _forward(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, blocks: Blocks):
    kv_heads = k_BTKH.shape[2]
    q_nBKMH, k_nBKCH, v_nBKCH = (_split(blocks, x, kv_heads) for x in (q_BTNH, k_BTKH, v_BTKH))
    ids_nBC = blocks.split_ids(segment_ids_BT)

    def meet(state, pair):
        largest_nBKM, sum_nBKM, mixed_nBKMH = state
        i, j = pair
        scores_BKMC = _scores(blocks, _at(q_nBKMH, i), _at(k_nBKCH, j), ids_nBC, i, j)
        before_BKM = _at(largest_nBKM, i)
        largest_BKM = jnp.maximum(before_BKM, jnp.max(scores_BKMC, axis=-1))
        shrink_BKM = jnp.exp(before_BKM - largest_BKM)
        weights_BKMC = jnp.exp(scores_BKMC - largest_BKM[..., None])
        sum_BKM = shrink_BKM * _at(sum_nBKM, i) + jnp.sum(weights_BKMC, axis=-1)
        values_BKMH = _product("BKMC,BKCH->BKMH", weights_BKMC.astype(v_BTKH.dtype), _at(v_nBKCH, j))
        mixed_BKMH = shrink_BKM[..., None] * _at(mixed_nBKMH, i) + values_BKMH
        return (_put(largest_nBKM, largest_BKM, i), _put(sum_nBKM, sum_BKM, i), _put(mixed_nBKMH, mixed_BKMH, i)), None

    per_query = q_nBKMH.shape[:-1]
    nothing = jnp.full(per_query, UNSEEN), jnp.zeros(per_query), jnp.zeros(q_nBKMH.shape)
    (largest_nBKM, sum_nBKM, mixed_nBKMH), _ = jax.lax.scan(meet, nothing, jnp.asarray(blocks.pairs()))
    out_nBKMH = (mixed_nBKMH / sum_nBKM[..., None]).astype(q_BTNH.dtype)
    out_BTNH = checkpoint_name(blocks.join(out_nBKMH, q_BTNH.shape[1]).reshape(q_BTNH.shape), ATTENDED)
    logsumexp_nBKM = checkpoint_name(largest_nBKM + jnp.log(sum_nBKM), ATTENDED)
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, out_BTNH, logsumexp_nBKM)


def _backward(blocks: Blocks, saved, gradient_BTNH):
    q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, out_BTNH, logsumexp_nBKM = saved
    _, tokens, kv_heads, head_dim = k_BTKH.shape
    gradient_BTNH = jnp.where((segment_ids_BT != 0)[..., None, None], gradient_BTNH, 0)
    arrays = q_BTNH, k_BTKH, v_BTKH, gradient_BTNH, out_BTNH
    q_nBKMH, k_nBKCH, v_nBKCH, gradient_nBKMH, out_nBKMH = (_split(blocks, x, kv_heads) for x in arrays)
    ids_nBC = blocks.split_ids(segment_ids_BT)
    # How much a query's weights would grow together; they sum to one, so each grows by what it does beyond this.
    together_nBKM = jnp.sum(gradient_nBKMH.astype(jnp.float32) * out_nBKMH.astype(jnp.float32), axis=-1)

    def meet(state, pair):
        of_q_nBKMH, of_k_nBKCH, of_v_nBKCH = state
        i, j = pair
        q_BKMH, k_BKCH, gradient_BKMH = _at(q_nBKMH, i), _at(k_nBKCH, j), _at(gradient_nBKMH, i)
        scores_BKMC = _scores(blocks, q_BKMH, k_BKCH, ids_nBC, i, j)
        weights_BKMC = jnp.exp(scores_BKMC - _at(logsumexp_nBKM, i)[..., None])
        of_weights_BKMC = _product("BKMH,BKCH->BKMC", gradient_BKMH, _at(v_nBKCH, j))
        of_scores_BKMC = weights_BKMC * (of_weights_BKMC - _at(together_nBKM, i)[..., None]) * head_dim**-0.5
        weights_BKMC, of_scores_BKMC = weights_BKMC.astype(v_BTKH.dtype), of_scores_BKMC.astype(q_BTNH.dtype)
        of_q_BKMH = _product("BKMC,BKCH->BKMH", of_scores_BKMC, k_BKCH)
        of_k_BKCH = _product("BKMC,BKMH->BKCH", of_scores_BKMC, q_BKMH)
        of_v_BKCH = _product("BKMC,BKMH->BKCH", weights_BKMC, gradient_BKMH)
        return (_add(of_q_nBKMH, of_q_BKMH, i), _add(of_k_nBKCH, of_k_BKCH, j), _add(of_v_nBKCH, of_v_BKCH, j)), None

    nothing = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q_nBKMH, k_nBKCH, v_nBKCH))
    of_all, _ = jax.lax.scan(meet, nothing, jnp.asarray(blocks.pairs()))
    inputs = q_BTNH, k_BTKH, v_BTKH
    of_inputs = (blocks.join(x, tokens).reshape(like.shape) for x, like in zip(of_all, inputs, strict=True))
    return *(x.astype(q_BTNH.dtype) for x in of_inputs), None


attend_in_blocks.defvjp(_forward, _backward)


def _scores(
    blocks: Blocks, q_BKMH: jax.Array, k_BKCH: jax.Array, ids_nBC: jax.Array, i: jax.Array, j: jax.Array
) -> jax.Array:
    """Scaled scores [B, K, M, C] of the i-th block's queries with the j-th block's keys, `UNSEEN` where one is not."""
    scores_BKMC = _product("BKMH,BKCH->BKMC", q_BKMH, k_BKCH) * q_BKMH.shape[-1] ** -0.5
    within_C = jnp.arange(blocks.length)
    distance_CC = (i * blocks.length + within_C)[:, None] - (j * blocks.length + within_C)
    near_CC = distance_CC >= 0 if blocks.window is None else (distance_CC >= 0) & (distance_CC < blocks.window)
    query_ids_BC, key_ids_BC = _at(ids_nBC, i), _at(ids_nBC, j)
    seen_BCC = near_CC & (query_ids_BC[:, :, None] == key_ids_BC[:, None, :]) & (key_ids_BC != 0)[:, None, :]
    batch, kv_heads, queries, length = scores_BKMC.shape
    scores_BKGCC = scores_BKMC.reshape(batch, kv_heads, queries // length, length, length)
    return jnp.where(seen_BCC[:, None, None], scores_BKGCC, UNSEEN).reshape(scores_BKMC.shape)


def _product(letters: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """An einsum with float32 sums."""
    with matmul_precision(left.dtype):
        return jnp.einsum(letters, left, right, preferred_element_type=jnp.float32)


def _split(blocks: Blocks, x_BTNH: jax.Array, kv_heads: int) -> jax.Array:
    """Heads apart by the key head that they share, then in blocks."""
    batch, tokens, heads, width = x_BTNH.shape
    return blocks.split(x_BTNH.reshape(batch, tokens, kv_heads, heads // kv_heads, width))


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    return rows_at(x, index, 1)[0]


def _put(x: jax.Array, value: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, value, index, 0)


def _add(x: jax.Array, value: jax.Array, index: jax.Array) -> jax.Array:
    return _put(x, _at(x, index) + value, index)
