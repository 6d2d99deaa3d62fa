"""One autocast copy of an activation for all layers that read it.

Under autocast every Linear casts its input anew, so q, k and v each keep a half-precision copy of
the same activation for backward. Here the last cast is remembered (weakly: it lives exactly as
long as somebody needs it) and handed to the next layer that reads the same tensor.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from lora_lightning.utilities.autocast import is_autocast


class _LastCast(threading.local):
    source: TensorWeakRef | None = None
    cast: TensorWeakRef | None = None
    version: int = -1


_last = _LastCast()


def autocast_input(x: Tensor) -> Tensor:
    """`x` as autocast would hand it to a matrix product; `x` itself where autocast is off."""
    if not is_autocast(x) or not x.is_floating_point():
        return x
    dtype = torch.get_autocast_dtype(x.device.type)
    if x.dtype in (dtype, torch.float64):  # autocast leaves float64 alone
        return x
    if torch.compiler.is_compiling() or x.is_inference():  # inductor shares the cast on its own
        return x.to(dtype)
    if _last.source is not None and _last.cast is not None and _last.source() is x:
        cast: Tensor | None = _last.cast()
        needs_grad = x.requires_grad and torch.is_grad_enabled()
        if (
            cast is not None
            and cast.dtype == dtype
            and _last.version == x._version  # x was not changed in place since
            and cast.requires_grad == needs_grad
        ):
            return cast
    cast = x.to(dtype)
    _last.source, _last.cast, _last.version = TensorWeakRef(x), TensorWeakRef(cast), x._version
    return cast
