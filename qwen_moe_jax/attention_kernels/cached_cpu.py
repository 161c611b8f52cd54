"""Attention of a few new tokens over a cache of keys and values, on CPUs: a C function that reads the cache in place.

XLA copies a layer's keys and values out of the cache before it multiplies with them, all slots of it, and widens
bfloat16 on the way. The function (`nn.kernels.functions.attention`) reads the slots that a token sees, and writes the
new ones.
"""

import jax
import jax.numpy as jnp

from qwen_moe_jax.attention_kernels.cached import as_stored
from qwen_moe_jax.nn.kernels import LANES, cpu

#: The most new tokens of a row: each reads the keys and values that it sees by itself.
FEW_TOKENS = 8
#: Formats of `nn.kernels` by the dtype that `stored_dtype` gives.
FORMATS = {"float32": "float32", "uint16": "bfloat16"}


def attends_in_place(q_BTNH: jax.Array, keys: jax.Array) -> bool:
    """Whether `write_and_attend` can be used for these queries and keys [..., H]; call it as `cpu.is_available`."""
    return (
        q_BTNH.shape[1] <= FEW_TOKENS
        and keys.dtype.name in FORMATS
        and keys.shape[-1] % LANES == 0
        and cpu.on_cpu()
        and cpu.target("attention", FORMATS[keys.dtype.name]) is not None
    )


def write_and_attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    layer: jax.Array,
    lengths_B: jax.Array,
    token_mask_BT: jax.Array,
    *,
    sliding_window: int | None = None,
    table_BM: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Stores keys and values of new tokens, and lets the tokens attend to all of their row so far.

    As `write_slots` and `attend_cached`, or `write_blocks` and `attend_blocks`, one after the other. Scores, softmax
    and sums are float32, rounded once.

    Args:
        q_BTNH, k_BTKH, v_BTKH: of the new tokens.
        keys, values: of all layers, [L, B, S, K, H], or in blocks, [L, P, S, K, H].
        layer: int32 []; which layer's they are.
        lengths_B: int32; tokens of each row before these.
        token_mask_BT: False for padding, which follows the tokens of a row: it is not written, its results are zeros.
        sliding_window: number of keys a query sees, itself included; None for all.
        table_BM: int32; the blocks of each row, where keys and values are in blocks.

    Returns:
        Results [B, T, N, H] in the dtype of the queries, and keys and values with the new ones, in place where the
        arrays are donated.
    """
    name = cpu.target("attention", FORMATS[keys.dtype.name])
    assert name is not None  # attends_in_place
    scaled_BTNH = q_BTNH.astype(jnp.float32) * q_BTNH.shape[-1] ** -0.5
    settings = jnp.int32(sliding_window or 0), jnp.int32(table_BM is not None)
    numbers = jnp.stack([layer.astype(jnp.int32), *settings])
    count_B = jnp.sum(token_mask_BT, axis=1, dtype=jnp.int32)
    table_BM = lengths_B[:, None] if table_BM is None else table_BM
    shapes = [jax.ShapeDtypeStruct(scaled_BTNH.shape, jnp.float32), *(jax.typeof(x) for x in (keys, values))]
    call = jax.ffi.ffi_call(name, shapes, input_output_aliases={7: 1, 8: 2})
    mixed_BTNH, keys, values = call(
        scaled_BTNH,
        as_stored(k_BTKH, keys),
        as_stored(v_BTKH, values),
        numbers,
        lengths_B.astype(jnp.int32),
        count_B,
        table_BM.astype(jnp.int32),
        keys,
        values,
    )
    return mixed_BTNH.astype(q_BTNH.dtype), keys, values
