"""The answers of the merged model beside those of the model with its adapters, on the same rows."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lora_lightning.errors import AdapterStateError

# Mean difference, of the largest score, beyond which a merge has gone wrong: where it is rounded to
# float32 it is about 1e-7, and to bfloat16 about 1e-3. (The largest one may be one token that is
# sent to another expert.)
_WRONG = {True: 1e-4, False: 0.1}


@dataclass(frozen=True)
class Difference:
    """Between two sets of scores.

    Attributes:
        largest: The maximum of |a - b| over all of them.
        mean: Its mean.
        scale: The largest score.

    """

    largest: float
    mean: float
    scale: float

    def __str__(self) -> str:
        return f"max {self.largest:.3g}, mean {self.mean:.3g}"


def difference(found: list[Tensor], wanted: list[Tensor]) -> Difference:
    """Compare scores, batch by batch."""
    gaps = [(a.double() - b.double()).abs().flatten() for a, b in zip(found, wanted, strict=True)]
    gap = torch.cat(gaps)
    scale = max(float(b.abs().max()) for b in wanted)
    return Difference(float(gap.max()), float(gap.mean()), scale)


def check_close(found: Difference, what: str, exact: bool = True) -> None:
    """Refuse a merge that answers otherwise than by rounding; `exact`: of float32.

    Raises:
        AdapterStateError: With both numbers.

    """
    if not found.mean <= _WRONG[exact] * max(found.scale, 1e-3):
        raise AdapterStateError(
            f"The model {what} answers otherwise than the one with its adapters: on validation "
            f"rows by {found.mean:.3g} in the mean and {found.largest:.3g} at most, with scores up "
            f"to {found.scale:.3g}. Nothing was written. Keep the adapter unmerged, and report "
            "this model."
        )


def widen(module: nn.Module) -> None:
    """Hold all numbers of fewer than 32 bits as float32; indices and packed weights stay."""
    module._apply(lambda t: t.float() if t.is_floating_point() and t.dtype.itemsize == 2 else t)


def validation_batches(module: LightningModule, data: Any, rows: int) -> list[Any]:
    """Whole batches of the validation data as the module gets them, with at least `rows` rows."""
    seen = _Batches(rows)
    with _quiet(), suppress(_Enough):
        trainer = Trainer(
            accelerator="cpu", devices=1, logger=False, callbacks=[seen],
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.validate(module, datamodule=data, verbose=False)
    module.trainer = None
    return seen.batches


class _Enough(Exception):
    """All rows that were asked for are there."""


class _Batches(Callback):
    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.batches: list[Any] = []

    def on_validation_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if self.rows <= 0:
            raise _Enough
        batch = args[1]
        self.batches.append(batch)
        self.rows -= rows_of(batch)


def rows_of(batch: Any) -> int:
    """The rows of a batch."""
    return next((len(tensor) for tensor in tensors_in(batch) if tensor.dim()), 1)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in a nest of containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):  # transformers' batches are no dicts
        for inner in value.values():
            yield from tensors_in(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from tensors_in(inner)


@torch.no_grad()
def scores(ask: Callable[[Any], Any], batches: list[Any]) -> list[Tensor]:
    """All numbers that `ask` answers to batches."""
    answers = [ask(batch) for batch in batches]
    return [t.float() for answer in answers for t in tensors_in(answer) if t.is_floating_point()]


def free_memory() -> int | None:
    """Bytes of memory that a process can still have; None where the system does not say."""
    file = Path("/proc/meminfo")
    if file.is_file():
        for line in file.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what a Trainer says about itself."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
