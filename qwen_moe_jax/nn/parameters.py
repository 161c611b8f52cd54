"""Creating parameters: drawn in place on the mesh, or abstract."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from qwen_moe_jax.config import ShardingRules
from qwen_moe_jax.config.weights import WeightFormat
from qwen_moe_jax.errors import ShardingError
from qwen_moe_jax.nn.quantised import Quantised, QuantisedMatrix, QuantisedParam, quantise, quantised_shapes, scale_axes
from qwen_moe_jax.sharding.rules import padded_shape, parameter_sharding

Kind = Literal["normal", "uniform", "log_uniform", "zeros", "ones"]


class Untrained(nnx.Variable):
    """A weight that a rule of its own changes, and no optimizer: `nnx.state(model, nnx.Param)` is without it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterFactory:
    """What the constructors of modules create their parameters with.

    Each parameter is created with the sharding that the rules give it, never whole on one device, and its values do not
    depend on the mesh. As metadata it carries its logical axes (`param.axes`), its partition spec (`param.spec`) and
    its shape without padding (`param.unpadded_shape`, see `sharding.rules.PADDED_AXES`).

    Rows of padding are zero and stay zero under AdamW with weight decay, clipping and accumulation: no token selects
    them and no loss counts them, so that their gradients and moments are exactly zero.

    Attributes:
        mesh: of the model.
        dtype: of the parameters.
        initializer_range: standard deviation of the matrices.
        rngs: source of keys; None makes abstract parameters (`jax.ShapeDtypeStruct` with sharding).
        rules: which mesh axes each logical axis is sharded over.
        stack: None, or the number of layers that share one stacked array [layers, …].
        variable: type of the variables, by which Flax's filters select them.
        weights: how the matrices of layers are stored in few bits; None stores floats.
    """

    mesh: Mesh
    dtype: str
    initializer_range: float
    rngs: nnx.Rngs | None
    rules: ShardingRules = ShardingRules()
    stack: int | None = None
    variable: type[nnx.Variable] = nnx.Param
    weights: WeightFormat | None = None

    def stacked(self, count: int) -> "ParameterFactory":
        """A factory whose parameters have a leading axis of `count` layers."""
        return dataclasses.replace(self, stack=count)

    def in_float32(self) -> "ParameterFactory":
        """A factory of float32 parameters."""
        return dataclasses.replace(self, dtype="float32")

    def of_floats(self) -> "ParameterFactory":
        """A factory whose matrices are floats: of routers, heads and decay rates."""
        return dataclasses.replace(self, weights=None)

    def matrix(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param | QuantisedMatrix:
        """`normal`, stored as `weights` says.

        Raises:
            ConfigError: its inputs do not divide into groups (`WeightFormat.groups`).
            ShardingError: it does not divide over the mesh, or its groups do not.
        """
        drawn = self.normal(name, shape, axes)
        if self.weights is None:
            return drawn
        axes, bits = drawn.axes, self.weights.bits
        described = quantised_shapes(name, drawn.unpadded_shape, self.weights)
        integers = self._part(f"{name} (integers)", described.integers, axes, math.prod(drawn.unpadded_shape))
        scales = self._part(f"{name} (scales)", described.scales, scale_axes(axes, bits), 0)
        if self.rngs is not None:
            shardings = integers.get_value().sharding, scales.get_value().sharding
            arrays = _quantise(bits, described.scales.shape[-2], shardings)(drawn.get_value())
            integers.set_value(arrays[0])
            scales.set_value(arrays[1])
        return QuantisedMatrix(integers, scales, axes)

    def _part(self, name: str, array: jax.ShapeDtypeStruct, axes: tuple[str, ...], numbers: int) -> QuantisedParam:
        """An abstract parameter, not padded, that stores so many weights."""
        try:
            sharding = parameter_sharding(name, array.shape, axes, self.mesh, self.rules)
        except ShardingError as error:
            raise ShardingError(f"{error} A smaller weights_group_size makes more groups of int4.") from None
        stored = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
        return QuantisedParam(stored, axes=axes, spec=sharding.spec, unpadded_shape=array.shape, numbers=numbers)

    def normal(
        self, name: str, shape: tuple[int, ...], axes: tuple[str, ...], zero_row: int | None = None
    ) -> nnx.Param:
        """A matrix drawn from N(0, initializer_range²), as every Linear and Embedding of transformers.

        Row `zero_row` is zero, as torch initialises the row of the padding token.
        """
        return self._create("normal", name, shape, axes, zero_row)

    def uniform(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...], bound: float) -> nnx.Param:
        """A matrix drawn uniformly from [-bound, bound)."""
        return dataclasses.replace(self, initializer_range=bound)._create("uniform", name, shape, axes)

    def log_uniform(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...], bound: float) -> nnx.Param:
        """Logarithms of numbers drawn uniformly from [0.01, bound): above 0, whose logarithm would be infinite."""
        return dataclasses.replace(self, initializer_range=bound)._create("log_uniform", name, shape, axes)

    def zeros(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
        """A bias, or a matrix that starts without effect."""
        return self._create("zeros", name, shape, axes)

    def ones(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
        """A norm's scale."""
        return self._create("ones", name, shape, axes)

    def untrained(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> Untrained:
        """Zeros in float32, whatever the dtype of the parameters: what changes by tiny steps must not be rounded."""
        # A key of its own: the other weights are those of a model without it.
        rngs = None if self.rngs is None else nnx.Rngs(0)
        make = dataclasses.replace(self, dtype="float32", rngs=rngs, variable=Untrained)
        return make._create("zeros", name, shape, axes)

    def _create(
        self, kind: Kind, name: str, shape: tuple[int, ...], axes: tuple[str, ...], zero_row: int | None = None
    ) -> Any:
        if self.stack is not None:
            shape, axes = (self.stack, *shape), ("layers", *axes)
        sharding = parameter_sharding(name, shape, axes, self.mesh, self.rules)
        stored = jax.ShapeDtypeStruct(
            padded_shape(shape, axes, self.mesh, self.rules), jnp.dtype(self.dtype), sharding=sharding
        )
        value: jax.Array | jax.ShapeDtypeStruct = stored
        if self.rngs is not None:
            value = _initializer(kind, shape, stored, zero_row)(self.rngs.params(), self.initializer_range)
        return self.variable(value, axes=axes, spec=sharding.spec, unpadded_shape=shape)


def as_rngs(source: Any) -> nnx.Rngs | None:
    """`nnx.Rngs` of itself, of a key (`jax.random.key(0)`) or of a seed; None of None.

    Raises:
        TypeError: anything else.
    """
    if source is None or isinstance(source, nnx.Rngs):
        return source
    if isinstance(source, int | np.integer) and not isinstance(source, bool):
        return nnx.Rngs(int(source))
    if isinstance(source, jax.Array):
        return nnx.Rngs(source)
    raise TypeError(f"rngs={source!r:.80} is not supported: expected nnx.Rngs(0), jax.random.key(0), a seed or None.")


def parameters_with_paths(module: Any) -> Iterator[tuple[str, nnx.Variable]]:
    """Every parameter and its path with dots ("model.norm.weight"), in the order of `jax.tree.leaves(module)`.

    Works on anything with a module's structure: weights, gradients, abstract parameters.
    """
    for keys, param in jax.tree_util.tree_leaves_with_path(module, is_leaf=lambda node: isinstance(node, nnx.Variable)):
        yield jax.tree_util.keystr(keys, simple=True, separator="."), param


@functools.cache
def _quantise(bits: int, groups: int, shardings: tuple[Any, Any]) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    return jax.jit(lambda drawn: _parts(quantise(drawn, bits, groups)), out_shardings=shardings)


def _parts(matrix: Quantised) -> tuple[jax.Array, jax.Array]:
    return matrix.integers, matrix.scales


@functools.cache
def _initializer(
    kind: Kind, shape: tuple[int, ...], stored: jax.ShapeDtypeStruct, zero_row: int | None
) -> Callable[[jax.Array, float], jax.Array]:
    """A compiled function (key, scale) → the parameter, each device drawing its own shard.

    Args:
        kind: of the distribution.
        shape: without padding: what is drawn does not depend on the mesh.
        stored: shape with padding, dtype and sharding of the result.
        zero_row: a row that is zero, or None.
    """
    padding = [(0, whole - size) for whole, size in zip(stored.shape, shape, strict=True)]

    def draw(key: jax.Array, scale: float) -> jax.Array:
        if kind == "normal":
            drawn = (scale * jax.random.normal(key, shape, jnp.float32)).astype(stored.dtype)
            return drawn if zero_row is None else drawn.at[zero_row].set(0)
        if kind == "uniform":
            return jax.random.uniform(key, shape, jnp.float32, -scale, scale).astype(stored.dtype)
        if kind == "log_uniform":
            return jnp.log(jax.random.uniform(key, shape, jnp.float32, 0.01, scale)).astype(stored.dtype)
        return jnp.full(shape, 1.0 if kind == "ones" else 0.0, stored.dtype)

    return jax.jit(lambda key, scale: jnp.pad(draw(key, scale), padding), out_shardings=stored.sharding)
