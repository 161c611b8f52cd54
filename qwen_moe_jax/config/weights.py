"""Low-bit weights: how many bits, and how many numbers share a scale."""

import dataclasses
import math
from typing import Literal

from qwen_moe_jax.errors import ConfigError

Weights = Literal["int8", "int4"]

#: The fewest inputs that may share a scale: with fewer, the scales take more than an eighth of the bytes.
SMALLEST_GROUP = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """How matrices are stored in few bits; `nn.quantised` has the formulas.

    Attributes:
        bits: of an integer: 8, with a scale for each output, or 4, with one for each group of inputs of each output.
        group_size: inputs of a group; those of a matrix whose inputs do not divide by it are as many as both divide by.
    """

    bits: Literal[8, 4]
    group_size: int

    def groups(self, name: str, inputs: int) -> int:
        """The number of scales of each output of a matrix.

        Args:
            name: of the matrix, for messages.
            inputs: of the matrix.

        Raises:
            ConfigError: the inputs do not divide into groups of an even size, `SMALLEST_GROUP` at least.
        """
        if self.bits == 8:
            return 1
        size = inputs if inputs <= self.group_size else math.gcd(inputs, self.group_size)
        if size % 2 or size < min(SMALLEST_GROUP, inputs):
            raise ConfigError(
                f"weights=int4: {name} has {inputs} inputs, which divide into groups of {size} by "
                f"weights_group_size={self.group_size}; expected groups of an even size of at least {SMALLEST_GROUP}. "
                "Choose another weights_group_size, or weights=int8."
            )
        return inputs // size
