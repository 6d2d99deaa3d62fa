"""Modules that train in full (`modules_to_save`: a new head, say): the tensors that they train.

The module itself trains, in place: while the adapter acts, the module and all inside it hold the
adapter's tensors, so that every method, direct read and hook sees what trains. The base's own are
kept aside meanwhile (`layers/in_place.py`). On a base in 16 bits the trained parameters are fp32
master copies, as all that trains.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import AdapterDict, AdapterModule
from lora_lightning.adapters.config import AdapterConfig
from lora_lightning.utilities._torch import share_gradient_hooks
from lora_lightning.utilities.dtensor import full_tensor, is_sharded

_Held = TypeVar("_Held", bound="HeldTensors")
# Under this name a module that trains in full, and each one inside it, finds what is held of it.
_ORIGINALS = "_original_tensors"


class HeldTensors(nn.Module):
    """The parameters and buffers of a module and of all inside it, under the names they have there.

    Nothing else of the modules is here: this is only where tensors lie that a module can hold.
    """

    @classmethod
    def of(cls: type[_Held], module: nn.Module, made_of: Callable[[Tensor, bool], Tensor]) -> _Held:
        """Hold `made_of(tensor, in state dicts?)` for each tensor that the base has in `module`.

        What several names share is shared here, too.
        """
        tensors: dict[int, Tensor] = {}
        nodes: dict[nn.Module, HeldTensors] = {}

        def made(tensor: Tensor | None, persistent: bool) -> Any:
            if tensor is None:
                return None
            if id(tensor) not in tensors:
                tensors[id(tensor)] = made_of(tensor, persistent)
            return tensors[id(tensor)]

        def hold(module: nn.Module, node: HeldTensors) -> None:
            nodes[module] = node
            own = base_tensors_of(module)
            for name, parameter in own._parameters.items():
                node._parameters[name] = made(parameter, True)
            for name, buffer in own._buffers.items():
                node._buffers[name] = made(buffer, name not in own._non_persistent_buffers_set)
            node._non_persistent_buffers_set = {*own._non_persistent_buffers_set}
            for name, child in module._modules.items():
                if child is not None and not isinstance(child, (AdapterDict, HeldTensors)):
                    if child not in nodes:
                        hold(child, cls())
                    node._modules[name] = nodes[child]

        held = cls()
        hold(module, held)
        return held

    def reset_parameters(self) -> None:
        """Nothing: these tensors are loaded or copied, not drawn."""


class OriginalTensors(HeldTensors):
    """What the base has in a module that trains in full.

    State dicts give it under the base's own names, so that it adds none.
    """

    @classmethod
    def aside(cls, module: nn.Module) -> OriginalTensors:
        """Hold the very tensors that are in `module` now, and let all inside it know."""
        held = cls.of(module, lambda tensor, persistent: tensor)
        _note(module, held)
        return held

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Add nothing to `destination`."""
        return kwargs.get("destination", args[0] if args else {})

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Take nothing."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return self  # the module holds these tensors while it is moved or cast


def _note(module: nn.Module, held: HeldTensors | None) -> None:
    """Let `module` and all inside it find what is held of them; None: of what is held no more."""
    if held is None:
        module.__dict__.pop(_ORIGINALS, None)
    else:
        module.__dict__[_ORIGINALS] = held  # no child
    for name, child in module._modules.items():
        if child is not None and not isinstance(child, (AdapterDict, HeldTensors)):
            inside = None if held is None else held._modules.get(name)
            _note(child, inside if isinstance(inside, HeldTensors) else None)


def forget_originals(module: nn.Module) -> None:
    """Undo what `OriginalTensors.aside` noted."""
    _note(module, None)


def base_tensors_of(module: nn.Module) -> nn.Module:
    """What holds the base's own parameters and buffers of `module`: itself, unless it trains."""
    held: nn.Module = module.__dict__.get(_ORIGINALS, module)
    return held


class ModulesToSaveCopy(AdapterModule):
    """The tensors that one module trains in full, in place of the base's.

    Args:
        module: The module, whose tensors they start from.
        config: The options shared by all adapters of the injection.
        device: Where the tensors of state dicts lie, without values; None: beside the base's.
        frozen: Names of the module's parameters that do not train: their user froze them.

    """

    def __init__(
        self,
        module: nn.Module,
        config: AdapterConfig,
        device: torch.device | None = None,
        frozen: Collection[str] = (),
    ) -> None:
        held = HeldTensors.of(module, lambda tensor, saved: _start(tensor, saved, device))
        tensors = (*held.parameters(), *held.buffers())
        super().__init__(config, tensors[0].device if tensors else None)
        self.module = held
        self.kept_frozen = frozenset(f"module.{name}" for name in frozen)
        for name, parameter in self.named_parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(name not in self.kept_frozen)

    def set_autocast_dtype(self, wanted: bool) -> None:
        """Hold the parameters as fp32 master copies, or leave them in the base's dtype."""
        super().set_autocast_dtype(wanted)
        if wanted:
            for parameter in self.module.parameters():
                parameter.data = parameter.data.to(_master(parameter.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        buffers = {id(buffer) for buffer in self.module.buffers()}  # are cast along with the base

        def keep_master_copy(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in buffers or not self.autocast_adapter_dtype:
                return moved
            wide = _master(moved.dtype)
            return moved if moved.dtype == wide else tensor.to(device=moved.device, dtype=wide)

        return super()._apply(keep_master_copy, recurse)  # type: ignore[no-untyped-call]


def _start(tensor: Tensor, saved: bool, device: torch.device | None) -> Tensor:
    """What trains in place of a tensor of the base: its values, whole; or memory on `device`."""
    if device is not None and saved:
        values = torch.empty_like(tensor.detach(), device=device)
    else:
        values = full_tensor(tensor.detach()).clone()
    if not isinstance(tensor, nn.Parameter):
        return values
    plain = is_sharded(tensor) or device is not None
    new = nn.Parameter(values, tensor.requires_grad) if plain else copy.deepcopy(tensor)
    new.__dict__.update(tensor.__dict__)  # marks such as "no weight decay"
    share_gradient_hooks(tensor, new)
    return new


def _master(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype
