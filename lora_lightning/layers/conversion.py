"""Turn a module into a layer and back: the swap of its class."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from lora_lightning.adapters.base import AdapterDict, AdapterModule
from lora_lightning.adapters.modules_to_save import ModulesToSaveCopy
from lora_lightning.errors import AdapterStateError, TargetError
from lora_lightning.layers.base import AdaptedLayer
from lora_lightning.layers.carried_adapters import CarriedAdapters
from lora_lightning.layers.dynamic_class import adapted_class
from lora_lightning.layers.instance_forward import (
    PatchableLayer,
    instance_patch,
    is_patched,
    put_adapters_inside,
    put_patches_back,
)
from lora_lightning.layers.loading import LoadableLayer, forget_load
from lora_lightning.layers.quantized.base import why_not_adaptable, why_not_trainable
from lora_lightning.layers.recomputation import SwitchLog

# What a layer has in its dictionary beside what the module had.
_STATE = (
    "_rows", "_active", "_enabled", "_merged", "_kept", "_switches", "_shown", "_merge_again",
    "_instance_forward", "_outer_forward", "_reached", "_has_acted", "_in_patch",
)  # fmt: skip
# All that a layer would hide, or overwrite, of a module.
_PARTS = (CarriedAdapters, PatchableLayer, LoadableLayer, AdaptedLayer)
_NAMES = {name for part in _PARTS for name in vars(part)}
_NEEDED = {"adapters", "original_tensors", *_STATE, *(n for n in _NAMES if n[:2] != "__")}
_NEEDED -= {*dir(nn.Module), "active_adapters"}  # the latter transformers' models have, for peft


def check_convertible(module: nn.Module, path: str, option: str = "target_modules") -> None:
    """Refuse modules whose class cannot be swapped, before anything is touched.

    Raises:
        TargetError: Naming `path` and the reason.

    """
    saved = option == "modules_to_save"
    unfit = why_not_trainable(module) if saved else why_not_adaptable(module)
    if isinstance(module, AdaptedLayer) and unfit is None:
        return
    if isinstance(module, torch.jit.ScriptModule):
        reason = (
            "is a scripted module: its compiled code cannot be extended. Adapt it before torch.jit"
        )
    elif unfit is not None:
        reason = unfit
    elif taken := _NEEDED & {*dir(type(module)), *module.__dict__, *module._modules}:
        reason = f"already has an attribute `{min(taken)}` of its own, where adapters would live"
    elif isinstance(module._parameters.get("weight"), nn.parameter.UninitializedParameter):
        reason = "is lazy and has no size yet. Run one batch through the model first"
    elif (obstacle := _why_no_subclass(type(module))) is not None:
        reason = (
            f"is of a class that cannot be extended ({obstacle}), which is how it would carry "
            "adapters. Leave it out, or let its metaclass take a class without arguments of its own"
        )
    else:
        return
    raise TargetError(f"{path!r} ({type(module).__name__}) {reason}. (lora.{option})")


def _why_no_subclass(base_type: type[nn.Module]) -> str | None:
    """What a class, or its metaclass, says against a subclass; None where nothing is amiss."""
    try:
        adapted_class(AdaptedLayer, base_type)
    except Exception as error:  # of a stranger's code: anything
        return f"{type(error).__name__}: {error}"
    return None


def attach_adapter(
    module: nn.Module, layer_type: type[AdaptedLayer], name: str, adapter: AdapterModule
) -> None:
    """Put `adapter` on `module` under `name`, inactive; the first one swaps the module's class."""
    convert_to_adapted(module, layer_type)
    adapter.train(module.training)
    layer = cast(AdaptedLayer, module)
    if isinstance(adapter, ModulesToSaveCopy):
        layer.keep_originals()
    layer.adapters[name] = adapter


def detach_adapter(module: AdaptedLayer, name: str) -> None:
    """Take adapter `name` off; the last one gives the module its own class back."""
    module.active_adapters = [active for active in module.active_adapters if active != name]
    del module.adapters[name]
    if module.trains_in_place:
        module.show_active()
    if not module.adapters:
        convert_back(module)


def convert_to_adapted(module: nn.Module, layer_type: type[AdaptedLayer]) -> None:
    """Swap the module's class for one that can carry adapters; a layer stays as it is."""
    if isinstance(module, AdaptedLayer):
        has_copies_only = module.layer_type is AdaptedLayer
        if has_copies_only and layer_type is not AdaptedLayer:
            module.__class__ = adapted_class(layer_type, module.base_type)
        return
    patch = instance_patch(module)
    module.__class__ = adapted_class(layer_type, type(module))
    layer = cast(AdaptedLayer, module)
    layer.adapters = AdapterDict()
    layer.adapters.training = module.training
    layer._rows = None
    layer._switches, layer._shown, layer._merge_again = SwitchLog(), None, []
    layer._active, layer._merged, layer._kept = [], [], {}
    layer._enabled = True
    layer._has_acted = layer._in_patch = False
    put_adapters_inside(layer, patch)


def convert_back(module: AdaptedLayer) -> None:
    """Give a layer without adapters the class back that it had."""
    base_type, patches = module.base_type, (module._instance_forward, module._outer_forward)
    for attribute in _STATE:
        del module.__dict__[attribute]
    del module.adapters
    forget_load(module)
    module.__class__ = base_type  # type: ignore[assignment]
    put_patches_back(module, *patches)


def check_detachable(module: AdaptedLayer, path: str) -> None:
    """Refuse modules that other code wrapped on top of ours, before anything is touched.

    Raises:
        AdapterStateError: Naming `path`.

    """
    if type(module) is not adapted_class(module.layer_type, module.base_type):
        raise AdapterStateError(
            f"{path!r} ({type(module).__name__}) was wrapped by other code after its adapters "
            "were added; take that wrapping off first, then the adapters."
        )
    if is_patched(module):
        raise AdapterStateError(
            f"The forward of {path!r} ({module.base_type.__name__}) was replaced after its "
            "adapters were added, and may call them; put back what was there before (del "
            "module.forward), then take the adapters off."
        )
