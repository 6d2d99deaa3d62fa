"""Weights of a Linear as torchao holds them in int8: one tensor of a class of its own.

W[i, j] = scale[block of i, j] * (q[i, j] - zero_point), q in int8; a block is a row, a group
within a row, or the whole tensor (`Int8WeightOnlyConfig(granularity=...)`). The module stays a
plain `nn.Linear`, which is what transformers' `TorchAoConfig` makes too.

Source: torchao 0.18, `Int8Tensor`. Rounding is torchao's own; it is imported when it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.utilities.is_a import is_a


def is_torchao_linear(module: nn.Module) -> bool:
    """Tell whether `module` is a Linear with torchao's weight, found without importing torchao."""
    return isinstance(module, nn.Linear) and has_torchao_weight(module)


def has_torchao_weight(module: nn.Module) -> bool:
    """Tell whether the weight of `module` is one of torchao's, found without importing torchao."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    return is_a(module._parameters.get("weight"), "TorchAOBaseTensor", module="torchao.utils")


def why_not_int8(module: nn.Module) -> str | None:
    """Why a Linear of torchao's cannot carry adapters; None where it can."""
    weight: Any = module.weight
    kind = type(weight).__name__
    if kind != "Int8Tensor":
        return (
            f"has its weight as torchao's {kind}, which cannot be merged into. Quantise with "
            "Int8WeightOnlyConfig, or with bitsandbytes"
        )
    if weight.act_quant_kwargs is not None or weight.act_pre_scale is not None:
        return (
            "rounds or scales its activations in torchao, where no gradient reaches the layers "
            "below it. Quantise weights only, with Int8WeightOnlyConfig"
        )
    return None


@dataclass(frozen=True)
class PackedInt8:
    """The weight of a Linear that torchao has quantised: an Int8Tensor that nobody else holds."""

    tensor: Any

    @staticmethod
    def of(module: Any) -> PackedInt8:
        """A copy of the weight of `module`: the original is written in place."""
        return PackedInt8(module.weight.detach().clone())

    def dense(self) -> Tensor:
        """W in float32, whatever dtype the layer computes in."""
        dense: Tensor = self.tensor.dequantize(torch.float32)
        return dense

    def like(self, dense: Tensor) -> PackedInt8:
        """Another W, rounded in the same way."""
        from torchao.quantization import PerGroup, PerRow, PerTensor

        height, width = self.tensor.block_size
        granularity = PerRow() if width == dense.shape[1] else PerGroup(width)
        if height > 1:
            granularity = PerTensor()
        reduced = self.tensor.reduce_range
        make = type(self.tensor).from_hp
        return PackedInt8(make(dense.float(), granularity, reduce_range=reduced))

    @torch.no_grad()
    def write(self, module: Any) -> None:
        """Make it the weight of `module`, in place: assigning `.data` has no effect there."""
        for name in module.weight.__tensor_flatten__()[0]:
            getattr(module.weight, name).copy_(getattr(self.tensor, name))

    def tensors(self) -> dict[str, Tensor]:
        """All it consists of, as plain tensors."""
        names = self.tensor.__tensor_flatten__()[0]
        return {f"weight.{name}": getattr(self.tensor, name) for name in names}
