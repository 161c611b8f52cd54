"""Running a function on explicitly sharded arrays.

Outside a model, arrays are on a mesh with `Auto` axes: a user indexes, differentiates and optimises them as ever, with
no mesh context. Inside, every axis is `Explicit`: shardings are part of the types, a reshard is a call in the code, and
a mistake is an error at trace time instead of a silent all-gather.
"""

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.errors import ShardingError


def with_explicit_axes(function: Callable[..., Any], mesh: Mesh, in_specs: Sequence[Any]) -> Callable[..., Any]:
    """Wraps `function(module, *args)` so that its body sees explicitly sharded arrays. Call it while tracing.

    Inside a body that sees them already, the arrays are only resharded.

    Args:
        function: takes a module, and pytrees of arrays or None.
        mesh: of the module, with `Auto` axes.
        in_specs: a `PartitionSpec` for each of `args`, or a tree of them. The module's parameters are sharded as they
            are stored (`param.spec`).

    Returns:
        A function whose results have the sharding they ended up with. It raises a ShardingError where the caller has
        set a mesh of other axes (`jax.set_mesh`): one program cannot have both.
    """

    def wrapped(module: nnx.Module, *args: Any) -> Any:
        if not _fits(mesh):
            raise _refusal(mesh)
        # Shardings are given leaf by leaf: the module and the arguments are flattened here and put together inside.
        leaves, treedef = jax.tree.flatten((module, args))
        specs = [param.spec for param in jax.tree.leaves(module, is_leaf=_is_param)]
        specs += jax.tree.leaves(jax.tree.map(_spread, tuple(in_specs), args, is_leaf=_is_spec), is_leaf=_is_spec)

        def body(leaves: list[jax.Array]) -> Any:
            module, args = jax.tree.unflatten(treedef, leaves)
            return function(module, *args)

        if has_explicit_axes(mesh):
            return body([jax.sharding.reshard(leaf, spec) for leaf, spec in zip(leaves, specs, strict=True)])
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.sharding.explicit_axes(body, in_sharding=(specs,))(leaves)

    return wrapped


def apart_from_callers_mesh(mesh: Mesh) -> AbstractContextManager:
    """A context in which a compiled function runs on this mesh, whatever mesh the caller has set (`jax.set_mesh`).

    Raises:
        ShardingError: a program or a gradient is being traced under another mesh: one program cannot have both.
    """
    if _fits(mesh):
        return contextlib.nullcontext()
    try:
        return jax.set_mesh(None)
    except ValueError:
        raise _refusal(mesh) from None


def _fits(mesh: Mesh) -> bool:
    """Whether no mesh is set, or one with the axes of this one."""
    current = jax.sharding.get_abstract_mesh()
    return current.empty or current.shape_tuple == mesh.abstract_mesh.shape_tuple


def _refusal(mesh: Mesh) -> ShardingError:
    current = jax.sharding.get_abstract_mesh()
    return ShardingError(
        f"the model is on a mesh of {dict(mesh.shape)}, and a program or a gradient around it is traced under another, "
        f"{dict(current.shape)}: one program cannot have both. Set the model's own, jax.set_mesh(model.mesh), or trace "
        "where no mesh is set."
    )


def has_explicit_axes(mesh: Mesh) -> bool:
    """Whether the code that is being traced sees explicitly sharded arrays on this mesh."""
    current = jax.sharding.get_abstract_mesh()
    return current.shape_tuple == mesh.abstract_mesh.shape_tuple and all(
        kind == AxisType.Explicit for kind in current.axis_types
    )


def _spread(spec: P, tree: Any) -> Any:
    """The spec for every array of the tree."""
    return jax.tree.map(lambda _: spec, tree)


def _is_param(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _is_spec(node: Any) -> bool:
    return isinstance(node, P)
