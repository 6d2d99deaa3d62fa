"""Predictions as files: batch by batch as they were returned, and a line for each row."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor
from torch.utils.data import DistributedSampler

from lora_lightning.data.split_data_module import SplitDataModule
from lora_lightning.tasks.classification import Classification
from lora_lightning.training.messages import show
from lora_lightning.utilities.atomic_write import write_atomically

Line = dict[str, Any]


class PredictionFiles(BasePredictionWriter):
    """Keeps what was predicted, which LightningCLI would drop: files of each process.

    Lightning notes which rows each batch was made of, whatever sampler, shuffling or number of
    processes there is. So each prediction stands beside its row, or beside none.
    """

    def __init__(self) -> None:
        super().__init__("epoch")

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Write them into the log directory, and say where."""
        # All processes ask for it together.
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        if not predictions:
            return
        number = f"_{trainer.global_rank}" if trainer.world_size > 1 else ""
        lines = lines_of(trainer, pl_module, predictions, batch_indices)
        # `save_predictions` makes the folder, on a machine that does not share it.
        *files, whole = save_predictions(predictions, folder / f"predictions{number}", lines)
        if trainer.is_global_zero:
            others = f" of process 0 of {trainer.world_size}" if number else ""
            read = "".join(f"{path}, a line for each row; " for path in files)
            show(f"predictions{others}: {read}{whole} (torch.load), batch by batch")


def lines_of(
    trainer: Trainer,
    pl_module: LightningModule,
    predictions: Sequence[Any],
    batch_indices: Sequence[Any],
) -> list[Line] | None:
    """A line for each row: what it says, and what is predicted for it. None: there are no rows."""
    batches = [_rows(batch) for batch in predictions]
    rows = [[_named(row, pl_module) for row in batch] for batch in batches if batch is not None]
    if len(rows) < len(batches):
        return None
    inputs = list(_inputs(trainer, [len(batch) for batch in rows], batch_indices))
    if not inputs:
        return [row for batch in rows for row in batch]
    lines = []
    for batch, of_batch in zip(rows, inputs, strict=True):
        each = len(batch) // max(len(of_batch), 1)  # several answers to each prompt
        for number, row in enumerate(batch):
            given = of_batch[number // each]
            if given is not None:
                if "image" in given:
                    row.pop("where", None)  # which says the same
                lines.append({**given, **row})
    return lines


def _inputs(
    trainer: Trainer, lengths: list[int], batch_indices: Sequence[Any]
) -> Iterator[list[Line | None]]:
    """Of each batch what its rows say, None for a row that is there twice; or nothing at all."""
    data, loader = getattr(trainer, "datamodule", None), trainer.predict_dataloaders
    if not isinstance(data, SplitDataModule) or len(batch_indices) != 1:
        return
    # Else it is the loader of a subclass, whose rows may be others.
    if getattr(loader, "dataset", None) is not data.prepared("predict"):
        return
    (indices,) = batch_indices
    known = len(indices) == len(lengths) and all(
        found and not length % len(found) for length, found in zip(lengths, indices, strict=True)
    )
    if not known:
        return
    records, several = data.records("predict"), trainer.world_size > 1
    sampler, place = getattr(getattr(loader, "batch_sampler", None), "sampler", None), 0
    for batch in indices:
        given: list[Line | None] = []
        for row in batch:
            twice = row >= len(records) or _fills_up(sampler, place)
            number = {"row": row} if several else {}
            given.append(None if twice else {**number, **data.input_of(records[row])})
            place += 1
        yield given


def _fills_up(sampler: object, place: int) -> bool:
    """Tell whether a DistributedSampler gives a row again, so that all processes have as many."""
    if not isinstance(sampler, DistributedSampler):
        return False
    return place * sampler.num_replicas + sampler.rank >= len(sampler.dataset)  # type: ignore[arg-type]


def _named(row: Line, pl_module: LightningModule) -> Line:
    """The row of a classifier with the names of its classes."""
    names = pl_module.label_names if isinstance(pl_module, Classification) else None
    if not names or not row.keys() >= {"labels", "probabilities"}:
        return row
    labels, found = row.pop("labels"), row.pop("probabilities")
    if isinstance(labels, list):  # of each word
        return {**row, "labels": labels, "probabilities": [_by_name(names, p) for p in found]}
    return {**row, "label": labels, "probabilities": _by_name(names, found)}


def _by_name(names: list[str], probabilities: list[Any]) -> dict[str, Any] | None:
    """The probability of each class; None of a word that was cut off."""
    if None in probabilities:
        return None
    return dict(zip(names, probabilities, strict=True))


def save_predictions(
    predictions: Sequence[Any], stem: Path, lines: Sequence[Line] | None
) -> list[Path]:
    """Write `stem`.pt, and `stem`.jsonl where there are lines.

    Args:
        predictions: What `predict_step` returned for each batch.
        stem: Path of the files without a suffix; its folder is made.
        lines: Of the rows.

    Returns:
        The files, that of lines first.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    whole = io.BytesIO()
    torch.save(predictions, whole)
    files = {stem.with_name(f"{stem.name}.pt"): whole.getvalue()}
    if lines is not None:
        text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
        files = {stem.with_name(f"{stem.name}.jsonl"): text.encode("utf-8", "replace"), **files}
    for path, content in files.items():
        write_atomically({path: content})
    return list(files)


def _rows(batch: Any) -> list[Line] | None:
    """The rows of a batch; None where it has none.

    It has, if it is a list of texts (of each a row `{"prediction": text}`), or a mapping of
    columns, lists and tensors of one length (NaN becomes None).
    """
    if isinstance(batch, Mapping):
        columns = {str(name): column for name, column in batch.items()}
    else:
        texts = isinstance(batch, list) and all(isinstance(item, str) for item in batch)
        columns = {"prediction": batch} if texts else {}
    lengths = {_length(column) for column in columns.values()}
    if len(lengths) != 1 or None in lengths:
        return None
    entries = zip(*(_plain(column) for column in columns.values()), strict=True)
    try:
        rows = [dict(zip(columns, entry, strict=True)) for entry in entries]
        json.dumps(rows)
    except (TypeError, ValueError):  # something that JSON has no words for
        return None
    return rows


def _length(column: Any) -> int | None:
    if isinstance(column, Tensor):
        return len(column) if column.ndim else None
    return len(column) if isinstance(column, (list, tuple)) else None


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
