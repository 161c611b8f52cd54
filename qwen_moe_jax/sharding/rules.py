"""From logical axes to mesh axes.

Every parameter names its axes ("expert", "embed", "ffn", …). `ShardingRules` (a choice of execution) say where they lie
at rest, `COMPUTE_AXES` where they lie during the layer that multiplies with them. What the rules cut beyond `COMPUTE_AXES` is gathered
for the layer; the `expert` cut of routed experts and the `tensor` cut never are.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.config import ShardingRules
from qwen_moe_jax.errors import ShardingError

#: Tokens are split over these mesh axes, in this order.
BATCH = ("data", "fsdp", "expert")

#: The mesh axes of each logical axis during a layer; the layers' own arithmetic is written for this.
COMPUTE_AXES: Mapping[str, tuple[str, ...]] = {
    "layers": (),
    "vocab": ("tensor",),
    "heads": ("tensor",),  # rows of q, k, v: heads times head size
    "ffn": ("tensor",),
    "embed": (),  # the hidden axis of dense weights
    "expert": ("expert",),
    "expert_embed": (),  # the hidden axis of routed experts, whose expert axis already lies along `expert`
    "norm": (),
    "router": (),
    "labels": (),
    "rank": (),  # of low-rank adapters
}


def stored(rules: ShardingRules) -> Mapping[str, tuple[str, ...]]:
    """The mesh axes of each logical axis at rest."""
    return {**COMPUTE_AXES, **dataclasses.asdict(rules)}


def partition_spec(axes: Sequence[str], table: Mapping[str, tuple[str, ...]] = COMPUTE_AXES) -> P:
    """The partition of an array with these logical axes.

    Raises:
        ShardingError: an axis is not in the table, or two of them would lie along the same mesh axis.
    """
    unknown = [axis for axis in axes if axis not in table]
    if unknown:
        raise ShardingError(f"unknown logical axes {unknown}: expected some of {list(table)}.")
    places = [table[axis] for axis in axes]
    cutting = [name for place in places for name in place]
    twice = sorted({name for name in cutting if cutting.count(name) > 1})
    if twice:
        cut = [repr(axis) for axis, place in zip(axes, places, strict=True) if twice[0] in place]
        raise ShardingError(
            f"logical axes {tuple(axes)} of one array: mesh axis {twice[0]!r} is used twice, by "
            f"{' and by '.join(cut)}. It can cut an array once: change the sharding rule of one of them."
        )
    return P(*(_entry(place) for place in places))


def parameter_sharding(
    name: str, shape: Sequence[int], axes: Sequence[str], mesh: Mesh, rules: ShardingRules
) -> NamedSharding:
    """Where a parameter lies at rest.

    Args:
        name: for messages.
        shape: of the whole array.
        axes: logical axes, one per dimension.
        mesh: the model's mesh.
        rules: what cuts them.

    Raises:
        ShardingError: a dimension does not divide over its mesh axes; the message gives the numbers.
    """
    table = stored(rules)
    try:
        spec = partition_spec(axes, table)
    except ShardingError as error:
        raise ShardingError(f"{name}: {error}") from None
    for size, axis in zip(shape, axes, strict=True):
        if size % math.prod(mesh.shape[mesh_axis] for mesh_axis in table[axis]):
            over = ", ".join(f"{mesh_axis}={mesh.shape[mesh_axis]}" for mesh_axis in table[axis])
            raise ShardingError(
                f"{name}: its {axis!r} axis of size {size} (shape {tuple(shape)}) does not divide over the mesh axes "
                f"{over}. Choose mesh sizes that divide {size}, or another sharding rule for {axis!r}."
            )
    return NamedSharding(mesh, spec)


def spec_of(x: jax.Array) -> P:
    """How an array lies that is explicitly sharded: what its type says."""
    return jax.typeof(x).sharding.spec


def mesh_axes(place: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """An entry of a partition as the mesh axes in it."""
    return (place,) if isinstance(place, str) else tuple(place or ())


def with_single_axes(spec: P) -> P:
    """The same partition, with the mesh axes of size 1 named as well.

    A `jax.shard_map` that is not checked sums the gradient of an input over the axes its spec does not name. Over a
    single device that is nothing, but XLA does not always see it, and copies the array.
    """
    named = {axis for place in spec for axis in mesh_axes(place)}
    mesh = jax.sharding.get_abstract_mesh()
    single = tuple(axis for axis in mesh.axis_names if mesh.shape[axis] == 1 and axis not in named)
    if len(spec) == 0:
        return spec
    return P((*mesh_axes(spec[0]), *single), *spec[1:])


def needs_gather(spec: P, axes: Sequence[str]) -> bool:
    """Whether a weight that lies like this is cut over devices that each need it whole, inside a `jax.shard_map`.

    Over one device there is nothing to gather, though XLA would copy it.
    """
    return any(_to_gather(place, axis) for place, axis in zip(spec, axes, strict=True))


def all_gather_weight(weight: jax.Array, spec: P, axes: Sequence[str]) -> jax.Array:
    """`gather_for_compute` for the inside of a `jax.shard_map`, where the weight is one device's part.

    Args:
        weight: that part.
        spec: how the whole lies.
        axes: its logical axes.
    """
    for dimension, (place, axis) in enumerate(zip(spec, axes, strict=True)):
        if over := _to_gather(place, axis):
            weight = jax.lax.all_gather(weight, over, axis=dimension, tiled=True)
    return weight


def gather_for_compute(weight: jax.Array, *axes: str) -> jax.Array:
    """Gathers a stored weight for the layer that multiplies with it (the all-gather of fully sharded training)."""
    return jax.sharding.reshard(weight, partition_spec(axes))


def _to_gather(place: str | tuple[str, ...] | None, axis: str) -> tuple[str, ...]:
    """The mesh axes that cut an axis beyond its use, those of one device left out."""
    return tuple(name for name in mesh_axes(place) if name not in COMPUTE_AXES[axis] and jax.lax.axis_size(name) > 1)


def _entry(place: tuple[str, ...]) -> str | tuple[str, ...] | None:
    """As a partition has it."""
    return place if len(place) > 1 else (place[0] if place else None)
