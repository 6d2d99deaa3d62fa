"""Labelled texts from rows, each with the place it came from."""

from __future__ import annotations

from dataclasses import dataclass

from lora_lightning.data.sources.read_rows import read_rows
from lora_lightning.data.sources.row import check_characters, described
from lora_lightning.errors import RecordError


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
        path, key: As for `read_rows`.
        text_column: The column of the text.
        label_column: That of the label; None reads texts only.

    Raises:
        RecordError: If the file or any of its records cannot be used.
    """
    columns = {text_column: "data.text_column"}
    if label_column is not None:
        columns[label_column] = "data.label_column"
    records = [
        Record(
            text=_text(row.values[text_column], f"{row.where}, column {text_column!r}"),
            label=None
            if label_column is None
            else label_text(row.values[label_column], f"{row.where}, column {label_column!r}"),
            where=row.where,
        )
        for row in read_rows(path, key=key, columns=columns)
    ]
    if not records:
        raise RecordError(f"{path}: no records; the file is empty. ({key})")
    return records


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{where}: the text must be a string, found {described(value)}.")
    check_characters(value, where)
    if not value.strip():
        raise RecordError(f"{where}: the text is empty. Remove the record or fill it in.")
    return value


def label_text(value: object, where: str) -> str:
    """A label as it is written.

    Raises:
        RecordError: If it is neither a string nor an integer, or empty.
    """
    if value is None or value == "":
        raise RecordError(f"{where}: the label is missing. Remove the record or fill it in.")
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise RecordError(
            f"{where}: the label must be a string or an integer, found {described(value)}."
        )
    return str(value)
