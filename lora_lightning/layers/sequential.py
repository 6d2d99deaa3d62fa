"""`nn.Sequential` that trains in full: it runs its layers, but not its adapters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, cast

from torch import nn

from lora_lightning.layers.base import AdaptedLayer


class AdaptedSequential(AdaptedLayer):
    """The layers of the container, one after the other."""

    def layers(self) -> dict[str, nn.Module]:
        """The children but for the adapters and what is kept aside."""
        children = cast("dict[str, nn.Module]", self._modules)
        own = ("adapters", "original_tensors")
        return {name: module for name, module in children.items() if name not in own}

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.layers().values())

    def __len__(self) -> int:
        return len(self.layers())

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.base_type(OrderedDict(list(self.layers().items())[index]))
        return list(self)[index]
