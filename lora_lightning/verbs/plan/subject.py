"""What is planned: a module with adapters, all of its tensors without memory."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lora_lightning.adapters.config import AdapterConfig
from lora_lightning.checkpoint.loading import put_adapter_on
from lora_lightning.engine.injection import freeze, inject_adapter
from lora_lightning.engine.switching import active_adapters, set_adapter, set_trainable
from lora_lightning.engine.targets.selection import Selection
from lora_lightning.layers.quantized.bitsandbytes import (
    is_linear4bit,
    is_linear8bit,
    round_placeholder,
)
from lora_lightning.layers.traversal import named_adapted_layers
from lora_lightning.tasks.model_options import weights_of
from lora_lightning.tasks.pretrained_task import PretrainedTask
from lora_lightning.training._lightning import trainer_of
from lora_lightning.training.adapter_callback import AdapterCallback
from lora_lightning.training.module_state import defines_hook
from lora_lightning.training.new_modules import new_modules_below


@dataclass
class Subject:
    """A module whose tensors have no memory.

    Attributes:
        module: With adapters.
        fake: The mode that its tensors belong to.
        selections: What each callback's adapter was put on, by adapter name.
        roots: The submodule that carries it.
        notes: What is not planned as the run will have it.

    """

    module: LightningModule
    fake: Any
    selections: dict[str, Selection] = field(default_factory=dict)
    roots: dict[str, nn.Module] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def of_adapters(self) -> list[Tensor]:
        """What adapters hold: their parameters, and buffers such as a scale."""
        layers = [layer for _, layer in named_adapted_layers(self.module)]
        held = [[*layer.adapters.parameters(), *layer.adapters.buffers()] for layer in layers]
        return [tensor for tensors in held for tensor in tensors]

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that train."""
        return [p for p in self.module.parameters() if p.requires_grad]


def subject_of(
    module: LightningModule, callbacks: Sequence[AdapterCallback], precision: str, fake: Any
) -> Subject:
    """Copy a module without its memory, build what it builds late, and put the adapters on.

    LoraError where options do not fit the module.
    """
    if isinstance(module, PretrainedTask) and module.network is None:
        module = copy.copy(module)
        module._modules = {**module._modules}
        module.configure_without_weights(precision)
    subject = Subject(without_memory(module, fake), fake)
    made = subject.module
    with fake:
        if not isinstance(made, PretrainedTask) and defines_hook(made, "configure_model"):
            made.configure_model()
        cast = weights_of(precision)
        if cast is not None:
            _cast(made, cast)
        for callback in callbacks:
            if callback.enabled:
                _attach(subject, callback)
        if subject.roots:
            freeze(made)
            for callback in callbacks:
                if callback.adapter_name in subject.roots:
                    root = subject.roots[callback.adapter_name]
                    set_trainable(root, callback.adapter_name, callback.trainable)
        made.train()
    return subject


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """`module.to(dtype)`, which cannot swap tensors without memory."""
    cast: dict[int, Tensor] = {}
    for child in module.modules():
        for tensors in (child._parameters, child._buffers):
            for name, tensor in tensors.items():
                if tensor is None or not tensor.is_floating_point():
                    continue
                if id(tensor) not in cast:
                    made = tensor.detach().to(dtype)
                    parameter = isinstance(tensor, nn.Parameter)
                    cast[id(tensor)] = (
                        nn.Parameter(made, tensor.requires_grad) if parameter else made
                    )
                tensors[name] = cast[id(tensor)]  # type: ignore[assignment]


def _attach(subject: Subject, callback: AdapterCallback) -> None:
    root, name = callback._root(subject.module), callback.adapter_name
    if callback.init_from is not None:
        from pathlib import Path

        put_adapter_on(root, Path(callback.init_from), name, callback.autocast_adapter_dtype)
    else:
        config = _started_plainly(callback.config, subject.notes)
        new: set[str] = getattr(subject.module, "new_parameters", set())
        tensors = {id(p) for n, p in subject.module.named_parameters() if n in new}
        listed = [*(config.modules_to_save or ())]
        if tensors and callback.trainable:
            found = [*listed, *new_modules_below(root, tensors, listed)]
            config = dataclasses.replace(config, modules_to_save=found or None)
        subject.selections[name] = inject_adapter(
            root, config, name, autocast_adapter_dtype=callback.autocast_adapter_dtype
        )
    if name not in active_adapters(root):
        set_adapter(root, [*active_adapters(root), name])
    subject.roots[name] = root


def _started_plainly(config: AdapterConfig, notes: list[str]) -> AdapterConfig:
    """Options with start values that need no values of the base: their sizes are the same."""
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, bool):
        return config
    if start == "eva":
        notes.append(
            "EVA finds a rank for each layer from the data: planned is the same rank everywhere "
            "(lora.init_lora_weights)"
        )
    known = {field.name for field in dataclasses.fields(config)}
    plain = {"init_lora_weights": True, "loftq_config": None, "eva_config": None}
    changes: dict[str, Any] = {k: v for k, v in plain.items() if k in known}
    return dataclasses.replace(config, **changes)


def without_memory(module: LightningModule, fake: Any) -> LightningModule:
    """A copy of a module whose parameters and buffers take no memory, on the CPU."""
    trainer = trainer_of(module)
    memo: dict[int, Any] = {} if trainer is None else {id(trainer): None}
    dense: dict[int, Tensor] = {}
    with fake:
        for child in module.modules():
            packed = is_linear4bit(child) or is_linear8bit(child)
            kept = [v for v in vars(child).values() if isinstance(v, Tensor) and v.is_meta]
            for tensor in [*child._parameters.values(), *child._buffers.values(), *kept]:
                if tensor is None or id(tensor) in memo:
                    continue
                made = torch.empty_strided(
                    tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu"
                )
                if isinstance(tensor, nn.Parameter):
                    made = nn.Parameter(made, requires_grad=tensor.requires_grad)
                memo[id(tensor)] = made
                if packed and tensor is child._parameters.get("weight"):
                    dense[id(child)] = made
                    memo[id(tensor)] = tensor  # for its options
    copied = copy.deepcopy(module, memo)
    new: Any
    with fake:
        for old, new in zip(module.modules(), copied.modules(), strict=True):
            if id(old) in dense:
                weight = dense[id(old)]
                if not weight.is_floating_point():  # real ones, rounded already
                    weight = torch.empty(new.out_features, new.in_features)
                round_placeholder(new, weight)
    return copied
