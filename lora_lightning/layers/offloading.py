"""Layers whose weights accelerate brings in for a forward and takes away again (`device_map`).

Between forwards their parameters are on the meta device; the values are in the hook's
`weights_map`. Adapters are small and train: they stay where the layer computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def offloading_hook(module: nn.Module) -> Any:
    """Accelerate's hook that takes the module's weights away between forwards, or None."""
    hook = module.__dict__.get("_hf_hook")
    hooks = getattr(hook, "hooks", (hook,))  # of a SequentialHook
    return next((each for each in hooks if getattr(each, "offload", False)), None)


def offloaded_as_a_whole(model: nn.Module, path: str) -> str | None:
    """Path of a module around `path` whose hook brings in all that is inside it, or None."""
    parts = path.split(".") if path else []
    for length in range(len(parts) + 1):
        outer = ".".join(parts[:length])
        if getattr(offloading_hook(model.get_submodule(outer)), "place_submodules", False):
            return outer
    return None


def compute_device(module: nn.Module, weight: Tensor) -> torch.device:
    """The device on which `weight` of `module` is while the module computes."""
    hook = offloading_hook(module)
    if hook is None or not weight.is_meta or hook.execution_device is None:
        return weight.device
    return torch.device(hook.execution_device)


@contextmanager
def weights_in_place(module: nn.Module) -> Iterator[None]:
    """Inside, an offloaded module has its weights; what is written to them is lost afterwards."""
    hook = offloading_hook(module)
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)
