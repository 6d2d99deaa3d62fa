"""The order of an epoch, shared out over the processes of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DistributedSampler

from lora_lightning.data.sampler import length_grouped


class EpochSampler(DistributedSampler[Any]):
    """Indices of rows, in an order that the seed and the number of the epoch say, and nothing else.

    So all processes agree, and a resumed run finds the order again. Each process takes every
    `num_replicas`-th row: what they have in a step are the rows that one process with so much
    larger batches has. Where the rows do not share out evenly, the index `len(lengths)` fills up
    (`BatchRows` has a row there of which nothing is learned), so that all have equally many, and no
    row counts twice.

    A DistributedSampler, which Lightning leaves in place and tells the epoch.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows per batch and process.
        shuffle: A random order; else that of `lengths`, or by length.
        group: Rows of about equal length share a batch.
        num_replicas: How many processes.
        rank: This process.
        seed: Of the random order.
    """

    def __init__(
        self,
        lengths: list[int],
        batch_size: int,
        *,
        shuffle: bool,
        group: bool,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(lengths, num_replicas, rank, shuffle, seed)  # type: ignore[arg-type]
        self.lengths = lengths
        self.batch_size = batch_size
        self.group = group

    def __iter__(self) -> Iterator[int]:
        order = self._order()
        order += [len(order)] * (self.total_size - len(order))
        return iter(order[self.rank :: self.num_replicas])

    def _order(self) -> list[int]:
        lengths = self.lengths
        if self.shuffle:
            generator = torch.Generator().manual_seed(mixed(self.seed, self.epoch))
            if self.group:
                return length_grouped(lengths, self.batch_size * self.num_replicas, generator)
            return torch.randperm(len(lengths), generator=generator).tolist()
        return sorted(range(len(lengths)), key=lengths.__getitem__ if self.group else None)


def mixed(seed: int, *numbers: int) -> int:
    """A seed that differs where any of the numbers does."""
    for number in numbers:  # torch seeds neighbours with unrelated states
        seed = (seed * 1_000_003 + number + 1) % 2**63
    return seed
