"""An adapter of its own for every row of a batch (`adapters_per_row`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_lightning.adapters.base import Adapter
from lora_lightning.errors import AdapterStateError
from lora_lightning.layers.composition import part_of

if TYPE_CHECKING:
    from lora_lightning.layers.base import AdaptedLayer


def forward_by_row(
    layer: AdaptedLayer, names: Sequence[str | None], x: Any, *args: Any, **kwargs: Any
) -> Any:
    """The layer's output, row i through adapter `names[i]` alone; None: through the base.

    Rows of one adapter are computed together, just as a batch of their own would be.

    Raises:
        AdapterStateError: If `x` has another number of rows, or the output has none.

    """
    if not isinstance(x, Tensor) or x.shape[0] != len(names):
        found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise AdapterStateError(
            f"adapters_per_row names an adapter for each of {len(names)} rows, but a "
            f"{layer.base_type.__name__} was called with {found}, whose first dimension is "
            "not the batch. Adapters per row need the batch first everywhere."
        )
    here = [n if n is not None and n in layer.adapters else None for n in names]
    groups = dict.fromkeys(here if layer.adapters_enabled else [None])
    if len(groups) < 2:
        return layer.run(_chain(layer, next(iter(groups), None)), x, *args, **kwargs)
    y: Tensor | None = None
    for name in groups:
        index = torch.tensor([i for i, n in enumerate(here) if n == name], device=x.device)
        rows = layer.run(_chain(layer, name), x.index_select(0, index), *args, **kwargs)
        if not isinstance(rows, Tensor):
            raise AdapterStateError(
                f"A {layer.base_type.__name__} answers with a {type(rows).__name__}, not a "
                "tensor: its rows cannot be put together. Run one batch per adapter."
            )
        if y is None:
            y = rows.new_zeros((len(here), *rows.shape[1:]))
        y = y.index_copy(0, index, rows)
    return y


def _chain(layer: AdaptedLayer, name: str | None) -> list[Adapter]:
    part = None if name is None else part_of(layer.adapters[name], "weight")
    if part is not None and part.live.is_meta:
        layer.check_filled(str(name))
    return [] if part is None else [part]
