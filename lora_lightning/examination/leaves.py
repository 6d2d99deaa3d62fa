"""What a step returns, whatever it is made of, as tensors and plain values by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def leaves(value: Any, name: str, around: tuple[int, ...] = ()) -> dict[str, Any]:
    """The tensors and plain values in `value`; of objects without an order, their attributes.

    Arrays are tensors then. `around` are the ids of what `value` is inside of.
    """
    if isinstance(value, Tensor):
        return {name: value.to_dense() if value.layout != torch.strided else value}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return {name: torch.from_numpy(np.ascontiguousarray(value))}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    parts = _parts(value)
    if parts is None or id(value) in around:
        return {name: value if parts is None else "itself"}
    found: dict[str, Any] = {f"{name} (kind)": f"{type(value).__name__} of {len(parts)}"}
    for key, part in parts.items():
        found |= leaves(part, f"{name}.{key}", (*around, id(value)))
    return found


def _parts(value: Any) -> dict[Any, Any] | None:
    """What is in `value`, by name; None for what is compared as it is."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (list, tuple)):
        return dict(enumerate(value))
    if is_dataclass(value) or "__eq__" not in _defined(type(value)):
        return dict(getattr(value, "__dict__", {}))
    return None


def _defined(kind: type) -> set[str]:
    return {name for base in kind.__mro__[:-1] for name in vars(base)}
