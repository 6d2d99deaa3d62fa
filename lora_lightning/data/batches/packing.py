"""Packing: several examples in one row, so that little of a batch is padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into as few rows as is known to be cheap, each whole.

    The longest item first, each into the row with the least room that takes it (best-fit
    decreasing: never more than 11/9 of the fewest possible rows, plus one; D. S. Johnson, 1973).
    n log n.

    Args:
        lengths: Of the items; none exceeds `capacity`.
        capacity: Room of a row.

    Returns:
        The indices of the items of each row.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[list[int]]] = {}  # rows by the room that is left
    rooms: list[int] = []  # the keys of it, in order
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        place = bisect_left(rooms, lengths[index])
        if place == len(rooms):
            row: list[int] = []
            room = capacity
            rows.append(row)
        else:
            room = rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        row.append(index)
        left = room - lengths[index]
        if left not in with_room:
            with_room[left] = []
            insort(rooms, left)
        with_room[left].append(row)
    return rows
