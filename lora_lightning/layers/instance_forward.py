"""What other code puts in the place of a layer's `forward`, on the instance.

accelerate's hooks, and patches of all kinds, exchange `module.forward`; such an attribute hides the
forward of the class, and with it the adapters. So on the class of a layer `forward` is a data
descriptor, which answers before the attribute does:

* Accelerate's hook stays outside: it brings weights and input to where they are needed, and its
  `_old_forward` is the layer with its adapters.
* Any other patch of before the adapters is the module's own map; the adapters act around it.
* A patch of after them runs as it is. One that does not come to the adapters is refused.
* Who puts the class's own forward back takes the patch off, not the adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn

from lora_lightning.errors import AdapterStateError
from lora_lightning.layers.carried_adapters import CarriedAdapters

Forward = Callable[..., Any]

_HOOK, _INNER = "_hf_hook", "_old_forward"  # accelerate's hook on a module, and what it calls


class PatchableLayer(CarriedAdapters):
    """The part of an adapted layer that knows what was patched onto it."""

    base_type: type[nn.Module]
    forward_with_adapters: Forward
    _instance_forward: Forward | None  # a patch of before the adapters
    _outer_forward: Forward | None  # accelerate's hook, or a patch of after the adapters
    _in_patch: bool  # whether the former runs at the moment
    _reached: bool | None  # whether the latter came to the adapters when it ran

    def note_reached(self) -> None:
        """Note that the forward with the adapters runs."""
        if self._reached is False:
            self._reached = True


class LayerForward:
    """`forward` on the class of an adapted layer; `function` runs the adapters."""

    def __init__(self, function: Forward) -> None:
        self.function = function

    def __get__(self, layer: PatchableLayer | None, owner: type | None = None) -> Any:
        if layer is None:
            return self.function
        if "forward" in layer.__dict__:  # put there past `__set__`
            self.__set__(layer, layer.__dict__.pop("forward"))
        return layer._outer_forward or layer.forward_with_adapters

    def __set__(self, layer: PatchableLayer, forward: Forward) -> None:
        layer._reached = layer._outer_forward = None
        if _is_method(layer, forward, layer.base_type):
            layer._instance_forward = None
        elif _is_hook(layer) or _is_checked(forward):
            layer._outer_forward = forward
        elif not (_is_adapted(layer, forward) or forward is layer._instance_forward):
            layer._outer_forward = partial(run_patch, layer, forward)

    def __delete__(self, layer: PatchableLayer) -> None:
        if layer._outer_forward is None is layer._instance_forward:
            raise AttributeError("forward")
        layer._reached = None
        if layer._outer_forward is None:
            layer._instance_forward = None
        layer._outer_forward = None


def run_patch(layer: PatchableLayer, patch: Forward, *args: Any, **kwargs: Any) -> Any:
    """Run what was patched onto a layer after its adapters.

    Raises:
        AdapterStateError: If the adapters that are applied had no part in it.

    """
    layer._reached = False
    output = patch(*args, **kwargs)
    if not layer._reached:
        _check_uncompiled(layer)
    return output


def _check_not_applied(layer: PatchableLayer) -> None:
    if any(adapter.is_applied for adapter in layer.adapters.values()):
        raise AdapterStateError(
            f"The forward of a {layer.base_type.__name__} was replaced on the module after its "
            f"adapters {[*layer.adapters]} were added, and what stands there now does not run "
            "them. Patch modules before adapters are added, let the patch call the forward that "
            "it replaces, or take it off: del module.forward."
        )


# What raises inside a graph may be lost with it.
_check_uncompiled = torch.compiler.disable(_check_not_applied)


def is_patched(layer: PatchableLayer) -> bool:
    """True if something other than accelerate's hook was patched on after the adapters."""
    in_class = next(vars(c)["forward"] for c in type(layer).__mro__ if "forward" in vars(c))
    if not isinstance(in_class, LayerForward):  # type(module).forward = ...
        return True
    in_class.__get__(layer)
    return layer._outer_forward is not None and not _is_hook(layer)


def why_not_run(layer: PatchableLayer) -> str | None:
    """Why it is not known that the layer runs its adapters; None where it is."""
    if not is_patched(layer) or layer._reached:
        return None
    found = "does not run them" if layer._reached is False else "has not run since"
    return f"its forward was replaced after its adapters were added, and what stands there {found}"


def instance_patch(module: nn.Module) -> Forward | None:
    """What is patched over the forward of a module without adapters, accelerate's hook apart."""
    hooked = {_HOOK, _INNER, "forward"} <= module.__dict__.keys()
    patch: Forward | None = module.__dict__.get(_INNER if hooked else "forward")
    return None if _is_method(module, patch, type(module)) else patch


def put_adapters_inside(layer: PatchableLayer, patch: Forward | None) -> None:
    """Make what is patched over a module that has become a layer (`instance_patch`) run it."""
    hook = layer.__dict__.pop("forward", None) if _HOOK in layer.__dict__ else None
    layer.__dict__.pop("forward", None)
    layer._instance_forward, layer._outer_forward, layer._reached = patch, hook, None
    if hook is not None:
        layer.__dict__[_INNER] = layer.forward_with_adapters


def put_patches_back(module: nn.Module, patch: Forward | None, outer: Forward | None) -> None:
    """Patch a module that is no layer any more as it was patched."""
    if outer is not None:  # accelerate's hook
        module.__dict__[_INNER] = patch or MethodType(type(module).forward, module)
    patch = outer or patch
    if patch is not None:
        module.forward = patch


def _is_hook(layer: PatchableLayer) -> bool:
    """True if accelerate's hook is on the layer and calls it with its adapters."""
    return _HOOK in layer.__dict__ and _is_adapted(layer, layer.__dict__.get(_INNER))


def _is_adapted(layer: PatchableLayer, forward: object) -> bool:
    if not isinstance(forward, MethodType) or forward.__self__ is not layer:
        return False
    return forward.__func__ is type(layer).forward_with_adapters


def _is_method(module: nn.Module, forward: object, owner: type[nn.Module]) -> bool:
    """True if `forward` is that of the class `owner`, bound to the module."""
    if not isinstance(forward, MethodType) or forward.__self__ is not module:
        return False
    return forward.__func__ is owner.forward


def _is_checked(forward: object) -> bool:
    return isinstance(forward, partial) and forward.func is run_patch
