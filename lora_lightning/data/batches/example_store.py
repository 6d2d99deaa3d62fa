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
        values: All numbers.
        ends: 0, and where each list ends.
    """

    def __init__(self, values: array[int], ends: array[int]) -> None:
        self._values, self._ends = _tensor(values, torch.int32), _tensor(ends, torch.int64)

    @classmethod
    def of(cls, lists: Iterable[Iterable[int]]) -> Ragged:
        """These lists."""
        builder = _RaggedBuilder()
        for numbers in lists:
            builder.append(numbers)
        return builder.done()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Tensor:
        return self._values[self._ends[index] : self._ends[index + 1]]

    @property
    def lengths(self) -> list[int]:
        """Length of each list."""
        return self._ends.diff().tolist()


class _RaggedBuilder:
    """Builder of a `Ragged`; a Python list of ints takes 8 bytes a number, and mostly 28 more."""

    def __init__(self) -> None:
        self._values, self._ends = array("i"), array("q", [0])

    def append(self, numbers: Iterable[int]) -> None:
        self._values.extend(numbers)
        self._ends.append(len(self._values))

    def done(self) -> Ragged:
        return Ragged(self._values, self._ends)


def _tensor(numbers: array[int], dtype: torch.dtype) -> Tensor:
    if not numbers:  # which frombuffer does not take
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(numbers, dtype=dtype)


class ExampleStore(Dataset[Tokens]):
    """Encoded examples.

    Args:
        examples: Read once, in order.
    """

    def __init__(self, examples: Iterable[Example]) -> None:
        input_ids, labels = _RaggedBuilder(), _RaggedBuilder()
        for example in examples:
            input_ids.append(example.input_ids)
            labels.append(example.labels)
        self._input_ids, self._labels = input_ids.done(), labels.done()

    def __len__(self) -> int:
        return len(self._input_ids)

    def __getitem__(self, index: int) -> Tokens:
        return Tokens(self._input_ids[index], self._labels[index])

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return self._input_ids.lengths


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
        self._rows = None if rows is None else Ragged.of(rows)

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
