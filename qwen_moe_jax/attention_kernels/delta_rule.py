"""The gated delta rule: linear attention whose state forgets, and corrects what it holds instead of adding to it.

The state S of a value head is a matrix that maps keys to values. A token decays it, S <- exp(g) S, reads what it holds
for the token's key, writes beta of what the value differs from that, S <- S + beta k (v - k S), and reads its result
with the query, q S. Queries and keys are normalised to length one; queries are scaled by H^-0.5.

Over a chunk of C tokens the same is a few matmuls. Let D_ij be the decay from token j to token i, and E_i the decay
from before the chunk to token i. What the tokens write, W, solves (I + A) W = beta (V - E K S), where A_ij is
beta_i (k_i k_j) D_ij for j < i. The results are E Q S + (Q K^T * D) W, the new state is E_C S + K^T (D_C W). Chunks
follow one another, and only the state goes from one to the next.

Source: Yang, Kautz and Hatamizadeh, Gated Delta Networks, arXiv 2412.06464, and transformers' qwen3_next. Two things
differ from the latter, in rounding alone. The logarithm of D_ij is the sum of g from j + 1 to i: the difference of two
sums from the chunk's start loses its low digits where decay is strong. And the system is solved with the state inside,
so that it has one right-hand side for each value head and not two.

Letters of this file: n chunks of a row, C tokens of a chunk, K key heads, G value heads that share a key head,
N = K * G value heads, H size of a key head, P size of a value head.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from qwen_moe_jax.attention_kernels.blockwise import ATTENDED
from qwen_moe_jax.attention_kernels.runs import PADDING, runs_of
from qwen_moe_jax.attention_kernels.triangular import SMALLEST_BLOCK, solve_unit_lower
from qwen_moe_jax.nn.bits import as_bits, from_bits
from qwen_moe_jax.nn.matmul import matmul_precision

#: Added to the squared length of queries and keys, under the root.
EPSILON = 1e-6


def chunk_size_for(platform: str) -> int:
    """Tokens of a chunk on devices of this platform (`jax.Device.platform`).

    64, as in transformers, is the least work. A TPU multiplies 128 x 128 numbers at a time: with chunks of 128 the
    compiler for v5p estimates 24 ms forward and backward where it estimates 41 for chunks of 64 (4096 tokens, 16 key
    and 32 value heads of 128), at 1.4 times the FLOPs.
    """
    return 128 if platform == "tpu" else 64


class _Inputs(NamedTuple):
    """What the rule reads of tokens."""

    q_BTKH: jax.Array
    k_BTKH: jax.Array
    v_BTKGP: jax.Array
    g_BTKG: jax.Array
    beta_BTKG: jax.Array


class _Runs(NamedTuple):
    """Runs of the tokens of chunks, and those that the states before and after a chunk belong to."""

    run_nBC: jax.Array
    before_nB: jax.Array
    after_nB: jax.Array


def chunk_gated_delta_rule(
    q_BTKH: jax.Array,
    k_BTKH: jax.Array,
    v_BTNP: jax.Array,
    g_BTN: jax.Array,
    beta_BTN: jax.Array,
    segment_ids_BT: jax.Array,
    initial_state_BNHP: jax.Array | None,
    *,
    chunk_size: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """The gated delta rule over whole rows, in chunks, on one device's rows and heads.

    Everything inside is float32. A real token whose segment is not that of the real token before it starts from a zero
    state; the first real token of a row goes on from the initial state. Padding leaves no trace, wherever it is: its
    results are zeros, it passes no gradient on, and its inputs may be anything.

    The backward pass keeps the inputs and the state before each chunk, and computes the rest of a chunk again.

    Args:
        q_BTKH: queries, not yet normalised, of any float dtype.
        k_BTKH: keys, likewise.
        v_BTNP: values; value head n uses key head n // (N / K).
        g_BTN: logarithm of the decay, at most 0, float32.
        beta_BTN: how much of the difference is written, between 0 and 1.
        segment_ids_BT: int32; 0 is padding.
        initial_state_BNHP: float32; None is zeros.
        chunk_size: tokens of a chunk in rows that are longer, a power of two, at least 8.

    Returns:
        Results [B, T, N, P] in the dtype of the values, and the state after the last real token, float32 [B, N, H, P].

    Raises:
        ValueError: `chunk_size` is another number.
    """
    if chunk_size < SMALLEST_BLOCK or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size is {chunk_size}: give a power of two, at least {SMALLEST_BLOCK}")
    length = min(chunk_size, max(SMALLEST_BLOCK, 1 << (v_BTNP.shape[1] - 1).bit_length()))
    inputs, state_BKGHP = _by_key_head(q_BTKH, k_BTKH, v_BTNP, g_BTN, beta_BTN, initial_state_BNHP)
    if v_BTNP.shape[1] == 0:
        return v_BTNP, _by_value_head(state_BKGHP)
    out_BTKGP, state_BKHGP = _rule(inputs, runs_of(segment_ids_BT), jnp.moveaxis(state_BKGHP, 2, 3), length)
    return out_BTKGP.reshape(v_BTNP.shape), _by_value_head(jnp.moveaxis(state_BKHGP, 3, 2))


def recurrent_gated_delta_rule(
    q_BTKH: jax.Array,
    k_BTKH: jax.Array,
    v_BTNP: jax.Array,
    g_BTN: jax.Array,
    beta_BTN: jax.Array,
    segment_ids_BT: jax.Array,
    initial_state_BNHP: jax.Array | None,
    new_B: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The gated delta rule token by token: for one to a handful of them, as in decoding.

    Arguments and results are those of `chunk_gated_delta_rule`, and one more: in a row of `new_B`, a bool, the first
    real token starts from zeros, whatever the initial state holds. To write those zeros would be a pass over states.
    """
    inputs, state_BKGHP = _by_key_head(q_BTKH, k_BTKH, v_BTNP, g_BTN, beta_BTN, initial_state_BNHP)
    run_BT = runs_of(segment_ids_BT)
    run_B = jnp.zeros(run_BT.shape[0], jnp.int32)
    start = state_BKGHP, run_B if new_B is None else jnp.where(new_B, PADDING, run_B)
    if run_BT.shape[1] == 1:
        (state_BKGHP, _), out_BKGP = _one_token(start, jax.tree.map(lambda x: x[:, 0], (inputs, run_BT)))
        out_BTKGP = out_BKGP[:, None]
    else:
        tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (inputs, run_BT))
        (state_BKGHP, _), out_TBKGP = jax.lax.scan(_one_token, start, tokens)
        out_BTKGP = jnp.moveaxis(out_TBKGP, 0, 1)
    return out_BTKGP.astype(v_BTNP.dtype).reshape(v_BTNP.shape), _by_value_head(state_BKGHP)


