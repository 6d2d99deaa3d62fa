"""LoRA on a linear map as one autograd function: no output-sized temporaries, little kept.

    h_i = drop_i(x) A_i^T;   y = x W^T + b + sum_i s_i h_i B_i^T,

the sum added into y in place. With g the gradient of y and g_i = s_i g B_i, backward is

    dA_i = g_i^T drop_i(x);   dB_i = s_i g^T h_i;   dx = g W + sum_i drop_i(g_i A_i),

again summed in place (the chain rule for Hu et al. 2021, arXiv:2106.09685, section 4.1). Kept for
it are x, which layers that read the same x share, h_i (r numbers per token), and of a dropout its
mask (one byte per element of x). The maths run in x's dtype: A, B and, under autocast, W are cast
to it when they are used and again in backward, so no copy of a weight is kept either.

Differentiating backward itself (`create_graph=True`) works: it then consists of ordinary
operations, and h is computed again from x.

Shapes:
    x (..., in), W (out, in), b (out,), A (r, in), B (out, r), y (..., out).

"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.lora.linear import LoraAdapter
from lora_lightning.layers.autocast_cache import autocast_input
from lora_lightning.utilities.autocast import is_autocast, product_dtype, without_autocast
from lora_lightning.utilities.tracing import is_traced

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_TYPES = (Tensor, nn.Parameter)


class LoraTerm(NamedTuple):
    """One adapter's share: scaling * B A drop(x), dropping with probability 0 <= dropout < 1."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout: float = 0.0


def lora_terms(adapters: Sequence[Adapter]) -> list[LoraTerm] | None:
    """Return what the adapters add, where all of them are plain LoRA."""
    terms = []
    for adapter in adapters:
        if type(adapter) is not LoraAdapter or adapter.lora_B_bias is not None:
            return None
        a, b = adapter.factors()
        if type(a) not in _TYPES or type(b) not in _TYPES:
            return None
        dropout = adapter.lora_dropout
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        terms.append(LoraTerm(a, b, adapter.scaling, p))
    return terms


def can_fuse(x: Tensor, *others: Tensor | None) -> bool:
    """Tell whether `fused_lora` and `add_lora` may be used on these tensors at this moment.

    Otherwise the plain expression has to be: where somebody traces or transforms it
    (torch.compile, torch.jit, torch.func, forward-mode AD), and where a tensor has a life of its
    own (DTensor, a quantised weight, sparse or nested layouts, float8, complex numbers). Without
    gradients the plain expression is the faster one.
    """
    return (
        torch.is_grad_enabled()
        and not is_traced()
        and type(x) in _TYPES
        and x.dtype in _DTYPES
        and x.layout is torch.strided
        and not x.is_nested
        and all(other is None or type(other) in _TYPES for other in others)
    )


def fused_lora(x: Tensor, weight: Tensor, bias: Tensor | None, terms: Sequence[LoraTerm]) -> Tensor:
    """F.linear(x, weight, bias) plus the shares of `terms`; casts as autocast where it is on."""
    return _apply(terms, False, x, None, weight, bias)


def add_lora(x: Tensor, y: Tensor, terms: Sequence[LoraTerm], *, inplace: bool = False) -> Tensor:
    """`y` plus the shares of `terms`, in y's dtype, for a base that made y of x in its own way.

    `inplace` writes the sum into the memory of `y`, if that is contiguous: only for a base known to
    need its y no more, neither in its backward nor as a buffer of its own.
    """
    return _apply(terms, inplace, x, y, None, None)


def _apply(terms: Sequence[LoraTerm], inplace: bool, x: Tensor, *base: Tensor | None) -> Tensor:
    # `base` is y, weight and bias.
    factors = [factor for term in terms for factor in term[:2]]
    settings = [term[2:] for term in terms]
    output: Tensor = _Lora.apply(  # type: ignore[no-untyped-call]
        autocast_input(x), *base, inplace, settings, *factors
    )
    return output


