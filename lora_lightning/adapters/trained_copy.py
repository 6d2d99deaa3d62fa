"""A trainable copy of a whole module: what `modules_to_save` asks for (a new head, say)."""

from __future__ import annotations

from typing import Any

from torch import nn

from lora_lightning.adapters.base import Adapter
from lora_lightning.config import LoraConfig


class TrainedCopy(Adapter):
    """Takes the module's place while it is active; the module itself stays as it was.

    Args:
        copy: A copy of the module, free of adapters. It keeps the module's dtype.
        config: The options shared by all adapters of the injection.

    """

    def __init__(self, copy: nn.Module, config: LoraConfig) -> None:
        super().__init__()
        self.config = config
        self.module = copy
        for parameter in copy.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)

    def reset_parameters(self) -> None:
        """Nothing to do: the modules inside reset themselves."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The copy's output in place of the module's."""
        return self.module(*args, **kwargs)
