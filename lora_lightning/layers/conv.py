"""`nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d` and their subclasses as layers."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.adapters.base import AdapterModule, Convolution
from lora_lightning.layers.base import AdaptedLayer

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class AdaptedConv(AdaptedLayer):
    """y = W * x + b, weight (out_channels, in_channels / groups, *kernel_size)."""

    kind = "conv"

    def convolution(self) -> Convolution:
        """Stride, padding, dilation, groups and padding mode of the module."""
        own, dims = cast(nn.Conv2d, self), self.weight.dim() - 2
        return Convolution(
            dims, own.stride, own.padding, own.dilation, own.groups, own.padding_mode
        )

    def peft_supports(self, adapter: AdapterModule) -> bool:
        """Tell whether PEFT has this type of adapter on such a convolution, computing the same."""
        conv, kernel = self.convolution(), tuple(self.weight.shape[2:])
        return all(a.peft_supports(conv, kernel) for a in adapter.by_weight().values())

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """The convolution of x with another kernel, in the module's own geometry.

        A kernel over other than the module's number of channels is grouped accordingly. A padding
        mode other than zeros pads the input first, as torch's own modules do.
        """
        module = cast(nn.Conv2d, self)
        groups = module.in_channels // weight.shape[1]
        padding = module.padding
        if module.padding_mode != "zeros":
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding = (0,) * (weight.dim() - 2)
        function = _FUNCTIONS[weight.dim() - 2]
        return function(x, weight, None, module.stride, padding, module.dilation, groups)