class _Lora(torch.autograd.Function):
    """Either `weight` or `y` is given."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        inplace: bool,
        settings: Sequence[tuple[float, float]],
        *factors: Tensor,
    ) -> Tensor:
        if y is None:
            assert weight is not None
            # Cast here, not by autocast: its cache would hand what was cast outside of autograd,
            # as all is here, to later readers of the same parameter. Detached, because nobody
            # could change in place an output that is a view of a tensor born in here.
            like = None if bias is None else bias.to(product_dtype(bias))
            output = F.linear(x, weight.to(product_dtype(weight)), like).detach()
        elif inplace and y.is_contiguous():
            if y._is_view():  # of what a function of bitsandbytes has made, which nobody else holds
                output = y.detach()
            else:
                ctx.mark_dirty(y)
                output = y
        else:
            output = y.clone(memory_format=torch.contiguous_format)
        flat = output.view(-1, output.shape[-1])
        kept: list[Tensor | None] = []
        for (scaling, p), a, b in zip(settings, factors[::2], factors[1::2], strict=True):
            dropped, mask = torch.native_dropout(x, p, True) if p else (x, None)
            hidden = F.linear(dropped.reshape(-1, x.shape[-1]), a.to(x.dtype)).to(flat.dtype)
            flat.addmm_(hidden, b.to(flat.dtype).t(), alpha=scaling)
            kept += (a, b, hidden if b.requires_grad else None, mask)
        of_weight, of_factors = ctx.needs_input_grad[2], any(ctx.needs_input_grad[6:])
        ctx.save_for_backward(x if of_weight or of_factors else None, weight, *kept)
        ctx.settings, ctx.shape, ctx.dtype = settings, x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        if is_autocast(grad):  # all is cast here as forward had it
            with without_autocast(grad):
                return _gradients(ctx, grad)
        return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    of_x, of_y, of_weight, of_bias, _, _, *of_factors = ctx.needs_input_grad
    x, weight, *kept = ctx.saved_tensors
    again = torch.is_grad_enabled()  # backward is to be differentiated
    g = grad.reshape(-1, grad.shape[-1])
    x = None if x is None else x.reshape(-1, x.shape[-1])
    dx = g @ weight.to(g.dtype) if of_x and weight is not None else None
    d_weight = (g.t() @ x).to(weight.dtype) if of_weight else None  # type: ignore[operator]
    d_bias = g.sum(0).to(ctx.bias_dtype) if of_bias else None

    d_factors: list[Tensor | None] = []
    for i, (scaling, p) in enumerate(ctx.settings):
        a, b, hidden, mask = kept[4 * i : 4 * i + 4]
        of_a, of_b = of_factors[2 * i : 2 * i + 2]
        d_a = d_b = None
        mask = None if mask is None else mask.reshape(-1, mask.shape[-1])
        if of_a or of_x:  # scaled in B's precision, and rounded once
            g_hidden = (g @ (b * (scaling / (1 - p))).to(g.dtype)).to(ctx.dtype)
        if of_a or (of_b and again):
            dropped = x if mask is None else x * mask
        if of_a:
            d_a = (g_hidden.t() @ dropped).to(a.dtype)
        if of_b:
            if again:
                hidden = (dropped @ a.to(ctx.dtype).t() / (1 - p)).to(g.dtype)
            # Transposed, this product takes two thirds of the time (a row-major result is wide).
            d_b = (hidden.t() @ g).t().to(b.dtype) * scaling
        if of_x:
            a = a.to(ctx.dtype)
            if dx is None or mask is not None:
                share = g_hidden @ a if mask is None else (g_hidden @ a) * mask
                dx = share if dx is None else dx + share
            else:
                dx.addmm_(g_hidden, a)
        d_factors += (d_a, d_b)
    dx = None if dx is None else dx.view(ctx.shape)
    return dx, grad if of_y else None, d_weight, d_bias, None, None, *d_factors
