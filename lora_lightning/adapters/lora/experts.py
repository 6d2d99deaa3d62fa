"""LoRA on a parameter: the fused weights of all experts of a layer, or any matrix.

For every expert e, W_e' = W_e + scaling * B_e A_e,  A_e (r, in), B_e (out, r).

Source: Hu et al. 2021, arXiv:2106.09685. Names, shapes and start values are those of PEFT's files:
the experts lie one after the other in A and side by side in B.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_lightning.adapters.base import AdapterSpec
from lora_lightning.adapters.lora.config import LoraConfig
from lora_lightning.adapters.lora.embedding import check_plain_start
from lora_lightning.adapters.lora.linear import LowRankAdapter
from lora_lightning.errors import ConfigError


class LoraExpertsAdapter(LowRankAdapter):
    """W_e + scaling * B_e A_e for every expert e; a matrix counts as one expert.

    Shapes:
        the parameter (experts, out, in), (experts, in, out) where its module `is_transposed`, or
        (out, in); lora_A (r * experts, in), row e * r + k is row k of A_e;
        lora_B (out, r * experts), column k * experts + e is column k of B_e.

    """

    def __init__(self, spec: AdapterSpec) -> None:
        _check_options(spec)
        *experts, rows, columns = spec.shape
        self.experts = experts[0] if experts else None
        self.transposed = spec.transposed and bool(experts)
        out_features, in_features = (columns, rows) if self.transposed else (rows, columns)
        super().__init__(spec)
        ranks = self.r * (self.experts or 1)
        self.lora_A = spec.parameter(ranks, in_features)
        self.lora_B = spec.parameter(out_features, ranks)
        self.reset_parameters()

    def factors(self) -> tuple[Tensor, Tensor]:
        """A_e and B_e of all experts, (experts, r, in) and (experts, out, r); of a matrix A, B."""
        if self.experts is None:
            return self.lora_A, self.lora_B
        a = self.lora_A.view(self.experts, self.r, -1)
        b = self.lora_B.view(-1, self.r, self.experts).permute(2, 0, 1)
        return a, b

    def stored_factors(self) -> tuple[Tensor, Tensor]:
        """L (..., m, r) and R (..., r, n) with L R = delta_weight(), the parameter (..., m, n)."""
        a, b = self.factors()
        b = b * self.scale()
        return (a.mT, b.mT) if self.transposed else (b, a)

    def delta_weight(self) -> Tensor:
        """scaling * B_e A_e for every expert, in the layout of the parameter."""
        left, right = self.stored_factors()
        return torch.matmul(left, right)


def _check_options(spec: AdapterSpec) -> None:
    check_plain_start(spec)
    config: LoraConfig = spec.config
    for option in ("lora_dropout", "use_dora", "lora_bias"):
        if getattr(config, option):
            raise ConfigError(
                f"{option} is set, but the update of the parameter {spec.path!r} is part of its "
                f"weight and {option} is not defined for that. Leave it at its default, or adapt "
                f"modules and parameters by two adapters, one without it. (lora.{option})"
            )
