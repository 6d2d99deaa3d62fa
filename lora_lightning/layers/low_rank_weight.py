"""A weight that stands for W + L R without the sum being made.

    W (..., m, n) frozen,  L (..., m, k),  R (..., k, n),  k small.

Code that reads the weights of experts nearly always multiplies with them. A `LowRankWeight` is
handed to such code in place of W. Products (`F.linear`, `@`, `torch.bmm`, `grouped_mm`) it answers
by x W + (x L) R; the choice of experts and transposition by another `LowRankWeight`. So neither
L R nor a gradient of its size ever exists. Whatever else it is asked, it answers with the sum.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lightning.utilities.autocast import without_autocast

_DESCRIPTION = (
    "shape", "dtype", "device", "layout", "ndim", "dim", "size", "numel", "element_size",
    "itemsize", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested",
    "is_floating_point", "is_complex",
)  # fmt: skip
_CONVERSION = ("to", "float", "half", "bfloat16", "double", "cpu", "cuda", "contiguous")
_OPERATORS = (
    "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "neg", "abs",
    "eq", "ne", "lt", "le", "gt", "ge", "len", "iter",
)  # fmt: skip


class LowRankWeight:
    """W + L R, of `weight`, `left` and `right`. No tensor, but used like one."""

    def __init__(self, weight: Tensor, left: Tensor, right: Tensor) -> None:
        self.weight = weight
        self.left = left
        self.right = right
        self._experts: tuple[Any, Any] | None = None
        self._sum: Tensor | None = None

    def dense(self) -> Tensor:
        """W + L R in W's dtype."""
        if self._sum is None:
            with without_autocast(self.weight):
                self._sum = self.weight + torch.matmul(self.left, self.right)
        return self._sum

    def __getitem__(self, key: Any) -> Any:
        by_tensor = isinstance(key, Tensor) and key.dtype not in (torch.bool, torch.uint8)
        if not (by_tensor or type(key) in (int, slice)):
            return self.dense()[key]
        if self.weight.dim() == 2:  # rows
            return self.weight[key] + torch.matmul(self.left[key], self.right)
        if type(key) is slice or (by_tensor and key.dim()):
            return LowRankWeight(self.weight[key], self.left[key], self.right[key])
        # One of the experts that a loop goes over. The factors are taken apart once: the gradient
        # of every single choice would be as large as the factors of all experts.
        if self._experts is None:
            self._experts = self.left.unbind(0), self.right.unbind(0)
        index = int(key)
        return LowRankWeight(self.weight[index], self._experts[0][index], self._experts[1][index])

    def transpose(self, dim0: int, dim1: int) -> Any:
        """(W + L R)^T = W^T + R^T L^T for the last two dimensions."""
        dims = self.weight.dim()
        if {dim0 % dims, dim1 % dims} != {dims - 2, dims - 1}:
            return self.dense().transpose(dim0, dim1)
        return LowRankWeight(self.weight.mT, self.right.mT, self.left.mT)

    @property
    def mT(self) -> Any:
        """The last two dimensions exchanged."""
        return self.transpose(-2, -1)

    @property
    def T(self) -> Any:
        """The dimensions in reverse order."""
        return self.mT if self.weight.dim() == 2 else self.dense().T

    def t(self) -> Any:
        """The transpose of a matrix."""
        return self.T

    def __matmul__(self, other: Any) -> Any:
        return _product(torch.matmul, self, other)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return _linear(*args, **kwargs)
        if func in _PRODUCTS and not kwargs:
            return _product(func, *args)
        if func in _GROUPED or str(func).startswith("transformers.grouped_mm_fallback"):
            return _grouped(func, *args, **kwargs)
        return func(*_dense(args), **_dense(kwargs))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what Python and torch look for on their own
            raise AttributeError(name)
        if name in _DESCRIPTION:
            return getattr(self.weight, name)
        if name in _CONVERSION:
            parts = (self.weight, self.left, self.right)
            return lambda *args, **kwargs: LowRankWeight(
                *(getattr(part, name)(*args, **kwargs) for part in parts)
            )
        return getattr(self.dense(), name)


def _operator(name: str) -> Any:
    def operator(self: LowRankWeight, *args: Any) -> Any:
        return getattr(self.dense(), name)(*_dense(args))

    return operator


for _name in _OPERATORS:
    setattr(LowRankWeight, f"__{_name}__", _operator(f"__{_name}__"))

_PRODUCTS = (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm)
_GROUPED = (getattr(torch, "_grouped_mm", None), getattr(F, "grouped_mm", None))


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    """input (W + L R)^T + bias, the weight (m, n) as in F.linear."""
    if not isinstance(weight, LowRankWeight) or isinstance(input, LowRankWeight):
        return F.linear(_dense(input), _dense(weight), _dense(bias))
    y = F.linear(input, weight.weight, _dense(bias))
    return y + F.linear(F.linear(input, weight.right), weight.left)


def _product(func: Any, a: Any, b: Any) -> Any:
    """The product a b, where one of the two or both are W + L R."""
    if isinstance(b, LowRankWeight):
        a = _dense(a)
        return func(a, b.weight) + func(func(a, b.left), b.right)
    return func(a.weight, b) + func(a.left, func(a.right, b))


def _grouped(func: Any, x: Any, weight: Any, offs: Any = None, **kwargs: Any) -> Any:
    """Rows offs[e-1] to offs[e] of x times W_e + L_e R_e, for every expert e."""
    if not isinstance(weight, LowRankWeight) or weight.dim() != 3 or x.dim() != 2:
        return func(_dense(x), _dense(weight), offs=offs, **kwargs)
    left, right = weight.left, weight.right
    missing = -left.shape[-1] % (16 // left.element_size())
    if missing:  # the kernel wants rows of whole 16 bytes
        left, right = F.pad(left, (0, missing)), F.pad(right, (0, 0, 0, missing))
    y = func(x, weight.weight, offs=offs, **kwargs)
    return y + func(func(x, left, offs=offs), right, offs=offs).to(y.dtype)


def _dense(value: Any) -> Any:
    if isinstance(value, LowRankWeight):
        return value.dense()
    if isinstance(value, (list, tuple)):
        return type(value)(_dense(item) for item in value)
    if isinstance(value, dict):
        return {key: _dense(item) for key, item in value.items()}
    return value
