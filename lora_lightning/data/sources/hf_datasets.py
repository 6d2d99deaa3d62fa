"""The rows of Hugging Face datasets: folders that `save_to_disk` wrote, and names on the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_lightning.data.sources.files import Columns
from lora_lightning.data.sources.row import Row, Skip, require_columns, with_label_names
from lora_lightning.errors import RecordError, first_few

# NAME, NAME:SPLIT or NAME:CONFIG:SPLIT; a split may be sliced as datasets slices it: train[:10%].
_HUB_NAME = re.compile(
    r"(?P<name>\w[\w.-]*(?:/\w[\w.-]*)?)"
    r"(?::(?:(?P<config>[^:\[]+):)?(?P<split>[^:\[]+(?:\[[^\]]*\])?))?"
)

# Rows of a streamed dataset that are in memory at a time.
STREAMED_BATCH = 32


def is_saved_dataset(folder: Path) -> bool:
    """True if `datasets` wrote the folder: one split, or several in folders of their own."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def saved_dataset(folder: Path, key: str) -> Any:
    """The one split that `folder` holds."""
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(part.name for part in folder.iterdir() if part.is_dir())
        raise RecordError(
            f"{folder}: holds several splits ({first_few(splits)}). "
            f"Name one of them, such as '{folder / splits[0]}'. ({key})"
        )
    datasets = _datasets(str(folder), "a dataset folder", key)
    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # anything: of a dataset without rows it is an IndexError
        raise RecordError(
            f"{folder}: this dataset has no rows, or its folder is damaged "
            f"({type(error).__name__}: {error}). Save it again, with rows. ({key})"
        ) from error


def is_hub_name(source: str) -> bool:
    """True if `source` can be a dataset on the Hugging Face hub."""
    return _HUB_NAME.fullmatch(source) is not None


def hub_dataset(source: str, key: str, streaming: bool, hint: str = "") -> Any:
    """The split of a dataset on the hub (or in its cache) that `source` names.

    Args:
        source: `NAME`, `NAME:SPLIT` or `NAME:CONFIG:SPLIT`. Without a split: the only one there
            is, or for training the one called `train`.
        key, streaming: As for `read_rows`.
        hint: The file that may be meant instead, for the error message.
    """
    match = _HUB_NAME.fullmatch(source)
    assert match is not None
    name, config, split = match.group("name", "config", "split")
    datasets = _datasets(source, "a dataset of the Hugging Face hub", key)
    try:
        loaded = datasets.load_dataset(name, config, split=split, streaming=streaming)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        problem = str(error).strip().rstrip(".") or type(error).__name__
        raise RecordError(
            f"{source}: no such file or folder, and no such dataset could be loaded: {problem}."
            f"{hint} Name a file, a folder, or a dataset of the Hugging Face hub as NAME, "
            f"NAME:SPLIT or NAME:CONFIG:SPLIT. ({key})"
        ) from error
    if split is not None:
        return loaded
    if len(loaded) == 1:
        return next(iter(loaded.values()))
    if "train" in loaded and key.endswith("train"):
        return loaded["train"]
    raise RecordError(
        f"{source}: holds several splits ({first_few(loaded)}). Name one of them, such as "
        f"'{name}:{f'{config}:' if config else ''}{next(iter(loaded))}'. ({key})"
    )


def dataset_rows(dataset: Any, source: str, skip: Skip, columns: Columns) -> Iterator[Row]:
    """The rows of a loaded dataset; of a streamed one, too."""
    dataset = dataset.with_format(None)  # tensors, if it was saved so
    names, features = dataset.column_names, dataset.features
    if columns and names is not None:  # unknown in a stream of files without a schema
        require_columns(names, columns, source)
        dataset = dataset.select_columns(list(columns))
    named = with_label_names(features.to_dict() if features else {})
    first = skip.take(len(dataset) if hasattr(dataset, "__len__") else skip.rows)
    for number, values in enumerate(_from(dataset, first), start=first):
        where = f"{source}, row {number}"
        require_columns(values, columns, where)
        yield Row(named(values), where)


def _from(dataset: Any, first: int) -> Iterator[dict[str, Any]]:
    if hasattr(dataset, "__len__"):
        if first < len(dataset):
            yield from dataset.skip(first)
        return
    # In a worker `datasets` would leave other workers' files out of what it gives row by row.
    for batch in dataset.skip(first).iter(batch_size=STREAMED_BATCH):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def _datasets(source: str, what: str, key: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise RecordError(
            f"{source}: reading {what} needs the package 'datasets'. "
            f'Install it with: pip install "lora_lightning[data]" ({key})'
        ) from error
    return datasets
