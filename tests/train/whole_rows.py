"""A batch for tests of whole steps."""

import numpy as np

from train.data.batches import Batch


def batch_of(tokens_BT: np.ndarray) -> Batch:
    """One document a row; every token is its own target."""
    ones_BT = np.ones_like(tokens_BT)
    return Batch(
        tokens_BT=tokens_BT,
        targets_BT=tokens_BT,
        segment_ids_BT=ones_BT,
        positions_BT=ones_BT.cumsum(axis=1, dtype=np.int32) - 1,
        target_mask_BT=ones_BT > 0,
    )
