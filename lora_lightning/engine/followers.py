"""Teachers that carry adapters to follow their student.

BYOL, MoCo, DINO and mean teachers copy the student, freeze the copy, and move each of its tensors
towards the student's,

    for s, t in zip(student.parameters(), teacher.parameters()):
        t.data = m * t.data + (1 - m) * s.data

With adapters on the student alone the two would be out of step. So the teacher carries adapters of
the same layout under the same name. They are frozen, as the teacher is, and it is the module's own
loop that moves them: the teacher follows what the student computes with. They are part of the
teacher, not of the adapter: checkpoints hold them as they hold what else the module moves of its
base, PEFT folders do not.

A teacher is told by its structure: its user froze all of it before there were adapters, and another
submodule has the same class and parameters, by name and shape, and is free. Where their values are
the same as well it is a copy, and gets a copy of the student's adapters. Otherwise it may be a
network to distil from, which nobody moves: its adapters change nothing until somebody does, start
alike in every process, and are taken off after a run in which nobody did.

A copy that is free (a target network that its optimizer leaves out) may train as well: it gets
adapters of its own, as options say, with the start values of those that it is a copy of. What
options select in a network that is no copy stays as they say.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lora_lightning.adapters.base import AdapterModule
from lora_lightning.adapters.carried import is_carried, mark_alike, mark_carried, starts_alike
from lora_lightning.engine.freezing import frozen_for_adapters
from lora_lightning.engine.switching import layers_with
from lora_lightning.layers.base import AdaptedLayer
from lora_lightning.layers.conversion import attach_adapter, check_convertible, detach_adapter
from lora_lightning.layers.multihead_attention import route_out_projections
from lora_lightning.layers.torch_fast_path import close_fast_path
from lora_lightning.layers.traversal import named_adapted_layers, walk
from lora_lightning.utilities.dtensor import is_sharded

Layout = tuple[type[nn.Module], tuple[tuple[str, torch.Size | None], ...]]


@dataclass(frozen=True)
class Follower:
    """A teacher by its path, its student, whether it began as its copy, and whether it is free."""

    teacher: str
    student: str
    is_copy: bool
    is_free: bool = False


def find_followers(model: nn.Module) -> list[Follower]:
    """The teachers in a model that carries no adapters yet."""
    modules = {path: module for path, module in walk(model) if path}
    frozen = {path: module for path, module in modules.items() if _is_frozen(module)}
    candidates = _outermost(frozen)
    layouts = {_layout(module) for module in candidates.values()}
    classes = {cls for cls, _ in layouts}
    free: dict[Layout, list[str]] = {}
    for path, module in modules.items():
        if (
            path not in frozen
            and type(module) in classes
            and (layout := _layout(module)) in layouts
        ):
            free.setdefault(layout, []).append(path)
    found: dict[str, Follower] = {}
    for path, teacher in candidates.items():
        if any(path.startswith(f"{outer}.") for outer in found):
            continue
        students = free.get(_layout(teacher), [])
        copied = [other for other in students if _same_values(teacher, modules[other])]
        similar = [other for other in students if _may_follow(path, other, teacher)]
        if copied or similar:
            found[path] = Follower(path, [*copied, *similar][0], bool(copied))
    return [*found.values(), *_free_copies({p: m for p, m in modules.items() if p not in frozen})]


def _free_copies(free: dict[str, nn.Module]) -> list[Follower]:
    """Networks that are copies of another, neither of them frozen; layers of a stack are none."""
    found: list[Follower] = []
    known: dict[Layout, list[str]] = {}
    for path, module in free.items():
        in_stack = any(part.isdigit() for part in path.split("."))
        in_copy = any(path.startswith(f"{follower.teacher}.") for follower in found)
        if in_stack or in_copy or not any(True for _ in module.children()):
            continue
        others = known.setdefault(_layout(module), [])
        original = next((p for p in others if _same_values(module, free[p])), None)
        if original is None:
            others.append(path)
        else:
            found.append(Follower(path, original, is_copy=True, is_free=True))
    return found


def _outermost(frozen: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The outermost frozen modules, and what is directly in them, which may follow by itself.

    A single layer is one only where all else is a wrapper of it (`AveragedModel`).
    """
    outer = {p: m for p, m in frozen.items() if p.rpartition(".")[0] not in frozen}
    inner = {p: m for p, m in frozen.items() if p.rpartition(".")[0] in outer}
    found = {**outer, **{path: m for path, m in inner.items() if any(True for _ in m.children())}}
    for path, module in outer.items():
        found.update(_wrapped(path, module))
    return found


