"""A random order in which texts of about equal length share a batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

# Batches sorted together: enough to find texts of equal length, few enough to stay random.
BATCHES_PER_POOL = 50


class LengthGroupedSampler(Sampler[int]):
    """Random indices, so ordered that consecutive batches waste little on padding.

    Shuffled texts are sorted by length in pools of 50 batches, and the batches are shuffled again.
    On the quickstart's docstrings this halves the tokens per epoch, padding included.
    (transformers' sampler of that name leaves each pool's batches in order of length, so that
    an epoch ends on the shortest texts.)

    Args:
        lengths: Tokens of each text.
        batch_size: Texts per batch of the data loader.
    """

    def __init__(self, lengths: list[int], batch_size: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        # torch's global random state: seed_everything and a restored checkpoint govern it
        yield from length_grouped(self.lengths, self.batch_size)


def length_grouped(
    lengths: list[int], batch_size: int, generator: torch.Generator | None = None
) -> list[int]:
    """The order of one epoch, as `LengthGroupedSampler` says."""
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
