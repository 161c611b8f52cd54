"""Creating parameters: drawn in place on the mesh, or only described."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from qwen_moe_jax.config import ShardingRules
from qwen_moe_jax.sharding.rules import parameter_sharding

Kind = Literal["normal", "uniform", "zeros", "ones"]


class Untrained(nnx.Variable):
    """A weight that a rule of its own changes, and no optimizer: `nnx.state(model, nnx.Param)` is without it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterFactory:
    """What the modules' constructors draw their weights from.

    Each weight is created where the sharding rules put it, never whole on one device, and the values do not depend on
    the mesh. Each carries as metadata its logical axes (`param.axes`) and how it lies (`param.spec`).

    Attributes:
        mesh: where the parameters live.
        dtype: of the parameters.
        initializer_range: standard deviation of the matrices.
        rngs: source of keys; None describes the parameters (`jax.ShapeDtypeStruct` with sharding) without allocating.
        rules: what of a parameter lies where on the mesh.
        stack: None, or the number of layers that share one stacked array [layers, …].
    """

    mesh: Mesh
    dtype: str
    initializer_range: float
    rngs: nnx.Rngs | None
    rules: ShardingRules = ShardingRules()
    stack: int | None = None

    def stacked(self, count: int) -> "ParameterFactory":
        """A factory whose parameters have a leading axis of `count` layers."""
        return dataclasses.replace(self, stack=count)

    def normal(
        self, name: str, shape: tuple[int, ...], axes: tuple[str, ...], zero_row: int | None = None
    ) -> nnx.Param:
        """A matrix drawn from N(0, initializer_range²), as every Linear and Embedding of transformers.

        `zero_row` is left zero, as torch leaves the row of the padding token.
        """
        return self._create("normal", name, shape, axes, zero_row)

    def uniform(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...], bound: float) -> nnx.Param:
        """A matrix drawn evenly from [-bound, bound)."""
        return dataclasses.replace(self, initializer_range=bound)._create("uniform", name, shape, axes)

    def zeros(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
        """A bias, or what is to begin without effect."""
        return self._create("zeros", name, shape, axes)

    def ones(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
        """A norm's scale."""
        return self._create("ones", name, shape, axes)

    def untrained(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> Untrained:
        """Zeros in float32, whatever the dtype of the parameters: what changes by tiny steps must not be rounded."""
        # A key of its own: the weights beside it are those of a model without it.
        rngs = None if self.rngs is None else nnx.Rngs(0)
        created = dataclasses.replace(self, dtype="float32", rngs=rngs)._create("zeros", name, shape, axes)
        return Untrained(created.get_value(), axes=created.axes, spec=created.spec)

    def _create(
        self, kind: Kind, name: str, shape: tuple[int, ...], axes: tuple[str, ...], zero_row: int | None = None
    ) -> nnx.Param:
        if self.stack is not None:
            shape, axes = (self.stack, *shape), ("layers", *axes)
        sharding = parameter_sharding(name, shape, axes, self.mesh, self.rules)
        dtype = jnp.dtype(self.dtype)
        if self.rngs is None:
            described = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
            return nnx.Param(described, axes=axes, spec=sharding.spec)
        value = _drawer(kind, shape, dtype, sharding, zero_row)(self.rngs.params(), self.initializer_range)
        return nnx.Param(value, axes=axes, spec=sharding.spec)


@functools.cache
def _drawer(kind: Kind, shape: tuple[int, ...], dtype: jnp.dtype, sharding: NamedSharding, zero_row: int | None):
    """A compiled function (key, scale) → the parameter, each device drawing its own part."""

    def draw(key: jax.Array, scale: float) -> jax.Array:
        if kind == "normal":
            drawn = (scale * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
            return drawn if zero_row is None else drawn.at[zero_row].set(0)
        if kind == "uniform":
            return jax.random.uniform(key, shape, jnp.float32, -scale, scale).astype(dtype)
        return jnp.full(shape, 1.0 if kind == "ones" else 0.0, dtype)

    return jax.jit(draw, out_shardings=sharding)
