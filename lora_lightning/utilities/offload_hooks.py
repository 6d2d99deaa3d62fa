"""Modules whose tensors stay where they are when accelerate offloads the model around them."""

from __future__ import annotations

from typing import Any

from torch import nn


class KeepsTensors(nn.Module):
    """Takes its tensors back from an offloading hook at once, to where the hook has it compute.

    They are small and train: an optimizer that is made next holds them.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_hf_hook":  # which has just taken them away
            for hook in getattr(value, "hooks", (value,)):  # of a SequentialHook
                if getattr(hook, "offload", False):
                    hook.detach_hook(self)
                    hook.offload = False
                    if hook.execution_device is not None:
                        self.to(hook.execution_device)
