"""The adapters that a module carries, and which of them take part in its forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from lora_lightning.adapters.base import Adapter, AdapterDict, DeltaAdapter
from lora_lightning.adapters.modules_to_save import (
    HeldTensors,
    ModulesToSaveCopy,
    OriginalTensors,
    forget_originals,
)
from lora_lightning.errors import AdapterStateError
from lora_lightning.layers.in_place import (
    computing_with,
    computing_with_base,
    places,
    reconcile,
    show,
    take,
)
from lora_lightning.layers.offloading import compute_device
from lora_lightning.layers.recomputation import Acting, SwitchLog, unwatch, watch


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
    original_tensors: OriginalTensors
    _shown: str | None  # whose tensors a module that trains in full holds now; None: the base's

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

    def note_switch(self) -> None:
        """Record what acts from now on, for layers that are computed again in backward."""
        rows = None if self._rows is None or not self._enabled else tuple(self._rows)
        applied = self.applied_names()
        names = {name for name in rows or applied if name is not None}
        acting = [adapter for name, adapter in self.adapters.items() if name in names]
        scalings = tuple(
            part.scaling
            for adapter in acting
            for part in adapter.modules()
            if isinstance(part, DeltaAdapter) and part.scaling != part.config_scaling
        )
        self._switches.add(Acting(tuple(applied), tuple(self._merged), rows, scalings))

    def _tell_adapters(self) -> None:
        of_rows = self._rows if self._rows is not None and self._enabled else ()
        applied = {*self.applied_names(), *of_rows}
        for name, adapter in self.adapters.items():
            adapter.set_applied(name in applied)
        self.note_switch()
        if self.trains_in_place:
            reconcile(self, self._held_now(), self.original_tensors)
            self.show_active()

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
            if adapter.applied.is_meta:
                if adapter_name not in self.applied_names():
                    continue
                self.check_filled(adapter_name)
            found.append(adapter)
        return found

    def compute_device(self) -> torch.device:
        """The device on which the module computes, offloaded or not."""
        return compute_device(self, next(self._base_parameters()))

    def _base_parameters(self) -> Iterator[nn.Parameter]:
        own = {id(p) for p in self.adapters.parameters()}
        return (p for _, p in nn.Module.named_parameters(self) if id(p) not in own)

    # -- tensors that train in full, in the module's own places (`modules_to_save`) ---------------

    def trained_copy(self) -> ModulesToSaveCopy | None:
        """Return the adapter whose tensors the module is to hold instead of the base's, if one is.

        Compiled code is made for one of them.
        """
        for name, adapter in self.adapters.items():
            if isinstance(adapter, ModulesToSaveCopy) and name in self.applied_names():
                if adapter.applied.is_meta:
                    self.check_filled(name)
                return adapter
        return None

    def trained_copies(self) -> dict[str, ModulesToSaveCopy]:
        """Return all that train the module in full, by the adapter's name."""
        if self.trains_in_place:
            reconcile(self, self._held_now(), self.original_tensors)
        return {n: a for n, a in self.adapters.items() if isinstance(a, ModulesToSaveCopy)}

    @property
    def trains_in_place(self) -> bool:
        """Whether the base's tensors are kept aside, as an adapter has others for the module."""
        return "original_tensors" in self._modules

    def keep_originals(self) -> None:
        """Keep the base's tensors aside, so that the module can hold others."""
        if not self.trains_in_place:
            self.original_tensors = OriginalTensors.aside(self)
            for part in self._parts():
                watch(part, self._switches)

    def show_active(self) -> None:
        """Have the module hold the tensors of the adapter that is applied, else the base's."""
        applied = self.applied_names()
        names = [n for n, a in self.adapters.items() if isinstance(a, ModulesToSaveCopy)]
        self._shown = next((name for name in names if name in applied), None)
        show(self, self._held_now(), self.original_tensors)
        if not names:
            del self.original_tensors
            forget_originals(self)
            for part in self._parts():
                unwatch(part, self._switches)

    def _parts(self) -> Iterator[nn.Module]:
        """Return what is inside, where a part may be called by itself."""
        whole = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
        ahead = [] if isinstance(self, whole) else [*self._modules.values()]
        seen: set[nn.Module] = set()
        while ahead:
            part = ahead.pop()
            others = (AdapterDict, HeldTensors, CarriedAdapters, *whole)
            if part is None or part in seen or isinstance(part, others):
                continue
            seen.add(part)
            yield part
            ahead += part._modules.values()

    def show_base(self) -> None:
        """Have the module hold the base's tensors, until `show_active`."""
        if self.trains_in_place:
            reconcile(self, self._held_now(), self.original_tensors)
            self._shown = None
            show(self, self.original_tensors, self.original_tensors)

    @torch.no_grad()
    def keep_trained(self) -> None:
        """Write the trained tensors that act now into the base's own, which stay."""
        copy = self.trained_copy() if self.trains_in_place else None
        if copy is not None:
            reconcile(self, copy.module, self.original_tensors)
            for _, trained, own in places(self, copy.module, self.original_tensors):
                for name, tensor in (*own._parameters.items(), *own._buffers.items()):
                    if tensor is not None:
                        tensor.copy_(getattr(trained, name))

    def _held_now(self) -> HeldTensors:
        """Return where those tensors are held that the module holds now."""
        copy = None if self._shown is None else self.adapters.get(self._shown)
        return copy.module if isinstance(copy, ModulesToSaveCopy) else self.original_tensors

    @contextmanager
    def base_shown(self) -> Iterator[None]:
        """Inside, the module holds the base's own tensors; new ones are the base's afterwards."""
        if not self.trains_in_place:
            yield
            return
        shown = self._shown
        self.show_base()
        try:
            yield
        finally:
            take(self, self.original_tensors, self.original_tensors)
            self._shown = shown
            show(self, self._held_now(), self.original_tensors)

    @contextmanager
    def computing(self, copy: ModulesToSaveCopy | None = None) -> Iterator[None]:
        """Inside, the module computes with the tensors of `copy`, else with those that act now."""
        if not self.trains_in_place:
            yield
            return
        copy = self.trained_copy() if copy is None else copy
        if not torch.compiler.is_compiling():
            reconcile(self, self._held_now(), self.original_tensors)
        if copy is None:
            with computing_with_base(self, self.original_tensors):
                yield
            return
        self.note_use()
        with computing_with(self, copy.module, self.original_tensors):
            yield

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Return what the module itself has; of one that trains in full, what trains now alone.

        So a loop over `head.parameters()` finds neither what is kept aside of the base nor what
        other adapters have. Those of a model around it, which optimizers are made of, has all.
        """
        inside = f"{prefix}." if prefix else ""
        aside = (f"{inside}adapters.", f"{inside}original_tensors.")
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            if not (self.trains_in_place and name.startswith(aside)):
                yield name, parameter

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load into the module; of one that trains in full, into what acts now.

        Unless the state has tensors of adapters: then it is one of this module, with all of it.
        """
        copy = self.trained_copy() if self.trains_in_place else None
        if copy is None or any(key.startswith("adapters.") for key in state_dict):
            return super().load_state_dict(state_dict, strict, assign)
        return copy.module.load_state_dict(state_dict, strict)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the base's tensors under their own names, and the adapters' under theirs."""
        with self.base_shown():
            return super().state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        with self.base_shown():
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def check_filled(self, name: str) -> None:
        """Refuse an adapter on the meta device, unless the module is there too, to find shapes.

        Torch itself may compute something from memory that nobody has written.

        Raises:
            AdapterStateError: Naming the adapter and what fills it.

        """
        if any(not p.is_meta for p in self._base_parameters()):
            raise AdapterStateError(
                f"Adapter {name!r} is on the meta device and has no values yet "
                "(low_cpu_mem_usage): fill it with load_adapter_state_dict, or take it off and "
                "use load_adapter."
            )
