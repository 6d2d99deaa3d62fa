"""The optimizers of a run, made of parameters that have no memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lora_lightning.tasks.pretrained_task import PretrainedTask
from lora_lightning.training.adapter_callback import AdapterCallback
from lora_lightning.training.module_state import defines_hook
from lora_lightning.training.optimizers import cover_trainable, find_optimizers, frozen_left_out


class Optimizers:
    """Makes a module's own optimizers over what trains; AdamW where it has none.

    Attributes:
        reason: Why not the module's own, where it has some; "" as long as they can be had.

    """

    def __init__(self, callbacks: Sequence[AdapterCallback]) -> None:
        self.reason = ""
        self._unnamed = [c._unnamed_parameters for c in callbacks if c.enabled]

    def __call__(self, module: Any) -> list[Optimizer]:
        """The optimizers, new ones at each call."""
        own = type(module).configure_optimizers
        ready = own is PretrainedTask.configure_optimizers
        if not self.reason and not ready and defines_hook(module, "configure_optimizers"):
            try:
                return self._own(module)
            except Exception as error:  # of a module that anybody may have written
                self.reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        return [_adamw(module)]

    def _own(self, module: Any) -> list[Optimizer]:
        with frozen_left_out() as meant_for:
            made = find_optimizers(module.configure_optimizers())
        if not made:
            raise ValueError("configure_optimizers returned none")
        unnamed = {i for find in self._unnamed for i in find(module)}
        left_out = cover_trainable(made, module, meant_for, unnamed)
        for parameter in left_out:
            parameter.requires_grad_(False)
        return made


def _adamw(module: nn.Module) -> Optimizer:
    trains = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(trains, lr=1e-3, fused=True)
