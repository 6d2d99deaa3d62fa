"""A trainable copy of a whole module: what `modules_to_save` asks for (a new head, say)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lora_lightning.adapters.base import Adapter
from lora_lightning.config import AdapterConfig


class TrainedCopy(Adapter):
    """Takes the module's place while it is active; the module itself stays as it was.

    Args:
        copy: A copy of the module, free of adapters. It keeps the module's dtype.
        config: The options shared by all adapters of the injection.

    """

    def __init__(self, copy: nn.Module, config: AdapterConfig) -> None:
        tensors = (*copy.parameters(), *copy.buffers())
        super().__init__(config, tensors[0].device if tensors else None)
        self.module = copy
        for parameter in copy.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The copy's output in place of the module's."""
        return self.module(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return nn.Module._apply(self, fn, recurse)  # the copy is cast like the module itself
