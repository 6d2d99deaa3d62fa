"""Order of an epoch's rows, and each process's share of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DistributedSampler

# Batches sorted together: enough to find texts of equal length, few enough to stay random.
BATCHES_PER_POOL = 50


class EpochSampler(DistributedSampler[Any]):
    """Indices of rows, in an order that the seed and the number of the epoch say, and nothing else.

    So all processes agree, and a resumed run finds the order again. Each process takes every
    `num_replicas`-th row: what they have in a step are the rows that one process with so much
    larger batches has. Where the rows do not share out evenly, the index `len(lengths)` fills up
    (`BatchRows` and `Labelled` have a row there that counts for nothing), so that all have equally
    many, and no row counts twice.

    A DistributedSampler, which Lightning leaves in place and tells the epoch.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows per batch and process.
        shuffle: A random order; else that of `lengths`, or by length.
        group: Rows of about equal length share a batch.
        num_replicas, rank, seed: As for DistributedSampler.
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


def length_grouped(
    lengths: list[int], batch_size: int, generator: torch.Generator | None = None
) -> list[int]:
    """Random indices, so ordered that consecutive batches waste little on padding.

    Shuffled texts are sorted by length in pools of 50 batches, and the batches are shuffled again.
    On the quickstart's docstrings this halves the tokens per epoch, padding included.
    (transformers' LengthGroupedSampler leaves each pool's batches in order of length, so that
    an epoch ends on the shortest texts.)

    Args:
        lengths: Tokens of each text.
        batch_size: Texts per batch, of all processes together.
        generator: Of the random order.
    """
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    size = batch_size * BATCHES_PER_POOL
    pools = (shuffled[start : start + size] for start in range(0, len(shuffled), size))
    order = [index for pool in pools for index in sorted(pool, key=lengths.__getitem__)]
    full_batches = len(order) // batch_size
    batches = torch.randperm(full_batches, generator=generator).tolist()
    starts = [batch * batch_size for batch in batches]
    return [
        *(index for start in starts for index in order[start : start + batch_size]),
        *order[full_batches * batch_size :],
    ]


def mixed(seed: int, *numbers: int) -> int:
    """A seed that differs where any of the numbers does."""
    for number in numbers:  # torch seeds neighbours with unrelated states
        seed = (seed * 1_000_003 + number + 1) % 2**63
    return seed
