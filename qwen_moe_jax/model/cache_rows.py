"""Rows of a cache: some of them taken out, put back, copied to another cache, cleared.

A chunk of one prompt is read with the rows that it needs, not with all, and tokens are decoded in those that have any.
Rows are numbered within the devices that hold them: row r of shard x is row `x * (B / X) + r` of the cache, and an
array of X · R numbers has R of each shard.
"""

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.model.cache import Cache, PagedKeyValues, Stored
from qwen_moe_jax.sharding.rules import BATCH

Tree = TypeVar("Tree")


def take_rows(
    cache: Cache, rows_R: jax.Array, lengths_R: jax.Array, mesh: Mesh, table_RM: jax.Array | None = None
) -> Cache:
    """These rows as a cache of their own, with the blocks of all.

    Args:
        cache: of all rows.
        rows_R: int32 [X · R]; a number that is no row takes any, for a place that is not used.
        lengths_R: int32; the tokens that each has.
        mesh: of the cache.
        table_RM: int32; their blocks, where keys and values are in blocks.
    """

    def take(x: jax.Array, row_R: jax.Array) -> jax.Array:
        return jnp.take(x, row_R, axis=1, mode="clip")

    taken = [tuple(_by_shard(take, stored, rows_R, mesh) for stored in period) for period in cache.segments]
    return dataclasses.replace(cache, segments=tuple(taken), lengths_B=lengths_R, table_BM=table_RM)


def put_rows(cache: Cache, part: Cache, rows_R: jax.Array, mesh: Mesh) -> Cache:
    """The cache with these rows of `part`, and their lengths; numbers that are no row are left out."""

    def put(x: jax.Array, row_R: jax.Array, new: jax.Array) -> jax.Array:
        return x.at[:, row_R].set(new, mode="drop")

    segments = [
        tuple(_by_shard(put, stored, rows_R, mesh, new) for stored, new in zip(period, others, strict=True))
        for period, others in zip(cache.segments, part.segments, strict=True)
    ]

    lengths_B = put_first(cache.lengths_B, part.lengths_B, rows_R, mesh)
    return dataclasses.replace(cache, segments=tuple(segments), lengths_B=lengths_B)


def take_first(tree: Tree, rows_R: jax.Array, mesh: Mesh) -> Tree:
    """These rows of arrays [B, …], of each device's own; a number that is no row takes any."""

    def local(tree: Tree, row_R: jax.Array) -> Tree:
        return jax.tree.map(lambda x: x.at[row_R].get(mode="clip"), tree)

    specs: Any = (P(BATCH), P(BATCH))
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(BATCH), check_vma=False)(tree, rows_R)


def put_first(tree: Tree, part: Tree, rows_R: jax.Array, mesh: Mesh) -> Tree:
    """Arrays [B, …] with these rows of `part`; numbers that are no row are left out."""

    def local(tree: Tree, part: Tree, row_R: jax.Array) -> Tree:
        return jax.tree.map(lambda x, new: x.at[row_R].set(new, mode="drop"), tree, part)

    specs: Any = (P(BATCH), P(BATCH), P(BATCH))
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(BATCH), check_vma=False)(tree, part, rows_R)


def _by_shard(function, stored: Stored, rows_R: jax.Array, mesh: Mesh, *others: Stored) -> Stored:
    """`function` of every array, on each device's own rows; blocks are no row's, and the newest there are."""
    if isinstance(stored, PagedKeyValues):
        return others[0] if others else stored
    spec = stored.specs()

    def local(stored: Stored, row_R: jax.Array, *others: Stored) -> Stored:
        return jax.tree.map(lambda x, *rest: function(x, row_R, *rest), stored, *others)

    specs = (spec, P(BATCH), *(spec for _ in others))
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)(stored, rows_R, *others)


def copy_rows(target: Cache, source: Cache, target_R: jax.Array, source_R: jax.Array, mesh: Mesh) -> Cache:
    """The target with copies of rows of another cache and their lengths, but without what they have in blocks.

    With a length of 0, a state would be taken for none.

    Args:
        target, source: of one model, with any numbers of rows.
        target_R, source_R: int32 [X · R]; a number that is no row of the target copies nothing.
        mesh: of both.
    """
    part = take_rows(source, source_R, take_first(source.lengths_B, source_R, mesh), mesh)
    segments = tuple(
        tuple(own if isinstance(own, PagedKeyValues) else new for own, new in zip(period, others, strict=True))
        for period, others in zip(target.segments, part.segments, strict=True)
    )
    return put_rows(target, dataclasses.replace(part, segments=segments), target_R, mesh)


def clear(cache: Cache, rows_R: jax.Array, blocks_R: jax.Array, mesh: Mesh) -> Cache:
    """The cache with zeros in these rows and blocks: a NaN of one text would reach the next, times zero.

    Args:
        cache: of all rows.
        rows_R, blocks_R: int32 [X · R] each, numbered on their devices; numbers that are none clear nothing.
        mesh: of the cache.
    """

    def zero(x: jax.Array, index_R: jax.Array) -> jax.Array:
        return x.at[:, index_R].set(0, mode="drop")

    def cleared(stored: Stored) -> Stored:
        spec, index_R = stored.specs(), blocks_R if isinstance(stored, PagedKeyValues) else rows_R
        local = jax.shard_map(
            lambda stored, index_R: jax.tree.map(lambda x: zero(x, index_R), stored),
            mesh=mesh,
            in_specs=(spec, P(BATCH)),
            out_specs=spec,
            check_vma=False,
        )
        return local(stored, index_R)

    return dataclasses.replace(cache, segments=tuple(tuple(map(cleared, period)) for period in cache.segments))
