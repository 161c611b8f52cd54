"""Settings of a batch as arrays: one row per request, lists padded to few lengths so that few programs are compiled."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qwen_moe_jax.config import GenerationConfig


def field_array(configs: Sequence[GenerationConfig], field: str, dtype: type) -> jax.Array:
    """A field of every row's config, [B]."""
    return jnp.asarray(np.array([getattr(config, field) for config in configs], dtype))


def bucket(count: int) -> int:
    """Padded length of a list: 0, 4, 16, 64, …"""
    size = 4 if count else 0
    while size < count:
        size *= 4
    return size


def token_table(rows: Sequence[Sequence[int]], vocab_size: int) -> jax.Array:
    """Lists of token ids as int32 [B, M]; V, which is no token, in unused slots."""
    table_BM = np.full((len(rows), bucket(max(map(len, rows), default=0))), vocab_size, np.int32)
    for slots, row in zip(table_BM, rows, strict=True):
        slots[: len(row)] = row
    return jnp.asarray(table_BM)


def add_rows(values_BV: jax.Array, token_BM: jax.Array, added_BM: jax.Array) -> jax.Array:
    """Adds to a few tokens of every row. Token ids from V on are ignored; a repeated one is added to repeatedly."""
    if token_BM.shape[1] == 0:
        return values_BV
    added_BM = jnp.broadcast_to(added_BM, token_BM.shape)
    return jax.vmap(lambda row_V, token_M, added_M: row_V.at[token_M].add(added_M, mode="drop"))(
        values_BV, token_BM, added_BM
    )


def token_mask(token_BM: jax.Array, vocab_size: int) -> jax.Array:
    """Which tokens of the vocabulary are in a row's list, bool [B, V]."""
    none_BV = jnp.zeros((token_BM.shape[0], vocab_size), jnp.int32)
    return add_rows(none_BV, token_BM, jnp.int32(1)) > 0
