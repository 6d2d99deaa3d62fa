"""LoHa: an update that is the elementwise product of two low-rank matrices.

W' = W + scaling * (A1 B1) o (A2 B2),  scaling = alpha / r: with 2 r (out + in) numbers, a matrix of
rank up to r^2.

A kernel (out, in, *positions) is the matrix (out, in * positions), or, with use_effective_conv2d,
each factor is itself a Tucker product: of a core T (r, r, *positions), contracted with B (r, in)
over its second and A (r, out) over its first dimension.

Where r^2 is small next to out and in, the update acts without being written out, as the product of
two matrices of rank r^2 (the one that FedPara's proposition 2 counts the rank with):

    ((A1 B1) o (A2 B2))[i, j] = sum over s, t of (A1[i, s] A2[i, t]) (B1[s, j] B2[t, j]).

Source: Hyeon-Woo et al. 2022, "FedPara" (arXiv:2108.06098), propositions 1 to 3; as an adapter:
LyCORIS, Yeh et al. 2023 (arXiv:2309.14859). Names, shapes and start values are PEFT's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.adapters.base import AdapterSpec, BaseWeight
from lora_lightning.adapters.lycoris import LycorisAdapter, LycorisConfig, contract_core, recompute
from lora_lightning.utilities.autocast import product_dtype, without_autocast
from lora_lightning.utilities.tracing import is_traced

# As two products the update was faster than as a dense weight up to this part of its products (one
# CPU thread; 64 to 3072 features or channels).
_WORTH_IT = 1 / 2


@dataclass(frozen=True, kw_only=True)
class LohaConfig(LycorisConfig):
    """Options of a LoHa adapter; names and defaults are those of PEFT.

    h = W x + b + scaling * ((A1 B1) o (A2 B2)) x,  scaling = alpha / r.  (arXiv:2108.06098,
    arXiv:2309.14859)

    Args:
        r: Rank of each of the two factors; that of the update can reach r^2.
        rank_dropout: Probability in [0, 1) of dropping a row of the update (an output feature) in
            a training step; the rows that are left are enlarged accordingly.
        init_weights: true: B2 is zero (the adapter starts as a no-op), all else Kaiming-uniform;
            false: B2 too, for tests.

    """

    peft_type = "LOHA"


LoHaConfig = LohaConfig  # PEFT's spelling


class LohaAdapter(LycorisAdapter):
    """LoHa on a linear map or a convolution.

    Shapes:
        hada_w1_a, hada_w2_a (out, r); hada_w1_b, hada_w2_b (r, in * positions). With
        use_effective_conv2d: hada_t1, hada_t2 (r, r, *kernel); hada_w1_a, hada_w2_a (r, out);
        hada_w1_b, hada_w2_b (r, in).

    """

    config: LohaConfig

    hada_t1: nn.Parameter | None
    hada_t2: nn.Parameter | None

    def __init__(self, spec: AdapterSpec) -> None:
        rows, columns, *kernel = spec.shape
        columns *= math.prod(kernel)
        # At min(rows, columns) a factor is any matrix. PEFT takes its default of 8 on layers that
        # are narrower than that; beyond the larger side there is no such excuse.
        fitting = (min if spec.fit_rank else max)(rows, columns)
        super().__init__(spec, spec.rank(fitting))
        shape_a, shape_b = (rows, self.r), (self.r, columns)
        self.hada_t1 = self.hada_t2 = None
        if self.effective:
            self.hada_t1, self.hada_t2 = self.core(), self.core()
            shape_a, shape_b = (self.r, rows), (self.r, spec.shape[1])
        self.hada_w1_a, self.hada_w1_b = spec.parameter(*shape_a), spec.parameter(*shape_b)
        self.hada_w2_a, self.hada_w2_b = spec.parameter(*shape_a), spec.parameter(*shape_b)
        products = self.r**2 * (rows + columns)
        self.uses_factors = spec.groups == 1 and products <= _WORTH_IT * rows * columns
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """B2 zero unless `init_weights` is false, all others Kaiming-uniform."""
        super().reset_parameters()
        self.start(*(["hada_w2_b"] if self.config.init_weights else []))

    def factors(self, strength: float | Tensor) -> list[Tensor]:
        """A1 (out, r) times `strength`, B1 (r, in * positions), A2, B2."""
        a1: Tensor = self.hada_w1_a
        b1: Tensor = self.hada_w1_b
        a2: Tensor = self.hada_w2_a
        b2: Tensor = self.hada_w2_b
        if self.hada_t1 is not None and self.hada_t2 is not None:
            a1, b1 = a1.t(), contract_core(self.hada_t1, b1).flatten(1)
            a2, b2 = a2.t(), contract_core(self.hada_t2, b2).flatten(1)
        return [a1 * strength, b1, a2, b2]

    def delta_weight(self) -> Tensor:
        """scaling * (A1 B1) o (A2 B2), (out, in, *kernel)."""
        return hadamard(*self.factors(self.scale())).view(self.spec.shape)

    def update(self, x: Tensor, base: BaseWeight) -> Tensor:
        """The base's map with scaling * (A1 B1) o (A2 B2) as its weight."""
        strength = self.strength()
        rows = self.kept_rows(rescale=True)
        if rows is not None:
            strength = (rows * strength).unsqueeze(1)
        factors = self.factors(strength)
        dtype = product_dtype(x)
        x = x.to(dtype)
        if self.uses_factors:
            return recompute(partial(_in_steps, base, self.spec.shape[1:]), x, *factors)
        factors = [factor.to(dtype) for factor in factors]
        if self.spec.conv is not None:
            return base.apply_weight(x, recompute(hadamard, *factors).view(self.spec.shape))
        if is_traced():
            return F.linear(x, hadamard(*factors))
        output: Tensor = _HadamardLinear.apply(x, *factors)  # type: ignore[no-untyped-call]
        return output


