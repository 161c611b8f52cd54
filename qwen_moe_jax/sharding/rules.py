"""One table from logical axes to mesh axes.

Every parameter names its axes ("expert", "embed", "ffn", …). `STORED` says where they lie at rest: every weight is cut
over as much of the mesh as its axes allow, so that no device holds a second copy. `USED` says where they lie during the
layer that multiplies with them: the `fsdp` cut is gathered, the `expert` cut of routed experts and the `tensor` cut
never are.
"""

from collections.abc import Mapping, Sequence

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.errors import ShardingError

MeshAxes = str | tuple[str, ...] | None

#: Tokens are split over these mesh axes, in this order.
BATCH = ("data", "fsdp", "expert")

STORED: Mapping[str, MeshAxes] = {
    "layers": None,
    "vocab": "tensor",
    "heads": "tensor",  # rows of q, k, v: heads times head size
    "ffn": "tensor",
    "embed": ("fsdp", "expert"),  # the hidden axis of dense weights
    "expert": "expert",
    "expert_embed": "fsdp",  # the hidden axis of routed experts, whose expert axis already lies along `expert`
    "norm": None,
    "router": None,
    "labels": None,
}

USED: Mapping[str, MeshAxes] = {**STORED, "embed": None, "expert_embed": None}


def partition_spec(axes: Sequence[str], table: Mapping[str, MeshAxes] = STORED) -> P:
    """The partition of an array with these logical axes.

    Raises:
        ShardingError: an axis is not in the table, or two of them would lie along the same mesh axis.
    """
    unknown = [axis for axis in axes if axis not in table]
    if unknown:
        raise ShardingError(f"unknown logical axes {unknown}: expected some of {list(table)}.")
    places = [table[axis] for axis in axes]
    used = [name for place in places if place for name in ((place,) if isinstance(place, str) else place)]
    twice = sorted({name for name in used if used.count(name) > 1})
    if twice:
        raise ShardingError(f"logical axes {tuple(axes)} map to {places}: mesh axis {twice[0]!r} is used twice.")
    return P(*places)


def parameter_sharding(name: str, shape: Sequence[int], axes: Sequence[str], mesh: Mesh) -> NamedSharding:
    """Where a parameter lies at rest.

    Args:
        name: for messages.
        shape: of the whole array.
        axes: logical axes, one per dimension.
        mesh: the model's mesh.

    Raises:
        ShardingError: a dimension does not divide over its mesh axes; the message gives the numbers.
    """
    spec = partition_spec(axes)
    for size, axis, place in zip(shape, axes, spec, strict=True):
        names = (place,) if isinstance(place, str) else (place or ())
        ways = 1
        for mesh_axis in names:
            ways *= mesh.shape[mesh_axis]
        if size % ways:
            over = " * ".join(f"{mesh_axis}={mesh.shape[mesh_axis]}" for mesh_axis in names)
            raise ShardingError(
                f"{name}: its {axis!r} axis of size {size} (shape {tuple(shape)}) does not divide over the mesh axes "
                f"{over}. Choose mesh sizes that divide {size}."
            )
    return NamedSharding(mesh, spec)


def over_all_single_axes(spec: P) -> P:
    """The same partition, with the mesh axes of size 1 named as well.

    A `jax.shard_map` that is not checked sums the gradient of an input over the axes its spec does not name. Over a
    single device that is nothing, but XLA does not always see it, and copies the array.
    """
    named = {axis for place in spec if place for axis in ((place,) if isinstance(place, str) else place)}
    mesh = jax.sharding.get_abstract_mesh()
    single = tuple(axis for axis in mesh.axis_names if mesh.shape[axis] == 1 and axis not in named)
    if len(spec) == 0:
        return spec
    first = (spec[0],) if isinstance(spec[0], str) else (spec[0] or ())
    return P((*first, *single), *spec[1:])


def is_gathered(*axes: str) -> bool:
    """Whether a stored weight with these axes is cut over devices that each need it whole, inside a `jax.shard_map`.

    Over one device there is nothing to gather, though XLA would copy it.
    """
    return any(STORED[axis] != USED[axis] and jax.lax.axis_size(STORED[axis]) > 1 for axis in axes)


def gathered(weight: jax.Array, *axes: str) -> jax.Array:
    """`as_used` for the inside of a `jax.shard_map`, where the weight is one device's part."""
    for dimension, axis in enumerate(axes):
        if is_gathered(axis):
            weight = jax.lax.all_gather(weight, STORED[axis], axis=dimension, tiled=True)
    return weight


def as_used(weight: jax.Array, *axes: str) -> jax.Array:
    """Gathers a stored weight for the layer that multiplies with it (the all-gather of fully sharded training)."""
    return jax.sharding.reshard(weight, partition_spec(axes, USED))
