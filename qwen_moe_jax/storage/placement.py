"""Tensors ↔ sharded arrays, block by block: host memory holds a few blocks, whatever the model and the mesh.

All shards of an array have one shape, so a block is the same window of every shard. Each process reads the block for
its own devices, transfers it, and updates the array in place; no communication is needed.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from qwen_moe_jax.sharding.rules import mesh_axes
from qwen_moe_jax.storage.prefetch import prefetch
from qwen_moe_jax.storage.tensor import Index, StoredTensor, blocks, index_shape

#: Bytes of one block, summed over the shards that this process reads.
BLOCK = 64 << 20
#: Bytes of a cache line.
_LINE = 64


@dataclasses.dataclass(frozen=True)
class _Block:
    """One block of one array: the same window of every shard.

    Attributes:
        number: position of the array in the list.
        tensor: that the array is read from.
        array: shape, dtype and sharding of the whole array.
        window: of each shard.
    """

    number: int
    tensor: StoredTensor
    array: jax.ShapeDtypeStruct
    window: Index

    @property
    def is_whole_shard(self) -> bool:
        return index_shape(self.window) == self.array.sharding.shard_shape(self.array.shape)


def place(
    tensors: Sequence[StoredTensor], abstract: Sequence[jax.ShapeDtypeStruct], advance: Callable[[int], None]
) -> list[jax.Array]:
    """Reads tensors into sharded arrays.

    Args:
        tensors: each is read once, also where its shards are replicated over devices.
        abstract: shape, dtype and sharding of each array.
        advance: called with the number of bytes read, counted in the array's dtype.

    Raises:
        CheckpointError: as reading raises it.
    """
    blocks_of = [_blocks(number, *pair) for number, pair in enumerate(zip(tensors, abstract, strict=True))]
    # Allocated first, so that a model that does not fit fails before anything is read.
    arrays: list[Any] = [
        None if first.is_whole_shard else _empty(array)()
        for (first, *_), array in zip(blocks_of, abstract, strict=True)
    ]
    for block, parts in prefetch(lambda block: (block, _read(block)), itertools.chain.from_iterable(blocks_of)):
        sharding = block.array.sharding
        placed = [jax.device_put(values, device) for values, devices in parts for device in devices]
        shape = _global_shape(index_shape(block.window), block.array)
        array: jax.Array = jax.make_array_from_single_device_arrays(shape, sharding, placed)
        if not block.is_whole_shard:
            begin = tuple(part.start for part in block.window)
            array = _overwrite(sharding)(arrays[block.number], array, begin)
        arrays[block.number] = jax.block_until_ready(array)
        advance(sum(values.nbytes for values, _ in parts))
    return arrays


def unpadded(array: jax.Array, shape: Sequence[int]) -> jax.Array:
    """An array without the padding at the end of its axes, on the same devices.

    An axis of odd size cannot be sharded. Its mesh axes shard another axis instead, if there is one that they divide.

    Args:
        array: on a mesh.
        shape: without padding.
    """
    if array.shape == tuple(shape):
        return array
    assert isinstance(array.sharding, NamedSharding)
    mesh, spec = array.sharding.mesh, [mesh_axes(entry) for entry in array.sharding.spec]
    spec += [()] * (array.ndim - len(spec))
    padded = [axis for axis in range(array.ndim) if array.shape[axis] != shape[axis]]
    moved = [name for axis in padded for name in spec[axis]]
    for axis in range(array.ndim):
        names = (*spec[axis], *moved)
        if axis in padded:
            spec[axis] = ()
        elif shape[axis] % math.prod(mesh.shape[name] for name in names) == 0:
            spec[axis], moved = names, []
    window = tuple(slice(0, size) for size in shape)
    return jax.jit(lambda array: array[window], out_shardings=NamedSharding(mesh, PartitionSpec(*spec)))(array)


def local_bytes(abstract: Iterable[jax.ShapeDtypeStruct]) -> int:
    """Bytes that `place` reads in this process: every distinct shard once."""
    return sum(
        len(_owners(array)) * math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
        for array in abstract
    )


def _blocks(number: int, tensor: StoredTensor, array: jax.ShapeDtypeStruct) -> list[_Block]:
    part_shape, parts = array.sharding.shard_shape(array.shape), len(_owners(array))
    windows = blocks(part_shape, array.dtype.itemsize, BLOCK // parts)
    return [_Block(number, tensor, array, window) for window in windows]


def _owners(array: jax.ShapeDtypeStruct) -> list[tuple[Index, list[jax.Device]]]:
    """The distinct shards of this process, and the devices that hold each."""
    owners: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in array.sharding.addressable_devices_indices_map(array.shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, array.shape, strict=True))
        owners.setdefault(bounds, []).append(device)
    return [(tuple(slice(*bound) for bound in bounds), devices) for bounds, devices in owners.items()]


def _read(block: _Block) -> list[tuple[np.ndarray, list[jax.Device]]]:
    """Reads a block's window of every shard; with the devices that each goes to."""
    read = []
    for part, devices in _owners(block.array):
        values = _aligned_empty(index_shape(block.window), block.array.dtype)
        block.tensor.read_into(_within(part, block.window), values)
        read.append((values, devices))
    return read


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """`np.empty` aligned to a cache line: JAX on CPUs uses aligned memory without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _LINE, np.uint8)
    begin = -memory.ctypes.data % _LINE
    return memory[begin : begin + size].view(dtype).reshape(shape)


def _within(part: Index, window: Index) -> Index:
    return tuple(slice(at.start + own.start, at.start + own.stop) for at, own in zip(part, window, strict=True))


def _global_shape(shard_shape: tuple[int, ...], like: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """Shape of an array with shards of `part_shape` under the sharding of `like`."""
    own_shape = like.sharding.shard_shape(like.shape)
    return tuple(part * (size // own) for part, size, own in zip(shard_shape, like.shape, own_shape, strict=True))


@functools.cache
def _empty(abstract: jax.ShapeDtypeStruct) -> Callable[[], jax.Array]:
    return jax.jit(lambda: jnp.zeros(abstract.shape, abstract.dtype), out_shardings=abstract.sharding)


@functools.cache
def _overwrite(sharding: NamedSharding) -> Callable[[jax.Array, jax.Array, tuple[int, ...]], jax.Array]:
    """A function (array, block, begin) → the array, updated in place with the block at `begin` of every shard."""

    def local(array: jax.Array, block: jax.Array, begin: tuple[Any, ...]) -> jax.Array:
        # As integers: XLA on CPUs would convert the whole bfloat16 array to float32 and back for every block.
        return _as_dtype(jax.lax.dynamic_update_slice(_as_bits(array), _as_bits(block), begin), array.dtype)

    @functools.partial(jax.jit, donate_argnums=0)
    def overwrite(array: jax.Array, block: jax.Array, begin: tuple[int, ...]) -> jax.Array:
        spec, starts = sharding.spec, jax.tree.map(lambda _: PartitionSpec(), begin)
        # check_vma is off: replicated shards get the same block, which the checker cannot see.
        return jax.shard_map(local, mesh=sharding.mesh, in_specs=(spec, spec, starts), out_specs=spec, check_vma=False)(
            array, block, begin
        )

    return overwrite


@dataclasses.dataclass(frozen=True)
class DeviceTensor(StoredTensor):
    """An array on devices.

    Attributes:
        array: all of whose shards are addressable by this process.
    """

    array: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> str:
        return str(self.array.dtype)

    @property
    def source(self) -> str:
        return "the model"

    def read_into(self, index: Index, out: np.ndarray) -> None:
        shards: dict[tuple[tuple[int, int], ...], jax.Array] = {}
        for shard in self.array.addressable_shards:
            bounds = tuple(part.indices(size)[:2] for part, size in zip(shard.index, self.shape, strict=True))
            shards.setdefault(bounds, shard.data)
        for bounds, data in shards.items():
            first = [max(part.start, low) for part, (low, _) in zip(index, bounds, strict=True)]
            last = [min(part.stop, high) for part, (_, high) in zip(index, bounds, strict=True)]
            if any(begin >= end for begin, end in zip(first, last, strict=True)):
                continue
            begin = tuple(at - low for at, (low, _) in zip(first, bounds, strict=True))
            size = tuple(end - at for at, end in zip(first, last, strict=True))
            inside = tuple(
                slice(at - part.start, end - part.start) for at, end, part in zip(first, last, index, strict=True)
            )
            # Of a slice, since JAX keeps the host's copy of an array as long as the array itself.
            out[inside] = np.asarray(_slice(data, begin, size))


@functools.partial(jax.jit, static_argnums=2)
def _slice(array: jax.Array, begin: tuple[int, ...], size: tuple[int, ...]) -> jax.Array:
    return _as_dtype(jax.lax.dynamic_slice(_as_bits(array), begin, size), array.dtype)


def _as_bits(array: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")


def _as_dtype(bits: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, dtype)
