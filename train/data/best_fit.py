"""Best-fit decreasing: the longest first, each into the fullest row that has room for it."""

import numpy as np


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Packs items of integer lengths into rows, with few rows.

    It needs at most 11/9 of the fewest rows that are possible, and one more (Johnson 1973). Rows with as much room are
    filled last in, first out, and items as long in their order: the result is a function of the lengths alone.

    Args:
        lengths: int64 [items], 0 to `capacity`.
        capacity: of a row.

    Returns:
        The items in the order of the rows, int64 [items], and how many each row has, int64 [rows]. Items of a row are
        in their own order; rows are in the order of their first item.
    """
    row_of = np.zeros(len(lengths), np.int64)
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows, by the room that they have
    rooms = 0  # bit n: there is a row with room for n
    rows = 0
    by_length = np.argsort(-lengths, kind="stable")
    for item, length in zip(by_length.tolist(), lengths[by_length].tolist(), strict=True):
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            row, room, rows = rows, capacity, rows + 1
        room -= length
        if not with_room[room]:
            rooms |= 1 << room
        with_room[room].append(row)
        row_of[item] = row
    first = np.full(rows, len(lengths), np.int64)
    np.minimum.at(first, row_of, np.arange(len(lengths)))
    order = np.lexsort((np.arange(len(lengths)), first[row_of]))
    return order, np.bincount(row_of, minlength=rows)[np.argsort(first)]
