"""Data that need not fit into memory: read, encoded and shuffled block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch.utils.data import IterableDataset, get_worker_info

from lora_lightning.data.batches.epoch_sampler import length_grouped, mixed
from lora_lightning.data.batches.example_store import Tokens
from lora_lightning.data.batches.packing import best_fit_decreasing
from lora_lightning.data.samples.sample import Example
from lora_lightning.data.sources.row import Row


@dataclass(eq=False)  # torch hashes data sets
class TextStream(IterableDataset[list[Tokens]]):
    """Rows for batches, made of a block of rows of the source at a time.

    A block is read, encoded, packed and put in a random order, then given out. So all that a
    position needs are three numbers: the seed of this pass, the block, and how much of it has been
    given. From them the block is made again, exactly, and what was before it is passed over
    unparsed where the file allows.

    Of the source's rows, each worker of each process takes every n-th.

    Attributes:
        rows: The rows of the source from the given number on.
        encode: What examples they make, in order.
        block: How many rows of the source are in memory at a time, per worker.
        batch_size: Examples of about equal length share a batch of this size.
        pack_length: Tokens of a packed row; None: one example a row.
        seed: Of the random order in each block.
    """

    rows: Callable[[int], Iterator[Row]]
    encode: Callable[[list[Row]], Iterable[Example]]
    block: int
    batch_size: int
    pack_length: int | None
    seed: int = 0
    rank: int = 0  # of this process
    processes: int = 1
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        """Have the order of this epoch."""
        self.epoch = epoch

    def __iter__(self) -> StreamPass:
        worker = get_worker_info()
        worker_id, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        return StreamPass(self, self.rank * workers + worker_id, self.processes * workers)


class StreamPass(Iterator[list[Tokens]]):
    """One worker's pass over its share of a stream, with a position to save and load."""

    def __init__(self, stream: TextStream, shard: int, shards: int) -> None:
        self.stream, self.shard, self.shards = stream, shard, shards
        seed = mixed(stream.seed, stream.epoch, shard)
        self.position = {"seed": seed, "block": 0, "given": 0}
        self._block: list[list[Tokens]] | None = None  # the rest of the block, last first
        self._source: Iterator[Row] | None = None

    def state_dict(self) -> dict[str, int]:
        """The position."""
        return dict(self.position)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a position."""
        self.position = dict(state)
        self._block = self._source = None

    def __next__(self) -> list[Tokens]:
        if self._block is None:
            self._block = self._next_block()[self.position["given"] :][::-1]
        while not self._block:
            self.position.update(block=self.position["block"] + 1, given=0)
            self._block = self._next_block()[::-1]
        self.position["given"] += 1
        return self._block.pop()

    def _next_block(self) -> list[list[Tokens]]:
        stream, block = self.stream, self.position["block"]
        if self._source is None:
            before = block * stream.block * self.shards
            self._source = islice(stream.rows(before), self.shard, None, self.shards)
        rows = list(islice(self._source, stream.block))
        if not rows:
            raise StopIteration
        examples = [Tokens.of(example) for example in stream.encode(rows)]
        lengths = [len(example.input_ids) for example in examples]
        generator = torch.Generator().manual_seed(mixed(self.position["seed"], block))
        if stream.pack_length is None:
            order = length_grouped(lengths, stream.batch_size, generator)
            return [[examples[index]] for index in order]
        packed = best_fit_decreasing(lengths, stream.pack_length)
        order = torch.randperm(len(packed), generator=generator).tolist()
        return [[examples[index] for index in packed[row]] for row in order]
