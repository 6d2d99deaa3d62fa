"""What every adapter is: one named set of trainable tensors on one module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_lightning.config import LoraConfig


class Adapter(nn.Module):
    """Tensors and maths of one adapter on one module; it never sees the module it sits on.

    Attributes:
        config: The options it was made from; shared by all adapters of one injection.

    """

    config: LoraConfig

    def reset_parameters(self) -> None:
        """Set the own tensors to their start values; called again after meta materialisation."""
        raise NotImplementedError


class DeltaAdapter(Adapter):
    """An adapter that adds to the weight: W + delta_weight()."""

    def delta_weight(self) -> Tensor:
        """The update of the weight, in the adapter's own dtype."""
        raise NotImplementedError

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The module's output `y` for input `x`, plus this adapter's share, in y's dtype."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # `model.to(torch.bfloat16)` (Lightning's "bf16-true") narrows the base, not the fp32
        # master copy of the adapter: small updates would be rounded away.
        def keep_master_copy(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.is_floating_point() and moved.dtype.itemsize < 4:
                return tensor.to(device=moved.device, dtype=torch.float32)
            return moved

        return super()._apply(keep_master_copy, recurse)


class AdapterDict(nn.ModuleDict):
    """The adapters of one module by name. Its type is how adapters are told from base modules."""

    def __getitem__(self, name: str) -> Adapter:
        return cast(Adapter, super().__getitem__(name))


def master_dtype(base: torch.dtype) -> torch.dtype:
    """float64 on a float64 base, else float32: half-precision and quantised bases too."""
    return torch.float64 if base == torch.float64 else torch.float32
