"""The map of a layer, composed of the base's map and the adapters on one of its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lora_lightning.adapters.base import Adapter, BaseWeight


def compose(
    adapters: list[Adapter], x: Tensor, base_map: Callable[[Tensor], Any], base: BaseWeight
) -> Any:
    """Return the output of `base_map` with `adapters` around it, the first one innermost."""
    inputs = []
    for adapter in reversed(adapters):
        inputs.append(x)
        x = adapter.if_applied(adapter.transform_input(x, base), x)
    y = base_map(x)
    for adapter, given in zip(adapters, reversed(inputs), strict=True):
        y = adapter.if_applied(adapter(given, y, base), y)
    return y
