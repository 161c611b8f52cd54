"""The token table: looked up on the way in and, where tied, multiplied with on the way out."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.nn.parameters import ParameterFactory
from qwen_moe_jax.sharding.rules import BATCH, mesh_axes, spec_of

TABLE = ("vocab", "embed")


class Embedding(nnx.Module):
    """Vectors of the vocabulary, [V, D]. Looking up `padding_idx` teaches it nothing, as in torch."""

    def __init__(self, name: str, vocab_size: int, hidden_size: int, padding_idx: int | None, make: ParameterFactory):
        self.weight = make.normal(f"{name}.weight", (vocab_size, hidden_size), TABLE, zero_row=padding_idx)
        self.padding_idx = padding_idx

    def __call__(self, tokens_BT: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """[B, T] to [B, T, D].

        The table is never gathered: every device looks up its part of the table for all tokens of the devices that the
        table is cut over, and an all-to-all turns parts of all tokens into whole vectors of a device's own tokens. A
        token id outside the vocabulary becomes NaN, which is seen, rather than some other token, which is not.
        """
        rows, columns = spec_of(self.weight[...])
        apart = tuple(axis for axis in BATCH if axis not in (*mesh_axes(rows), *mesh_axes(columns))) or None
        beyond = self.weight.shape[0]
        tokens_BT = jnp.where(tokens_BT < 0, beyond, tokens_BT)  # a negative index would count from the end
        tokens_BT = jax.sharding.reshard(tokens_BT, P(apart, None))
        sliced = P(apart, None, columns)
        hidden_BTD = self.weight.at[tokens_BT].get(out_sharding=sliced, mode="fill", fill_value=jnp.nan).astype(dtype)
        if self.padding_idx is not None:
            frozen_BT1 = (tokens_BT == self.padding_idx)[..., None]
            hidden_BTD = jnp.where(frozen_BT1, jax.lax.stop_gradient(hidden_BTD), hidden_BTD)
        return jax.sharding.reshard(hidden_BTD, P(BATCH, None, None))
