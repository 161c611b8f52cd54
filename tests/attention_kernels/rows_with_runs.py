"""Rows in which segments and padding alternate, and where in them each separate run is."""

import numpy as np
from hypothesis import strategies as st


def separate_runs(segment_ids_T: np.ndarray) -> list[np.ndarray]:
    """Positions of the real tokens of each run of a row: padding is skipped, another segment's token begins a run."""
    runs: list[list[int]] = [[]]
    for position in np.flatnonzero(segment_ids_T):
        if runs[-1] and segment_ids_T[position] != segment_ids_T[runs[-1][-1]]:
            runs.append([])
        runs[-1].append(position)
    return [np.array(run, int) for run in runs]


def layouts(length: int) -> st.SearchStrategy[np.ndarray]:
    """Segment ids of a row: pieces of padding and of three segments in any order, so that a segment may come back."""
    pieces = st.lists(st.tuples(st.integers(0, 3), st.integers(1, length)), min_size=1, max_size=length)
    return pieces.map(
        lambda pieces: np.resize(np.concatenate([np.full(count, segment) for segment, count in pieces]), length)
    ).map(lambda ids_T: ids_T.astype(np.int32))
