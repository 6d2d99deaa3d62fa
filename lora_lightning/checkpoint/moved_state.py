"""What a module has moved of its own base, out of a file and into the module.

Tensors are written into the module's own. Other entries go to the modules that wrote them, and what
only an overridden `state_dict` of the outermost one knows goes to its `load_state_dict`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters.modules_to_save import base_tensors_of
from lora_lightning.checkpoint.state_entries import overrides, owner_of, writes_entries
from lora_lightning.engine.followers import carried_places
from lora_lightning.layers.traversal import walk
from lora_lightning.utilities.dtensor import copy_full, distribute_like, is_sharded
from lora_lightning.utilities.wrappers import under_own_names

Place = tuple[nn.Module, str]  # a module, and the name of a tensor of its own


def tensor_places(model: nn.Module) -> dict[str, Place]:
    """Parameters and persistent buffers of the base, also those that are None, by their keys.

    Those of adapters are among them where a teacher carries them.
    """
    base = {
        f"{path}.{name}" if path else name: (own, name)
        for path, module in walk(model)
        for own in [base_tensors_of(module)]
        for name in (*own._parameters, *own._buffers)
        if name not in own._non_persistent_buffers_set
    }
    return {**base, **carried_places(model)}


def without_place(model: nn.Module, keys: Iterable[str]) -> list[str]:
    """Those of `keys`, of entries that belong to no adapter, that the model could not take."""
    places = tensor_places(model)
    others = [key for key in keys if key not in places]
    if overrides(model, "state_dict") or overrides(model, "load_state_dict"):
        return []
    return [key for key in others if not writes_entries(owner_of(model, key))]


def moved_differences(model: nn.Module, state: Mapping[str, Any]) -> list[str]:
    """Tensors of another kind of numbers than in `state`, or another shape: buffers may grow."""
    lines = []
    for key, (module, name) in tensor_places(model).items():
        own, value = getattr(module, name), state.get(key)
        if key not in state or own is None:
            continue
        if not isinstance(value, Tensor) or value.is_floating_point() != own.is_floating_point():
            there = value.dtype if isinstance(value, Tensor) else type(value).__name__
            lines.append(f"{key}: {there} in the checkpoint, {own.dtype} here")
        elif name in module._parameters and value.shape != own.shape:
            lines.append(f"{key}: {list(value.shape)} in the checkpoint, {list(own.shape)} here")
    return lines


def load_moved(model: nn.Module, state: Mapping[str, Any]) -> set[str]:
    """Load entries that belong to no adapter; whole tensors, also into sharded ones.

    Returns:
        The keys that the model has no place for.

    """
    _make_room(model, state)
    own = {key: getattr(*place) for key, place in tensor_places(model).items() if key in state}
    parts = {
        key: distribute_like(value, own.get(key)) if isinstance(value, Tensor) else value
        for key, value in state.items()
    }
    # Not the model's own method, which may drop any of it; those of the modules inside are called.
    result = nn.Module.load_state_dict(model, under_own_names(model, parts), strict=False)
    left = set(result.unexpected_keys)
    if overrides(model, "load_state_dict") and not any(map(is_sharded, model.parameters())):
        # It is shown what it would be without adapters: a whole state, in the form of `state_dict`.
        whole = {**model.state_dict(), **{key: state[key] for key in left}}
        model.load_state_dict(whole, strict=False)
        left = set()
    for key, (module, name) in tensor_places(model).items():
        tensor = getattr(module, name)
        if key in state and isinstance(tensor, Tensor):
            copy_full(tensor, state[key])
    return set() if overrides(model, "state_dict") else left


@torch.no_grad()
def _make_room(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Give buffers the shapes that they have in `state`: a memory bank grows."""
    for key, (module, name) in tensor_places(model).items():
        value = state.get(key)
        if name not in module._buffers or not isinstance(value, Tensor):
            continue
        buffer = module._buffers[name]
        if buffer is None:
            first = next(module.parameters(), next(model.parameters(), value))
            module._buffers[name] = value.to(first.device, copy=True)
        elif buffer.shape != value.shape:
            module._buffers[name] = value.to(buffer.device, buffer.dtype, copy=True)
