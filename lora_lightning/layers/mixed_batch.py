"""An adapter of its own for every row of a batch (`adapters_per_row`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_lightning.errors import AdapterStateError


def forward_by_row(
    names: Sequence[str | None],
    x: Any,
    forward: Callable[[str | None, Tensor], Any],
    layer_name: str,
) -> Any:
    """The output of a layer whose row i of `x` goes through adapter `names[i]` alone (None: base).

    Rows of one adapter are computed together by `forward`, just as a batch of their own would be.

    Raises:
        AdapterStateError: If `x` has another number of rows, or the output has none.

    """
    if not isinstance(x, Tensor) or x.shape[0] != len(names):
        found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise AdapterStateError(
            f"adapters_per_row names an adapter for each of {len(names)} rows, but a {layer_name} "
            f"was called with {found}, whose first dimension is not the batch. Adapters per row "
            "need the batch first everywhere."
        )
    groups = dict.fromkeys(names)
    if len(groups) < 2:
        return forward(next(iter(groups), None), x)
    y: Tensor | None = None
    for name in groups:
        index = torch.tensor([i for i, other in enumerate(names) if other == name], device=x.device)
        rows = forward(name, x.index_select(0, index))
        if not isinstance(rows, Tensor):
            raise AdapterStateError(
                f"A {layer_name} answers with a {type(rows).__name__}, not a tensor: its rows "
                "cannot be put together. Run one batch per adapter."
            )
        if y is None:
            y = rows.new_zeros((len(names), *rows.shape[1:]))
        y = y.index_copy(0, index, rows)
    return y
