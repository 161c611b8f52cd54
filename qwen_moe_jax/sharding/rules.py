"""From logical axes to mesh axes.

Every parameter names its logical axes ("expert", "embed", "ffn", …). `ShardingRules`, part of the execution config, map
them to the mesh axes that the stored parameter is sharded over; `COMPUTE_AXES` maps them to the mesh axes that a layer
computes with. What the rules add to `COMPUTE_AXES` is all-gathered for the layer. Routed experts are never gathered
over `expert`, and no weight over `tensor`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.config import ShardingRules
from qwen_moe_jax.errors import ShardingError

#: The mesh axes that the batch is sharded over, in this order.
BATCH = ("data", "fsdp", "expert")

#: The mesh axis that the positions of each row are sharded over.
CONTEXT = "context"

#: Whether the program that is traced shards positions over `context`; JAX keeps what it traces under either apart.
_shards_positions: Any = jax.make_user_context(default_value=True)

#: The mesh axes of each logical axis during a layer; the layers' arithmetic is written for these.
COMPUTE_AXES: Mapping[str, tuple[str, ...]] = {
    "layers": (),
    "vocab": ("tensor",),
    "heads": ("tensor",),  # rows of q, k, v: heads times head size; what each head has one of
    "ffn": ("tensor",),
    "embed": (),  # the hidden axis of dense weights
    "embed_pair": (),  # two of them side by side, the input of a next-token head
    "expert": ("expert",),
    "expert_embed": (),  # the hidden axis of routed experts, whose expert axis is already sharded over `expert`
    "norm": (),
    "conv": (),  # taps of a convolution, whose channels are heads
    "router": (),
    "labels": (),
    "rank": (),  # of low-rank adapters
    "group": (),  # of scales that count for all inputs of a quantised matrix
}

#: Logical axes whose size need not divide over the mesh: parameters are created with zeros after the last row, which
#: `param.unpadded_shape` leaves out. A vocabulary comes from a tokenizer; every other size is a choice, and labels are
#: not sharded.
PADDED_AXES = ("vocab",)


def batch_shards(mesh: Mesh) -> int:
    """The number of devices that share the batch: its rows are a multiple of it."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def positions_axis(mesh: Mesh | None = None) -> str | None:
    """The mesh axis of positions, of `mesh` or in the program that is traced; None where it has one device.

    Also None where `positions_over_context(False)` says so.

    Explicit axes tell an array whose sharding names an axis of one device from an array whose sharding does not. Steps
    of single tokens, and whatever else knows nothing of the axis, are written without it.
    """
    shape = jax.sharding.get_abstract_mesh().shape if mesh is None else mesh.shape
    return CONTEXT if shape[CONTEXT] > 1 and _shards_positions.value else None


def positions_over_context(sharded: bool) -> AbstractContextManager:
    """A context for tracing a step that shards its positions over `context`, or one that does not.

    Steps of a few tokens behind a cache do not: these are on every device of `context`, which shards its slots.
    """
    return _shards_positions(sharded)


def position_shards() -> int:
    """The number of devices that share the positions of a row in the program that is traced."""
    return jax.sharding.get_abstract_mesh().shape[CONTEXT] if positions_axis() else 1


def tokens_spec(*rest: str | None, mesh: Mesh | None = None) -> P:
    """The partition spec of activations [B, T, …]; `rest` is of the axes after T, `mesh` as in `positions_axis`."""
    return P(BATCH, positions_axis(mesh), *rest)