def _wrapped(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What holds all parameters of `module`, of that in turn, and so on."""
    below = [name for name, child in module.named_children() if _has_parameters(child)]
    if len(below) == 1 and not _has_parameters(module, recurse=False):
        inside = f"{path}.{below[0]}", module.get_submodule(below[0])
        yield inside
        yield from _wrapped(*inside)


def carry_adapters(
    model: nn.Module, followers: list[Follower], adapter_name: str, fresh: bool = False
) -> None:
    """Have teachers carry an adapter that their students have; those that do so already keep it.

    `fresh` tells that the adapter has just been made: what free copies got starts as the original.
    """
    modules = dict(walk(model))
    for follower in followers:
        layers = dict(layers_with(modules[follower.student], adapter_name))
        adapters = {path: layer.adapters[adapter_name] for path, layer in layers.items()}
        if not follower.is_copy and any(a.config.starts_from_base for a in adapters.values()):
            continue  # its start would be part of a weight that the teacher does not have
        inside = dict(walk(modules[follower.teacher]))
        # Together: what they share, the copies share.
        for path, adapter in copy.deepcopy(adapters).items():
            module = inside[path]
            own = module.adapters.get(adapter_name) if isinstance(module, AdaptedLayer) else None
            trains = own is not None and follower.is_free
            if own is not None and (
                is_carried(own) or not follower.is_copy or (trains and not fresh)
            ):
                continue
            if own is not None:
                detach_adapter(cast(AdaptedLayer, module), adapter_name)
            check_convertible(module, f"{follower.teacher}.{path}")
            attach_adapter(module, layers[path].layer_type, adapter_name, adapter)
            _activate_like(cast(AdaptedLayer, module), layers[path])
            if not trains:
                _hold_still(adapter)
            if not follower.is_copy:
                _start_alike(cast(AdaptedLayer, module), adapter)
    route_out_projections(model)
    close_fast_path(model)


def carried_tensors(model: nn.Module, alike: bool | None = None) -> list[tuple[str, Tensor]]:
    """What teachers carry, by keys of a state dict: all of it, or as `starts_alike` tells."""
    return [
        (f"{path}.adapters.{name}.{key}", getattr(*place))
        for path, layer in named_adapted_layers(model)
        for name, adapter in layer.adapters.items()
        if is_carried(adapter) and alike in (None, starts_alike(adapter))
        for key, place in _places(adapter)
    ]


def carried_places(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Module and name of each of `carried_tensors`."""
    return {
        f"{path}.adapters.{name}.{key}": place
        for path, layer in named_adapted_layers(model)
        for name, adapter in layer.adapters.items()
        if is_carried(adapter)
        for key, place in _places(adapter)
    }


def _places(adapter: AdapterModule) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    for path, module in adapter.named_modules():
        for name in (*module._parameters, *module._buffers):
            if name not in module._non_persistent_buffers_set and getattr(module, name) is not None:
                yield f"{path}.{name}" if path else name, (module, name)


def leave_teachers(model: nn.Module, followers: list[Follower], adapter_name: str) -> None:
    """Take an adapter off copies that options have selected beside what they are copies of."""
    modules = dict(walk(model))
    for follower in followers:
        if follower.is_copy and not follower.is_free:
            for _, layer in layers_with(modules[follower.teacher], adapter_name):
                detach_adapter(layer, adapter_name)


def drop_carried(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter off the teachers that carry it."""
    for _, layer in list(named_adapted_layers(model)):
        adapter = layer.adapters.get(adapter_name)
        if adapter is not None and is_carried(adapter):
            detach_adapter(layer, adapter_name)


def take_off_unmoved(model: nn.Module, moved: Collection[str]) -> None:
    """Take adapters off teachers that are no copies and that nobody moved; `moved` as in a file."""
    for path, layer in list(named_adapted_layers(model)):
        for name, adapter in list(layer.adapters.items()):
            prefix = f"{path}.adapters.{name}."
            if starts_alike(adapter) and not any(key.startswith(prefix) for key in moved):
                detach_adapter(layer, name)


def _activate_like(layer: AdaptedLayer, other: AdaptedLayer) -> None:
    active = {*layer.active_adapters, *other.active_adapters}
    layer.active_adapters = [name for name in layer.adapters if name in active]


def _hold_still(adapter: AdapterModule) -> None:
    mark_carried(adapter)
    for parameter in adapter.parameters():
        parameter.requires_grad_(False)


def _start_alike(layer: AdaptedLayer, adapter: AdapterModule) -> None:
    """Give an adapter start values that depend on no seed and no student."""
    mark_alike(adapter)
    for name, part in adapter.by_weight().items():
        part.spec = replace(part.spec, seed=0)
        part.reset_parameters()
        if part.needs_weight:
            part.start_from_weight(layer.base_weight(name).detach())


def _is_frozen(module: nn.Module) -> bool:
    """Tell whether its user froze all of it; what was frozen for adapters does not count."""
    free = [
        parameter.requires_grad or name in frozen_for_adapters(part)
        for _, part in walk(module)
        for name, parameter in part.named_parameters(recurse=False)
    ]
    return bool(free) and not any(free)


def _has_parameters(module: nn.Module, recurse: bool = True) -> bool:
    return any(True for _ in module.parameters(recurse))


def _layout(module: nn.Module) -> Layout:
    shapes = ((n, None if is_lazy(p) else p.shape) for n, p in module.named_parameters())
    return type(module), tuple(shapes)


def _same_values(one: nn.Module, other: nn.Module) -> bool:
    return all(map(_equal, one.parameters(), other.parameters()))


def _equal(one: Tensor, other: Tensor) -> bool:
    unknown = one.is_meta or other.is_meta or is_sharded(one) or is_sharded(other)
    unknown |= is_lazy(one) or is_lazy(other)
    if unknown or one is other or one.dtype != other.dtype:
        return False
    return torch.equal(one, other.to(one.device))


def _may_follow(path: str, other: str, teacher: nn.Module) -> bool:
    """Tell siblings of a name each from the layers of a stack, of which some may be frozen."""
    (outer, _, name), (outside, _, its_name) = path.rpartition("."), other.rpartition(".")
    named = not (name.isdigit() or its_name.isdigit())
    return named and outer == outside and any(True for _ in teacher.children())
