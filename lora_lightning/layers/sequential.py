"""`nn.Sequential` that trains in full: it runs its layers, but not its adapters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, cast

from torch import nn

from lora_lightning.errors import AdapterStateError
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

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        """Neither what trains nor what is kept aside of the base would have the new layers."""
        raise AdapterStateError(
            f"The layers of a {self.base_type.__name__} that trains in full cannot be exchanged "
            "while its adapter is on. Change it before, or take the adapter off first "
            "(delete_adapter, merge_and_unload). (lora.modules_to_save)"
        )

    append = extend = insert = pop = __setitem__ = __delitem__ = __iadd__ = _refuse

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.base_type(OrderedDict(list(self.layers().items())[index]))
        return list(self)[index]
