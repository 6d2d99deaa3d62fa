"""Every error this library raises on purpose, and the words they share.

A message says what was asked, what was found, the nearest known thing, what to do, and which
config key to change. All of them derive from `LoraError`, so one `except` catches the lot.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class LoraError(Exception):
    """Base of every error that lora_lightning raises on purpose."""


class ConfigError(LoraError, ValueError):
    """An option has a value that cannot work, alone or beside another option."""


class TargetError(LoraError, ValueError):
    """A name that should select modules selects none, or modules that cannot be adapted."""


class RankError(LoraError, ValueError):
    """A rank that is no positive integer or exceeds what the layer's size allows."""


class AdapterMismatchError(LoraError, RuntimeError):
    """Adapter state and model disagree: keys, shapes, settings or base model."""


class AdapterStateError(LoraError, RuntimeError):
    """An operation does not fit the state the adapters are in (unknown name, merged, ...)."""


class OptimizerError(LoraError, RuntimeError):
    """The optimizers do not hold exactly the trainable tensors."""


class NonfiniteError(LoraError, ArithmeticError):
    """A loss or gradient is NaN or infinite, and the run may not go on with it."""


class CheckpointError(LoraError, RuntimeError):
    """A checkpoint file is missing, damaged, or not one of ours."""


class RecordError(LoraError, ValueError):
    """A data file or one of its records cannot be used; names file, line and column."""


class ModelError(LoraError, ValueError):
    """A model cannot be found or loaded under the given name."""


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """The known word nearest to `word`, or None where nothing is near."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def nearest_hint(word: str, known: Iterable[str]) -> str:
    """A question after the known word nearest to `word`, to stand behind a sentence; "" if none."""
    near = did_you_mean(word, known)
    return f" Did you mean {near!r}?" if near else ""


def nearest_file(path: Path) -> str:
    """A question after the file or folder beside `path` with the nearest name; "" if none."""
    folder = path.parent
    names = [beside.name for beside in folder.iterdir()] if folder.is_dir() else []
    near = did_you_mean(path.name, names)
    return f" Did you mean {str(folder / near)!r}?" if near else ""


def first_few(items: Iterable[str], limit: int = 5) -> str:
    """`items` joined by commas; what goes beyond `limit` is counted, not listed."""
    listed = list(items)
    shown = ", ".join(listed[:limit])
    return shown if len(listed) <= limit else f"{shown}, ... ({len(listed)} in all)"
