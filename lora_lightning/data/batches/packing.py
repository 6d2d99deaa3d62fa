"""Packing: several examples in one row, so that little of a batch is padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into as few rows as is known to be cheap, each whole.

    The longest item first, each into the row with the least space that takes it (best-fit
    decreasing: never more than 11/9 of the fewest possible rows, plus one; D. S. Johnson, 1973).
    n log n.

    Args:
        lengths: Of the items; none exceeds `capacity`.
        capacity: Space of a row.

    Returns:
        The indices of the items of each row.
    """
    rows: list[list[int]] = []
    with_space: dict[int, list[list[int]]] = {}  # rows by the space that is left
    spaces: list[int] = []  # the keys of it, in order
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        place = bisect_left(spaces, lengths[index])
        if place == len(spaces):
            row: list[int] = []
            space = capacity
            rows.append(row)
        else:
            space = spaces[place]
            row = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[place]
        row.append(index)
        left = space - lengths[index]
        if left not in with_space:
            with_space[left] = []
            insort(spaces, left)
        with_space[left].append(row)
    return rows
