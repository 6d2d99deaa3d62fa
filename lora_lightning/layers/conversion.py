"""Turn a module into a host and back: the swap of its class."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from lora_lightning.adapters.base import Adapter, AdapterDict
from lora_lightning.errors import AdapterStateError, TargetError
from lora_lightning.layers.base import Host, adapted_class
from lora_lightning.layers.quantized.base import why_not_adaptable, why_not_trainable

# What a host has in its dictionary beside what the module had.
_STATE = ("row_adapters", "_active", "_enabled", "_merged", "_kept", "_instance_forward")
# All that a host would hide, or overwrite, of a module.
_NEEDED = {"adapters", *_STATE, *(name for name in vars(Host) if name[:2] != "__")}
_NEEDED -= {"forward", "active_adapters"}  # the latter transformers' models have, for peft


def check_can_grow(module: nn.Module, path: str, option: str = "target_modules") -> None:
    """Refuse modules whose class cannot be swapped, before anything is touched.

    Raises:
        TargetError: Naming `path` and the reason.

    """
    saved = option == "modules_to_save"
    unfit = why_not_trainable(module) if saved else why_not_adaptable(module)
    if isinstance(module, Host) and unfit is None:
        return
    if isinstance(module, torch.jit.ScriptModule):
        reason = (
            "is a scripted module: its compiled code cannot be extended. Adapt it before torch.jit"
        )
    elif unfit is not None:
        reason = unfit
    elif taken := _NEEDED & {*dir(type(module)), *module.__dict__, *module._modules}:
        reason = f"already has an attribute `{min(taken)}` of its own, where adapters would live"
    elif isinstance(getattr(module, "weight", None), nn.parameter.UninitializedParameter):
        reason = "is lazy and has no size yet. Run one batch through the model first"
    else:
        return
    raise TargetError(f"{path!r} ({type(module).__name__}) {reason}. (lora.{option})")


def grow(module: nn.Module, host_type: type[Host], name: str, adapter: Adapter) -> None:
    """Put `adapter` on `module` under `name`, inactive; the first one swaps the module's class."""
    become_host(module, host_type)
    adapter.train(module.training)
    cast(Host, module).adapters[name] = adapter


def shrink(module: Host, name: str) -> None:
    """Take adapter `name` off; the last one gives the module its own class back."""
    del module.adapters[name]
    module.active_adapters = [active for active in module.active_adapters if active != name]
    if not module.adapters:
        leave_host(module)


def become_host(module: nn.Module, host_type: type[Host]) -> None:
    """Swap the module's class for one that can carry adapters; a host stays as it is."""
    if isinstance(module, Host):
        if module.host_type is Host and host_type is not Host:  # it has trained copies only
            module.__class__ = adapted_class(host_type, module.base_type)
        return
    instance_forward = module.__dict__.pop("forward", None)
    module.__class__ = adapted_class(host_type, type(module))
    host = cast(Host, module)
    host.adapters = AdapterDict()
    host.row_adapters = None
    host._active, host._merged, host._kept = [], [], {}
    host._enabled = True
    host._instance_forward = instance_forward


def leave_host(module: Host) -> None:
    """Give a host without adapters the class back that it had."""
    base_type, instance_forward = module.base_type, module._instance_forward
    for attribute in _STATE:
        del module.__dict__[attribute]
    del module.adapters
    module.__class__ = base_type  # type: ignore[assignment]
    if instance_forward is not None:
        module.forward = instance_forward  # type: ignore[method-assign]


def check_can_shrink(module: Host, path: str) -> None:
    """Refuse modules whose class was swapped again on top of ours, before anything is touched.

    Raises:
        AdapterStateError: Naming `path`.

    """
    if type(module) is not adapted_class(module.host_type, module.base_type):
        raise AdapterStateError(
            f"{path!r} ({type(module).__name__}) was wrapped by other code after its adapters "
            "were added; take that wrapping off first, then the adapters."
        )
