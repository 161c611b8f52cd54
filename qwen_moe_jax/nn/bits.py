"""bfloat16 moved as its bits: XLA on CPUs widens the whole of an array before it takes a part, or writes one.

It does so once for a loop where it can, and for every step of it where it cannot. Integers it leaves as they are.
"""

import jax
import jax.numpy as jnp


def as_bits(x: jax.Array) -> jax.Array:
    """bfloat16 as uint16; anything else as it is."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def from_bits(x: jax.Array) -> jax.Array:
    """The inverse of `as_bits`."""
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def rows_at(x: jax.Array, start: jax.Array, count: int) -> jax.Array:
    """`x[start : start + count]`, read in a loop without a copy of the whole."""
    if x.dtype == jnp.bfloat16:
        x, start = jax.lax.optimization_barrier(
            (x, start)
        )  # or all of x would be reinterpreted before the loop: a copy
    return from_bits(jax.lax.dynamic_slice_in_dim(as_bits(x), start, count))
