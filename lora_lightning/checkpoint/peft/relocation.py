"""An adapter's options for the same modules under other paths, below or above a model's top.

Options name modules by whole paths, by the last parts of them, or by expressions. What they mean
for each module is a fact; where they would mean something else under the new paths, these facts are
written down in their place.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from lora_lightning.adapters.config import Config, pattern_value
from lora_lightning.engine.targets.matching import matches_name


def moved_config(config: Config, moved: Mapping[str, str]) -> Config:
    """`config` with the same values for modules, and single parameters, that have other paths.

    What it selects (`target_modules` and its like, `modules_to_save`) is left to the caller.

    Args:
        config: As it names them.
        moved: New path by old path, of every module with the adapter.

    """
    if all(old == new for old, new in moved.items()):
        return config
    changes: dict[str, Any] = {}
    alpha = "lora_alpha" if hasattr(config, "lora_alpha") else "alpha"
    for option, common in (("rank_pattern", "r"), ("alpha_pattern", alpha)):
        pattern = getattr(config, option, None)
        if pattern and all(isinstance(value, (int, float)) for value in pattern.values()):
            default = getattr(config, common)
            values = {new: pattern_value(pattern, old, default) for old, new in moved.items()}
            if any(pattern_value(pattern, p, default) != v for p, v in values.items()):
                changes[option] = _one_by_one(values, default)
    ids = getattr(config, "trainable_token_indices", None)
    if isinstance(ids, dict):
        rows = {new: i for name, i in ids.items() for new in _new_names(name, moved)}
        changes["trainable_token_indices"] = rows
    parameters = getattr(config, "target_parameters", None)
    if parameters:
        names = [new for name in parameters for new in _new_names(name, moved)]
        changes["target_parameters"] = list(dict.fromkeys(names))
    inner = getattr(config, "feedforward_modules", None)  # of (IA)^3
    if inner:
        changes["feedforward_modules"] = [new for old, new in moved.items() if _fits(inner, old)]
    return dataclasses.replace(config, **changes)


def _one_by_one(values: Mapping[str, float], default: float) -> dict[str, float]:
    """A pattern with these values, of which the first entry that fits the end of a path counts."""
    ends = tuple(f".{path}" for path, value in values.items() if value != default)
    ordered = sorted(values, key=len, reverse=True)  # before those that a path ends with
    return {
        re.escape(path): values[path]
        for path in ordered
        if values[path] != default or path.endswith(ends)
    }


def _new_names(name: str, moved: Mapping[str, str]) -> list[str]:
    return [new for old, new in moved.items() if matches_name(name, old)] or [name]


def _fits(names: list[str] | str, path: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(matches_name(name, path) for name in names)
