"""Weights in 8 or 4 bits: integers and their scales, quantised once and multiplied as they are stored.

**int8**, one scale for each output o of a matrix [O, I] (symmetric, as in LLM.int8, arXiv 2208.07339, and torchao's
`Int8WeightOnlyConfig`):

    s[o] = max_i |w[o, i]| / 127        q[o, i] = round(w[o, i] / s[o])         w ≈ q s

**int4**, one scale for each group g of consecutive inputs (symmetric and group-wise, as in GPTQ, arXiv 2210.17323, and
AWQ, arXiv 2306.00978; a scale with a sign uses all sixteen numbers, as in llama.cpp's Q4_0):

    u = max(max w / 7, -min w / 8)      v = max(-min w / 7, max w / 8)          over the group
    s[o, g] = u if u <= v else -v       q[o, i] = round(w[o, i] / s[o, g]) in -8 … 7

Rounding is to the nearest, ties to even, so that |w - q s| <= |s| / 2. Scales of int8 are float32; those of int4 are
rounded to bfloat16 before they are used. A run of 16 int4 is 8 bytes: byte j has number j in its lower half and number
j + 8 in its upper one, each plus 8, so that unpacking moves no single numbers; `nn.kernels` reads them so. Where a
group is no multiple of 16, the group is the run.

Letters of this file besides the package's: O outputs, I inputs, `G` groups of inputs, with 1 for int8.
"""

import dataclasses
import functools
from collections.abc import Callable
from types import EllipsisType, ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.config.weights import WeightFormat
from qwen_moe_jax.sharding.rules import all_gather_weight, gather_for_compute, spec_of


