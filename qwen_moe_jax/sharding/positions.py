"""Which positions of a row each device of the mesh axis `context` has.

A query sees the keys before it, so that the end of a row is more work than its start. Under *zig-zag* a row is split
into twice as many chunks as there are devices, and device x of X has chunk x and chunk 2X - 1 - x: as many pairs of a
query and a key as any other device has (Megatron-LM, and Llama 3, arXiv 2407.21783). *Contiguous* gives device x the
x-th part, for layers that read a row in its order.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

#: New tokens of a row behind a cache that devices of the axis share. Fewer are decoded tokens and drafts, for which the
#: same weights are read however few of them a device has.
SHORTEST_CHUNK = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowOrder:
    """The order in which a row's positions are stored, sharded over `context` in equal parts.

    Attributes:
        length: positions of a row.
        shards: X, devices of the axis.
        chunks: chunks of a device: 2 under zig-zag, 1 where its positions are contiguous.
        count: blocks of a chunk.
        block: positions of a block, the unit of attention.
    """

    length: int
    shards: int
    chunks: int
    count: int
    block: int

    @classmethod
    def of(cls, length: int, shards: int, *, zigzag: bool, longest: int, multiple: int = 1) -> "RowOrder":
        """The order with the fewest blocks that are not longer than `longest`, and multiples of `multiple`."""
        chunks = 2 if zigzag else 1
        chunk = math.ceil(length / (shards * chunks))
        count = math.ceil(chunk / (longest - longest % multiple))
        block = math.ceil(chunk / count)
        return cls(length=length, shards=shards, chunks=chunks, count=count, block=block + -block % multiple)

    @classmethod
    def of_chunk(cls, length: int, shards: int) -> "RowOrder | None":
        """The order of new tokens behind a cache; None where every device of the axis has all of them.

        It is their own: whatever part of a chunk a device has, its queries see the keys of all devices.
        """
        if shards == 1 or length < SHORTEST_CHUNK:
            return None
        return cls.of(length, shards, zigzag=False, longest=length)

    @property
    def local(self) -> int:
        """Positions of a device."""
        return self.chunks * self.count * self.block

    @property
    def padded(self) -> int:
        """Positions of a row, with the padding at its end that makes the parts equal."""
        return self.shards * self.local

    def chunks_of(self, device: int) -> list[int]:
        """The chunks of a device, numbered from the start of the row."""
        return [device, 2 * self.shards - 1 - device][: self.chunks]

    def blocks_of(self, device: int) -> list[int]:
        """The blocks of a device, numbered from the start of the row."""
        return [chunk * self.count + number for chunk in self.chunks_of(device) for number in range(self.count)]

    def positions(self) -> np.ndarray:
        """The position in the row of each stored one, int32 [padded]."""
        blocks = [block for device in range(self.shards) for block in self.blocks_of(device)]
        return (np.array(blocks, np.int32)[:, None] * self.block + np.arange(self.block, dtype=np.int32)).reshape(-1)

    def stored_at(self) -> np.ndarray:
        """Where each position of the row is stored, int32 [padded]: the inverse of `positions`."""
        return np.argsort(self.positions()).astype(np.int32)

    def store(self, x: jax.Array, axis: int = 1) -> jax.Array:
        """An array in the row's order in the order of storage, padded with zeros."""
        padding = [(0, self.padded - self.length) if number == axis else (0, 0) for number in range(x.ndim)]
        x = jnp.pad(x, padding)
        return x if self.chunks == 1 else jnp.take(x, self.positions(), axis=axis)

    def in_row_order(self, x: jax.Array) -> jax.Array:
        """An array [B, padded, …] as it is stored in the order of the row; whole chunks are moved."""
        parts = x.reshape(x.shape[0], self.shards, self.chunks, self.count * self.block, *x.shape[2:])
        chunks = [parts[:, :, 0], parts[:, ::-1, 1]] if self.chunks == 2 else [parts[:, :, 0]]
        return jnp.concatenate(chunks, axis=1).reshape(x.shape)

    def restore(self, x: jax.Array, axis: int = 1) -> jax.Array:
        """The inverse of `store`, without the padding."""
        if self.chunks == 1:
            return jax.lax.slice_in_dim(x, 0, self.length, axis=axis)
        return jnp.take(x, self.stored_at()[: self.length], axis=axis)
