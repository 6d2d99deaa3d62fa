"""The base as it was when adapters were attached, to find what training has changed of it since.

What a checkpoint must hold is found on the module itself, by comparison: parameters that the module
moves by its own hand (the teacher of BYOL, MoCo, DINO; weights that are masked or renormalised in
forward), buffers (centres, queues, codebooks), and whatever else a state dict holds of it. The
comparison reads every bit (`lora_lightning.checkpoint.checksum`). A cast by the precision plugin is
no training, and neither is sharding.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lora_lightning.checkpoint.checksum import checksums
from lora_lightning.checkpoint.fingerprint import base_tensors, persistent_buffers
from lora_lightning.checkpoint.state_entries import (
    EXTRA_STATE,
    entry_digest,
    root_entries,
    state_entries,
)
from lora_lightning.engine.followers import carried_tensors
from lora_lightning.layers.traversal import walk
from lora_lightning.utilities._torch import is_flattened
from lora_lightning.utilities.dtensor import is_sharded, is_unit, local_part

_CASTS = {"bf16-true": torch.bfloat16, "16-true": torch.float16}


@dataclass
class Baseline:
    """What was there, as checksums; and what was found to have moved so far.

    Attributes:
        bits: Of each base tensor by name, the checksums of its unmoved values: as they were, and
            in each dtype and part of them that a plugin or strategy has made since.
        entries: Digests of the entries of a state dict that are no tensors of modules.
        originals: Buffers and entries themselves, which a checkpoint of before they moved lacks.
        moved: Checksums of what has moved, as last seen; it is saved from then on.

    """

    bits: dict[str, dict[str, str]] = field(default_factory=dict)
    entries: dict[str, str] = field(default_factory=dict)
    originals: dict[str, Any] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)

    def remember(self, module: LightningModule) -> set[str]:
        """Take in the module as it is at the head of a run; training has not begun.

        Returns:
            The tensors that were exchanged since the last run, by nobody who trains: they are a
            new base.

        """
        # Copies of a student's adapters start elsewhere in every process: they have moved.
        copies = dict(carried_tensors(module, alike=False))
        tensors = {name: t for name, t in _parts(module).items() if name not in copies}
        sums = checksums(tensors)
        exchanged = {n for n, s in sums.items() if self._is_other(n, tensors[n], s)}
        for name in exchanged:
            self.bits.pop(name)
            self.moved.pop(name, None)
        cast = _CASTS.get(str(module.trainer.precision_plugin.precision))
        kept = {name for name, _ in [*base_buffers(module), *carried_tensors(module)]}
        for name, tensor in tensors.items():
            fresh = name not in self.bits
            known = self.bits.setdefault(name, {})
            if fresh and name in kept:
                self.originals[name] = tensor.detach().cpu().clone()
            if known.setdefault(_layout(tensor), sums[name]) != sums[name]:
                continue  # it has moved
            if cast is not None and tensor.is_floating_point() and tensor.dtype != cast:
                narrow = tensor.to(cast)
                if _layout(narrow) not in known:
                    known[_layout(narrow)] = checksums({"": narrow})[""]
        for key, value in _entries(module).items():
            if key not in self.entries:
                self.entries[key] = entry_digest(value)
                self.originals[key] = copy.deepcopy(value)
        return exchanged

    def note_parts(self, module: nn.Module) -> None:
        """Take in the parts that a strategy has just made of the tensors."""
        tensors = _parts(module)
        sums = checksums(tensors)
        for name, tensor in tensors.items():
            self.bits.setdefault(name, {}).setdefault(_layout(tensor), sums[name])

    def changed(self, module: LightningModule) -> dict[str, Any]:
        """All that differs from what was there, or did once, by its key in the state dict.

        Tensors are the module's own (of sharded ones this process's view). It is the same on every
        process where the module is.
        """
        tensors = _parts(module)
        sums = checksums(tensors)
        for name, tensor in tensors.items():
            known = self.bits.get(name, {})
            unmoved = known.get(_layout(tensor))
            if unmoved is None and (is_flattened(tensor) or _is_gathered(module, tensor)):
                continue  # whole for a forward: what changes is the part, which is looked at then
            if unmoved != sums[name]:
                self.moved[name] = sums[name]
        entries = _entries(module)
        for key, value in entries.items():
            digest = entry_digest(value)
            if key.endswith(EXTRA_STATE) or self.entries.get(key) != digest:
                self.moved[key] = digest
        whole = {**dict(_own(module)), **entries}
        return {name: whole[name] for name in self.moved if name in whole}

    def start_from(self, module: LightningModule, state: Iterable[str]) -> dict[str, Any]:
        """What a checkpoint with the keys `state` lacks because it had not moved yet.

        Tensors that nobody has kept are not among them: `cannot_restore`.
        """
        return {
            name: self.originals[name]
            for name in self.changed(module)
            if name not in state and name in self.originals
        }

    def cannot_restore(self, module: LightningModule, state: Mapping[str, Any]) -> list[str]:
        """What has moved in memory, but not in a checkpoint with these entries, nor was kept."""
        return [n for n in self.changed(module) if n not in state and n not in self.originals]

    def loaded(self, names: Iterable[str]) -> None:
        """A checkpoint was loaded in which these have moved."""
        self.moved = dict.fromkeys(names, "")

    def _is_other(self, name: str, tensor: Tensor, checksum: str) -> bool:
        unmoved = self.bits.get(name, {}).get(_layout(tensor))
        return unmoved is not None and checksum not in (unmoved, self.moved.get(name))


def base_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Persistent buffers by name, without those of adapters."""
    return [
        (f"{path}.{name}" if path else name, buffer)
        for path, child in walk(module)
        for name, buffer in persistent_buffers(child)
    ]


def _parts(module: nn.Module) -> dict[str, Tensor]:
    """What this process holds of each base tensor."""
    return {name: local_part(tensor) for name, tensor in _own(module)}


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    base = base_tensors(module, quantized=False, replaced=True)
    for name, tensor in (*base, *carried_tensors(module)):
        if not tensor.is_meta:
            yield name, tensor


def _is_gathered(module: nn.Module, tensor: Tensor) -> bool:
    """True for a whole parameter where FSDP2 has shared out others, and this one at its time."""
    return isinstance(tensor, nn.Parameter) and any(map(is_unit, module.modules()))


def _entries(module: nn.Module) -> dict[str, Any]:
    if any(is_sharded(p) or is_flattened(p) for p in module.parameters()):
        return state_entries(module)  # a whole state dict would gather the base
    return {**root_entries(module), **state_entries(module)}


def _layout(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
