"""Optimizer state that is kept in the memory of the host, and is on the devices only while a step updates it.

Both memories are named by JAX's memory kinds: "device" and "pinned_host" (page-locked memory of the host, from which
devices copy by themselves). The arrays are sharded alike in both, so every device copies its own shard.
"""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen_moe_jax.errors import ConfigError

DEVICE, HOST = "device", "pinned_host"


def check_memory_kind(kind: str, mesh: Mesh, key: str = "optimizer.memory_kind") -> None:
    """Refuses a memory that the mesh's devices do not have; `key` is what asks for it.

    Raises:
        ConfigError: they have none of that kind.
    """
    try:
        NamedSharding(mesh, PartitionSpec(), memory_kind=kind)
    except ValueError:  # JAX looks it up for devices that are only compiled for, too
        device = mesh.devices.flat[0]
        raise ConfigError(
            f"{key}: it needs {kind!r}, expected a memory that {device.device_kind} devices have: this one cannot be "
            "addressed by them. Leave the key out to keep everything on the devices."
        ) from None


def check_arguments(kind: str, mesh: Mesh) -> None:
    """Refuses a memory that JAX does not name for a program's arguments on these devices, and would leave out silently.

    Raises:
        ConfigError: they are GPUs that are only compiled for.
    """
    if NamedSharding(mesh, PartitionSpec(), memory_kind=kind).memory_kind != kind:
        raise ConfigError(
            f"optimizer.memory_kind: found {kind!r}, and JAX names no memories for the arguments of a program on "
            f"{mesh.devices.flat[0].device_kind} devices that are only compiled for: this plan would have the state on "
            "the devices. Plan without the key; a run on the devices may set it."
        )


def in_memory(kind: str, shardings: Any, abstract: Any) -> Any:
    """The shardings of optimizer state whose arrays are kept in a memory; scalars, which are counters, stay on devices.

    Args:
        kind: of the memory.
        shardings: of the state on devices.
        abstract: the state's arrays, of which shapes are needed only.
    """
    return jax.tree.map(
        lambda sharding, array: sharding.with_memory_kind(kind) if array.ndim else sharding, shardings, abstract
    )


def on_devices(arrays: Any, shardings: Any) -> Any:
    """Within a jitted function, arrays of these shardings with those in another memory copied to the devices."""

    def fetch(array: jax.Array, sharding: NamedSharding) -> jax.Array:
        return jax.device_put(array, sharding.with_memory_kind(DEVICE)) if is_offloaded(sharding) else array

    return jax.tree.map(fetch, arrays, shardings)


def as_stored(arrays: Any, shardings: Any) -> Any:
    """Within a jitted function, arrays on devices with those that are kept in another memory copied there."""

    def store(array: jax.Array, sharding: NamedSharding) -> jax.Array:
        return jax.device_put(array, sharding) if is_offloaded(sharding) else array

    return jax.tree.map(store, arrays, shardings)


def is_offloaded(sharding: NamedSharding) -> bool:
    """Whether arrays of this sharding are kept in another memory than that of the devices."""
    return sharding.memory_kind not in (None, DEVICE)
