"""The map of a layer: a fold over the adapters on one of its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_lightning.adapters.base import Adapter, Base, MultiWeightAdapter
from lora_lightning.adapters.modules_to_save import ModulesToSaveCopy


def compose(chain: list[Adapter], x: Tensor, base_map: Callable[[Tensor], Any], base: Base) -> Any:
    """The output of `base_map` with the adapters of `chain` around it, the first one innermost."""
    compiling = torch.compiler.is_compiling()
    inputs = []
    for adapter in reversed(chain):
        inputs.append(x)
        below = adapter.transform_input(x, base)
        x = torch.where(adapter.applied, below, x) if compiling and below is not x else below
    y = base_map(x)
    for adapter, given in zip(chain, reversed(inputs), strict=True):
        after = adapter(given, y, base)
        y = torch.where(adapter.applied, after, y) if compiling and after is not y else after
    return y


def split_copy(chain: list[Adapter]) -> tuple[ModulesToSaveCopy | None, list[Adapter]]:
    """The trained copy that replaces the base, if there is one, and the other adapters."""
    copy = next((adapter for adapter in chain if isinstance(adapter, ModulesToSaveCopy)), None)
    return copy, [adapter for adapter in chain if not isinstance(adapter, ModulesToSaveCopy)]


def part_of(adapter: Adapter, weight_name: str) -> Adapter | None:
    """What of an adapter sits on one weight of its module."""
    return adapter.part(weight_name) if isinstance(adapter, MultiWeightAdapter) else adapter
