"""Exchange the weights of an adapter in place, under code that is compiled already."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import DeltaAdapter
from lora_lightning.adapters.lora import LoraConfig, LowRankAdapter
from lora_lightning.checkpoint import config_differences
from lora_lightning.config import AdapterConfig, pattern_value
from lora_lightning.errors import AdapterMismatchError, AdapterStateError, first_few
from lora_lightning.hosts.base import named_hosts
from lora_lightning.injection import adapters_named
from lora_lightning.peft_format import read_folder
from lora_lightning.peft_keys import tensors_to_load


def hotswap_adapter(
    model: nn.Module, path: str | os.PathLike[str], adapter_name: str = "default"
) -> None:
    """Give an adapter on `model` the weights and the scaling of another one from a PEFT folder.

    No tensor and no module is replaced, so compiled code runs on without being compiled again.
    LoRA weights of a smaller rank fill the first ranks, the others become zero: an adapter injected
    with the largest rank to come is a slot for all. Modules that the folder has no tensors for stop
    acting (B = 0).

    Args:
        model: A model with an adapter of that name, of the same type as the folder's.
        path: The folder.
        adapter_name: Which adapter to fill.

    Raises:
        CheckpointError: If the folder is damaged.
        AdapterMismatchError: If the folder's adapter does not fit into this one. Nothing is
            changed then.
        AdapterStateError: If there is no such adapter, or it is merged.

    """
    adapters = adapters_named(model, adapter_name)
    if not adapters:
        raise AdapterStateError(
            f"There is no adapter {adapter_name!r} to fill. Put one on first, with load_adapter or "
            "inject_adapter, of the largest rank that is to come."
        )
    if any(adapter_name in host.merged_adapters for _, host in named_hosts(model)):
        raise AdapterStateError(
            f"Adapter {adapter_name!r} is merged into the base; call unmerge_adapter(model) first."
        )
    config = next(iter(adapters.values())).config
    incoming, values = read_folder(Path(path))
    own = tensors_to_load(model, adapter_name)
    problems = _differences(config, incoming, own, values)
    if problems:
        raise AdapterMismatchError(
            f"The adapter in {str(path)!r} does not fit into {adapter_name!r}; nothing was "
            "changed:\n  " + "\n  ".join(problems)
        )
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.zero_()
            if key in values:
                part = tensor[tuple(slice(0, size) for size in values[key].shape)]
                part.copy_(values[key])
    if isinstance(incoming, LoraConfig):
        changed = _rescale(adapters, cast(LoraConfig, config), incoming)
        for adapter in adapters.values():
            adapter.config = changed


def _differences(
    config: AdapterConfig,
    incoming: AdapterConfig,
    own: dict[str, Tensor],
    values: dict[str, Tensor],
) -> list[str]:
    if type(config) is not type(incoming):
        return [f"it is of type {incoming.peft_type}, this one of type {config.peft_type}"]
    if config.starts_from_base or incoming.starts_from_base:
        return ["an adapter that starts from the base weight cannot be exchanged in place"]
    problems = []
    extra = sorted(values.keys() - own.keys())
    missing = sorted(own.keys() - values.keys())
    if extra:
        problems.append(f"tensors for which there is no place here: {first_few(extra, 3)}")
    ranks_may_differ = isinstance(config, LoraConfig) and not config.use_dora
    if missing and not ranks_may_differ:
        problems.append(f"tensors that it lacks: {first_few(missing, 3)}")
    if not ranks_may_differ:
        saved = incoming.to_dict()
        problems += [line for line in config_differences(saved, config)]
    for key in sorted(values.keys() & own.keys()):
        there, here = list(values[key].shape), list(own[key].shape)
        smaller = len(there) == len(here) and all(
            t == h or (ranks_may_differ and t < h and index == _rank_dimension(key))
            for index, (t, h) in enumerate(zip(there, here, strict=True))
        )
        if not smaller:
            problems.append(f"{key} is {there}, here {here}")
    return problems


def _rank_dimension(key: str) -> int:
    return 0 if key.endswith(("lora_A.weight", "lora_embedding_A")) else 1


def _rescale(adapters: dict[str, Any], own: LoraConfig, incoming: LoraConfig) -> LoraConfig:
    """Set the scaling of every part; the options that say the same of the ranks that are here."""
    alphas: dict[str, float] = {}
    for path, adapter in adapters.items():
        for part in adapter.modules():
            if not isinstance(part, (LowRankAdapter, DeltaAdapter)):
                continue
            r = pattern_value(incoming.rank_pattern, path, incoming.r)
            alpha = pattern_value(incoming.alpha_pattern, path, incoming.lora_alpha)
            scaling = alpha / (math.sqrt(r) if incoming.use_rslora else r)
            part.own_scaling = scaling
            part.set_scaling(scaling)
            rank = cast(LowRankAdapter, part).r
            alphas[path] = scaling * (math.sqrt(rank) if own.use_rslora else rank)
    common = max(set(alphas.values()), key=list(alphas.values()).count)
    pattern = {f"^{re.escape(path)}": a for path, a in alphas.items() if a != common}
    return dataclasses.replace(own, lora_alpha=common, alpha_pattern=pattern)
