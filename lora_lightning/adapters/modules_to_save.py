"""A trainable copy of a whole module: what `modules_to_save` asks for (a new head, say).

It is no adapter of a weight but another base map: adapters act on it as on the module itself.

On a base in 16 bits the copy's parameters are fp32 master copies, as all that trains: it computes
with them cast to what the base has in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import AdapterModule
from lora_lightning.adapters.config import AdapterConfig


class ModulesToSaveCopy(AdapterModule):
    """Takes the module's place while it is active; the module itself stays as it was.

    Args:
        copy: A copy of the module, free of adapters.
        config: The options shared by all adapters of the injection.

    """

    def __init__(self, copy: nn.Module, config: AdapterConfig) -> None:
        tensors = (*copy.parameters(), *copy.buffers())
        super().__init__(config, tensors[0].device if tensors else None)
        self.module = copy
        self.base_dtypes = {
            name: p.dtype for name, p in copy.named_parameters(remove_duplicate=False)
        }
        for parameter in copy.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)

    def set_autocast_dtype(self, wanted: bool) -> None:
        """Hold the parameters as fp32 master copies, or in the base's dtype."""
        super().set_autocast_dtype(wanted)
        for name, parameter in self.module.named_parameters():
            dtype = self.base_dtypes[name]
            parameter.data = parameter.data.to(_master(dtype) if wanted else dtype)

    def tensor(self, name: str) -> Tensor | None:
        """A parameter of the copy in the dtype that it acts in, or None where there is none."""
        parameter: Tensor | None = getattr(self.module, name, None)
        dtype = self.base_dtypes.get(name)
        if parameter is None or dtype is None or parameter.itemsize <= dtype.itemsize:
            return parameter
        return parameter.to(dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The copy's output in place of the module's."""
        with self.in_base_dtype():
            return self.module(*args, **kwargs)

    @contextmanager
    def in_base_dtype(self) -> Iterator[None]:
        """Inside, the parameters of `module` have the dtypes that the base has in their place."""
        masters = []
        for name, dtype in self.base_dtypes.items():
            path, _, last = name.rpartition(".")
            held: dict[str, Any] = self.module.get_submodule(path)._parameters
            if held[last].itemsize > dtype.itemsize:  # FSDP's policy may have narrowed it already
                masters.append((held, last, held[last]))
                held[last] = held[last].to(dtype)
        try:
            yield
        finally:
            for held, last, master in masters:
                held[last] = master

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # What the base is cast to, asked of empty tensors: buffers are cast along with it.
        self.base_dtypes = {
            name: fn(torch.empty(0, dtype=dtype)).dtype for name, dtype in self.base_dtypes.items()
        }
        buffers = {id(buffer) for buffer in self.module.buffers()}

        def keep_master_copy(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in buffers or not self.autocast_adapter_dtype:
                return moved
            wide = _master(moved.dtype)
            return moved if moved.dtype == wide else tensor.to(device=moved.device, dtype=wide)

        return super()._apply(keep_master_copy, recurse)  # type: ignore[no-untyped-call]


def _master(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype
