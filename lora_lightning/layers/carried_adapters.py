"""The adapters that a module carries, and which of them take part in its forward."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import nn

from lora_lightning.adapters.base import Adapter, AdapterDict
from lora_lightning.adapters.modules_to_save import ModulesToSaveCopy
from lora_lightning.errors import AdapterStateError
from lora_lightning.layers.offloading import bring_back, compute_device
from lora_lightning.layers.recomputation import Acting, SwitchLog


def _told(name: str) -> Any:
    """A property that is kept under `name`; the adapters are told of every change."""

    def write(layer: CarriedAdapters, value: Any) -> None:
        setattr(layer, name, value)
        layer._tell_adapters()

    return property(attrgetter(name), write)


class CarriedAdapters(nn.Module):
    """The part of an adapted layer that knows which of its adapters are applied.

    Attributes:
        adapters: The adapters by name.
        active_adapters: Names of those that take part in forward.
        adapters_enabled: False inside `disable_adapter`.
        merged_adapters: Names of those that are in the weights at present.
        row_adapters: Inside `adapters_per_row`, the adapter's name of each row (None: the base).

    """

    adapters: AdapterDict
    active_adapters: list[str] = _told("_active")
    adapters_enabled: bool = _told("_enabled")
    merged_adapters: list[str] = _told("_merged")
    row_adapters: list[str | None] | None = _told("_rows")
    _active: list[str]
    _rows: list[str | None] | None
    _enabled: bool
    _merged: list[str]
    _switches: SwitchLog
    _has_acted = False  # whether adapters took part in a forward so far, as far as Python saw

    def note_use(self) -> None:
        """Record that adapters take part in a forward now; compiled code is not watched."""
        if not torch.compiler.is_compiling():
            self.__dict__["_has_acted"] = True

    def applied_names(self) -> list[str]:
        """Return the adapters that take part in forward, in the order in which they were added.

        None of them inside `adapters_per_row`, where each row has one of its own.
        """
        if not self._enabled or self._rows is not None:
            return []
        return [n for n in self.adapters if n in self._active and n not in self._merged]

    def _tell_adapters(self) -> None:
        of_rows = self._rows if self._rows is not None and self._enabled else ()
        applied = {*self.applied_names(), *of_rows}
        for name, adapter in self.adapters.items():
            adapter.set_applied(name in applied)
        rows = None if self._rows is None or not self._enabled else tuple(self._rows)
        self._switches.add(Acting(tuple(self.applied_names()), tuple(self._merged), rows))

    def check_recomputation(self, layer_name: str) -> None:
        """Refuse to be computed again in backward with other adapters than forward had.

        Raises:
            AdapterStateError: Under activation checkpointing, after a switch.

        """
        if not torch.compiler.is_compiling():
            self._switches.check(layer_name)

    def applied_adapters(self, name: str = "weight") -> list[Adapter]:
        """Return the adapters on a weight that take part in forward now.

        While torch.compile traces, all of them: each is then switched by its tensor `applied`.
        """
        every = torch.compiler.is_compiling() and self._rows is None
        found = []
        for adapter_name in self.adapters if every else self.applied_names():
            adapter = self.adapters[adapter_name].by_weight().get(name)
            if adapter is None:
                continue
            if "_hf_hook" in adapter.__dict__:
                self.bring_adapters_back()
            if adapter.applied.is_meta:
                if adapter_name not in self.applied_names():
                    continue
                self.check_filled(adapter_name)
            found.append(adapter)
        return found

    def compute_device(self) -> torch.device:
        """The device on which the module computes, offloaded or not."""
        own = {id(p) for p in self.adapters.parameters()}
        weight = next(p for p in self.parameters() if id(p) not in own)
        return compute_device(self, weight)

    def bring_adapters_back(self) -> None:
        """Undo what accelerate did to adapters when it offloaded the model around them."""
        for adapter in self.adapters.values():
            if adapter.by_weight():  # a trained copy is called, as accelerate expects
                bring_back(adapter, self.compute_device())

    def trained_copy(self) -> ModulesToSaveCopy | None:
        """Return the copy (`modules_to_save`) that is applied in the module's place, if one is.

        Compiled code is made for one of them: a copy may answer in any structure.
        """
        for name, copy in self.trained_copies().items():
            if name in self.applied_names():
                if copy.applied.is_meta:
                    self.check_filled(name)
                return copy
        return None

    def trained_copies(self) -> dict[str, ModulesToSaveCopy]:
        """Return all copies of the module that adapters train, by the adapter's name."""
        return {n: a for n, a in self.adapters.items() if isinstance(a, ModulesToSaveCopy)}

    def check_filled(self, name: str) -> None:
        """Refuse an adapter on the meta device, unless the module is there too, to find shapes.

        Torch itself may compute something from memory that nobody has written.

        Raises:
            AdapterStateError: Naming the adapter and what fills it.

        """
        own = {id(p) for p in self.adapters.parameters()}
        if any(not p.is_meta for p in self.parameters() if id(p) not in own):
            raise AdapterStateError(
                f"Adapter {name!r} is on the meta device and has no values yet "
                "(low_cpu_mem_usage): fill it with load_adapter_state_dict, or take it off and "
                "use load_adapter."
            )
