"""The border between ordinary JAX arrays and explicitly sharded ones.

Outside a model, arrays lie on a mesh with `Auto` axes: a user indexes, differentiates and optimises them as ever, with
no mesh context. Inside, every axis is `Explicit`: shardings stand in the types, a reshard is a word in the code, and a
mistake is an error at trace time instead of a silent all-gather.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P


def with_explicit_axes(function: Callable[..., Any], mesh: Mesh, inputs: Sequence[P]) -> Callable[..., Any]:
    """Wraps `function(module, *arrays)` so that its body sees explicitly sharded arrays. Call it while tracing.

    The module's parameters come in as stored (`param.spec`), the arrays as `inputs` say.
    Results go out with the sharding they ended up with.
    """

    def wrapped(module: nnx.Module, *arrays: jax.Array) -> Any:
        # explicit_axes takes shardings leaf by leaf: modules are opened here and closed again inside.
        leaves, treedef = jax.tree.flatten(module)
        specs = [param.spec for param in jax.tree.leaves(module, is_leaf=_is_param)]

        def body(leaves: list[jax.Array], arrays: tuple[jax.Array, ...]) -> Any:
            return function(jax.tree.unflatten(treedef, leaves), *arrays)

        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.sharding.explicit_axes(body, in_sharding=(specs, tuple(inputs)))(leaves, arrays)

    return wrapped


def _is_param(node: Any) -> bool:
    return isinstance(node, nnx.Variable)
