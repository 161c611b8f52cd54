"""Running a function on explicitly sharded arrays.

Outside a model, arrays are on a mesh with `Auto` axes: a user indexes, differentiates and optimises them as ever, with
no mesh context. Inside, every axis is `Explicit`: shardings are part of the types, a reshard is a call in the code, and
a mistake is an error at trace time instead of a silent all-gather.
"""

from collections.abc import Callable, Sequence
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
        _check_context(mesh)
        # Shardings are given leaf by leaf: the module and the arguments are flattened here and put together inside.
        leaves, treedef = jax.tree.flatten((module, args))
        specs = [param.spec for param in jax.tree.leaves(module, is_leaf=_is_param)]
        specs += jax.tree.leaves(jax.tree.map(_spread, tuple(in_specs), args, is_leaf=_is_spec), is_leaf=_is_spec)

        def body(leaves: list[jax.Array]) -> Any:
            module, args = jax.tree.unflatten(treedef, leaves)
            return function(module, *args)

        if _is_explicit(mesh):
            return body([jax.sharding.reshard(leaf, spec) for leaf, spec in zip(leaves, specs, strict=True)])
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.sharding.explicit_axes(body, in_sharding=(specs,))(leaves)

    return wrapped


def _check_context(mesh: Mesh) -> None:
    current = jax.sharding.get_abstract_mesh()
    if not current.empty and current.shape_tuple != mesh.abstract_mesh.shape_tuple:
        raise ShardingError(
            f"the model is on a mesh of {dict(mesh.shape)}, and the mesh that is set is {dict(current.shape)}. Set "
            "that of the model, jax.set_mesh(model.mesh), or call the model where no mesh is set."
        )


def _is_explicit(mesh: Mesh) -> bool:
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
