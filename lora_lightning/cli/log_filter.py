"""Filter of what other packages write into the terminal of the command."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

# tqdm reads it when it is imported, which most other packages do: its bars (of downloads, of
# weights that are loaded) need a terminal.
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_DISABLE", "1")

_LOGGERS = (
    "lightning.pytorch",
    "lightning.pytorch.utilities.rank_zero",
    "torchao",  # which transformers imports where it is installed
    "bitsandbytes.backends.cpu.ops",
    "torch.utils._pytree",
)
_LOGGED = (
    "GPU available: False",
    "TPU available: False",
    "💡 Tip",
    "Restoring states from the checkpoint",  # what was done with it is said afterwards
    "Failed to load",  # torchao, of its kernels for GPUs; bitsandbytes, of a faster one for CPUs
    "<enum '",  # torch, of what is deprecated in torchao
)
_WARNED = ("`isinstance", "Checkpoint directory .* exists")  # on every run and resume


def filter_logs() -> None:
    """Drop what no user can act on, and have the rest keep above a live progress bar."""
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_is_shown)
    for handler in logging.getLogger("lightning.pytorch").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(_Stderr())
    for text in _WARNED:
        warnings.filterwarnings("ignore", message=text)


def shorten_warnings() -> None:
    """Show a warning of Lightning or this package without the line of theirs that gave it.

    When Lightning is imported: it has a format of its own.
    """
    before = warnings.formatwarning

    def shown(message: Any, category: Any, filename: str, lineno: int, line: Any = None) -> str:
        ours = {"lightning", "lora_lightning"} & {*Path(filename).parts}
        if ours and issubclass(category, UserWarning):
            return f"warning: {message}\n"
        return before(message, category, filename, lineno, line)

    if before.__module__ != __name__:
        warnings.formatwarning = shown


def _is_shown(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_LOGGED)


class _Stderr:
    """Standard error as it is when something is written: a live progress bar takes its place."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)
