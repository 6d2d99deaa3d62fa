"""What trains in a run is settled at its start, whatever the module does to `requires_grad` later.

Modules freeze and unfreeze whole networks between steps (the critic of a GAN) or from an epoch on.
What did not train at the start is frozen again before it gets a gradient. Adapters go on as the
module means it: frozen they wait, and train again when it says so.
"""

from __future__ import annotations

import warnings
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lora_lightning.engine.norm_stats import is_held
from lora_lightning.errors import AdapterStateError, first_few
from lora_lightning.layers.traversal import named_adapted_layers, named_parameters
from lora_lightning.training.messages import rank_zero_warn
from lora_lightning.training.module_state import module_state
from lora_lightning.training.optimizers import is_left_out


def settle_what_trains(module: LightningModule) -> None:
    """Remember what trains, and what does not, at the start of a fit."""
    state = module_state(module)
    parameters = [p for _, p in named_parameters(module)]
    state.trained = [p for p in parameters if p.requires_grad and not is_left_out(p)]
    state.left_out = [p for p in parameters if is_left_out(p)]
    state.frozen = [p for p in parameters if not p.requires_grad]
    state.refrozen = False


class EvalModeAdvice:
    """Lightning's warning of modules in eval mode, left out where only held norm layers are."""

    def __init__(self) -> None:
        self._filter: Any = None

    def leave_out(self, module: LightningModule) -> None:
        """Between the start of fit and that of training, when it is given."""
        if all(child.training or is_held(child) for child in module.modules()):
            warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
            self._filter = warnings.filters[0]

    def let_in(self) -> None:
        """Have it given again."""
        if self._filter in warnings.filters:
            warnings.filters.remove(self._filter)  # type: ignore[attr-defined]
        self._filter = None


def trained_parameters(module: LightningModule) -> dict[str, nn.Parameter]:
    """What trains in this run, by name: also what waits just now, or has come since."""
    trained = {id(p) for p in module_state(module).trained}
    return {
        n: p
        for n, p in named_parameters(module)
        if (p.requires_grad and not is_left_out(p)) or id(p) in trained
    }


def waiting_parameters(module: LightningModule) -> list[str]:
    """Names of what trains in this run, but is frozen just now."""
    return [name for name, p in trained_parameters(module).items() if not p.requires_grad]


def freeze_again(trainer: Trainer, module: LightningModule) -> None:
    """Freeze what did not train at the start; said once. What no optimizer has needs no gradient.

    AdapterStateError, before the step, if an optimizer was given such a tensor as well.
    """
    state = module_state(module)
    for p in state.left_out:
        p.grad = None
    woken = {id(p): p for p in state.frozen if p.requires_grad or p.grad is not None}
    if not woken:
        return
    aside = {
        id(p)
        for _, layer in named_adapted_layers(module)
        if layer.trains_in_place
        for p in layer.original_tensors.parameters()
    }  # of what trains in full: the module that was meant trains already
    found = {name: p for name, p in named_parameters(module) if id(p) in woken}
    names = [name for name, p in found.items() if id(p) not in aside]
    held = {id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"]}
    if held & woken.keys():
        raise AdapterStateError(
            f"{first_few(found)} began to train, but belong to no adapter: they would not be "
            "saved. Train them as a copy instead: lora.modules_to_save. (lora.modules_to_save)"
        )
    for p in woken.values():
        p.requires_grad_(False)
        p.grad = None
    if names and not state.refrozen:
        state.refrozen = True
        rank_zero_warn(
            f"requires_grad was set on {len(names)} tensors of the base while it trains "
            f"({first_few(names, 3)}). The base stays frozen: from now on they are frozen again in "
            "every step, without a word. Adapters train and wait as the module says. To train "
            "these modules themselves, list them in modules_to_save. (lora.modules_to_save)"
        )
