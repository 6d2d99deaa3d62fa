"""Modules of a pretrained network that no file had weights for: they train in full.

An adapter is trained around them, and whoever loads it would have other random ones in their place.
So they are trained and saved as trained copies are, as if `modules_to_save` named them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from lightning.pytorch import LightningModule
from torch import nn

from lora_lightning.engine.targets.matching import matches_name
from lora_lightning.errors import first_few
from lora_lightning.layers.traversal import adapter_owners, named_adapted_layers, walk
from lora_lightning.training.adapter_callback import AdapterCallback
from lora_lightning.training.module_state import callbacks_of, module_state


def train_new_modules(callback: AdapterCallback, module: LightningModule, root: nn.Module) -> None:
    """Add the new modules below `root` to what the callback's adapter trains, if it is to train.

    Of several adapters the first that trains has them. One that comes from a file is as it is.
    """
    learners = [c for c in callbacks_of(module) if c.trainable and c.init_from is None]
    listed = [n for n in callback.config.modules_to_save or () if n not in callback._new_modules]
    found: list[str] = []
    if learners[:1] == [callback]:
        names = module_state(module).new_names
        new = {id(p) for name, p in module.named_parameters() if name in names}
        found = new_modules_below(root, new, listed)
    if found != callback._new_modules:
        callback.config = dataclasses.replace(
            callback.config, modules_to_save=[*listed, *found] or None
        )
        callback._new_modules = found


def new_modules_line(callback: AdapterCallback) -> list[str]:
    """What is said of them when training begins."""
    if not callback._new_modules:
        return []
    return [
        f"{first_few(callback._new_modules)}: newly initialised, as no file has such weights; "
        "trained in full and saved with the adapter (as if in lora.modules_to_save)"
    ]


def frozen_new_parameters(module: nn.Module, names: Iterable[str]) -> set[str]:
    """The `names` of parameters that are frozen, and have no copy that acts in their place."""
    copied = tuple(
        f"{path}."
        for path, layer in named_adapted_layers(module)
        if any(copy.is_applied for copy in layer.trained_copies().values())
    )
    parameters = dict(module.named_parameters())
    return {
        name
        for name in parameters.keys() & set(names)
        if not parameters[name].requires_grad and not name.startswith(copied)
    }


def new_modules_below(root: nn.Module, new: set[int], listed: list[str]) -> list[str]:
    """The outermost modules that can be copied and have no parameters but such as are in `new`.

    What is inside of modules that are `listed` to be saved is left out.
    """
    adapters = adapter_owners(root)
    found: list[str] = []
    covered: set[int] = set()
    for path, child in walk(root):
        own = {id(p) for _, p in nn.Module.named_parameters(child)} - adapters.keys()
        if any(matches_name(name, path) for name in listed):
            covered |= own
    for path, child in walk(root):
        own = {id(p) for _, p in nn.Module.named_parameters(child)} - adapters.keys()
        container = isinstance(child, (nn.ModuleList, nn.ModuleDict))
        if path and own and own <= new - covered and not container:
            found.append(path)
            covered |= own
    return found
