"""Biases that train with an adapter (`bias="lora_only"` or `"all"`).

They train in place, as in PEFT. Unlike there, the original values are kept beside them, so that
disabling, deactivating or taking off the adapter brings the base model back bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from lora_lightning.adapters.modules_to_save import base_tensors_of
from lora_lightning.layers.base import AdaptedLayer
from lora_lightning.layers.recomputation import Acting, SwitchLog, unwatch, watch
from lora_lightning.layers.traversal import walk
from lora_lightning.utilities._torch import version_kept

_RECORD = "_trained_bias"


@dataclass
class TrainedBias:
    """One bias that belongs to an adapter.

    Attributes:
        adapter_name: Whose bias it is.
        hidden: The values not in the module now: the original ones while `shown`, else the
            trained ones.
        shown: Whether the module's bias holds the trained values now.

    """

    adapter_name: str
    hidden: Tensor
    shown: bool = True
    switches: SwitchLog = field(default_factory=SwitchLog)

    @staticmethod
    def parameter(module: nn.Module) -> nn.Parameter:
        """The base's own bias of the module, also where another one trains in its place."""
        return cast(nn.Parameter, base_tensors_of(module)._parameters["bias"])

    @torch.no_grad()
    def show(self, module: nn.Module, shown: bool) -> None:
        """Exchange the values in the module for the hidden ones where `shown` changes."""
        if shown == self.shown:
            return
        layer = module if isinstance(module, AdaptedLayer) and module.merged_adapters else None
        merged = [] if layer is None else layer.merged_adapters
        if layer is not None:  # what is merged into the one is not in the other
            layer.unmerge()
        bias = self.parameter(module)
        kept = bias.detach().clone()
        # No backward formula reads a bias, so a graph that holds it (LayerNorm's does) stays good.
        with version_kept(bias):
            bias.copy_(self.hidden)
        self.hidden, self.shown = kept, shown
        self.note_switch()
        if layer is not None:
            layer.merge(merged)

    def note_switch(self) -> None:
        """Record whose bias acts from now on, for modules that are computed again in backward."""
        self.switches.add(Acting((self.adapter_name,) if self.shown else ()))

    def original(self, module: nn.Module) -> Tensor:
        """The values of before any training and merging."""
        return self.hidden if self.shown else _unmerged(module)

    def trained(self, module: nn.Module) -> Tensor:
        """The values that belong to the adapter, without what is merged into them."""
        return _unmerged(module) if self.shown else self.hidden


def _unmerged(module: nn.Module) -> Tensor:
    kept = module.kept_tensors() if isinstance(module, AdaptedLayer) else {}
    return kept.get("bias", TrainedBias.parameter(module))


def train_bias(module: nn.Module, adapter_name: str, is_watched: bool = True) -> None:
    """Make `module.bias` train as part of an adapter; `is_watched` as in `layers.recomputation`."""
    bias = TrainedBias.parameter(module)
    record = TrainedBias(adapter_name, bias.detach().clone())
    record.note_switch()
    module.__dict__[_RECORD] = record
    if is_watched:
        watch(module, record.switches)


def trained_biases(
    model: nn.Module, adapter_name: str | None = None
) -> Iterator[tuple[str, nn.Module, TrainedBias]]:
    """(path of the bias, its module, its record) of the biases of one adapter, or of all."""
    for path, module in walk(model):
        record = module.__dict__.get(_RECORD)
        if record is not None and adapter_name in (None, record.adapter_name):
            yield (f"{path}.bias" if path else "bias"), module, record


def forget_bias(module: nn.Module) -> None:
    """End the training of the bias and bring its original values back."""
    record: TrainedBias = module.__dict__[_RECORD]
    record.show(module, False)
    record.parameter(module).requires_grad_(False)
    del module.__dict__[_RECORD]
    unwatch(module, record.switches)


def biases_to_train(
    model: nn.Module, option: str, targets: set[str]
) -> list[tuple[str, nn.Module]]:
    """The modules whose bias `option` selects; always the base's own."""
    if option == "none":
        return []
    found: dict[int, tuple[str, nn.Module]] = {}  # a bias shared by two modules trains once
    for path, module in walk(model):
        bias = base_tensors_of(module)._parameters.get("bias")
        if isinstance(bias, nn.Parameter) and (option == "all" or path in targets):
            found.setdefault(id(bias), (path, module))
    return list(found.values())
