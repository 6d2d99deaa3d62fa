"""Autocast as a tensor meets it; on the meta device, where torch cannot be asked, it is off."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def is_autocast(tensor: Tensor) -> bool:
    """True if autocast is on where `tensor` lives."""
    kind = tensor.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Autocast off where `tensor` lives: a context manager."""
    kind = tensor.device.type
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)