class QuantisedParam(nnx.Variable):
    """The integers or the scales of a matrix, which no optimizer trains: `nnx.state(model, nnx.Param)` is without."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """Matrices [..., O, I] as plain arrays of integers and scales; in a shard_map, one device's shards.

    Attributes:
        integers: int8 [..., O, I], or two int4 a byte, uint8 [..., O, I / 2].
        scales: float32 [..., 1, O], or bfloat16 [..., G, O].
    """

    integers: Any
    scales: Any

    @property
    def bits(self) -> int:
        """Of an integer: 8 or 4."""
        return 4 if self.integers.dtype == jnp.uint8 else 8

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., O, I]."""
        *lead, columns = self.integers.shape
        return (*lead, columns * 8 // self.bits)

    def dequantised(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The matrices [..., O, I] in this dtype: integer times scale in float32, rounded once."""
        groups, scales = self.scales.shape[-2], jnp.swapaxes(self.scales, -1, -2).astype(jnp.float32)
        if self.bits == 8:
            return (self.integers.astype(jnp.float32) * scales).astype(dtype)
        columns = self.shape[-1]
        run = packed_run(columns // groups)
        packed = _split(self.integers, columns // run)
        numbers = _joined(jnp.concatenate([packed & 15, packed >> 4], axis=-1).astype(jnp.float32) - 8)
        return _joined(_split(numbers, groups) * scales[..., None]).astype(dtype)

    def gathered(self, axes: tuple[str, ...]) -> "Quantised":
        """`gather_for_compute` of matrices with these logical axes: the integers travel, not floats."""
        return Quantised(
            gather_for_compute(self.integers, *axes),
            gather_for_compute(self.scales, *scale_axes(axes, self.bits)),
        )

    def all_gathered(self, specs: "Quantised", axes: tuple[str, ...]) -> "Quantised":
        """`all_gather_weight` of matrices with these logical axes, inside a shard_map."""
        return Quantised(
            all_gather_weight(self.integers, specs.integers, axes),
            all_gather_weight(self.scales, specs.scales, scale_axes(axes, self.bits)),
        )


#: A stored weight: an array of floats, or integers with scales.
Weight = jax.Array | Quantised


class QuantisedMatrix(nnx.Module):
    """A matrix [..., O, I] of a module, stored as `Quantised`; it takes the place of an `nnx.Param`.

    Args:
        integers, scales: variables with `axes`, `spec` and `unpadded_shape`.
        axes: logical axes of the matrix.
    """

    def __init__(self, integers: QuantisedParam, scales: QuantisedParam, axes: tuple[str, ...]):
        self.integers, self.scales, self.axes = integers, scales, axes

    def __getitem__(self, everything: EllipsisType) -> Quantised:
        """`matrix[...]`: its arrays."""
        return Quantised(self.integers[...], self.scales[...])

    def get_value(self) -> Quantised:
        """Its arrays, or what describes them in an abstract model."""
        return Quantised(self.integers.get_value(), self.scales.get_value())

    @property
    def unpadded_shape(self) -> tuple[int, ...]:
        """[..., O, I]."""
        return self.shape

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., O, I]."""
        return self.get_value().shape


def scale_axes(axes: tuple[str, ...], bits: int) -> tuple[str, ...]:
    """The logical axes of the scales [..., G, O] of matrices [..., O, I]: groups are sharded as their inputs."""
    *lead, outputs, inputs = axes
    return (*lead, inputs if bits == 4 else "group", outputs)


def packed_run(group: int) -> int:
    """How many int4 are packed as one run, of which the second half is in the upper halves of the bytes."""
    return 16 if group % 16 == 0 else group


def quantised_shapes(name: str, shape: tuple[int, ...], format: WeightFormat) -> Quantised:
    """Shape and dtype of the arrays of matrices [..., O, I]; `name` is for messages.

    Raises:
        ConfigError: the inputs do not divide into groups.
    """
    *lead, outputs, inputs = shape
    groups = format.groups(name, inputs)
    if format.bits == 8:
        return Quantised(jax.ShapeDtypeStruct(shape, jnp.int8), jax.ShapeDtypeStruct((*lead, 1, outputs), jnp.float32))
    return Quantised(
        jax.ShapeDtypeStruct((*lead, outputs, inputs // 2), jnp.uint8),
        jax.ShapeDtypeStruct((*lead, groups, outputs), jnp.bfloat16),
    )


def quantise(weights: Any, bits: int, groups: int, xp: ModuleType = jnp) -> Quantised:
    """Matrices [..., O, I] of floats as integers and scales, by the formulas at the head of the file.

    Args:
        weights: computed with in float32.
        bits: 8 or 4.
        groups: of the inputs; 1 for 8 bits.
        xp: `jax.numpy` or `numpy`, whose arrays these are; the results are the same bits.
    """
    scales = scales_of(weights, bits, groups, xp)
    return Quantised(integers_of(weights, scales, bits, xp), scales)


def scales_of(weights: Any, bits: int, groups: int, xp: ModuleType = jnp) -> Any:
    """The scales of matrices, [..., G, O]; arguments as `quantise` has them."""
    weights = weights.astype(np.float32)
    if bits == 8:
        return (xp.max(xp.abs(weights), axis=-1) * np.float32(1 / 127))[..., None, :]
    grouped = weights.reshape(*weights.shape[:-1], groups, -1)
    high, low = xp.max(grouped, axis=-1), xp.min(grouped, axis=-1)
    seventh, eighth = np.float32(1 / 7), np.float32(1 / 8)  # a compiler divides by a constant so
    plus, minus = xp.maximum(high * seventh, -low * eighth), xp.maximum(-low * seventh, high * eighth)
    return xp.swapaxes(xp.where(plus <= minus, plus, -minus).astype(jnp.bfloat16), -1, -2)


def integers_of(weights: Any, scales: Any, bits: int, xp: ModuleType = jnp) -> Any:
    """The integers of matrices, packed if they are int4, of these scales; arguments as `quantise` has them.

    With 8 bits, some of the inputs may be given.
    """
    weights, groups = weights.astype(np.float32), scales.shape[-2]
    divisors = xp.swapaxes(scales, -1, -2).astype(np.float32)
    divisors = xp.where(divisors == 0, np.float32(1), divisors)
    if bits == 8:
        return xp.rint(weights / divisors).astype(np.int8)
    grouped = weights.reshape(*weights.shape[:-1], groups, -1)
    numbers = xp.clip(xp.rint(grouped / divisors[..., None]), -8, 7) + np.float32(8)
    run = packed_run(numbers.shape[-1])
    numbers = numbers.astype(np.uint8).reshape(*weights.shape[:-1], -1, run)
    packed = numbers[..., : run // 2] | (numbers[..., run // 2 :] << 4)
    return packed.reshape(*weights.shape[:-1], -1)


def _split(x: jax.Array, count: int) -> jax.Array:
    """[..., I] to [..., count, I / count], sharded along `count` as it was along I."""
    *lead, size = x.shape
    return jnp.reshape(x, (*lead, count, size // count), out_sharding=_spec(x, lambda spec: P(*spec, None)))


def _joined(x: jax.Array) -> jax.Array:
    """The inverse of `_split`."""
    *lead, count, size = x.shape
    return jnp.reshape(x, (*lead, count * size), out_sharding=_spec(x, lambda spec: P(*spec[:-1])))


def _spec(x: jax.Array, change: Callable[[P], P]) -> P | None:
    """The changed partition spec of an array with explicit axes; None of other arrays."""
    kinds = jax.sharding.get_abstract_mesh().axis_types
    return change(spec_of(x)) if AxisType.Explicit in kinds else None


def as_matrix(weight: Weight, dtype: jax.typing.DTypeLike) -> jax.Array:
    """A stored weight in the dtype of a product."""
    return weight.dequantised(dtype) if isinstance(weight, Quantised) else weight.astype(dtype)


def quantised_einsum(
    letters: str,
    x: jax.Array,
    weight: Quantised,
    out: P | None = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """`einsum(letters, x, matrices)`, accumulated in float32; gradients reach `x` only.

    Scales of int8 multiply the sums, `(x @ q) s`, where they are constant over the sum; others multiply the integers
    first.

    Args:
        letters: einsum letters of (activations, matrices [..., O, I]) → result.
        x: activations.
        weight: gathered for the computation.
        out: sharding of the result; None inside a shard_map.
        preferred_element_type: of the result; None is that of `x`.
    """
    return _einsum(letters, out, jnp.dtype(preferred_element_type or x.dtype), x, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _einsum(letters: str, out: P | None, dtype: jnp.dtype, x: jax.Array, weight: Quantised) -> jax.Array:
    """`quantised_einsum`; its backward pass dequantises again, whatever a remat policy would keep."""
    _, matrix, result = letters.replace("->", ",").split(",")
    if weight.bits == 4 or not set(matrix[:-1]) <= set(result):
        product = jnp.einsum(
            letters, x, weight.dequantised(x.dtype), out_sharding=out, preferred_element_type=jnp.float32
        )
        return product.astype(dtype)
    sums = jnp.einsum(letters, x, weight.integers.astype(x.dtype), out_sharding=out, preferred_element_type=jnp.float32)
    scales = jnp.squeeze(weight.scales, -2)
    new = tuple(position for position, letter in enumerate(result) if letter not in matrix)
    return (sums * jnp.expand_dims(scales, new)).astype(dtype)


def _einsum_forward(letters: str, out: P | None, dtype: jnp.dtype, x: jax.Array, weight: Quantised):
    return _einsum(letters, out, dtype, x, weight), (x, weight)


def _einsum_backward(letters: str, out: P | None, dtype: jnp.dtype, saved: tuple[jax.Array, Quantised], gradient):
    x, weight = saved
    # As in the forward pass, outside of whose context this is traced: float32 is multiplied in float32.
    with jax.default_matmul_precision("highest" if x.dtype == jnp.float32 else None):
        _, pull = jax.vjp(lambda x: _einsum.fun(letters, out, dtype, x, weight), x)
        return pull(gradient)[0], None


_einsum.defvjp(_einsum_forward, _einsum_backward)
