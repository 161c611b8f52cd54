"""Runs: the tokens of a row between which a recurrent layer passes its state on.

A row is a sequence of real tokens with padding anywhere between them. Its first run goes on where the row's initial
state ended; each real token whose segment is not that of the real token before it starts a new run, from nothing.
"""

import jax
import jax.numpy as jnp

#: The run of padding.
PADDING = -1


def runs_of(segment_ids_BT: jax.Array) -> jax.Array:
    """The number of each token's run in its row, int32 [B, T]: 0 for the first run, `PADDING` for padding.

    Numbers never fall along a row's real tokens.

    Args:
        segment_ids_BT: int32; 0 is padding.
    """
    real_BT = segment_ids_BT != 0
    if segment_ids_BT.shape[1] < 2:
        return jnp.where(real_BT, 0, PADDING)
    latest_BT = jax.lax.associative_scan(lambda old, new: jnp.where(new != 0, new, old), segment_ids_BT, axis=1)
    before_BT = jnp.pad(latest_BT[:, :-1], ((0, 0), (1, 0)))
    starts_BT = real_BT & (before_BT != 0) & (segment_ids_BT != before_BT)
    return jnp.where(real_BT, jnp.cumsum(starts_BT, axis=1, dtype=jnp.int32), PADDING)
