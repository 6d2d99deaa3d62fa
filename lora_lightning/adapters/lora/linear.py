"""LoRA: a trainable low-rank update of a frozen weight.

W' = W + scaling * B A,  A (r, in), B (out, r),  scaling = lora_alpha / r.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685),
section 4.1; with use_rslora the scaling is lora_alpha / sqrt(r) (Kalajdzievski 2023,
arXiv:2312.03732). Tensor names and shapes are those of PEFT's files.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.adapters.base import AdapterSpec, BaseWeight, Convolution, DeltaAdapter
from lora_lightning.adapters.initialization import constant_, kaiming_uniform_, normal_
from lora_lightning.adapters.lora.config import LoraConfig
from lora_lightning.adapters.lora.init_weights import START_FROM_WEIGHT, orthogonal_factors
from lora_lightning.utilities.autocast import is_autocast
from lora_lightning.utilities.dtensor import copy_full


class LowRankAdapter(DeltaAdapter):
    """Common part of LoRA on every kind of weight; its `update` is without dropout and bias."""

    config: LoraConfig
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_B_bias: nn.Parameter | None

    file_names: ClassVar[dict[str, str]] = {
        "lora_A": "lora_A.weight",
        "lora_B": "lora_B.weight",
        "lora_B_bias": "lora_B.bias",
    }

    def __init__(self, spec: AdapterSpec, largest: int | None = None) -> None:
        config: LoraConfig = spec.config
        self.r = spec.rank(largest or min(spec.shape[-2:]))
        self.lora_alpha = spec.alpha(config.lora_alpha)
        root = math.sqrt(self.r) if config.use_rslora else self.r
        super().__init__(spec, self.lora_alpha / root)
        self.fitted_rank = None if self.r == spec.rank() else self.r
        dropout = config.lora_dropout
        self.lora_dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.lora_B_bias = None

    def reset_parameters(self) -> None:
        """A and B as `init_lora_weights` says, unless they start from the base weight."""
        super().reset_parameters()
        start = self.config.init_lora_weights
        generator = self.spec.generator("lora_A")
        if start == "gaussian":
            normal_(self.lora_A, 1 / self.r, generator)
        else:
            kaiming_uniform_(self.lora_A, generator)
        if start is False:
            kaiming_uniform_(self.lora_B, self.spec.generator("lora_B"))
        else:
            constant_(self.lora_B, 0)
        if start == "orthogonal":
            self._start_with(
                *orthogonal_factors(self.r, self.spec.shape, self.spec.path, generator)
            )
        if self.lora_B_bias is not None:
            constant_(self.lora_B_bias, 0)

    @torch.no_grad()
    def _start_with(self, a: Tensor, b: Tensor) -> None:
        copy_full(self.lora_A, a)
        copy_full(self.lora_B, b)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (k, in) and B (out, k) of the update scaling * B A, as matrices."""
        raise NotImplementedError

    def as_matrix(self, weight: Tensor) -> Tensor:
        """A weight in the canonical layout as the matrix (out, in) that B A is added to."""
        return weight

    def transform_bias(self, bias: Tensor, base: BaseWeight) -> Tensor:
        """Base bias + scaling * b."""
        if self.lora_B_bias is None:
            return bias
        return bias + self.scaling * self.lora_B_bias.to(bias.dtype)

    def why_no_weight(self, has_bias: bool) -> str | None:
        """Where the base has no bias that the adapter's own could go into."""
        if self.lora_B_bias is not None and not has_bias:
            return "it has no bias that the adapter's own (lora_bias) could be merged into"
        return None

    def peft_supports(self, conv: Convolution, kernel: tuple[int, ...]) -> bool:
        """Not where it dilates either: PEFT's A does not."""
        return super().peft_supports(conv, kernel) and set(conv.dilation) == {1}

    def extra_repr(self) -> str:
        """Rank and alpha, as they appear in `print(model)`."""
        return f"r={self.r}, lora_alpha={self.lora_alpha:g}"


