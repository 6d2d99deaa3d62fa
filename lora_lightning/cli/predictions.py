"""Predictions as files: batch by batch as they were returned, and a line for each row."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_lightning.utilities.atomic_write import write_atomically


def save_predictions(predictions: Sequence[Any], stem: Path) -> list[Path]:
    """Write `stem`.pt, and `stem`.jsonl where batches consist of rows.

    A batch consists of rows if it is a list of texts (a line `{"prediction": text}` for each), or
    a mapping of columns, lists and tensors of one length (a line with an entry of each column; NaN
    becomes null).

    Args:
        predictions: What `predict_step` returned for each batch.
        stem: Path of the files without a suffix; its folder is made.

    Returns:
        The files, that of lines first.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    whole = io.BytesIO()
    torch.save(predictions, whole)
    files = {stem.with_name(f"{stem.name}.pt"): whole.getvalue()}
    rows = [_rows(batch) for batch in predictions]
    if all(found is not None for found in rows):
        lines = (json.dumps(row, ensure_ascii=False) for found in rows for row in found or ())
        text = "".join(f"{line}\n" for line in lines)
        files = {stem.with_name(f"{stem.name}.jsonl"): text.encode("utf-8", "replace"), **files}
    for path, content in files.items():
        write_atomically({path: content})
    return list(files)


def _rows(batch: Any) -> list[dict[str, Any]] | None:
    """The rows of a batch; None where it has none."""
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