def _one_token(
    before: tuple[jax.Array, jax.Array], token: tuple[_Inputs, jax.Array]
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """The state [B, K, G, H, P] and its run [B] after a token of each row, and the tokens' results [B, K, G, P].

    State and run are those before where the token is padding. Old results for key and query are read in one pass over
    the state, and the query's is corrected by what the token writes. Of a token that starts a run, what was read is
    replaced, not the state before it is read: that would be one more pass.
    """
    (state_BKGHP, before_B), (inputs, run_B) = before, token
    real_B = run_B != PADDING
    q_BKH, k_BKH, v_BKGP, g_BKG, beta_BKG = _in_float32(inputs, real_B)
    goes_on_B1111 = (real_B & (run_B == before_B))[:, None, None, None, None]
    starts_B1111 = (run_B > before_B)[:, None, None, None, None]
    decay_BKG11 = jnp.exp(g_BKG)[..., None, None]
    qk_BK1MH = jnp.stack([q_BKH, k_BKH], axis=2)[:, :, None]
    qk_BKGMH = jnp.broadcast_to(qk_BK1MH, (*v_BKGP.shape[:3], *qk_BK1MH.shape[3:]))
    with matmul_precision(jnp.float32):
        read_BKGMP = jnp.where(goes_on_B1111, qk_BKGMH @ state_BKGHP * decay_BKG11, 0)
        write_BKGP = beta_BKG[..., None] * (v_BKGP - read_BKGMP[..., 1, :])
        # A product of two terms, the first of them zero: of one term alone XLA makes no product, and then computes
        # what is written, back to the convolution, again for each number of the state.
        both_BKGMP = jnp.stack([jnp.zeros_like(write_BKGP), write_BKGP], axis=3)
        written_BKGHP = qk_BKGMH.mT @ both_BKGMP
    out_BKGP = read_BKGMP[..., 0, :] + jnp.sum(q_BKH * k_BKH, axis=-1)[:, :, None, None] * write_BKGP
    state_BKGHP = jnp.where(starts_B1111, 0, state_BKGHP * decay_BKG11) + written_BKGHP
    return (state_BKGHP, jnp.maximum(before_B, run_B)), out_BKGP


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rule(inputs: _Inputs, run_BT: jax.Array, state_BKHGP: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """Results [B, T, K, G, P] in the dtype of the values and the final state, in chunks of `length` tokens."""
    out_BTKGP, state_BKHGP, _ = _over_chunks(inputs, run_BT, state_BKHGP, length, keep_states=False)
    return out_BTKGP, state_BKHGP


def _forward(inputs: _Inputs, run_BT: jax.Array, state_BKHGP: jax.Array, length: int):
    out_BTKGP, state_BKHGP, states_nBKHGP = _over_chunks(inputs, run_BT, state_BKHGP, length, keep_states=True)
    # Where results of attention are saved, the states before the chunks are, too: without them all chunks are computed
    # again, one after the other, before the backward pass computes each again.
    kept = checkpoint_name(states_nBKHGP, ATTENDED)
    return (checkpoint_name(out_BTKGP, ATTENDED), state_BKHGP), (inputs, run_BT, kept)


def _backward(length: int, saved, gradients):
    inputs, run_BT, states_nBKHGP = saved
    of_out_BTKGP, of_state_BKHGP = gradients
    tokens = run_BT.shape[1]
    all_inputs, all_of_out = jax.tree.map(lambda x: _split(x, length), (inputs, of_out_BTKGP))

    def one_chunk(carry, chunk):
        of_state_BKHGP, of_inputs = carry
        index, runs, state_BKHGP = chunk
        inputs, of_out_BCKGP = jax.tree.map(lambda x: _chunk_at(x, index), (all_inputs, all_of_out))
        _, pull = jax.vjp(lambda state, inputs: _one_chunk(state, inputs, runs), state_BKHGP, inputs)
        of_state_BKHGP, of_chunk = pull((of_state_BKHGP, of_out_BCKGP.astype(jnp.float32)))
        of_inputs = jax.tree.map(lambda x, part: _with_chunk(x, part, index), of_inputs, of_chunk)
        return (of_state_BKHGP, of_inputs), None

    runs = chunk_runs(run_BT, length)
    chunks = np.arange(runs.run_nBC.shape[0]), runs, states_nBKHGP
    start = of_state_BKHGP, jax.tree.map(jnp.zeros_like, all_inputs)
    with matmul_precision(jnp.float32):
        (of_state_BKHGP, of_inputs), _ = jax.lax.scan(one_chunk, start, chunks, reverse=True)
    return jax.tree.map(lambda x: _join(x, tokens), of_inputs), None, of_state_BKHGP


_rule.defvjp(_forward, _backward)


def _over_chunks(inputs: _Inputs, run_BT: jax.Array, state_BKHGP: jax.Array, length: int, keep_states: bool):
    """Results, the final state, and the states before each chunk if they are to be kept."""
    all_inputs = jax.tree.map(lambda x: _split(x, length), inputs)

    def one_chunk(carry, chunk):
        state_BKHGP, out_BnCKGP = carry
        index, runs = chunk
        inputs = jax.tree.map(lambda x: _chunk_at(x, index), all_inputs)
        after_BKHGP, out_BCKGP = _one_chunk(state_BKHGP, inputs, runs)
        out_BnCKGP = _with_chunk(out_BnCKGP, out_BCKGP.astype(inputs.v_BTKGP.dtype), index)
        return (after_BKHGP, out_BnCKGP), state_BKHGP if keep_states else None

    runs = chunk_runs(run_BT, length)
    start = state_BKHGP, jnp.zeros_like(all_inputs.v_BTKGP)
    with matmul_precision(jnp.float32):
        chunks = np.arange(runs.run_nBC.shape[0]), runs
        (state_BKHGP, out_BnCKGP), states_nBKHGP = jax.lax.scan(one_chunk, start, chunks)
    return _join(out_BnCKGP, run_BT.shape[1]), state_BKHGP, states_nBKHGP


def _one_chunk(state_BKHGP: jax.Array, inputs: _Inputs, runs: _Runs) -> tuple[jax.Array, jax.Array]:
    """The state after a chunk and its results, float32 [B, C, K, G, P]."""
    run_BC, before_B, after_B = runs
    q_BKCH, k_BKCH, *others = (jnp.moveaxis(x, 1, 2) for x in _in_float32(inputs, run_BC != PADDING))
    v_BKGCP, g_BKGC, beta_BKGC = (jnp.moveaxis(x, 2, 3) for x in others)
    beta_BKGC1 = beta_BKGC[..., None]
    length, shape = run_BC.shape[1], state_BKHGP.shape
    up_to, before = np.tri(length, dtype=np.float32), np.tri(length, k=-1, dtype=np.float32)

    # Masks come after the exponentials: sums of g are never positive, so that none of them overflows.
    since_start_BKGC = g_BKGC @ up_to.T
    between_BKGCC = (g_BKGC[..., None, :] * up_to) @ before
    same_BCC = (run_BC[:, :, None] == run_BC[:, None, :]) & (up_to > 0)
    decay_BKGCC = jnp.where(same_BCC[:, None, None], jnp.exp(between_BKGCC), 0)
    goes_on_B11C, stays_B11C = (run_BC == before_B[:, None])[:, None, None], (run_BC == after_B[:, None])[:, None, None]
    from_start_BKGC1 = jnp.where(goes_on_B11C, jnp.exp(since_start_BKGC), 0)[..., None]
    to_end_BKGC1 = jnp.where(stays_B11C, jnp.exp(between_BKGCC[..., -1, :]), 0)[..., None]
    whole_BK1G1 = jnp.where((before_B == after_B)[:, None, None], jnp.exp(since_start_BKGC[..., -1]), 0)[
        :, :, None, :, None
    ]

    def read(x_BKCH: jax.Array) -> jax.Array:
        read_BKCI = _matmul(x_BKCH, state_BKHGP.reshape(*shape[:3], -1))
        return jnp.moveaxis(read_BKCI.reshape(*x_BKCH.shape[:3], *shape[3:]), 2, 3)

    lower_BKGCC = beta_BKGC1 * _matmul(k_BKCH, k_BKCH.mT)[:, :, None] * decay_BKGCC * before
    write_BKGCP = solve_unit_lower(lower_BKGCC, beta_BKGC1 * (v_BKGCP - from_start_BKGC1 * read(k_BKCH)))
    weights_BKGCC = _matmul(q_BKCH, k_BKCH.mT)[:, :, None] * decay_BKGCC
    out_BKGCP = from_start_BKGC1 * read(q_BKCH) + _matmul(weights_BKGCC, write_BKGCP)
    left_BKCGP = jnp.moveaxis(to_end_BKGC1 * write_BKGCP, 3, 2)
    written_BKHI = _matmul(k_BKCH.mT, left_BKCGP.reshape(*left_BKCGP.shape[:3], -1))
    return whole_BK1G1 * state_BKHGP + written_BKHI.reshape(shape), jnp.moveaxis(out_BKGCP, 3, 1)


@jax.custom_vjp
def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """`x @ y`. JAX's own gradient of y is computed transposed and then copied."""
    return x @ y


_matmul.defvjp(lambda x, y: (x @ y, (x, y)), lambda saved, of_z: (of_z @ saved[1].mT, saved[0].mT @ of_z))


def _in_float32(inputs: _Inputs, real: jax.Array) -> _Inputs:
    """The inputs in float32, queries and keys normalised, queries scaled, and padding's made zeros.

    Args:
        inputs: of a token or of a chunk.
        real: False for padding, [B] or [B, C].
    """
    mask = (jnp.reshape(real, real.shape + (1,) * (x.ndim - real.ndim)) for x in inputs)
    q, k, v, g, beta = (jnp.where(real, x.astype(jnp.float32), 0) for real, x in zip(mask, inputs, strict=True))
    q, k = (x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + EPSILON) for x in (q, k))
    return _Inputs(q * q.shape[-1] ** -0.5, k, v, g, beta)


def _by_key_head(q_BTKH, k_BTKH, v_BTNP, g_BTN, beta_BTN, state_BNHP) -> tuple[_Inputs, jax.Array]:
    """Value heads grouped by the key head that they share, and the state in float32, zeros where there is none."""
    batch, tokens, key_heads, key_size = k_BTKH.shape
    value_heads, value_size = v_BTNP.shape[2:]
    if state_BNHP is None:
        state_BNHP = jnp.zeros((batch, value_heads, key_size, value_size), jnp.float32)
    heads = key_heads, value_heads // key_heads
    v_BTKGP, g_BTKG, beta_BTKG = (x.reshape(batch, tokens, *heads, *x.shape[3:]) for x in (v_BTNP, g_BTN, beta_BTN))
    state_BKGHP = state_BNHP.astype(jnp.float32).reshape(batch, *heads, key_size, value_size)
    return _Inputs(q_BTKH, k_BTKH, v_BTKGP, g_BTKG, beta_BTKG), state_BKGHP


def _by_value_head(state_BKGHP: jax.Array) -> jax.Array:
    batch, key_heads, shared, *sizes = state_BKGHP.shape
    return state_BKGHP.reshape(batch, key_heads * shared, *sizes)


def chunk_runs(run_BT: jax.Array, length: int) -> _Runs:
    """The runs in chunks. The state before the first chunk is of run 0, others of the last run so far."""
    batch, tokens = run_BT.shape
    count = -(-tokens // length)
    run_BT = jnp.pad(run_BT, ((0, 0), (0, count * length - tokens)), constant_values=PADDING)
    run_nBC = jnp.moveaxis(run_BT.reshape(batch, count, length), 1, 0)
    after_nB = jax.lax.cummax(jnp.maximum(0, jnp.max(run_nBC, axis=-1)))
    return _Runs(run_nBC, jnp.pad(after_nB, ((1, 0), (0, 0)))[:-1], after_nB)


def _split(x: jax.Array, length: int) -> jax.Array:
    """[B, T, ...] to [B, n, C, ...], filled up with zeros, bfloat16 as its bits."""
    x = as_bits(x)
    batch, tokens, *others = x.shape
    count = -(-tokens // length)
    x = jnp.pad(x, ((0, 0), (0, count * length - tokens), *[(0, 0)] * len(others)))
    return x.reshape(batch, count, length, *others)


def _join(x: jax.Array, tokens: int) -> jax.Array:
    """The inverse of `_split`, without the filling."""
    batch, chunks, length, *others = x.shape
    return from_bits(x.reshape(batch, chunks * length, *others)[:, :tokens])


def _chunk_at(x: jax.Array, index: jax.Array) -> jax.Array:
    return from_bits(jax.lax.dynamic_index_in_dim(x, index, axis=1, keepdims=False))


def _with_chunk(x: jax.Array, part: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, as_bits(part), index, axis=1)
