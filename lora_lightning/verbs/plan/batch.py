"""The largest batch of a run, as tensors without memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lora_lightning.data.encoding.for_model import MAX_LENGTH
from lora_lightning.errors import ConfigError
from lora_lightning.tasks.model_options import weights_of
from lora_lightning.tasks.pretrained_task import PretrainedTask
from lora_lightning.verbs.plan.live_bytes import Answers
from lora_lightning.verbs.plan.run_length import RunLength


@dataclass(frozen=True)
class BatchShape:
    """Rows and tokens of a batch.

    Attributes:
        rows: Per device.
        length: Tokens of a row; None where rows are no texts.
        target: Tokens of an encoder-decoder's target.
        packed: Whether several examples share a row.
        padded: Whether rows of a batch may differ in length.
        learned: Tokens of the batch that are learned, at most; None: all.

    """

    rows: int
    length: int | None = None
    target: int | None = None
    packed: bool = False
    padded: bool = True
    learned: int | None = None

    def __str__(self) -> str:
        if self.length is None:
            return f"batch of {self.rows}"
        target = "" if self.target is None else f" (targets of {self.target:,})"
        return f"batch {self.rows} x {self.length:,} tokens{target}"


def shape_of(module: Any, data: Any, asked: dict[str, int | None], found: RunLength) -> BatchShape:
    """What is asked for; else what the data have; else what their options allow."""
    for name, number in asked.items():
        if number is not None and number < 1:
            raise ConfigError(f"{name} must be at least 1, found {number}. ({name})")
    rows = asked["batch_size"] or getattr(data, "batch_size", None) or _rows_of(found) or 1
    config: Any = getattr(getattr(module, "network", None), "config", None)
    if not isinstance(module, PretrainedTask) or not hasattr(config, "vocab_size"):
        return BatchShape(rows)
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or MAX_LENGTH
    option = getattr(data, "max_length", None) or min(positions, MAX_LENGTH)
    packed = bool(getattr(data, "packing", False))
    known = option if packed else found.longest
    length = asked["length"] or known or option
    if length > positions and text.model_type != "t5":
        raise ConfigError(
            f"length={length} is more than the {positions} positions that the model has "
            "(max_position_embeddings in its config.json). (length)"
        )
    target = None
    if config.is_encoder_decoder:
        cut = getattr(data, "max_target_length", None)
        known = None if asked["length"] else found.longest_target
        target = asked["target_length"] or known or cut or length
    as_found = length == (option if packed else found.longest)
    as_found = as_found and target in (None, found.longest_target)
    padded = not (as_found and found.equal == found.rows)
    learned = found.most_learned(rows) if as_found else None
    return BatchShape(rows, length, target, packed, padded, learned)


def answers(shape: BatchShape) -> Answers:
    """What holds for the values of such a batch."""
    tokens = shape.rows * (shape.target or shape.length or 0)
    return Answers(not (shape.padded or shape.packed), tokens, shape.learned)


def batch_of(module: Any, shape: BatchShape, found: RunLength, precision: str) -> Any:
    """The batch; called where tensors have no memory."""
    if not isinstance(module, PretrainedTask):
        return _like(found.first_batch, shape.rows, precision)
    network: Any = module.network
    kind, config = module.auto_class, network.config
    labels: tuple[int, ...] = (shape.rows,)
    if shape.length is None:
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        dtype = weights_of(precision) or torch.float32
        pixels = torch.empty(shape.rows, config.num_channels, height, width, dtype=dtype)
        return {"pixel_values": pixels, "labels": torch.zeros(labels, dtype=torch.long)}
    ids = torch.zeros(shape.rows, shape.length, dtype=torch.long)
    if "SequenceClassification" not in kind:
        labels = (shape.rows, shape.target or shape.length)
    batch = {"input_ids": ids, "labels": torch.zeros(labels, dtype=torch.long)}
    batch["position_ids" if shape.packed else "attention_mask"] = torch.ones_like(ids)
    return batch


def _rows_of(found: RunLength) -> int | None:
    tensors = [t for t in pytree.tree_leaves(found.first_batch) if isinstance(t, Tensor) and t.ndim]
    return len(tensors[0]) if tensors else None


def _like(batch: Any, rows: int, precision: str) -> Any:
    """The shapes of a batch, with another number of rows."""
    before, cast = None, weights_of(precision)

    def made(leaf: Any) -> Any:
        nonlocal before
        if not isinstance(leaf, Tensor):
            return leaf
        shape = list(leaf.shape)
        if shape and before is None:
            before = shape[0]
        if shape and shape[0] == before:
            shape[0] = rows
        dtype = cast if cast is not None and leaf.is_floating_point() else leaf.dtype
        return torch.empty(shape, dtype=dtype, device="cpu")

    return pytree.tree_map(made, batch)