def hadamard(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
    """(A1 B1) o (A2 B2)."""
    return (a1 @ b1) * (a2 @ b2)


def _in_steps(base: BaseWeight, shape: tuple[int, ...], x: Tensor, *factors: Tensor) -> Tensor:
    """The base's map with (A1 B1) o (A2 B2) as its weight, as two of rank r^2; shape (in, ...)."""
    a1, b1, a2, b2 = factors
    a = (a1.unsqueeze(2) * a2.unsqueeze(1)).flatten(1).to(x.dtype)
    b = (b1.unsqueeze(1) * b2.unsqueeze(0)).flatten(0, 1).to(x.dtype)
    if len(shape) == 1:
        return F.linear(F.linear(x, b), a)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(shape) - 2]
    hidden = base.apply_weight(x, b.view(-1, *shape))
    return convolve(hidden, a.view(*a.shape, *(1 for _ in shape[1:])))


class _HadamardLinear(torch.autograd.Function):
    """F.linear(x, hadamard(a1, b1, a2, b2)), for whose backward nothing of W's size is kept.

    With P1 = A1 B1, P2 = A2 B2 and G = g^T x, g the gradient of the output:
    dx = g (P1 o P2);  dA1 = (G o P2) B1^T;  dB1 = A1^T (G o P2); the same for A2, B2 with P1.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(x, *factors)
        return F.linear(x, hadamard(*factors))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        of_x, *of_factors = ctx.needs_input_grad
        x, a1, b1, a2, b2 = ctx.saved_tensors
        dx: Tensor | None = None
        d_factors: list[Tensor | None] = [None] * 4
        with without_autocast(grad):
            p1, p2 = a1 @ b1, a2 @ b2
            if of_x:
                dx = grad @ (p1 * p2)
            if any(of_factors):
                g = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
                g1, g2 = g * p2, g * p1
                d_factors = [g1 @ b1.t(), a1.t() @ g1, g2 @ b2.t(), a2.t() @ g2]
        return dx, *d_factors
