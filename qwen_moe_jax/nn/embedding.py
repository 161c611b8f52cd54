"""The token table [V, D]: looked up at the input and, where tied, multiplied with at the output."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.nn.bits import as_bits, from_bits
from qwen_moe_jax.nn.lora import LoraAdapter
from qwen_moe_jax.nn.matmul import weight_einsum
from qwen_moe_jax.nn.parameters import ParameterFactory
from qwen_moe_jax.sharding.rules import BATCH, mesh_axes, position_shards, positions_axis, spec_of, tokens_spec

#: Logical axes of the token table and of the output head.
TABLE = ("vocab", "embed")

#: A NaN of bfloat16, by its bits.
NAN_BITS = 0x7FC0


class Embedding(nnx.Module):
    """A vector for each token of the vocabulary. Looking up `padding_idx` has no gradient, as in torch.

    Args:
        name: of the module, for messages.
        vocab_size: V; the stored table has further rows of zeros where V does not divide over its shards.
        hidden_size: D.
        padding_idx: a token, or None.
        make: creates the parameter.
    """

    def __init__(self, name: str, vocab_size: int, hidden_size: int, padding_idx: int | None, make: ParameterFactory):
        self.weight = make.normal(f"{name}.weight", (vocab_size, hidden_size), TABLE, zero_row=padding_idx)
        self.padding_idx = padding_idx
        self.axes = TABLE
        self.lora: LoraAdapter | None = nnx.data(None)  # set by `model.lora.add_lora`

    def __call__(self, tokens_BT: jax.Array, dtype: jax.typing.DTypeLike, *, differentiable: bool = True) -> jax.Array:
        """[B, T] to [B, T, D], differentiable unless it need not be: XLA on CPUs then widens no table of bfloat16.

        The table is never gathered: each device looks up its shard of the table for the tokens of all devices that the
        table is sharded over, and an all-to-all turns slices of the vectors of all tokens into whole vectors of the
        device's own tokens. A token id outside the vocabulary becomes NaN, which is noticed, rather than the vector of
        another token, which is not.
        """
        rows, columns = spec_of(self.weight[...])
        over = {*mesh_axes(rows), *mesh_axes(columns)}
        batch = tuple(axis for axis in BATCH if axis not in over) or None
        positions = None if positions_axis() in over else positions_axis()
        is_known_BT = (tokens_BT >= 0) & (tokens_BT < self.weight.unpadded_shape[0])
        tokens_BT = jnp.where(is_known_BT, tokens_BT, self.weight.shape[0])
        tokens_BT = jax.sharding.reshard(tokens_BT, P(batch, positions))
        sliced = P(batch, positions, columns)
        table_VD, missing = self.weight[...], jnp.nan
        if not differentiable and table_VD.dtype == jnp.bfloat16:
            # In a loop, all of the table would be reinterpreted before it.
            table_VD, tokens_BT = jax.lax.optimization_barrier((table_VD, tokens_BT))
            table_VD, missing = as_bits(table_VD), NAN_BITS
        rows_BTD = table_VD.at[tokens_BT].get(out_sharding=sliced, mode="fill", fill_value=missing)
        hidden_BTD = (rows_BTD if differentiable else from_bits(rows_BTD)).astype(dtype)
        if self.padding_idx is not None:
            frozen_BT1 = (tokens_BT == self.padding_idx)[..., None]
            hidden_BTD = jnp.where(frozen_BT1, jax.lax.stop_gradient(hidden_BTD), hidden_BTD)
        if positions_axis() and mesh_axes(columns)[-1:] == (positions_axis(),):
            # Alone, since XLA has no all-to-all from columns to both rows and positions, and would sum all vectors.
            hidden_BTD = jax.sharding.reshard(hidden_BTD, P(batch, positions_axis(), mesh_axes(columns)[:-1] or None))
        hidden_BTD = jax.sharding.reshard(hidden_BTD, tokens_spec(None))
        if self.lora is None:
            return hidden_BTD
        rows_BTr = self.lora.lora_B.at[tokens_BT].get(
            out_sharding=P(batch, positions, None), mode="fill", fill_value=jnp.nan
        )
        rows_BTr = self.lora.scaled(jax.sharding.reshard(rows_BTr.astype(dtype), tokens_spec(None)))
        return hidden_BTD + weight_einsum(
            "BTr,rD->BTD", rows_BTr, self.lora.lora_A[...], self.lora.a_axes, tokens_spec(None)
        )


def without_padding(logits_BTV: jax.Array, vocab_size: int) -> jax.Array:
    """The logits of the vocabulary, without those of the table's rows of padding; explicit axes, B over `BATCH`.

    The vocabulary does not divide over `tensor`, so T is sharded over it where it divides: an all-to-all, after which
    no device holds more than before.
    """
    if logits_BTV.shape[-1] == vocab_size:
        return logits_BTV
    shape = jax.sharding.get_abstract_mesh().shape
    divides = logits_BTV.shape[1] % (position_shards() * shape["tensor"]) == 0
    positions: Any = positions_axis()
    if divides:
        positions = (positions, "tensor") if positions else "tensor"
    return jax.sharding.reshard(logits_BTV, P(BATCH, positions, None))[..., :vocab_size]
