"""Labelled texts from files, each with the place it came from.

JSONL, CSV and folders saved by Hugging Face `datasets` are read; whatever is wrong with a file or
one of its records is a `RecordError` that names file, line and column.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lightning.errors import RecordError, did_you_mean, first_few

# One row as its reader found it: where it is, and its columns.
Row = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Record:
    """A text, its label (None where none was asked for) and where both were found."""

    text: str
    label: str | None
    where: str


def read_records(
    path: str, *, key: str, text_column: str = "text", label_column: str | None = "label"
) -> list[Record]:
    """All records of a file or dataset folder, in order.

    Args:
        path: A `.jsonl` or `.json` file (one object per line), a `.csv` file with a header, or a
            folder written by `datasets.Dataset.save_to_disk`.
        key: The config key that holds `path`, for error messages.
        text_column: The column that holds the text.
        label_column: The column that holds the label; None reads texts only.

    Raises:
        RecordError: If the file or any of its records cannot be used.
    """
    columns = {text_column: "data.text_column"}
    if label_column is not None:
        columns[label_column] = "data.label_column"
    records = [
        Record(
            text=_text(row[text_column], f"{where}, column {text_column!r}"),
            label=None
            if label_column is None
            else _label(row[label_column], f"{where}, column {label_column!r}"),
            where=where,
        )
        for where, row in _rows(path, key, columns)
    ]
    if not records:
        raise RecordError(f"{path}: no records; the file is empty. ({key})")
    return records


def _rows(path: str, key: str, columns: Mapping[str, str]) -> Iterator[Row]:
    """The rows of `path`; `columns` maps each column that they must have to its config key."""
    source = Path(path).expanduser()
    if not source.exists():
        raise RecordError(_missing_file(source, key))
    if source.is_dir():
        return _dataset_rows(source, key, columns)
    if source.suffix in (".jsonl", ".json"):
        return _json_rows(source, columns)
    if source.suffix == ".csv":
        return _csv_rows(source, columns)
    raise RecordError(
        f"{source}: unknown file type {source.suffix!r}. Known: .jsonl, .json (one object per "
        f"line), .csv, or a folder saved by datasets.Dataset.save_to_disk. ({key})"
    )


def _json_rows(source: Path, columns: Mapping[str, str]) -> Iterator[Row]:
    for number, line in enumerate(_lines(source), start=1):
        if not line.strip():
            continue
        where = f"{source}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise RecordError(
                f"{where}, column {error.colno}: broken JSON: {error.msg}. "
                "Each line must be one complete JSON object."
            ) from error
        if not isinstance(row, dict):
            raise RecordError(
                f"{where}: expected a JSON object, found {type(row).__name__}. "
                'Each line must be one object such as {"text": "...", "label": "..."}.'
            )
        _require_columns(row, columns, where)
        yield where, row


def _csv_rows(source: Path, columns: Mapping[str, str]) -> Iterator[Row]:
    # strict: an unclosed quote is an error, not a field that swallows the rest of the file
    reader = csv.reader(_lines(source), strict=True)
    start = 1  # a quoted field may span lines: name the line where the row begins
    header: list[str] | None = None
    try:
        for fields in reader:
            where, start = f"{source}, line {start}", reader.line_num + 1
            if not fields:
                continue
            if header is None:
                header = fields
                _require_columns(header, columns, where)
                continue
            if len(fields) != len(header):
                raise RecordError(
                    f"{where}: found {len(fields)} fields, but the header has {len(header)} "
                    f"({first_few(header)}). A field that holds commas, quotes or line breaks "
                    "must be quoted."
                )
            yield where, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise RecordError(f"{source}, line {start}: broken CSV: {error}.") from error


def _dataset_rows(source: Path, key: str, columns: Mapping[str, str]) -> Iterator[Row]:
    if (source / "dataset_dict.json").is_file():
        splits = sorted(part.name for part in source.iterdir() if part.is_dir())
        raise RecordError(
            f"{source}: holds several splits ({first_few(splits)}). "
            f"Name one of them, such as '{source / splits[0]}'. ({key})"
        )
    if not (source / "state.json").is_file():
        raise RecordError(
            f"{source}: is a folder, but not one saved by datasets.Dataset.save_to_disk "
            f"(no state.json). ({key})"
        )
    try:
        import datasets
    except ImportError as error:
        raise RecordError(
            f"{source}: reading a dataset folder needs the package 'datasets'. "
            f'Install it with: pip install "lora_lightning[data]" ({key})'
        ) from error
    dataset = datasets.load_from_disk(str(source))
    _require_columns(dataset.column_names, columns, str(source))
    dataset = dataset.select_columns(list(columns))
    names = {
        column: dict(enumerate(feature.names))
        for column, feature in dataset.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    for number, row in enumerate(dataset):
        # A ClassLabel stores an index (-1 or None: unlabelled); its name is what the user means.
        named = {column: known.get(row[column]) for column, known in names.items()}
        yield f"{source}, row {number}", {**row, **named}


def _lines(source: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, decoded one by one so that an error knows its line."""
    with source.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise RecordError(
                    f"{source}, line {number}, byte {error.start + 1}: not UTF-8 "
                    f"({error.reason}). Save the file as UTF-8."
                ) from error


def _require_columns(found: Iterable[str], columns: Mapping[str, str], where: str) -> None:
    found = list(found)
    for column, key in columns.items():
        if column not in found:
            near = did_you_mean(column, found)
            hint = f" Did you mean {near!r}?" if near else ""
            raise RecordError(
                f"{where}: no column {column!r}. Columns found: {first_few(found, 20)}.{hint} "
                f"({key})"
            )


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{where}: the text must be a string, found {_described(value)}.")
    if not value.strip():
        raise RecordError(f"{where}: the text is empty. Remove the record or fill it in.")
    return value


def _label(value: Any, where: str) -> str:
    if value is None or value == "":
        raise RecordError(f"{where}: the label is missing. Remove the record or fill it in.")
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise RecordError(
            f"{where}: the label must be a string or an integer, found {_described(value)}."
        )
    return str(value)


def _described(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.40}"


def _missing_file(source: Path, key: str) -> str:
    folder = source.parent
    if not folder.is_dir():
        return f"{source}: no such file; the folder {folder} does not exist either. ({key})"
    near = did_you_mean(source.name, (path.name for path in folder.iterdir()))
    hint = f" Did you mean {str(folder / near)!r}?" if near else ""
    return f"{source}: no such file.{hint} ({key})"
