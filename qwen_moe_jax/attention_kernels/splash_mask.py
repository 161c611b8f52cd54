"""Which keys a query sees, as JAX's splash attention asks for it; imported by `splash.py` where its kernels are made.

The kernels compute the mask themselves, by `mask_function`. Their tables of blocks are made from slices of it, for each
pair of blocks of a row: those of which all is seen, or nothing, are one number here, or a row of 131,072 tokens would
take minutes.
"""

from typing import Any

import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask import Mask


class SeenKeys(Mask):
    """Causal, within a window.

    Args:
        positions_T: int32; of each query in its row; within a block of queries they follow one another.
        keys: of the row, in its order.
        window: keys that a query sees, itself included; None sees all before it.
    """

    def __init__(self, positions_T: np.ndarray, keys: int, window: int | None) -> None:
        self.q_sequence = positions_T
        self._keys, self._window = keys, window

    def mask_function(self, query_ids: Any, key_ids: Any) -> Any:
        """Whether each query sees each key, given their positions."""
        seen = query_ids >= key_ids
        return seen if self._window is None else seen & (query_ids - key_ids < self._window)

    @property
    def shape(self) -> tuple[int, ...]:
        """(queries, keys)."""
        return len(self.q_sequence), self._keys

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        """The mask of a block of queries and one of keys; one number, bool [1, 1], where it is the same for all."""
        queries, keys = self.q_sequence[index[0]], np.arange(index[1].start, index[1].stop, dtype=np.int32)
        nearest, farthest = int(queries[-1]) - int(keys[0]), int(queries[0]) - int(keys[-1])
        window = self._window or len(self.q_sequence) + self._keys
        if nearest < 0 or farthest >= window:
            return np.zeros((1, 1), bool)
        if farthest >= 0 and nearest < window:
            return np.ones((1, 1), bool)
        return self.mask_function(queries[:, None], keys[None])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SeenKeys) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[Any, ...]:
        return self.q_sequence.tobytes(), self._keys, self._window
