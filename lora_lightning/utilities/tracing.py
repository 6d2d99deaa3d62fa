"""Whether compilers, tracers or transformations of torch follow what is computed."""

from __future__ import annotations

import torch

from lora_lightning.utilities._torch import functional_transform_is_active


def is_traced() -> bool:
    """Return True where what is computed has to be ordinary operations.

    That is inside torch.compile, torch.jit.trace, torch.func's transforms and forward-mode AD,
    which do not look into an autograd function or take it for what it is not.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]  # untyped export
        or functional_transform_is_active()
    )
