"""Entries of a module's state dict that are neither its parameters nor its buffers.

`get_extra_state`, persistent states of torchmetrics, and all that an overridden `state_dict` or
`_save_to_state_dict` adds. Every module is asked by itself: what the outer ones make of the answer
(drop keys, rename them) does not matter.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lora_lightning.checkpoint.checksum import checksums
from lora_lightning.layers.base import AdaptedLayer
from lora_lightning.layers.quantized.base import packed_weight
from lora_lightning.layers.traversal import named_adapted_layers, walk
from lora_lightning.utilities._torch import load_own_state, own_state
from lora_lightning.utilities.wrappers import plain_name

EXTRA_STATE = "_extra_state"
_WRITERS = ("state_dict", "_save_to_state_dict", "get_extra_state")


def overrides(module: nn.Module, method: str) -> bool:
    """Tell whether a module has its own version of a method of `nn.Module`."""
    kind = module.base_type if isinstance(module, AdaptedLayer) else type(module)
    own = getattr(kind, method) is not getattr(nn.Module, method)
    return own or method in module.__dict__


def writes_entries(module: nn.Module) -> bool:
    """Tell whether a module itself decides what a state dict holds of it."""
    return bool(module._state_dict_hooks) or any(overrides(module, name) for name in _WRITERS)


def state_entries(model: nn.Module) -> dict[str, Any]:
    """The entries by their keys in `model.state_dict()`, without what belongs to adapters.

    Quantised layers are left out: how they say their scales is no state.
    """
    known = _tensor_names(model)
    adapters = tuple(f"{path}.adapters." for path, _ in named_adapted_layers(model))
    found: dict[str, Any] = {}
    for prefix, module in _writers(model):
        if module is not model and (module._state_dict_hooks or overrides(module, "state_dict")):
            found |= module.state_dict(prefix=prefix)
        found |= own_state(module, prefix)
    own = {key: v for key, v in _plain(found).items() if not key.startswith(adapters)}
    return {key: value for key, value in own.items() if key not in known}


def root_entries(model: nn.Module) -> dict[str, Any]:
    """What the model's own `state_dict` adds to all that; none where it has none of its own."""
    if not (overrides(model, "state_dict") or model._state_dict_hooks):
        return {}
    known = _tensor_names(model)
    tensors = [*model.parameters(), *model.buffers()]
    places = {(t.data_ptr(), t.shape) for t in tensors}
    adapters = tuple(f"{path}.adapters." for path, _ in named_adapted_layers(model))
    return {
        key: value
        for key, value in _plain(model.state_dict()).items()
        if key not in known
        and not key.startswith(adapters)
        # A known tensor under another name
        and not (isinstance(value, Tensor) and (value.data_ptr(), value.shape) in places)
    }


def load_entries(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Give each module its entries of `state_entries`."""
    for prefix, module in _writers(model):
        own = {key: value for key, value in state.items() if key.startswith(prefix)}
        if own:
            load_own_state(module, own, prefix)


def owner_of(model: nn.Module, key: str) -> nn.Module:
    """The innermost module that `key` lies in."""
    modules = dict(walk(model))
    path = key.rpartition(".")[0]
    while path not in modules:
        path = path.rpartition(".")[0]
    return modules[path]


def entry_digest(value: object) -> str:
    """A digest of an entry; one that cannot be compared is never the same twice."""
    if isinstance(value, Tensor):
        return checksums({"": value})[""]
    if isinstance(value, Mapping):
        return _digest([(repr(key), entry_digest(item)) for key, item in value.items()])
    if isinstance(value, (list, tuple)):
        return _digest([entry_digest(item) for item in value])
    try:
        return _digest(pickle.dumps(value))
    except Exception:  # pickle calls the value's own code
        return _digest((type(value).__name__, id(object())))


def _digest(value: object) -> str:
    content = value if isinstance(value, bytes) else repr(value).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def _writers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in walk(model):
        if writes_entries(module) and packed_weight(module) is None:
            yield (path + "." if path else ""), module


def _tensor_names(model: nn.Module) -> set[str]:
    parameters = model.named_parameters(remove_duplicate=False)
    buffers = model.named_buffers(remove_duplicate=False)
    return {plain_name(name) for part in (parameters, buffers) for name, _ in part}


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    return {plain_name(key): value for key, value in state.items()}
