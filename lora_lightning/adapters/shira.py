"""SHiRA: train a small, fixed choice of a weight's entries, which may change it in any rank.

    W' = W + S,    S (out, in) with r (in + out) entries that are not zero: as many as LoRA has.

Source: Bhardwaj et al. 2024, "Sparse High Rank Adapters" (arXiv:2406.13175), sections 3 and 4.
Names, shapes, start values and the random choice of entries are those of PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lightning.adapters.base import AdapterSpec, BaseWeight, DeltaAdapter
from lora_lightning.adapters.config import AdapterConfig, Rank
from lora_lightning.adapters.initialization import constant_, normal_
from lora_lightning.errors import ConfigError, RankError

# Up to this share of entries that are not zero, the sparse product is the faster one on a CPU.
# Measured on one core, forward and backward, 1024 x 1024 and 1024 tokens, in ms against the dense
# one: fp32 24 / 84 at a share of 1/64, 39 / 95 at 1/16, 104 / 84 at 1/4; bf16 15 / 36 at 1/64,
# 30 / 36 at 1/16, 49 / 38 at 1/8. Gathered columns and index_add: 2 to 35 times the dense one.
SPARSE_SHARE = 1 / 16


@dataclass(frozen=True, kw_only=True)
class ShiraConfig(AdapterConfig):
    """Options of a SHiRA adapter; names and defaults are those of PEFT.

    Args:
        r: r (in + out) entries of every weight train, as many as LoRA of this rank would.
        mask_type: The choice of entries: "random", or any other word for what mask_fn does.
        mask_fn: Given a weight (out, in) and r, the mask of its shape that is 1 at the r (in + out)
            entries that train and 0 elsewhere. Used where mask_type is not "random".
        random_seed: Of the random choice.
        init_weights: true: the change starts at zero (a no-op); false: random, for tests.

    """

    peft_type = "SHIRA"
    # The chosen entries are saved with their values.
    free_to_change = AdapterConfig.free_to_change | {
        "mask_type",
        "mask_fn",
        "random_seed",
        "init_weights",
    }

    r: Rank = 32
    mask_type: str = "random"
    mask_fn: Callable[..., Any] | None = None
    random_seed: int | None = None
    init_weights: bool = True

    def __post_init__(self) -> None:
        if (self.mask_type == "random") == (self.mask_fn is not None):
            raise ConfigError(
                f"mask_type={self.mask_type!r} with mask_fn={self.mask_fn!r}: a random choice "
                "takes no function, any other needs one. (lora.mask_fn)"
            )
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        """The options as plain Python values: without the function."""
        return {key: value for key, value in super().to_dict().items() if key != "mask_fn"}

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> ShiraConfig:
        """The config of `to_dict`; what a function chose is saved with the tensors."""
        if options.get("mask_fn") is None:
            options = {**options, "mask_type": "random"}
        return super().from_dict(options)


class ShiraAdapter(DeltaAdapter):
    """SHiRA on a linear map: y + x S^T.

    On a CPU the product is a sparse one where S has few entries; else S is written out for it,
    which costs what the base's own product costs.

    Shapes:
        x (..., in), y (..., out); shira_weight (k), k = r (in + out); shira_indices (2, k): row
        and column of each, in the order of the rows.

    """

    config: ShiraConfig

    shira_indices: Tensor

    def __init__(self, spec: AdapterSpec) -> None:
        super().__init__(spec, 1.0)
        r, count = spec.config.r, spec.config.r * sum(spec.shape)
        if count > math.prod(spec.shape):
            raise RankError(
                f"r={r} asks for {count} entries of {spec.path!r}, whose weight "
                f"{tuple(spec.shape)} has {math.prod(spec.shape)}: at most r="
                f"{math.prod(spec.shape) // sum(spec.shape)} fits. Lower r, or leave this layer "
                "out with exclude_modules. (lora.r)"
            )
        self.shira_weight = spec.parameter(count)
        indices = torch.zeros(2, count, dtype=torch.int32, device=spec.device)
        self.register_buffer("shira_indices", indices)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """S = 0 at randomly chosen places, unless `mask_fn` chooses them."""
        super().reset_parameters()
        config = self.config
        if config.init_weights:
            constant_(self.shira_weight, 0)
        else:
            normal_(self.shira_weight, 1, self.spec.generator("shira_weight"))
        if config.mask_type == "random" and not self.shira_indices.is_meta:
            generator = torch.Generator()  # as in PEFT one of each shape, the same without a seed
            if config.random_seed is not None:
                generator.manual_seed(config.random_seed)
            order = torch.randperm(math.prod(self.spec.shape), generator=generator)
            self._choose(order[: len(self.shira_weight)].sort().values)

    @property
    def needs_weight(self) -> bool:  # type: ignore[override]
        """True if `mask_fn` chooses the entries."""
        return self.config.mask_fn is not None

    def start_from_weight(self, weight: Tensor) -> None:
        """Choose the entries with `mask_fn`."""
        config = self.config
        mask: Tensor = cast(Callable[..., Any], config.mask_fn)(weight, config.r)
        chosen = mask.flatten().nonzero().flatten()
        if mask.shape != weight.shape or len(chosen) != len(self.shira_weight):
            raise ConfigError(
                f"mask_fn chooses {len(chosen)} entries in a mask of shape {tuple(mask.shape)} for "
                f"{self.spec.path!r}; it should be {len(self.shira_weight)}, r (in + out), of the "
                f"weight's {tuple(weight.shape)}. (lora.mask_fn)"
            )
        self._choose(chosen)

    def _choose(self, flat: Tensor) -> None:
        columns = self.spec.shape[1]
        self.shira_indices.copy_(torch.stack([flat // columns, flat % columns]))

    def delta_weight(self) -> Tensor:
        """S, dense."""
        rows, columns = self.shira_indices.long()
        flat = self.shira_weight.new_zeros(math.prod(self.spec.shape))
        values = self.scale() * self.shira_weight
        return flat.index_add(0, rows * self.spec.shape[1] + columns, values).view(self.spec.shape)

    def forward(self, x: Tensor, y: Tensor, base: BaseWeight) -> Tensor:
        """y + x S^T, in y's dtype."""
        if not self._product_is_sparse(x):
            return super().forward(x, y, base)
        values = (self.scale() * self.shira_weight).to(x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        change: Tensor = SparseProduct.apply(  # type: ignore[no-untyped-call]
            rows, values, self.shira_indices, self.spec.shape
        )
        return y + change.reshape(y.shape).to(y.dtype)

    def _product_is_sparse(self, x: Tensor) -> bool:
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return False
        if len(self.shira_weight) > SPARSE_SHARE * math.prod(self.spec.shape):
            return False
        rows = self.shira_indices[0]
        return bool((rows[1:] >= rows[:-1]).all())  # a file may have them in any order


class SparseProduct(torch.autograd.Function):
    """x S^T for few entries (row, column, value) of S (out, in), in the order of the rows.

    A sum of chosen rows of x^T for each output is what `F.embedding_bag` computes, without the n k
    products in memory; so is a sum of rows of g^T for each input in backward.

    Shapes:
        x (n, in) -> (n, out); values (k), indices (2, k).

    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, indices: Tensor, shape: tuple[int, int]
    ) -> Tensor:
        """The product."""
        ctx.save_for_backward(x, values, indices)
        ctx.shape = shape
        rows, columns = indices
        starts = _starts(rows, shape[0])
        return _sums(x.t().contiguous(), columns, starts, values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, g S, and of the values, (g^T x) at their places."""
        x, values, indices = ctx.saved_tensors
        rows, columns = indices
        if torch.is_grad_enabled():  # a second derivative is wanted
            dense = values.new_zeros(ctx.shape).index_put((rows, columns), values)
            return grad @ dense, (grad.t() @ x)[rows, columns], None, None
        grad_x = grad_values = None
        by_output = grad.t().contiguous()
        if ctx.needs_input_grad[0]:
            order = columns.argsort()
            starts = _starts(columns[order], ctx.shape[1])
            grad_x = _sums(by_output, rows[order], starts, values[order])
        if ctx.needs_input_grad[1]:
            starts = _starts(rows, ctx.shape[0])
            # The gradient of what forward calls; through autograd it takes three times as long.
            grad_values = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                by_output, x.t().contiguous(), columns, starts, rows, mode=0
            )
        return grad_x, grad_values, None, None


def _starts(targets: Tensor, count: int) -> Tensor:
    """Find where in `targets`, ascending, the entries of 0, 1, ..., count - 1 begin."""
    return torch.searchsorted(targets, torch.arange(count, dtype=targets.dtype), out_int32=True)


def _sums(table: Tensor, sources: Tensor, starts: Tensor, values: Tensor) -> Tensor:
    """(n, targets): the sum of value * table[source] over the entries of each target."""
    sums = F.embedding_bag(sources, table, starts, mode="sum", per_sample_weights=values)
    return sums.t().contiguous()  # adding a transposed tensor takes ten times as long as copying it
