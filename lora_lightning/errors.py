"""Every error this library raises on purpose, and the words they share.

A message says what was asked, what was found, the nearest known thing, what to do, and which
config key to change. All of them derive from `LoraError`, so one `except` catches the lot.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

# What a terminal obeys instead of showing it, or shows nothing of: control characters but line
# break and tab, marks that turn the order of a line around, what has no width (but for the joiners
# within words and emoji), halves of surrogate pairs, which cannot even be written.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    r"""`text` for a terminal: what it would obey or hide is spelled out, as ``\x1b`` or ``\u202e``.

    What is read from files, folders and models may hold such characters, and all that is shown
    goes through here: every `LoraError`, `warn`, and what `training/messages.py` says.
    """
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def warn(message: str, stacklevel: int = 2) -> None:
    """Python's `warnings.warn` of a `printable` message, where Lightning need not be installed."""
    warnings.warn(printable(message), stacklevel=stacklevel + 1)


class LoraError(Exception):
    """Base of every error that lora_lightning raises on purpose; its message is `printable`."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(printable(part) if isinstance(part, str) else part for part in args))


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
