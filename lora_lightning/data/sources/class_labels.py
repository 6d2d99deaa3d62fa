"""The names of classes that Hugging Face `datasets` stores as numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Values = dict[str, Any]


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
    if feature.get("_type") == "ClassLabel":
        return dict(enumerate(feature["names"]))
    return _names(feature.get("feature"))  # of a list
