"""The mesh: five named axes, any of which may be 1, over real or simulated devices."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from qwen_moe_jax.config import MESH_AXES
from qwen_moe_jax.errors import ShardingError
from qwen_moe_jax.sharding.distributed import num_processes
from qwen_moe_jax.suggest import did_you_mean
from qwen_moe_jax.text import format_mesh

AXES = MESH_AXES


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = 1,
    expert: int = 1,
    context: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh of `data * fsdp * expert * context * tensor` devices, for models to be placed on.

    Rows are split over data, fsdp and expert, and the positions of each row over context; routed experts over expert;
    attention heads, MLP widths and the vocabulary over tensor; what remains of every weight over fsdp (and expert, for
    the dense weights).

    Its axes are `Auto`: outside a model, arrays on it behave like any JAX array (index, differentiate and optimise them
    freely). The models themselves compute with explicit sharding inside.

    On a machine with CPUs only, and before anything else has used JAX, the devices are simulated.

    Raises:
        ShardingError: there are fewer devices than the mesh needs.
    """
    sizes = {"data": data, "fsdp": fsdp, "expert": expert, "context": context, "tensor": tensor}
    for axis, size in sizes.items():
        if size < 1:
            raise ShardingError(f"make_mesh: {axis}={size} is not a size: expected a positive integer.")
    needed = int(np.prod(list(sizes.values())))
    if devices is None:
        if needed > 1:
            _offer_simulated_devices(needed)
        devices = jax.devices()
    if len(devices) < needed:
        found = devices[0].platform if devices else "none"
        shape = format_mesh(sizes)
        raise ShardingError(
            f"make_mesh: {shape} needs {needed} devices, found {len(devices)} ({found}). "
            f"To simulate them on the CPU, call make_mesh before anything else uses JAX, or start Python with "
            f"JAX_NUM_CPU_DEVICES={needed} (and JAX_PLATFORMS=cpu where there is an accelerator)."
        )
    chosen = list(devices)[:needed]
    idle = {device.process_index for device in devices} - {device.process_index for device in chosen}
    if idle:
        raise ShardingError(
            f"make_mesh: {needed} devices leave none of process {', '.join(map(str, sorted(idle)))} in the mesh, found "
            f"{len(devices)} devices of all processes. Choose sizes with that product, or start fewer processes."
        )
    # As jax.make_mesh, which would not split an axis of a torus: expert=8 on 4x4x4 chips takes one and half of another.
    placed = mesh_utils.create_device_mesh(tuple(sizes.values()), chosen, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def simulate_devices(count: int) -> None:
    """Makes the program see `count` simulated CPU devices, and nothing else; of several processes, each has its share.

    Raises:
        ShardingError: JAX is already running in this process with other devices; the processes cannot share evenly.
    """
    processes = num_processes()
    if count % processes:
        raise ShardingError(
            f"{count} simulated devices were asked for, and {processes} processes have to bring as many each: choose "
            f"mesh sizes with a product that is a multiple of {processes}, or another number of processes."
        )
    count //= processes
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        pass  # a backend is up: what matters is what it has, which is checked below
    found = jax.local_devices()
    if found[0].platform != "cpu" or len(found) < count:
        raise ShardingError(
            f"{count} simulated devices were asked for, but JAX already runs with {len(found)} {found[0].platform} "
            "device(s) in this process. Ask for them first, or start Python with "
            f"JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES={count}."
        )


def _offer_simulated_devices(count: int) -> None:
    """Sets how many devices the CPU platform would show. It has no effect where accelerators are found.

    Each of several processes brings its share.
    """
    share = count // num_processes()
    if jax.config.jax_num_cpu_devices < share:  # type: ignore[attr-defined]
        try:
            jax.config.update("jax_num_cpu_devices", share)
        except RuntimeError:
            pass  # a backend is already up; make_mesh reports what it finds


def checked_mesh(mesh: Mesh | None) -> Mesh:
    """The mesh of a model: the caller's with all of `AXES`, of type `Auto`; None is one device.

    Axes may come in any order and with any type. Those that are missing are added with size 1, after the others, so
    that the order of the devices stays: arrays on the caller's mesh and on the model's go into one program.

    Raises:
        ShardingError: the mesh has an axis of another name.
    """
    if mesh is None:
        return make_mesh(devices=jax.local_devices()[:1])
    unknown = [name for name in mesh.axis_names if name not in AXES]
    if unknown:
        hints = "".join(did_you_mean(str(name), AXES) for name in unknown)
        raise ShardingError(
            f"the mesh has axes {mesh.axis_names}: {', '.join(map(repr, unknown))} is unknown; {hints}expected some of "
            f"{', '.join(AXES)}, in any order. Name the axes of jax.make_mesh so, or use qwen_moe_jax.make_mesh."
        )
    missing = tuple(axis for axis in AXES if axis not in mesh.axis_names)
    devices = mesh.devices.reshape(*mesh.devices.shape, *[1] * len(missing))
    return Mesh(devices, (*mesh.axis_names, *missing), axis_types=(AxisType.Auto,) * len(AXES))