class LoraAdapter(LowRankAdapter):
    """LoRA on a linear map: y + scaling * (B A dropout(x) + b).

    The maths run in the activation's dtype: A and B (small) are cast to it, never the activation
    (large) to theirs.

    Where A and B start from the base weight (PiSSA, OLoRA), what they start with, B0 A0, is
    subtracted as a frozen low-rank term of its own, scaling * (B A - B0 A0): the base weight
    itself stays untouched.

    Shapes:
        x (..., in), y (..., out) -> (..., out); lora_A (r, in); lora_B (out, r);
        lora_B_bias (out) with `lora_bias`; lora_A_start, lora_B_start as lora_A, lora_B.

    """

    not_in_files = frozenset({"lora_A_start", "lora_B_start"})
    lora_A_start: Tensor | None
    lora_B_start: Tensor | None

    def __init__(self, spec: AdapterSpec) -> None:
        out_features, in_features = spec.shape
        super().__init__(spec)
        self.lora_A = spec.parameter(self.r, in_features)
        self.lora_B = spec.parameter(out_features, self.r)
        self.lora_B_bias = spec.parameter(out_features) if spec.config.lora_bias else None
        starts = spec.config.starts_from_base
        for name, tensor in (("lora_A_start", self.lora_A), ("lora_B_start", self.lora_B)):
            self.register_buffer(name, torch.zeros_like(tensor.detach()) if starts else None)
        self.reset_parameters()

    @property
    def needs_weight(self) -> bool:  # type: ignore[override]
        """True if A and B start from the base weight."""
        return self.lora_A_start is not None

    @torch.no_grad()
    def start_from_weight(self, weight: Tensor) -> None:
        """A and B from the base weight (PiSSA, OLoRA), and what they start with beside them."""
        if self.lora_A_start is None or self.lora_B_start is None:  # DoRA's magnitude alone
            return
        start = str(self.config.init_lora_weights)
        factors = START_FROM_WEIGHT[start.partition("_")[0]]
        generator = self.spec.generator("lora_A")
        self._start_with(*factors(weight, self.r, self.scaling, start, generator))
        self.lora_A_start.copy_(self.lora_A)
        self.lora_B_start.copy_(self.lora_B)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (k, in) and B (out, k); k = 2 r where what they started with is subtracted."""
        if self.lora_A_start is None or self.lora_B_start is None:
            return self.lora_A, self.lora_B
        return (
            torch.cat([self.lora_A, self.lora_A_start]),
            torch.cat([self.lora_B, -self.lora_B_start], dim=1),
        )

    def file_state(self) -> dict[str, Tensor]:
        """A and B; where their start is subtracted, those of rank 2 r that say the same."""
        state = super().file_state()
        if self.lora_A_start is not None:
            for name in self.not_in_files:
                del state[name]
            a, b = self.factors()
            state["lora_A.weight"], state["lora_B.weight"] = a.detach(), b.detach()
        return state

    def cast_factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A and B in the dtype in which `x` is multiplied."""
        a, b = self.factors()
        if is_autocast(x):  # which casts x, A and B itself
            return a, b
        return a.to(x.dtype), b.to(x.dtype)

    def update(self, x: Tensor, base: BaseWeight) -> Tensor:
        """The product scaling * B A x."""
        a, b = self.cast_factors(x)
        return F.linear(F.linear(x, a) * self.scale(), b)

    def forward(self, x: Tensor, y: Tensor, base: BaseWeight) -> Tensor:
        """y + scaling * (B A dropout(x) + b), in y's dtype."""
        x, scale = self.lora_dropout(x), self.scale()
        a, b = self.cast_factors(x)
        hidden = F.linear(x, a)
        if isinstance(scale, float) and hidden.dtype == y.dtype:
            # One call: no output-sized temporaries for B h, for its scaling and for the sum.
            flat_y, flat_hidden = y.reshape(-1, y.shape[-1]), hidden.reshape(-1, a.shape[0])
            y = torch.addmm(flat_y, flat_hidden, b.t(), alpha=scale).view(y.shape)
        else:  # compiled: inductor fuses this; or a base that answers in a dtype of its own
            y = y + F.linear(hidden * scale, b).to(y.dtype)
        if self.lora_B_bias is not None:
            y = y + (scale * self.lora_B_bias).to(y.dtype)
        return y

    def delta_weight(self) -> Tensor:
        """scaling * B A, (out, in)."""
        a, b = self.factors()
        return self.scale() * (b @ a)
