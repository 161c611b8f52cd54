"""A tensor with its rows or columns in another order."""

import dataclasses

import numpy as np

from qwen_moe_jax.storage.tensor import Index, StoredTensor, TensorView


@dataclasses.dataclass(frozen=True)
class Picked(TensorView):
    """Rows or columns of a tensor, by their numbers. (Long runs of rows of several tensors are `PickedRows`.)

    Attributes:
        tensor: the tensor.
        axis: 0 for rows, 1 for columns of a matrix.
        order: numbers of its rows or columns.
    """

    tensor: StoredTensor
    axis: int
    order: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.tensor.shape)
        shape[self.axis] = len(self.order)
        return tuple(shape)

    def read_into(self, index: Index, out: np.ndarray) -> None:
        wanted = self.order[index[self.axis]]
        if self.axis == 1:
            out[...] = self.tensor.read((index[0], slice(0, self.tensor.shape[1])))[:, wanted]
            return
        # Runs of neighbouring rows are read at once.
        starts = np.flatnonzero(np.diff(wanted, prepend=wanted[:1] - 2) != 1)
        for start, stop in zip(starts, [*starts[1:], len(wanted)], strict=True):
            rows = slice(int(wanted[start]), int(wanted[start]) + int(stop - start))
            out[start:stop] = self.tensor.read((rows, *index[1:]))
