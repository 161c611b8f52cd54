"""Attention of many queries on CPUs: a C function that reads queries, keys and values where they are stored.

XLA copies heads before it multiplies, computes the scores that no query may see, and has them all in memory, with
their masks. The function (`nn.kernels.functions.flash`) has those of a few queries and keys at a time.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from qwen_moe_jax.attention_kernels.blockwise import ATTENDED
from qwen_moe_jax.attention_kernels.cached_cpu import FORMATS
from qwen_moe_jax.nn.kernels import LANES, cpu


def attends_many(q_BTNH: jax.Array, keys: jax.Array) -> bool:
    """Whether `attend_stored` can be used for these queries and stored keys [..., H]; call it as `cpu.is_available`.

    Not for other dtypes than float32 and bfloat16, nor for two of them, nor for heads whose size is no multiple of
    `LANES`.
    """
    return (
        FORMATS.get(keys.dtype.name) == q_BTNH.dtype.name
        and keys.shape[-1] % LANES == 0
        and cpu.on_cpu()
        and cpu.target("flash_attention", q_BTNH.dtype.name) is not None
    )


def attend_stored(
    q_BTNH: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    layer: jax.Array,
    lengths_B: jax.Array,
    token_mask_BT: jax.Array,
    *,
    sliding_window: int | None = None,
    table_BM: jax.Array | None = None,
) -> jax.Array:
    """Lets new tokens, whose keys and values are stored already, attend to all of their row so far.

    As `attend_cached`, or `attend_blocks`. Scores, softmax, weights and sums are float32, rounded once.

    Args:
        q_BTNH: of the new tokens.
        keys, values: of all layers, [L, B, S, K, H], or in blocks, [L, P, S, K, H].
        layer: int32 []; which layer's they are.
        lengths_B: int32; tokens of each row before these.
        token_mask_BT: False for padding, which follows the tokens of a row: its results are zeros.
        sliding_window: number of keys a query sees, itself included; None for all.
        table_BM: int32; the blocks of each row, where keys and values are in blocks.

    Returns:
        [B, T, N, H] in the dtype of the queries.
    """
    count_B = jnp.sum(token_mask_BT, axis=1, dtype=jnp.int32)
    numbers = layer, sliding_window or 0, table_BM is not None, 0
    table_BM = lengths_B[:, None] if table_BM is None else table_BM
    return _call(q_BTNH, keys, values, numbers, lengths_B, count_B, table_BM, table_BM)[0]


def attends_rows(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> bool:
    """Whether `attend_rows` can be used for these arrays of one device: on a mesh of one CPU, and as `attends_many`."""
    dtype = q_BTNH.dtype.name
    return (
        jax.sharding.get_abstract_mesh().size <= 1
        and dtype in FORMATS.values()
        and dtype == k_BTKH.dtype.name == v_BTKH.dtype.name
        and q_BTNH.shape[-1] % LANES == 0
        and cpu.on_cpu()
        and cpu.target("flash_attention", dtype) is not None
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend_rows(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array, window: int | None
) -> jax.Array:
    """Causal attention within segments over whole rows, as `blockwise.attend_in_blocks`, with gradients.

    Scores, softmax, weights and sums are float32, rounded once. Results of padding are zeros.

    Args:
        q_BTNH, k_BTKH, v_BTKH: for which it `attends_rows`.
        segment_ids_BT: int32; 0 is padding.
        window: number of keys a query sees, itself included; None for all.

    Returns:
        [B, T, N, H] in the dtype of the queries.
    """
    return _whole_rows(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, window)[0]


def _whole_rows(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, window: int | None) -> Sequence[jax.Array]:
    batch, tokens = segment_ids_BT.shape
    lengths_B, count_B = jnp.zeros(batch, jnp.int32), jnp.full(batch, tokens, jnp.int32)
    numbers = 0, window or 0, 0, 1
    return _call(q_BTNH, k_BTKH[None], v_BTKH[None], numbers, lengths_B, count_B, lengths_B[:, None], segment_ids_BT)


def _forward(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, window: int | None):
    out_BTNH, (largest_BTN, sum_BTN) = _whole_rows(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, window)
    out_BTNH = checkpoint_name(out_BTNH, ATTENDED)
    logsumexp_BTN = checkpoint_name(largest_BTN + jnp.log(jnp.maximum(sum_BTN, 1e-30)), ATTENDED)
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, out_BTNH, logsumexp_BTN)


def _backward(window: int | None, saved, gradient_BTNH):
    q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, out_BTNH, logsumexp_BTN = saved
    together_BTN = jnp.sum(gradient_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32), axis=-1)
    name = cpu.target("flash_gradients", q_BTNH.dtype.name)
    assert name is not None  # attends_rows
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q_BTNH, k_BTKH, v_BTKH)]
    call = jax.ffi.ffi_call(name, results, vmap_method="sequential")
    numbers, scale = jnp.full(1, window or 0, jnp.int32), jnp.full(1, q_BTNH.shape[-1] ** -0.5, jnp.float32)
    inputs = q_BTNH, gradient_BTNH, k_BTKH, v_BTKH, together_BTN, logsumexp_BTN
    return *call(*inputs, segment_ids_BT.astype(jnp.int32), numbers, scale), None


attend_rows.defvjp(_forward, _backward)


def _call(q_BTNH, keys, values, numbers, lengths_B, count_B, table_BM, segment_ids_BT) -> Sequence[jax.Array]:
    """The results and, of each query, the largest score and the sum of weights, [2, B, T, N]."""
    name = cpu.target("flash_attention", q_BTNH.dtype.name)
    assert name is not None  # attends_many
    numbers = jnp.stack([jnp.asarray(number, jnp.int32) for number in numbers])
    scale = jnp.full(1, q_BTNH.shape[-1] ** -0.5, jnp.float32)
    integers = (x.astype(jnp.int32) for x in (lengths_B, count_B, table_BM, segment_ids_BT))
    sums = jax.ShapeDtypeStruct((2, *q_BTNH.shape[:-1]), jnp.float32)
    results = [jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype), sums]
    call = jax.ffi.ffi_call(name, results, vmap_method="sequential")
    return call(q_BTNH, numbers, scale, *integers, keys, values)
