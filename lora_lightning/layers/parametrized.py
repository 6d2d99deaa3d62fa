"""Weights that a parametrization computes at every reading, and may change something by it.

Spectral norm takes a step of its power iteration at every reading in train mode. So a layer's
forward reads a weight once, as the module alone does, and all other readings leave no trace.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lora_lightning.utilities.rng import random_state, set_random_state

_forwards = 0  # that are running at present


def reads_anew(module: nn.Module) -> bool:
    """True if every reading of a tensor of the module itself computes it."""
    return "parametrizations" in module._modules and not _forwards


@contextmanager
def reads_once() -> Iterator[None]:
    """Inside, every parametrized tensor is computed at its first reading only."""
    global _forwards
    _forwards += 1
    try:
        with parametrize.cached():
            yield
    finally:
        _forwards -= 1


def value(module: nn.Module, name: str) -> Any:
    """`module.name` as it is now; None where there is none.

    Where it is parametrized, what eval mode makes of it, on a copy of all that may change. Inside
    `reads_once`, where it belongs to a forward, it is the module that is read.
    """
    parametrizations = module._modules.get("parametrizations")
    if not isinstance(parametrizations, nn.ModuleDict) or name not in parametrizations:
        return getattr(module, name, None)
    if _forwards:
        return getattr(module, name)  # no default: torch.compile reads on its own to see if it is
    tensors = [*parametrizations[name].parameters(), *parametrizations[name].buffers()]
    copies = {id(t): _copy(t) for t in tensors}
    state = random_state()
    try:
        with torch.no_grad():
            return copy.deepcopy(parametrizations[name], copies).eval()()
    finally:
        set_random_state(state)


def _copy(tensor: Tensor) -> Tensor:
    copied = tensor.detach().clone()
    return nn.Parameter(copied, False) if isinstance(tensor, nn.Parameter) else copied
