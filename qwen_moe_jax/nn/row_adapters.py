"""Several low-rank adapters of one matrix, of which every row of a batch has one or none."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.nn.lora import LoraAdapter
from qwen_moe_jax.sharding.rules import BATCH


class RowAdapters(LoraAdapter):
    """Adapters side by side, as one whose rank is the sum of theirs; a row keeps the part of its own between A and B.

    What other adapters would add to a row is exactly zero, and a row without an adapter gets the matrix alone. Weights
    are read once for all rows, whatever adapters these have, and sharded as those of one adapter.

    Args:
        adapters: by their numbers, from 1; all of one matrix.
    """

    def __init__(self, adapters: Mapping[int, LoraAdapter]):
        first = next(iter(adapters.values()))
        self.a_axes, self.b_axes = first.a_axes, first.b_axes
        self.parts = tuple((number, one.lora_A.shape[-2], one.scaling) for number, one in adapters.items())
        self.lora_A = _joined([one.lora_A for one in adapters.values()], axis=-2)
        self.lora_B = _joined([one.lora_B for one in adapters.values()], axis=-1)
        self.rows: nnx.Variable | None = nnx.data(None)  # int32 [(layers,) B]; the adapter of each row, 0 for none

    def scaled(self, x_BTr: jax.Array) -> jax.Array:
        """What goes from A to B: each row's own part, times its scaling, and zeros."""
        ranks = [rank for _, rank, _ in self.parts]
        owner_r = np.repeat(np.array([number for number, _, _ in self.parts], np.int32), ranks)
        scaling_r = np.repeat(np.array([scaling for _, _, scaling in self.parts], np.float32), ranks)
        is_own_BTr = self.rows[...][:, None, None] == jax.sharding.reshard(jnp.asarray(owner_r), P(None))
        scaling = jax.sharding.reshard(jnp.asarray(scaling_r, x_BTr.dtype), P(None))
        return jnp.where(is_own_BTr, x_BTr * scaling, 0)

    def choose(self, rows: jax.Array, *, stacked: bool) -> None:
        """Says which adapter each row has, int32 [B], or [layers, B] where layers are stacked; sharded over `BATCH`."""
        spec = P(None, BATCH) if stacked else P(BATCH)
        self.rows = nnx.Variable(rows, spec=spec, unpadded_shape=rows.shape)


def _joined(parts: Sequence[nnx.Variable], axis: int) -> nnx.LoRAParam:
    """Parameters next to each other along the axis of their ranks, which is not sharded."""
    first = parts[0]
    arrays = [part.get_value() for part in parts]
    join = jax.jit(lambda arrays: jnp.concatenate(arrays, axis=axis), out_shardings=arrays[0].sharding)
    joined = join(arrays)
    return nnx.LoRAParam(joined, axes=first.axes, spec=first.spec, unpadded_shape=joined.shape)
