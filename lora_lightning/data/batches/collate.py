"""From rows of examples to the tensors of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lora_lightning.data.batches.example_store import Tokens
from lora_lightning.utilities.constants import IGNORE_INDEX

Batch = dict[str, Tensor]
Row = Sequence[Tokens]  # the examples of a row; without packing it has one


@dataclass(frozen=True)
class PadRows:
    """One example a row, padded to the longest of the batch.

    `input_ids`, `attention_mask` (B, T) and `labels`: (B, T) of a causal LM, (B, L) of an
    encoder-decoder, padded with `IGNORE_INDEX`.

    Args:
        pad_id: Any id; it is masked.
    """

    pad_id: int = 0

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """The batch of these rows."""
        examples = [example for row in rows for example in row]
        ids = [example.input_ids for example in examples]
        return {
            "input_ids": _padded(ids, self.pad_id),
            "attention_mask": _padded([torch.ones_like(i) for i in ids], 0),
            "labels": _padded([example.labels for example in examples], IGNORE_INDEX),
        }


@dataclass(frozen=True)
class PadPrompts:
    """Prompts to go on from: `input_ids` and `attention_mask` (B, T).

    Args:
        pad_id: Any id; it is masked.
        left: Whether padding is before the prompts.
    """

    pad_id: int = 0
    left: bool = True

    def __call__(self, prompts: Sequence[Sequence[int]]) -> Batch:
        """The batch of these token ids."""
        ids = [torch.tensor(prompt) for prompt in prompts]
        side = "left" if self.left else "right"
        return {
            "input_ids": _padded(ids, self.pad_id, side),
            "attention_mask": _padded([torch.ones_like(i) for i in ids], 0, side),
        }


@dataclass(frozen=True)
class PackRows:
    """Several examples a row, kept apart by their positions.

    `input_ids`, `labels` and `position_ids` (B, T), which begin at 0 in each example. From these
    and the absence of an `attention_mask` transformers makes attention block-diagonal. The first
    token of an example is no label: it would be predicted from the end of the one before.

    Args:
        length: T. Rows are filled up to it, so that all batches have one shape; what fills a row
            is a sequence of its own, of which nothing is learned.
        flat: All rows behind one another as one of shape (1, tokens), without filling: the only
            form in which transformers' FlashAttention keeps examples apart.
        pad_id: Any id.
    """

    length: int
    flat: bool = False
    pad_id: int = 0

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """The batch of these rows."""
        packed = [_end_to_end(row) for row in rows]
        if self.flat:
            return {key: torch.cat([row[key] for row in packed])[None] for key in packed[0]}
        return {key: torch.stack([self._filled(row, key) for row in packed]) for key in packed[0]}

    def _filled(self, row: Batch, key: str) -> Tensor:
        missing = self.length - len(row[key])
        if key == "position_ids":
            filling = torch.arange(missing)
        else:
            filling = torch.full((missing,), IGNORE_INDEX if key == "labels" else self.pad_id)
        return torch.cat([row[key], filling])


def _end_to_end(row: Row) -> Batch:
    labels = torch.cat([example.labels for example in row]).long()
    positions = torch.cat([torch.arange(len(example.input_ids)) for example in row])
    labels[positions == 0] = IGNORE_INDEX
    return {
        "input_ids": torch.cat([example.input_ids for example in row]).long(),
        "labels": labels,
        "position_ids": positions,
    }


def _padded(sequences: list[Tensor], value: int, side: str = "right") -> Tensor:
    longs = [sequence.long() for sequence in sequences]
    return pad_sequence(longs, batch_first=True, padding_value=value, padding_side=side)
