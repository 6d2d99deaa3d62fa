"""LoRA on a convolution.

W' = W + scaling * B A: A is a convolution to r channels in the geometry of the base (kernel,
stride, padding and its mode, dilation), B a 1x1 convolution from there, grouped like the base.

With groups > 1, A reads every input channel, as in PEFT: the update is then no grouped kernel and
cannot be merged. The update of one group uses r / groups of the r channels.

Source: Hu et al. 2021, arXiv:2106.09685; names, shapes and start values are PEFT's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_lightning.adapters.base import AdapterSpec, BaseWeight
from lora_lightning.adapters.lora.embedding import check_plain_start
from lora_lightning.adapters.lora.linear import LowRankAdapter
from lora_lightning.errors import RankError
from lora_lightning.utilities.autocast import is_autocast


class LoraConvAdapter(LowRankAdapter):
    """y + scaling * (B * A * dropout(x) + b).

    Shapes:
        x (batch, in, *size), y (batch, out, *size'); lora_A (r, in, *kernel);
        lora_B (out, r / groups, 1, ...); lora_B_bias (out) with `lora_bias`.

    """

    def __init__(self, spec: AdapterSpec) -> None:
        check_plain_start(spec)
        groups = self.groups = spec.groups
        out_channels, in_channels, *kernel = spec.shape
        in_channels *= groups
        super().__init__(spec, min(out_channels, in_channels * math.prod(kernel)))
        if self.r % groups:
            raise RankError(
                f"r={self.r} cannot be shared out over the {groups} groups of "
                f"{spec.path!r}: it must be a multiple of them. Give this layer a rank of its own "
                "with rank_pattern, or leave it out with exclude_modules. (lora.r)"
            )
        self.lora_A = spec.parameter(self.r, in_channels, *kernel)
        self.lora_B = spec.parameter(out_channels, self.r // groups, *(1 for _ in kernel))
        self.lora_B_bias = spec.parameter(out_channels) if spec.config.lora_bias else None
        self.reset_parameters()

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in * kernel) and B (out, r), flat."""
        return self.lora_A.flatten(1), self.lora_B.flatten(1)

    def as_matrix(self, weight: Tensor) -> Tensor:
        """The kernel as (out, in * kernel)."""
        return weight.flatten(1)

    def update(self, x: Tensor, base: BaseWeight) -> Tensor:
        """The convolutions scaling * B * A * x."""
        a: Tensor = self.lora_A
        b: Tensor = self.lora_B
        if not is_autocast(x):
            a, b = a.to(x.dtype), b.to(x.dtype)
        hidden = base.apply_weight(x, a)
        convolution = (torch.conv1d, torch.conv2d, torch.conv3d)[b.dim() - 3]
        return convolution((hidden * self.scale()).to(hidden.dtype), b, groups=self.groups)

    def forward(self, x: Tensor, y: Tensor, base: BaseWeight) -> Tensor:
        """y + scaling * (B * A * dropout(x) + b), in y's dtype."""
        y = y + self.update(self.lora_dropout(x), base).to(y.dtype)
        if self.lora_B_bias is not None:
            shape = (-1, *(1 for _ in self.lora_B.shape[2:]))
            y = y + (self.scale() * self.lora_B_bias).view(shape).to(y.dtype)
        return y

    def why_no_weight(self, has_bias: bool) -> str | None:
        """Where the base has groups."""
        if self.groups > 1:
            return (
                "its update reads all input channels, its base only those of one of "
                f"{self.groups} groups"
            )
        return super().why_no_weight(has_bias)

    def delta_weight(self) -> Tensor:
        """scaling * B A as a kernel, (out, in, *kernel)."""
        a, b = self.factors()
        return self.scale() * (b @ a).view(-1, *self.lora_A.shape[1:])
