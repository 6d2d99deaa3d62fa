"""Exchange the weights of an adapter in place, under code that is compiled already."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import AdapterModule
from lora_lightning.adapters.config import AdapterConfig, pattern_value
from lora_lightning.adapters.lora.config import LoraConfig
from lora_lightning.adapters.lora.linear import LowRankAdapter
from lora_lightning.adapters.trainable_tokens import TrainableTokensAdapter
from lora_lightning.checkpoint.compatibility import config_differences
from lora_lightning.checkpoint.peft.config import TENSORS
from lora_lightning.checkpoint.peft.keys import parts_in_file, tensors_to_load
from lora_lightning.checkpoint.peft.reading import (
    check_means_the_same,
    opened_folder,
    read_base,
    read_values,
)
from lora_lightning.checkpoint.peft.saved_base import added_rows, check_no_rows
from lora_lightning.engine.injection import adapters_named
from lora_lightning.engine.targets.matching import matches_name
from lora_lightning.errors import AdapterMismatchError, AdapterStateError, first_few
from lora_lightning.layers.traversal import named_adapted_layers

# Of a low-rank update, the ends of its keys
_FACTORS = ("lora_A.weight", "lora_embedding_A", "lora_B.weight", "lora_embedding_B")


@dataclass(frozen=True)
class _Factor:
    """A or B of a low-rank update that may be filled by one of a smaller rank."""

    part: LowRankAdapter
    other: str  # the key of the other one
    dimension: int  # in which the rank is

    def size(self, here: list[int], config: LoraConfig) -> list[int] | None:
        """The size of the tensor with the rank that `config` says; None where it does not fit."""
        r = pattern_value(config.rank_pattern, self.part.spec.path, config.r)
        if r > self.part.r or r % getattr(self.part, "groups", 1):
            return None
        sizes = list(here)
        sizes[self.dimension] = here[self.dimension] * r // self.part.r
        return sizes

    def fill(self, tensor: Tensor, value: Tensor) -> None:
        """Copy `value` into the first ranks."""
        if self.dimension == 1:
            tensor[:, : value.shape[1]].copy_(value)
        else:
            # A holds the updates of experts, or of groups of channels, one after the other.
            experts: int | None = getattr(self.part, "experts", None)
            blocks = experts or cast(int, getattr(self.part, "groups", 1))
            ranks = torch.unflatten(value, 0, (blocks, -1))
            torch.unflatten(tensor, 0, (blocks, -1))[:, : ranks.shape[1]].copy_(ranks)


def hotswap_adapter(
    model: nn.Module, path: str | os.PathLike[str], adapter_name: str = "default"
) -> None:
    """Give an adapter on `model` the weights and the scaling of another one from a PEFT folder.

    No tensor and no module is replaced, so compiled code runs on without being compiled again.
    LoRA weights of a smaller rank fill the first ranks, the others become zero: an adapter injected
    with the largest rank to come is a slot for all. Modules that the folder has no LoRA weights for
    stop acting (B = 0). The optimizer of a run keeps what it knows of the old weights.

    Args:
        model: A model with an adapter of that name, of the same type as the folder's.
        path: The folder.
        adapter_name: Which adapter to fill.

    Raises:
        CheckpointError: If the folder is damaged.
        AdapterMismatchError: If the folder's adapter does not fit into this one. Nothing is
            changed then.
        AdapterStateError: If there is no such adapter, it is merged, or it has no values yet.

    """
    adapters = adapters_named(model, adapter_name)
    own = _slot(model, adapters, adapter_name)
    config = next(iter(adapters.values())).config
    factors = _factors(model, config, adapter_name)
    with opened_folder(model, Path(path)) as (content, shapes, opened):
        incoming = content.config
        sizes = {name: shapes[key] for key, name in content.own.items()}
        problems = _differences(config, incoming, own, sizes, factors)
        problems += _other_tokens(adapters, incoming)
        if problems:
            raise AdapterMismatchError(
                f"The adapter in {str(path)!r} does not fit into {adapter_name!r}; nothing was "
                "changed:\n  " + "\n  ".join(problems)
            )
        file = Path(path) / TENSORS
        check_means_the_same(model, content, adapters, file)
        values = read_values(content, opened, own, file)
        rows = added_rows(model, read_base(content, opened), file)
        check_no_rows(rows, [adapter_name], file)
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.zero_()
            if key in values and key in factors:
                factors[key].fill(tensor, values[key])
            elif key in values:
                tensor.copy_(values[key])
    if isinstance(incoming, LoraConfig):
        changed = _rescale(adapters, cast(LoraConfig, config), incoming)
        for adapter in adapters.values():
            for part in adapter.modules():
                if isinstance(part, AdapterModule):
                    part.config = changed


def _slot(model: nn.Module, adapters: dict[str, AdapterModule], name: str) -> dict[str, Tensor]:
    """The tensors to fill, by their keys in files."""
    if not adapters:
        raise AdapterStateError(
            f"There is no adapter {name!r} to fill. Put one on first, with load_adapter or "
            "inject_adapter, of the largest rank that is to come."
        )
    if any(name in layer.merged_adapters for _, layer in named_adapted_layers(model)):
        raise AdapterStateError(
            f"Adapter {name!r} is merged into the base; call unmerge_adapter(model) first."
        )
    own = tensors_to_load(model, name)
    if any(tensor.is_meta for tensor in own.values()):
        raise AdapterStateError(
            f"Adapter {name!r} is on the meta device and has no memory yet: fill it first with "
            "load_adapter_state_dict, or take it off and use load_adapter."
        )
    return own


def _factors(model: nn.Module, config: AdapterConfig, name: str) -> dict[str, _Factor]:
    """The tensors that may come with a smaller rank, or not at all, by their keys."""
    if not isinstance(config, LoraConfig) or config.use_dora:
        return {}
    found = {}
    for prefix, part in parts_in_file(model, name):
        for ending in _FACTORS:
            if isinstance(part, LowRankAdapter) and ending in part.file_state():
                own, other = ("_A", "_B") if "_A" in ending else ("_B", "_A")
                key = prefix + ending.replace(own, other)
                found[prefix + ending] = _Factor(part, key, 0 if own == "_A" else 1)
    return found


def _differences(
    config: AdapterConfig,
    incoming: AdapterConfig,
    own: dict[str, Tensor],
    sizes: dict[str, list[int]],
    factors: dict[str, _Factor],
) -> list[str]:
    if type(config) is not type(incoming):
        return [f"it is of type {incoming.peft_type}, this one of type {config.peft_type}"]
    if config.starts_from_base or incoming.starts_from_base:
        return ["an adapter that starts from the base weight cannot be exchanged in place"]
    problems = []
    extra = sorted(sizes.keys() - own.keys())
    if extra:
        problems.append(f"tensors for which there is no place here: {first_few(extra, 3)}")
    optional = {key for key, factor in factors.items() if factor.other not in sizes}
    optional |= {key for key in own if key.endswith("lora_B.bias") and factors}
    missing = sorted(own.keys() - sizes.keys() - optional)
    if missing:
        problems.append(f"tensors that it lacks: {first_few(missing, 3)}")
    if not factors:
        problems += config_differences(incoming.to_dict(), config)
    for key in sorted(sizes.keys() & own.keys()):
        there, here = list(sizes[key]), list(own[key].shape)
        expected = here
        if key in factors:
            expected = factors[key].size(here, cast(LoraConfig, incoming)) or []
        if there != expected:
            problems.append(f"{key} is {there}, here {here}")
    return problems


def _other_tokens(adapters: dict[str, AdapterModule], incoming: AdapterConfig) -> list[str]:
    """Rows of other tokens than those that are trained here."""
    wanted = getattr(incoming, "trainable_token_indices", None)
    problems = []
    for path, adapter in adapters.items():
        if isinstance(adapter, TrainableTokensAdapter):
            ids = wanted
            if isinstance(wanted, dict):
                ids = next((i for name, i in wanted.items() if matches_name(name, path)), None)
            if ids != adapter.token_ids:
                problems.append(f"its rows are of the tokens {ids}, here {adapter.token_ids}")
    return problems


def _rescale(
    adapters: dict[str, AdapterModule], own: LoraConfig, incoming: LoraConfig
) -> LoraConfig:
    """Set the scaling of every part; the options that say the same of the ranks that are here."""
    alphas: dict[str, float] = {}
    for adapter in adapters.values():
        for part in adapter.modules():
            if not isinstance(part, LowRankAdapter):
                continue
            path = part.spec.path
            r = pattern_value(incoming.rank_pattern, path, incoming.r)
            alpha = pattern_value(incoming.alpha_pattern, path, incoming.lora_alpha)
            part.config_scaling = alpha / (math.sqrt(r) if incoming.use_rslora else r)
            part.set_scaling(part.config_scaling)
            alphas[path] = part.config_scaling * (math.sqrt(part.r) if own.use_rslora else part.r)
            part.lora_alpha = alphas[path]
    if not alphas:
        return own
    common = max(alphas.values(), key=list(alphas.values()).count)
    pattern = {f"^{re.escape(path)}": a for path, a in alphas.items() if a != common}
    return dataclasses.replace(own, lora_alpha=common, alpha_pattern=pattern)
