"""Tensors ↔ arrays on devices, block by block: host memory holds a few blocks, whatever the model and the mesh.

Every device's part of an array is cut alike, so one block is the same window of every part. It is read for the devices
of this process alone, put on them, and written into the array in place; no step looks at what lies on other processes.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from qwen_moe_jax.sharding.rules import mesh_axes
from qwen_moe_jax.storage.prefetch import prefetch
from qwen_moe_jax.storage.tensor import Index, StoredTensor, blocks, index_shape

#: Bytes of one block, of all parts that this process holds together.
BLOCK = 64 << 20
#: Bytes of a cache line.
_LINE = 64


@dataclasses.dataclass(frozen=True)
class _Block:
    """One block of one array: the same window of every device's part.

    Attributes:
        number: of the array.
        tensor: what is read.
        array: the whole array, described.
        window: of each part.
    """

    number: int
    tensor: StoredTensor
    array: jax.ShapeDtypeStruct
    window: Index

    @property
    def is_whole_part(self) -> bool:
        return index_shape(self.window) == self.array.sharding.shard_shape(self.array.shape)


def place(
    tensors: Sequence[StoredTensor], described: Sequence[jax.ShapeDtypeStruct], advance: Callable[[int], None]
) -> list[jax.Array]:
    """Reads tensors into arrays.

    Args:
        tensors: what is read, each once; for copies on several devices too.
        described: shape, dtype and sharding of each array.
        advance: is told of bytes read, in the arrays' dtype.

    Raises:
        CheckpointError: as reading raises it.
    """
    blocks_of = [_blocks(number, *pair) for number, pair in enumerate(zip(tensors, described, strict=True))]
    # Allocated at once: where the model does not fit, nothing has been read yet; and beside the first reads.
    arrays = [
        None if first.is_whole_part else _empty(array)()
        for (first, *_), array in zip(blocks_of, described, strict=True)
    ]
    for block, parts in prefetch(lambda block: (block, _read(block)), itertools.chain.from_iterable(blocks_of)):
        sharding = block.array.sharding
        placed = [jax.device_put(values, device) for values, devices in parts for device in devices]
        shape = _global_shape(index_shape(block.window), block.array)
        array = jax.make_array_from_single_device_arrays(shape, sharding, placed)
        if not block.is_whole_part:
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
    mesh, spec = array.sharding.mesh, [mesh_axes(entry) for entry in array.sharding.spec]
    spec += [()] * (array.ndim - len(spec))
    cut = [axis for axis in range(array.ndim) if array.shape[axis] != shape[axis]]
    moved = [name for axis in cut for name in spec[axis]]
    for axis in range(array.ndim):
        names = (*spec[axis], *moved)
        if axis in cut:
            spec[axis] = ()
        elif shape[axis] % math.prod(mesh.shape[name] for name in names) == 0:
            spec[axis], moved = names, []
    window = tuple(slice(0, size) for size in shape)
    return jax.jit(lambda array: array[window], out_shardings=NamedSharding(mesh, PartitionSpec(*spec)))(array)


def local_bytes(described: Iterable[jax.ShapeDtypeStruct]) -> int:
    """Bytes that `place` reads in this process: of every part, once."""
    return sum(
        len(_owners(array)) * math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
        for array in described
    )


def _blocks(number: int, tensor: StoredTensor, array: jax.ShapeDtypeStruct) -> list[_Block]:
    part_shape, parts = array.sharding.shard_shape(array.shape), len(_owners(array))
    windows = blocks(part_shape, array.dtype.itemsize, BLOCK // parts)
    return [_Block(number, tensor, array, window) for window in windows]


def _owners(array: jax.ShapeDtypeStruct) -> list[tuple[Index, list[jax.Device]]]:
    """The different parts that this process holds, and the devices that hold each."""
    owners: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in array.sharding.addressable_devices_indices_map(array.shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, array.shape, strict=True))
        owners.setdefault(bounds, []).append(device)
    return [(tuple(slice(*bound) for bound in bounds), devices) for bounds, devices in owners.items()]


def _read(block: _Block) -> list[tuple[np.ndarray, list[jax.Device]]]:
    """The block's window of every part, read, and the devices it goes to."""
    read = []
    for part, devices in _owners(block.array):
        values = _aligned_empty(index_shape(block.window), block.array.dtype)
        block.tensor.read_into(_within(part, block.window), values)
        read.append((values, devices))
    return read


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """As `np.empty`, where JAX on CPUs takes the memory as it is: it would copy what does not begin at a cache line."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _LINE, np.uint8)
    begin = -memory.ctypes.data % _LINE
    return memory[begin : begin + size].view(dtype).reshape(shape)


def _within(part: Index, window: Index) -> Index:
    return tuple(slice(at.start + own.start, at.start + own.stop) for at, own in zip(part, window, strict=True))


def _global_shape(part_shape: tuple[int, ...], like: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """Of an array, sharded so, whose parts have this shape."""
    own_shape = like.sharding.shard_shape(like.shape)
    return tuple(part * (size // own) for part, size, own in zip(part_shape, like.shape, own_shape, strict=True))


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
        spec, starts = sharding.spec, jax.tree.map(lambda _: PartitionSpec(), begin)
        # Copies are written alike on every device that holds one; which they are, need not be proved.
        return jax.shard_map(local, mesh=sharding.mesh, in_specs=(spec, spec, starts), out_specs=spec, check_vma=False)(
            array, block, begin
        )

    return overwrite


@dataclasses.dataclass(frozen=True)
class DeviceTensor(StoredTensor):
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
    def source(self) -> str:
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
