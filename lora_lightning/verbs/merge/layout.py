"""How the tensors of a model's files become those of the network, and back, by transformers' rules.

Mostly one becomes one under its name or another. Some become one together (the experts of a layer
are fused), or one becomes several. What belongs together is a group; each is read, changed and
written on its own, so that no more than one has to be in memory. All of it is tried beforehand with
tensors that have no values.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_lightning.verbs.merge.base_files import BaseFiles

Tensors = dict[str, Tensor]


class NotByShardsError(Exception):
    """Why a model cannot be merged shard by shard, but has to be in memory as a whole."""


@dataclass
class Group:
    """Tensors that are converted together.

    Attributes:
        first: The name in the network of the first one.
        sources: The names in the files, each with the pattern by which it is converted.
        converter: transformers' converter; None where a tensor only gets another name.
        targets: What it becomes in the network, without values.
        dtype: Of the first one in the files.

    """

    first: str
    converter: Any = None
    sources: list[tuple[str, str]] = field(default_factory=list)
    targets: Tensors = field(default_factory=dict)
    dtype: torch.dtype = torch.float32


class Layout:
    """The groups of a model's files.

    Args:
        network: On the meta device, without adapters.
        files: What is read.

    Attributes:
        groups: All that the network has a place for, in the order of the files.
        unread: The names in the files that it has none for.
        shapes: All that is in the network's state dict.

    """

    def __init__(self, network: Any, files: BaseFiles) -> None:
        self.network = network
        self.files = files
        self.shapes: Tensors = dict(network.state_dict())
        self.unread: list[str] = []
        try:
            self.groups = self._grouped()
            for group in self.groups:
                group.targets = self.converted(group, files.meta)
        except Exception as error:  # of rules that are transformers' own, and of every version
            raise NotByShardsError(
                f"its files cannot be matched with the network name by name ({error!r})"
            ) from error
        self.group_of = {name: group for group in self.groups for name in group.targets}
        if len(self.group_of) != sum(len(group.targets) for group in self.groups):
            raise NotByShardsError("two tensors of its files become the same one of the network")

    def converted(self, group: Group, tensors: Any) -> Tensors:
        """What the tensors of a group, by their names in the files, become in the network."""
        if group.converter is None:
            return {group.first: tensors[group.sources[0][0]]}
        converter = copy.deepcopy(group.converter)
        for key, pattern in group.sources:
            converter.add_tensor(group.first, key, pattern, tensors[key])
        found = converter.convert(group.first, model=self.network, config=self.network.config)
        return {name: t[0] if isinstance(t, list) else t for name, t in found.items()}

    def read(self, group: Group) -> Tensors:
        """The tensors of a group as the network has them."""
        return self.converted(group, {key: self.files.tensor(key) for key, _ in group.sources})

    def reverted(self, tensors: Tensors) -> Tensors:
        """Tensors of the network, all of a group, as they are called and cut in files."""
        from transformers.core_model_loading import revert_weight_conversion

        found: Tensors = revert_weight_conversion(self.network, dict(tensors))
        return found

    def _grouped(self) -> list[Group]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        rules = get_model_conversion_mapping(self.network)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {p: rule for rule in converters for p in rule.source_patterns}
        place = self.network.base_model_prefix, self.shapes
        groups: dict[str, Group] = {}
        for key in sorted(self.files.meta, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, *place)
            if name not in self.shapes and key in self.shapes:
                name, pattern = rename_source_key(key, [], [], *place)
            if name not in self.shapes:
                self.unread.append(key)
                continue
            group = groups.setdefault(name, Group(name, dtype=self.files.meta[key].dtype))
            if pattern is not None:
                group.converter = by_pattern[pattern]
            elif group.sources:
                raise ValueError(f"{group.sources[0][0]} and {key} are both {name}")
            group.sources.append((key, pattern or key))
        self.network._weight_conversions = [rule for rule in rules if rule.was_used()]
        return [*groups.values()]
