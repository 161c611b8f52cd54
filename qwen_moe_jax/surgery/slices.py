"""Tensors of a new model that are made from an old model's while they are read."""

import dataclasses

import numpy as np

from qwen_moe_jax.storage.tensor import Index, StoredTensor, TensorView, index_shape

#: Values that are drawn at once.
_DRAWN = 1 << 20


@dataclasses.dataclass(frozen=True)
class Scaled(TensorView):
    """A tensor times a number: multiplied in float32 and rounded to its dtype."""

    tensor: StoredTensor
    factor: float

    def read_into(self, index: Index, out: np.ndarray) -> None:
        values = self.tensor.read(index).astype(np.float32) * np.float32(self.factor)
        out[...] = values.astype(self.dtype)


@dataclasses.dataclass(frozen=True)
class Redrawn(TensorView):
    """A matrix some of whose values are drawn anew, each with the same probability, from a normal distribution.

    The same seed gives the same values, in whatever blocks the matrix is read.

    Attributes:
        tensor: the matrix.
        share: probability of a value to be drawn.
        std: standard deviation of the drawn values.
        seed: numbers that identify the draw: the user's, of the layer, the expert, the matrix.
    """

    tensor: StoredTensor
    share: float
    std: float
    seed: tuple[int, ...]

    def read_into(self, index: Index, out: np.ndarray) -> None:
        self.tensor.read_into(index, out)
        rows, columns = index
        each = max(_DRAWN // self.shape[1], 1)
        for chunk in range(rows.start // each, -(-rows.stop // each)):
            generator = np.random.default_rng((*self.seed, chunk))
            size = min(each, self.shape[0] - chunk * each), self.shape[1]
            drawn = generator.random(size, np.float32) < self.share
            values = generator.standard_normal(size, np.float32) * np.float32(self.std)
            first, last = max(rows.start, chunk * each), min(rows.stop, chunk * each + size[0])
            inside = slice(first - chunk * each, last - chunk * each), columns
            part = out[first - rows.start : last - rows.start]
            part[...] = np.where(drawn[inside], values[inside].astype(out.dtype), part)


@dataclasses.dataclass(frozen=True)
class WeightedSum(StoredTensor):
    """The sum of matrices of one shape, each times a number: in float32, rounded once.

    Attributes:
        tensors: the matrices, one at least.
        weights: a number for each.
    """

    tensors: tuple[StoredTensor, ...]
    weights: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensors[0].shape

    @property
    def dtype(self) -> str:
        return self.tensors[0].dtype

    @property
    def source(self) -> str:
        return self.tensors[0].source

    def read_into(self, index: Index, out: np.ndarray) -> None:
        total = np.zeros(index_shape(index), np.float32)
        for tensor, weight in zip(self.tensors, self.weights, strict=True):
            total += tensor.read(index).astype(np.float32) * np.float32(weight)
        out[...] = total.astype(self.dtype)
