"""A word at the first training step about adapters that it did not reach.

A module may never be called: its weight is read past it (Mamba's `dt_proj`), or what holds it is
not part of the model's forward. An adapter there has no effect, and nothing else would say so.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from lora_lightning.engine.targets.hints import shown_name
from lora_lightning.errors import first_few, warn
from lora_lightning.layers.traversal import adapter_owners

# The ids of the adapters' parameters, of every model whose first step is still to come
_watched: WeakKeyDictionary[nn.Module, set[int]] = WeakKeyDictionary()
_hooks: list[RemovableHandle] = []


def watch_first_step(model: nn.Module) -> None:
    """Warn at the first optimizer step on adapters of `model` if some have no gradient."""
    _watched[model] = set(adapter_owners(model))
    if not _hooks:
        _hooks.append(register_optimizer_step_post_hook(torch.compiler.disable(_after_step)))


def forget_first_step(model: nn.Module) -> None:
    """Leave it to others to look after `model` and all that is inside it."""
    for module in model.modules():
        _watched.pop(module, None)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    for model, known in list(_watched.items()):
        if any(id(p) in known for p in stepped):
            del _watched[model]
            _warn_of_unreached(model, stepped)
    if not _watched:
        while _hooks:
            _hooks.pop().remove()


def _warn_of_unreached(model: nn.Module, stepped: list[nn.Parameter]) -> None:
    owners = adapter_owners(model)
    trained = [p for p in stepped if id(p) in owners and p.requires_grad]
    paths = dict.fromkeys(owners[id(p)] for p in trained)
    reached = {owners[id(p)] for p in trained if p.grad is not None}
    unreached = [path for path in paths if path not in reached]
    if unreached:
        names = first_few(dict.fromkeys(map(shown_name, unreached)))
        warn(
            f"{len(unreached)} of {len(paths)} adapted modules had no gradient in the first "
            f"training step ({first_few(unreached, 3)}): they were not called, their weights are "
            "read past them, or their outputs are detached. An adapter that is never called has "
            f"no effect; leave it out: exclude_modules: [{names}]. (lora.exclude_modules)",
            stacklevel=2,
        )
