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


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which `x` is multiplied: its own, or autocast's."""
    if is_autocast(x) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
