"""One row of a file or dataset, and what every reader of rows needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lightning.errors import RecordError, first_few, nearest_hint

Values = dict[str, Any]

# Of one line of a file, in bytes, and of what a chat template makes of one row, in characters.
LONGEST_LINE = 2**28
# Levels of lists and objects in a row. Python's own limit depends on its version and on the call.
DEEPEST_ROW = 100


@dataclass(frozen=True)
class Row:
    """The columns of one row, and where it stands ("my.jsonl, line 3")."""

    values: Mapping[str, Any]
    where: str


class Skip:
    """Rows that a reader is still to pass over, counted across files."""

    def __init__(self, rows: int = 0) -> None:
        self.rows = rows

    def take(self, available: int = 1) -> int:
        """Take from the next `available` rows those to pass over, and count them."""
        taken = min(self.rows, available)
        self.rows -= taken
        return taken


def require_columns(found: Iterable[str], columns: Mapping[str, str], where: str) -> None:
    """Each of `columns`, mapped to the config key that names it, must be among those found."""
    found = list(found)
    for column, key in columns.items():
        if column not in found:
            hint = nearest_hint(column, found)
            raise RecordError(
                f"{where}: no column {column!r}. Columns found: {first_few(found, 20)}.{hint} "
                f"({key})"
            )


def check_ordinary(path: Path, key: str) -> None:
    """Refuse what can be opened but may never end: a device, a pipe, a socket."""
    if path.exists() and not path.is_file():
        raise RecordError(
            f"{path}: is no ordinary file but a device, a pipe or the like, which may never end. "
            f"Write what it gives into a file, and name that. ({key})"
        )


def check_depth(values: object, where: str) -> None:
    """Refuse a row of lists or objects within each other without end."""
    level = [values]
    for _ in range(DEEPEST_ROW):
        level = [
            part
            for value in level
            if isinstance(value, (dict, list))
            for part in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise RecordError(
        f"{where}: lists and objects lie within each other more than {DEEPEST_ROW} levels deep. "
        "Remove the row or write it flatter."
    )


def check_characters(text: str, place: str) -> None:
    """Refuse half an emoji: JSON can write it, and no tokenizer reads it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecordError(
            f"{place}: character {error.start + 1} is {text[error.start]!a}, half of a surrogate "
            "pair. Remove it or restore the character."
        ) from error


def described(value: object) -> str:
    """The type of `value` and how it begins, for error messages."""
    return "null" if value is None else f"{type(value).__name__} {value!r:.40}"


def with_label_names(features: Mapping[str, Any]) -> Callable[[Values], Values]:
    """A function that puts class names in place of the numbers of `ClassLabel` columns.

    Args:
        features: The columns as `datasets.Features.to_dict` describes them; a column may be a
            ClassLabel, a list of them, or a list of such lists. A number without a name (-1:
            unlabelled) becomes None.
    """
    classes = {column: names for column, f in features.items() if (names := _names(f))}

    def named(values: Values) -> Values:
        for column in classes.keys() & values.keys():
            values[column] = _name(values[column], classes[column])
        return values

    return named


def _name(value: Any, names: Mapping[int, str]) -> Any:
    if isinstance(value, list):
        return [_name(number, names) for number in value]
    return names.get(value)


def _names(feature: Any) -> dict[int, str] | None:
    if not isinstance(feature, dict):
        return None
    if feature.get("_type") == "ClassLabel" and isinstance(feature.get("names"), list):
        return dict(enumerate(feature["names"]))
    return _names(feature.get("feature"))  # of a list
