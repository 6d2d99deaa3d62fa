"""Parts that LoHa and LoKr share: options, dropout, and how to keep little for backward.

Both add an update that is a product of small tensors, W' = W + scaling * delta(tensors), with
scaling = alpha / r.

Source: LyCORIS, Yeh et al. 2023 (arXiv:2309.14859); names, shapes, start values and dropout are
PEFT's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import AdapterSpec, DeltaAdapter
from lora_lightning.adapters.config import Positive, Probability, RankedConfig, check_choice
from lora_lightning.adapters.initialization import constant_, kaiming_uniform_
from lora_lightning.utilities.autocast import without_autocast
from lora_lightning.utilities.tracing import is_traced

# Computing again has a price of its own, which is the larger part of the step where the tensors
# have fewer elements than this (one CPU thread); what is kept is then little anyway.
SMALL = 2**16


@dataclass(frozen=True, kw_only=True)
class LycorisConfig(RankedConfig):
    """Options that LoHa and LoKr have in common; names and defaults are those of PEFT.

    Args:
        r: Rank of the factors.
        alpha: Numerator of the scaling alpha / r; doubling it doubles the update.
        rank_dropout: Probability in [0, 1) of dropping a row of the update (an output feature) in
            a training step.
        module_dropout: Probability in [0, 1) of dropping the whole update of a module in a
            training step. What is kept is not enlarged.
        use_effective_conv2d: Factor the kernels of convolutions (also 1d and 3d) as a core over
            the kernel's positions and two matrices over the channels (FedPara, arXiv:2108.06098,
            proposition 3), instead of as one matrix (out, in * positions).
        init_weights: true: the adapter starts as a no-op; false: all tensors random, for tests.

    """

    free_to_change = RankedConfig.free_to_change | {
        "rank_dropout",
        "module_dropout",
        "init_weights",
    }
    starts: ClassVar[tuple[bool | str, ...]] = (True, False)  # values of init_weights

    alpha: Positive = 8
    rank_dropout: Probability = 0.0
    module_dropout: Probability = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool | str = True

    def __post_init__(self) -> None:
        check_choice("init_weights", self.init_weights, self.starts)
        super().__post_init__()


class LycorisAdapter(DeltaAdapter):
    """y + update(x), of which a training step may drop rows or all of it."""

    config: LycorisConfig

    def __init__(self, spec: AdapterSpec, r: int) -> None:
        self.r = r
        self.alpha = spec.alpha(spec.config.alpha)
        super().__init__(spec, self.alpha / r)
        self.fitted_rank = None if r == spec.rank() else r
        kernel = spec.shape[2:]
        # On a kernel of one position there is nothing to take apart.
        self.effective = spec.config.use_effective_conv2d and any(size != 1 for size in kernel)

    def core(self) -> nn.Parameter:
        """The tensor of `use_effective_conv2d`, (r, r, *kernel); PEFT ends that of 1d with a 1."""
        kernel = self.spec.shape[2:]
        return self.spec.parameter(self.r, self.r, *kernel, *((1,) if len(kernel) == 1 else ()))

    def start(self, *zero: str) -> None:
        """Start values: the tensors `zero` are 0, all others Kaiming-uniform."""
        for name, tensor in self.named_parameters(recurse=False):
            if name in zero:
                constant_(tensor, 0)
            else:  # fan_in is the product of all dimensions but the first
                kaiming_uniform_(tensor.flatten(1), self.spec.generator(name))

    def strength(self) -> float | Tensor:
        """`scale()`, or 0 where the whole update is dropped."""
        p = self.config.module_dropout
        if not (self.training and p):
            return self.scale()
        # A factor 0, not a branch: it can be compiled, and the tensors still get gradients (of
        # 0), which DistributedDataParallel waits for.
        like = self.scaling_tensor
        return self.scale() * (torch.rand((), device=like.device) > p).to(like.dtype)

    def kept_rows(self, rescale: bool) -> Tensor | None:
        """Draw the factors of the update's rows: 0 or 1, divided by the mean if `rescale`.

        None where no rows are dropped.
        """
        p = self.config.rank_dropout
        if not (self.training and p):
            return None
        rows, like = self.spec.shape[0], self.scaling_tensor
        kept = (torch.rand(rows, device=like.device) > p).to(like.dtype)
        return kept / kept.mean().clamp_min(1 / rows) if rescale else kept

    def extra_repr(self) -> str:
        """Rank and alpha, as they appear in `print(model)`."""
        return f"r={self.r}, alpha={self.alpha:g}"


def contract_core(core: Tensor, columns: Tensor) -> Tensor:
    """Sum of core[i, j, ...] columns[j, s] over j: (r, r, *kernel), (r, in) -> (r, in, *kernel)."""
    return torch.einsum("ij...,js->is...", core, columns)


def recompute(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`function(*tensors)`, of which only `tensors` are kept for backward.

    What backward needs from inside is computed again there, unless it is little. For functions
    that are cheap next to what they would keep; all that needs a gradient has to be among
    `tensors`, in the dtype of the maths.
    """
    if is_traced() or not torch.is_grad_enabled() or sum(t.numel() for t in tensors) < SMALL:
        return function(*tensors)
    output: Tensor = _Recomputed.apply(function, *tensors)  # type: ignore[no-untyped-call]
    return output


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        wanted = ctx.needs_input_grad[1:]
        twice = torch.is_grad_enabled()  # create_graph=True: stay connected to the outside
        tensors = ctx.saved_tensors
        if not twice:
            tensors = [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
        with torch.enable_grad(), without_autocast(grad):
            output = ctx.function(*tensors)
            inputs = [t for t, w in zip(tensors, wanted, strict=True) if w]
            gradients = iter(torch.autograd.grad(output, inputs, grad, create_graph=twice))
        return None, *(next(gradients) if w else None for w in wanted)
