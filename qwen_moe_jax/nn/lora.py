"""A low-rank adapter (LoRA): two small matrices that are trained while the matrix they belong to is frozen."""

import dataclasses
import math

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.config import LoraConfig
from qwen_moe_jax.nn.matmul import weight_einsum
from qwen_moe_jax.nn.parameters import ParameterFactory


class LoraAdapter(nnx.Module):
    """`scaling · B (A x)`, added to a matrix [out, in] or to each of several, [E, out, in] (LoRA, arXiv 2106.09685).

    A is drawn as PEFT draws it, uniformly up to 1 / sqrt(in), and B is zero: it begins without effect. Each is sharded
    as the axis it shares with the matrix; those of experts as their experts. Both are `nnx.LoRAParam`, a kind of
    `nnx.Param`, so that Flax's filters tell them from the weights: `nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)`.

    Args:
        name: of the matrix, for messages.
        axes: logical axes of the matrix, (…, out, in).
        sizes: of the matrix.
        config: rank and scaling.
        make: where the parameters come from.
    """

    def __init__(
        self, name: str, axes: tuple[str, ...], sizes: tuple[int, ...], config: LoraConfig, make: ParameterFactory
    ):
        *lead_axes, out_axis, in_axis = axes
        *lead_sizes, rows, columns = sizes
        self.a_axes, self.b_axes = (*lead_axes, "rank", in_axis), (*lead_axes, out_axis, "rank")
        make = dataclasses.replace(make, variable=nnx.LoRAParam)
        bound = 1 / math.sqrt(columns)
        self.lora_A = make.uniform(f"{name}.lora_A", (*lead_sizes, config.r, columns), self.a_axes, bound)
        self.lora_B = make.zeros(f"{name}.lora_B", (*lead_sizes, rows, config.r), self.b_axes)
        self.scaling = config.scaling

    def __call__(self, x: jax.Array, letters: str, narrow: str, narrow_spec: P, out: P) -> jax.Array:
        """What is to be added to `einsum(letters, x, matrix)`, in the dtype of `x`.

        Args:
            x: activations.
            letters: einsum letters of (activations, matrix) → result.
            narrow: letters of the array between A and B, r among them.
            narrow_spec: its sharding.
            out: sharding of the result.
        """
        activations, matrix, result = letters.replace("->", ",").split(",")
        stack, row, column = matrix[:-2], matrix[-2], matrix[-1]
        x_r = self.narrowed(x, f"{activations},{stack}r{column}->{narrow}", narrow_spec)
        return weight_einsum(f"{narrow},{stack}{row}r->{result}", x_r, self.lora_B[...], self.b_axes, out)

    def narrowed(self, x: jax.Array, letters: str, narrow_spec: P) -> jax.Array:
        """`scaling · A x`, by the einsum letters of (activations, A) -> result."""
        return self.scaled(weight_einsum(letters, x, self.lora_A[...], self.a_axes, narrow_spec))

    def scaled(self, x_r: jax.Array) -> jax.Array:
        """What goes from A to B, [..., r]: times `scaling`."""
        return x_r * self.scaling

    def product(self) -> jax.Array:
        """`scaling · B A`, [layers, …, out, in] in float32: what merging adds to the matrix."""
        return self.scaling * jax.numpy.einsum(
            "...or,...ri->...oi", self.lora_B[...], self.lora_A[...], precision="highest"
        )
