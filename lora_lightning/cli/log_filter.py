"""Filter of what other packages write into the terminal of the command."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

_LOGGERS = (
    "lightning.pytorch",
    "lightning.pytorch.utilities.rank_zero",
    "torchao",  # which transformers imports where it is installed
    "torch.utils._pytree",
)
_LOGGED = (
    "GPU available: False",
    "TPU available: False",
    "💡 Tip",
    "Failed to load",  # torchao, of its kernels for GPUs
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


def _is_shown(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_LOGGED)


class _Stderr:
    """Standard error as it is when something is written: a live progress bar takes its place."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)