def token_shards() -> int:
    """The number of devices that share the tokens of a batch in the program that is traced."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[axis] for axis in BATCH) * position_shards()


def group_axes(*, without_expert: bool = False) -> tuple[str, ...]:
    """The mesh axes of groups of tokens, [G, …], in the program that is traced.

    `expert` is the last, so that it can be left out (`without_expert`) by an exchange over that axis alone.
    """
    context = positions_axis()
    axes = ("data", "fsdp") if context is None else ("data", "fsdp", context)
    return axes if without_expert else (*axes, "expert")


def stored(rules: ShardingRules) -> Mapping[str, tuple[str, ...]]:
    """The mesh axes that each logical axis of a stored parameter is sharded over."""
    return {**COMPUTE_AXES, **dataclasses.asdict(rules)}


def partition_spec(axes: Sequence[str], table: Mapping[str, tuple[str, ...]] = COMPUTE_AXES) -> P:
    """The partition spec of an array with these logical axes.

    Raises:
        ShardingError: an axis is not in the table, or two axes are sharded over the same mesh axis.
    """
    unknown = [axis for axis in axes if axis not in table]
    if unknown:
        raise ShardingError(f"unknown logical axes {unknown}: expected some of {list(table)}.")
    entries = [table[axis] for axis in axes]
    used = [name for entry in entries for name in entry]
    twice = sorted({name for name in used if used.count(name) > 1})
    if twice:
        both = [repr(axis) for axis, entry in zip(axes, entries, strict=True) if twice[0] in entry]
        raise ShardingError(
            f"logical axes {tuple(axes)} of one array: mesh axis {twice[0]!r} is used twice, by "
            f"{' and by '.join(both)}. It can shard one axis of an array: change the sharding rule of one of them."
        )
    return P(*(_entry(names) for names in entries))


def parameter_sharding(
    name: str, shape: Sequence[int], axes: Sequence[str], mesh: Mesh, rules: ShardingRules
) -> NamedSharding:
    """The sharding of a stored parameter.

    Args:
        name: of the parameter, for messages.
        shape: of the whole array, without padding.
        axes: logical axes, one per dimension.
        mesh: the model's mesh.
        rules: which mesh axes each logical axis is sharded over.

    Raises:
        ShardingError: a dimension that is not padded does not divide over its mesh axes; the message has the numbers.
    """
    table = stored(rules)
    try:
        spec = partition_spec(axes, table)
    except ShardingError as error:
        raise ShardingError(f"{name}: {error}") from None
    for size, axis in zip(shape, axes, strict=True):
        if axis not in PADDED_AXES and size % _num_shards(axis, table, mesh):
            over = ", ".join(f"{mesh_axis}={mesh.shape[mesh_axis]}" for mesh_axis in table[axis])
            raise ShardingError(
                f"{name}: its {axis!r} axis of size {size} (shape {tuple(shape)}) does not divide over the mesh axes "
                f"{over}. Choose mesh sizes that divide {size}, or another sharding rule for {axis!r}."
            )
    return NamedSharding(mesh, spec)


def require_whole_heads(name: str, counts: Mapping[str, int], mesh: Mesh) -> None:
    """Refuses numbers of heads that do not divide over the mesh axis `tensor`.

    Args:
        name: of the module, for messages.
        counts: by the name of their config field.
        mesh: the model's mesh.

    Raises:
        ShardingError: naming the first that does not divide.
    """
    num_shards = mesh.shape["tensor"]
    for field, count in counts.items():
        if count % num_shards:
            raise ShardingError(
                f"{name}: {field}={count} does not divide over the mesh axis tensor={num_shards}: a head is on one "
                f"device. Choose a tensor size that divides {count}."
            )


def padded_shape(shape: Sequence[int], axes: Sequence[str], mesh: Mesh, rules: ShardingRules) -> tuple[int, ...]:
    """The shape of a stored parameter: dimensions of `PADDED_AXES` are rounded up to a multiple of their shards."""
    table = stored(rules)
    multiples = [_num_shards(axis, table, mesh) if axis in PADDED_AXES else 1 for axis in axes]
    return tuple(math.ceil(size / multiple) * multiple for size, multiple in zip(shape, multiples, strict=True))


def spec_of(x: jax.Array) -> P:
    """The partition spec in the type of an array with explicit axes."""
    return jax.typeof(x).sharding.spec


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes in one entry of a partition spec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def with_single_axes(spec: P) -> P:
    """The same partition spec, with the mesh axes of size 1 named as well.

    A `jax.shard_map` that is not checked sums the gradient of an input over the axes its spec does not name. Over a
    single device that is nothing, but XLA does not always see it, and copies the array.
    """
    named = {axis for entry in spec for axis in mesh_axes(entry)}
    mesh = jax.sharding.get_abstract_mesh()
    single = tuple(axis for axis in mesh.axis_names if mesh.shape[axis] == 1 and axis not in named)
    if len(spec) == 0:
        return spec
    return P((*mesh_axes(spec[0]), *single), *spec[1:])


def needs_gather(spec: P, axes: Sequence[str]) -> bool:
    """Whether `all_gather_weight` communicates. Over one device it need not be called: XLA would copy the weight.

    Args:
        spec: of the stored weight.
        axes: its logical axes.
    """
    return any(_to_gather(entry, axis) for entry, axis in zip(spec, axes, strict=True))


def all_gather_weight(weight: jax.Array, spec: P, axes: Sequence[str]) -> jax.Array:
    """`gather_for_compute` inside a `jax.shard_map`, where `weight` is the shard of one device.

    Args:
        weight: the shard.
        spec: of the stored weight.
        axes: its logical axes.
    """
    for dimension, (entry, axis) in enumerate(zip(spec, axes, strict=True)):
        for name in reversed(_to_gather(entry, axis)):  # one after the other: see `_gathers`
            weight = jax.lax.all_gather(weight, name, axis=dimension, tiled=True)
    return weight


def gather_for_compute(weight: jax.Array, *axes: str) -> jax.Array:
    """Gathers a stored weight for the layer that multiplies with it (the all-gather of fully sharded training)."""
    entries = [mesh_axes(entry) for entry in spec_of(weight)]
    for dimension, name in _gathers(spec_of(weight), axes):
        entries[dimension] = entries[dimension][: entries[dimension].index(name)]
        weight = jax.sharding.reshard(weight, P(*map(_entry, entries)))
    return jax.sharding.reshard(weight, partition_spec(axes))


def gather_for_matmul(weight: jax.Array, *axes: str) -> jax.Array:
    """`gather_for_compute` for a weight that is multiplied with activations sharded as `tokens_spec` says.

    The type of the result says that the devices hold the same (`reduced`), and so that of its gradient says that they
    hold parts to be summed (`unreduced`): the gradient reaches the shards by reduce-scatters. From a replicated weight
    it would come back replicated, by an all-reduce of twice the bytes, which only some of XLA's compilers improve.
    Axes of the batch that it is not sharded over are summed last, when only shards are left.
    """
    spec, wanted = spec_of(weight), partition_spec(axes)
    summed = {*BATCH, *mesh_axes(positions_axis())} - {name for entry in wanted for name in mesh_axes(entry)}
    gathers = _gathers(spec, axes)

    def gather(shard: jax.Array) -> jax.Array:
        for dimension, name in gathers:
            shard = jax.lax.all_gather(shard, name, axis=dimension, tiled=True, to="reduced")
        return shard

    before = P(*spec, reduced=summed - {name for entry in spec for name in mesh_axes(entry)})
    weight = jax.sharding.reshard(weight, before)
    if gathers:
        over = {name for _, name in gathers}
        entries = [tuple(name for name in mesh_axes(entry) if name not in over) for entry in spec]
        after = P(*map(_entry, entries), reduced=before.reduced | over)
        weight = jax.shard_map(gather, in_specs=before, out_specs=after)(weight)
    return jax.sharding.reshard(weight, P(*wanted, reduced=summed))


def _gathers(spec: P, axes: Sequence[str]) -> list[tuple[int, str]]:
    """Over which mesh axes a weight is gathered, one after the other: (dimension, mesh axis), the minor ones first.

    One all-gather over several mesh axes is no ring in a TPU's network: libtpu's compiler makes it an all-reduce of
    twice the bytes, where one axis after the other sends little more than once what arrives. Mesh axes of one device
    are left out, and dimensions that no axes after those of the layer's arithmetic are to be gathered of.
    """
    size = jax.sharding.get_abstract_mesh().shape
    found = []
    for dimension, (entry, wanted) in enumerate(zip(spec, partition_spec(axes), strict=True)):
        stored, kept = mesh_axes(entry), mesh_axes(wanted)
        if stored[: len(kept)] == kept:
            found += [(dimension, name) for name in reversed(stored[len(kept) :]) if size[name] > 1]
    return found


def _num_shards(axis: str, table: Mapping[str, tuple[str, ...]], mesh: Mesh) -> int:
    return math.prod(mesh.shape[mesh_axis] for mesh_axis in table[axis])


def _to_gather(entry: str | tuple[str, ...] | None, axis: str) -> tuple[str, ...]:
    """The mesh axes, of more than one device, that an axis is stored over and not computed with."""
    return tuple(name for name in mesh_axes(entry) if name not in COMPUTE_AXES[axis] and jax.lax.axis_size(name) > 1)


def _entry(names: tuple[str, ...]) -> str | tuple[str, ...] | None:
    """Mesh axes as an entry of a partition spec."""
    return names if len(names) > 1 else (names[0] if names else None)
