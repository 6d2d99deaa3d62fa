"""The record that a run keeps on its LightningModule, and the callbacks that act on it.

It stands in the module's own dictionary, where `deepcopy` and `pickle` take it along.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lora_lightning.checkpoint.fingerprint import Fingerprint
from lora_lightning.checkpoint.moved_state import tensor_places
from lora_lightning.engine.followers import Follower
from lora_lightning.engine.unloading import unload
from lora_lightning.training._lightning import trainer_of
from lora_lightning.training.adapter_callback import AdapterCallback
from lora_lightning.training.checkpoint_io.baseline import Baseline

_ATTRIBUTE = "_lora_state"
_LIGHTNING_CORE = ("lightning.pytorch.core.", "pytorch_lightning.core.")


@dataclass(frozen=True)
class Handed:
    """What the strategy gave of the module for a checkpoint that is put together.

    `trained` tells whether it is only what training changed, collected already.
    """

    state: dict[str, Any]
    trained: bool


@dataclass
class ModuleState:
    """All that is remembered on a module."""

    # The hooks that are overridden on the instance, and what was in its dictionary before, or None
    overrides: dict[str, Callable[..., Any]] = field(default_factory=dict)
    original_hooks: dict[str, Any] = field(default_factory=dict)
    # Of the base, taken when the adapters were attached
    base_fingerprint: Fingerprint | None = None
    followers: list[Follower] = field(default_factory=list)
    notes: list[Any] = field(default_factory=list)  # of own_averages.py, from then
    baseline: Baseline = field(default_factory=Baseline)
    handed: Handed | None = None  # while a checkpoint is put together
    base_on_meta: bool = False  # until the strategy has loaded it
    new_names: set[str] = field(default_factory=set)  # of parameters that no file had values for
    # What child processes trained, until the module has the layers for it
    from_children: dict[str, Any] = field(default_factory=dict)
    # FSDP1's wrapper of the module, and what averages the adapters' gradients
    fsdp: tuple[Any, Any] | None = None
    had_gradient: set[int] = field(default_factory=set)  # ids, where gradients do not stay
    resumed_from: dict[str, Any] | None = None  # of this process, until training starts
    learning_rates: list[float] = field(default_factory=list)  # as configured in this run
    trained: list[nn.Parameter] = field(default_factory=list)  # of this run, see frozen_base.py
    frozen: list[nn.Parameter] = field(default_factory=list)
    left_out: list[nn.Parameter] = field(default_factory=list)  # that no optimizer is to have
    refrozen: bool = False  # True once that was said
    final_states: list[dict[str, Any]] = field(default_factory=list)  # of all processes, after fit
    unreadable: set[str] = field(default_factory=set)  # in checkpoints of this run, as was said
    turn: Any = None  # the hook that is under way, of resume/hook_turns.py


def module_state(module: LightningModule) -> ModuleState:
    """The module's record, made on first use."""
    state: ModuleState = module.__dict__.setdefault(_ATTRIBUTE, ModuleState())
    return state


def callbacks_of(module: LightningModule) -> list[AdapterCallback]:
    """The enabled LoraCallbacks of the module's Trainer, in order."""
    callbacks = getattr(trainer_of(module), "callbacks", [])
    return [c for c in callbacks if isinstance(c, AdapterCallback) and c.enabled]


def bare_copy(module: nn.Module) -> nn.Module:
    """A copy on the CPU as the module was before any run: no adapters, no Trainer, its own hooks.

    What a run has moved of its buffers, and of a teacher, is as it was as well.
    """
    record, trainer = module.__dict__.get(_ATTRIBUTE) or ModuleState(), trainer_of(module)
    memo: dict[int, Any] = {id(part): None for part in (record, trainer) if part is not None}
    copied = copy.deepcopy(module, memo)
    copied.__dict__.pop(_ATTRIBUTE, None)
    for hook in record.overrides:
        copied.__dict__.pop(hook, None)
        if record.original_hooks.get(hook) is not None:
            setattr(copied, hook, copy.deepcopy(record.original_hooks[hook], memo))
    unload(copied)
    places = tensor_places(copied)
    with torch.no_grad():
        for key, value in record.baseline.originals.items():
            tensor = getattr(*places[key]) if key in places else None
            if isinstance(value, Tensor) and tensor is not None and tensor.shape == value.shape:
                tensor.copy_(value)
    return copied.requires_grad_(False).cpu()


# -- hooks that are overridden on the instance -----------------------------------------------------


def override_hook(module: LightningModule, hook: str, override: Callable[..., Any]) -> None:
    """Bind `override` to the module in place of `hook`; doing it again changes nothing."""
    if not _is_override(module, hook, module.__dict__.get(hook)):
        state = module_state(module)
        state.original_hooks[hook] = _set_by_user(module, hook)
        state.overrides[hook] = override
        setattr(module, hook, MethodType(override, module))


def original_hook(module: LightningModule, hook: str) -> Callable[..., Any]:
    """The hook that an override stands before."""
    on_instance: Callable[..., Any] | None = module_state(module).original_hooks.get(hook)
    if on_instance is not None:
        return on_instance
    # As Python binds it, be it a static or a class method.
    found = next(vars(cls)[hook] for cls in type(module).__mro__ if hook in vars(cls))
    bound: Callable[..., Any] = found.__get__(module, type(module))
    return bound


def defines_hook(module: LightningModule, hook: str) -> bool:
    """Tell whether the user's module defines `hook` itself, on its class or on the instance."""
    on_instance = _set_by_user(module, hook), module_state(module).original_hooks.get(hook)
    if on_instance != (None, None):
        return True
    owner = next(cls for cls in type(module).__mro__ if hook in cls.__dict__)
    # By name, so that modules of the `pytorch_lightning` package count as well.
    return not owner.__module__.startswith(_LIGHTNING_CORE)


def _set_by_user(module: LightningModule, hook: str) -> Any:
    """The hook that the user has put on the instance, if any."""
    current = module.__dict__.get(hook)
    # A bound override comes back from pickle as the class's own method of the same name.
    from_class = getattr(current, "__func__", None) is getattr(type(module), hook)
    return None if _is_override(module, hook, current) or from_class else current


def _is_override(module: LightningModule, hook: str, method: object) -> bool:
    override = module_state(module).overrides.get(hook)
    return override is not None and getattr(method, "__func__", None) is override
