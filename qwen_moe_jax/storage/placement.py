"""Tensors ↔ arrays on devices, block by block: host memory holds a few blocks, whatever the model and the mesh.

Every device's part of an array is cut alike, so one block is the same window of every part. It is read for the devices
of this process alone, put on them, and written into the array in place; no step looks at what lies on other processes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from qwen_moe_jax.storage.ahead import ahead
from qwen_moe_jax.storage.tensor import Index, Tensor, blocks, size_of

#: Bytes of one block, of all parts that this process holds together.
BLOCK = 64 << 20


@dataclasses.dataclass(frozen=True)
class _Piece:
    """One block of one array: the same window of every device's part.

    Attributes:
        tensor: what is read.
        described: the whole array.
        window: of each part.
    """

    tensor: Tensor
    described: jax.ShapeDtypeStruct
    window: Index

    @property
    def covers_all(self) -> bool:
        return size_of(self.window) == self.described.sharding.shard_shape(self.described.shape)


def place(
    tensors: Sequence[Tensor], described: Sequence[jax.ShapeDtypeStruct], advance: Callable[[int], None]
) -> list[jax.Array]:
    """Reads tensors into arrays.

    Args:
        tensors: what is read, each once; for copies on several devices too.
        described: shape, dtype and sharding of each array.
        advance: is told of bytes read, in the arrays' dtype.

    Raises:
        CheckpointError: as reading raises it.
    """
    pieces = (
        piece for tensor, array in zip(tensors, described, strict=True) for piece in _pieces(tensor, array)
    )  # fmt: skip
    arrays: list[jax.Array] = []
    growing: jax.Array | None = None
    for piece, parts in ahead(lambda piece: (piece, _read(piece)), pieces):
        sharding = piece.described.sharding
        placed = [jax.device_put(values, device) for values, devices in parts for device in devices]
        shape = _global_shape(size_of(piece.window), sharding, piece.described.shape)
        block = jax.make_array_from_single_device_arrays(shape, sharding, placed)
        advance(sum(values.nbytes for values, _ in parts))
        if piece.covers_all:
            arrays.append(jax.block_until_ready(block))
            continue
        begin = tuple(part.start for part in piece.window)
        if growing is None:
            growing = _empty(piece.described)()
        growing = jax.block_until_ready(_overwrite(sharding)(growing, block, begin))
        part_shape = sharding.shard_shape(piece.described.shape)
        if all(part.stop == size for part, size in zip(piece.window, part_shape, strict=True)):
            arrays.append(growing)
            growing = None
    return arrays


def local_bytes(described: Iterable[jax.ShapeDtypeStruct]) -> int:
    """Bytes that `place` reads in this process: of every part, once."""
    return sum(
        len(_owners(array.shape, array.sharding))
        * math.prod(array.sharding.shard_shape(array.shape))
        * array.dtype.itemsize
        for array in described
    )


def _pieces(tensor: Tensor, described: jax.ShapeDtypeStruct) -> Iterator[_Piece]:
    parts = len(_owners(described.shape, described.sharding))
    part_shape = described.sharding.shard_shape(described.shape)
    for window in blocks(part_shape, described.dtype.itemsize, BLOCK // parts):
        yield _Piece(tensor, described, window)


def _owners(shape: tuple[int, ...], sharding: NamedSharding) -> list[tuple[Index, list[jax.Device]]]:
    """The different parts that this process holds, and the devices that hold each."""
    owners: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        owners.setdefault(bounds, []).append(device)
    return [(tuple(slice(*bound) for bound in bounds), devices) for bounds, devices in owners.items()]


def _read(piece: _Piece) -> list[tuple[np.ndarray, list[jax.Device]]]:
    """The block's window of every part, read, and the devices it goes to."""
    read = []
    for part, devices in _owners(piece.described.shape, piece.described.sharding):
        values = np.empty(size_of(piece.window), piece.described.dtype)
        piece.tensor.read_into(_within(part, piece.window), values)
        read.append((values, devices))
    return read


def _within(part: Index, window: Index) -> Index:
    return tuple(slice(at.start + own.start, at.start + own.stop) for at, own in zip(part, window, strict=True))


def _global_shape(part_shape: tuple[int, ...], sharding: NamedSharding, like: tuple[int, ...]) -> tuple[int, ...]:
    """Of an array, sharded so, whose parts have this shape."""
    counts = [size // part for size, part in zip(like, sharding.shard_shape(like), strict=True)]
    return tuple(size * count for size, count in zip(part_shape, counts, strict=True))


@functools.cache
def _empty(described: jax.ShapeDtypeStruct) -> Callable[[], jax.Array]:
    return jax.jit(lambda: jnp.zeros(described.shape, described.dtype), out_shardings=described.sharding)


@functools.cache
def _overwrite(sharding: NamedSharding) -> Callable[[jax.Array, jax.Array, tuple[int, ...]], jax.Array]:
    """A function (array, block, begin) → the array with the block in every part from `begin` on, in the same memory."""

    def local(array: jax.Array, block: jax.Array, begin: tuple[jax.Array, ...]) -> jax.Array:
        # As bits: XLA on CPUs would widen the whole bfloat16 array to float32 and narrow it again for every block.
        return _as_dtype(jax.lax.dynamic_update_slice(_as_bits(array), _as_bits(block), begin), array.dtype)

    @functools.partial(jax.jit, donate_argnums=0)
    def overwrite(array: jax.Array, block: jax.Array, begin: tuple[int, ...]) -> jax.Array:
        spec, starts = sharding.spec, jax.tree.map(lambda _: jax.sharding.PartitionSpec(), begin)
        # Copies are written alike on every device that holds one; which they are, need not be proved.
        return jax.shard_map(local, mesh=sharding.mesh, in_specs=(spec, spec, starts), out_specs=spec, check_vma=False)(
            array, block, begin
        )

    return overwrite


@dataclasses.dataclass(frozen=True)
class Placed(Tensor):
    """An array on devices, as a tensor to be read.

    Attributes:
        array: all of whose parts this process can reach.
    """

    array: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> str:
        return str(self.array.dtype)

    @property
    def where(self) -> str:
        return "the model"

    def read_into(self, index: Index, out: np.ndarray) -> None:
        held = {}
        for shard in self.array.addressable_shards:
            bounds = tuple(part.indices(size)[:2] for part, size in zip(shard.index, self.shape, strict=True))
            held.setdefault(bounds, shard.data)
        for bounds, data in held.items():
            first = [max(part.start, low) for part, (low, _) in zip(index, bounds, strict=True)]
            last = [min(part.stop, high) for part, (_, high) in zip(index, bounds, strict=True)]
            if any(begin >= end for begin, end in zip(first, last, strict=True)):
                continue
            begin = tuple(at - low for at, (low, _) in zip(first, bounds, strict=True))
            size = tuple(end - at for at, end in zip(first, last, strict=True))
            inside = tuple(
                slice(at - part.start, end - part.start) for at, end, part in zip(first, last, index, strict=True)
            )
            # A slice is an array of its own. Asked for itself, JAX would keep the host's copy as long as the model.
            out[inside] = np.asarray(_cut(data, begin, size))


@functools.partial(jax.jit, static_argnums=2)
def _cut(array: jax.Array, begin: tuple[int, ...], size: tuple[int, ...]) -> jax.Array:
    return _as_dtype(jax.lax.dynamic_slice(_as_bits(array), begin, size), array.dtype)


def _as_bits(array: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")


def _as_dtype(bits: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, dtype)
