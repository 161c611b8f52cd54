"""Settings of a batch as arrays: one row per request, lists padded to few lengths so that few programs are compiled."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qwen_moe_jax.config import GenerationConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableSizes:
    """Fixed lengths of the lists of every row's settings: the same compiled programs serve whatever fits into them.

    Attributes:
        biases: sequences of `logit_bias` and `bad_words_ids` together.
        prefix: tokens of such a sequence before its last.
        stops, forced, suppressed: tokens of `eos_token_id`, of `forced_eos_token_id`, and of `suppress_tokens` and
            `begin_suppress_tokens` each.
    """

    biases: int = 512
    prefix: int = 7
    stops: int = 16
    forced: int = 4
    suppressed: int = 128


def field_array(configs: Sequence[GenerationConfig], field: str, dtype: type) -> jax.Array:
    """A field of every row's config, [B]."""
    return jnp.asarray(np.array([getattr(config, field) for config in configs], dtype))


def bucket(count: int) -> int:
    """Padded length of a list: 0, 4, 16, 64, …"""
    size = 4 if count else 0
    while size < count:
        size *= 4
    return size


def token_table(rows: Sequence[Sequence[int]], vocab_size: int, size: int | None = None) -> jax.Array:
    """Lists of token ids as int32 [B, M]; V, which is no token, in unused slots. `size` is M; None fits the longest."""
    size = bucket(max(map(len, rows), default=0)) if size is None else size
    table_BM = np.full((len(rows), size), vocab_size, np.int32)
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
