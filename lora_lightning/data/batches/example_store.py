"""Examples in little memory: flat tensors of 32 bits, which worker processes share."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lora_lightning.data.samples.sample import Example
from lora_lightning.utilities.constants import IGNORE_INDEX


class Tokens(NamedTuple):
    """An `Example` as tensors (int32)."""

    input_ids: Tensor
    labels: Tensor

    @classmethod
    def of(cls, example: Example) -> Tokens:
        """The tensors of `example`."""
        ids, labels = example.input_ids, example.labels
        return cls(torch.tensor(ids, dtype=torch.int32), torch.tensor(labels, dtype=torch.int32))


class Ragged:
    """Lists of integers, one behind the other.

    Args:
        lists: Read once, in order.
    """

    def __init__(self, lists: Iterable[Iterable[int]]) -> None:
        # A Python list of ints takes 8 bytes a number, and mostly 28 more.
        values, ends = array("i"), array("q", [0])
        for numbers in lists:
            values.extend(numbers)
            ends.append(len(values))
        # frombuffer takes no empty array
        self._values = torch.frombuffer(values or array("i", [0]), dtype=torch.int32)
        self._ends = torch.frombuffer(ends, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Tensor:
        return self._values[self._ends[index] : self._ends[index + 1]]

    @property
    def lengths(self) -> list[int]:
        """Length of each list."""
        return self._ends.diff().tolist()


class ExampleStore(Dataset[Tokens]):
    """Encoded examples.

    Args:
        examples: Read once, in order.
    """

    def __init__(self, examples: Iterable[Example]) -> None:
        # The ids of an example, then its labels.
        self._lists = Ragged(part for e in examples for part in (e.input_ids, e.labels))

    def __len__(self) -> int:
        return len(self._lists) // 2

    def __getitem__(self, index: int) -> Tokens:
        return Tokens(self._lists[2 * index], self._lists[2 * index + 1])

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return self._lists.lengths[::2]


class BatchRows(Dataset[list[Tokens]]):
    """Rows for batches, of one example each, or of several that are packed.

    The row one past the end is a first example of which nothing is learned. It fills up what
    processes share out, so that all have equally many and sums over labels stay what they are.

    Args:
        store: The examples.
        rows: The indices of the examples of each row. Default: one each.
    """

    def __init__(self, store: ExampleStore, rows: list[list[int]] | None = None) -> None:
        self.store = store
        self._rows = None if rows is None else Ragged(rows)

    def __len__(self) -> int:
        return len(self.store if self._rows is None else self._rows)

    def __getitem__(self, index: int) -> list[Tokens]:
        if index == len(self):
            first = self.store[0]
            return [first._replace(labels=torch.full_like(first.labels, IGNORE_INDEX))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self._rows is None:
            return [self.store[index]]
        return [self.store[example] for example in self._rows[index].tolist()]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        lengths = self.store.lengths
        if self._rows is None:
            return lengths
        return [sum(lengths[i] for i in self._rows[n].tolist()) for n in range(len(self._rows))]
