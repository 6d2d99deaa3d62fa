"""`nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d` and their subclasses as layers."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.adapters.base import Adapter, AdapterModule, Convolution
from lora_lightning.adapters.ia3 import Ia3ConvAdapter
from lora_lightning.adapters.lora.conv import LoraConvAdapter
from lora_lightning.adapters.lora.dora import DoraConvAdapter
from lora_lightning.adapters.oft import OftConvAdapter
from lora_lightning.layers.base import AdaptedLayer
from lora_lightning.layers.by_weight import AdaptedByWeight
from lora_lightning.layers.covered import covered
from lora_lightning.layers.own_forward import (
    has_own_forward,
    is_linear_in_kernel,
    kernel_in_place,
    makes_the_same,
)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class AdaptedConv(AdaptedLayer):
    """y = W * x + b, weight (out_channels, in_channels / groups, *kernel_size)."""

    kind = "conv"

    def convolution(self) -> Convolution:
        """Stride, padding, dilation, groups and padding mode of the module."""
        own = cast(nn.Conv2d, self)
        return Convolution(
            len(own.kernel_size),
            own.stride,
            own.padding,
            own.dilation,
            own.groups,
            own.padding_mode,
        )

    def peft_supports(self, adapter: AdapterModule) -> bool:
        """Tell whether PEFT has this type of adapter on such a convolution, computing the same."""
        conv, kernel = self.convolution(), cast(nn.Conv2d, self).kernel_size
        on_weight = adapter.by_weight().values()
        if not all(a.peft_supports(conv, kernel) for a in on_weight):
            return False
        return not self.has_own_forward() or all(map(self._peft_runs_own_forward, on_weight))

    def _peft_runs_own_forward(self, adapter: Adapter) -> bool:
        # PEFT makes LoRA's A and B of the module's own class, and hands others' inputs and outputs
        # through the module; updates of another kind it computes as torch's convolution would.
        if isinstance(adapter, (Ia3ConvAdapter, OftConvAdapter)):
            return True
        plain = isinstance(adapter, LoraConvAdapter) and not isinstance(adapter, DoraConvAdapter)
        return plain and makes_the_same(cast(nn.Conv2d, self), self.base_type)

    def has_own_forward(self) -> bool:
        """Tell whether the class computes by code of its own; it may pad its input, say."""
        return has_own_forward(self.base_type, _torch_type(self))

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """The convolution of x with another kernel, in the module's own geometry.

        A kernel over other than the module's number of channels is grouped accordingly. A padding
        mode other than zeros pads the input first, as torch's own modules do.
        """
        module = cast(nn.Conv2d, self)
        if self.has_own_forward():
            with covered(self, kernel_in_place(weight, module.in_channels)):
                return cast(Tensor, self.base_type.forward(self, x))
        groups = module.in_channels // weight.shape[1]
        padding = module.padding
        if module.padding_mode != "zeros":
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding = (0,) * (weight.dim() - 2)
        function = _FUNCTIONS[weight.dim() - 2]
        return function(x, weight, None, module.stride, padding, module.dilation, groups)


class AdaptedConvByWeight(AdaptedByWeight, AdaptedConv):
    """y = f(x; W'): a convolution whose forward makes something else of its kernel."""


def _torch_type(module: nn.Module) -> type[nn.Module]:
    return next(kind for kind in CONVOLUTIONS if isinstance(module, kind))


def is_conv_by_weight(module: nn.Module) -> bool:
    """Tell whether a convolution's forward is no convolution with its kernel alone."""
    if isinstance(module, AdaptedLayer):
        return isinstance(module, AdaptedByWeight)
    own = has_own_forward(type(module), _torch_type(module))
    return own and not is_linear_in_kernel(module)
