"""Embeddings and heads that carry adapters keep their size, and their place, while they do.

transformers' `resize_token_embeddings` gives the table other rows and puts a new head in the old
one's place, without its adapters; `set_input_embeddings` and `set_output_embeddings` exchange
whole modules. While adapters sit there these methods are held, on the instance, and refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn

from lora_lightning.engine.bias import trained_biases
from lora_lightning.errors import AdapterStateError
from lora_lightning.layers.base import AdaptedLayer
from lora_lightning.layers.traversal import walk
from lora_lightning.utilities.wrappers import unwrapped

_RESIZE = "resize_token_embeddings"
_GETTERS = {
    "set_input_embeddings": "get_input_embeddings",
    "set_output_embeddings": "get_output_embeddings",
}


def hold_sizes(model: nn.Module) -> None:
    """Make every transformers model inside refuse to resize what carries adapters."""
    for _, module in walk(model):
        if hasattr(type(module), _RESIZE) and _adapted_tables(module):
            held = (partial(_resize, module), *(partial(_set, module, n) for n in _GETTERS))
            for name, function in zip((_RESIZE, *_GETTERS), held, strict=True):
                module.__dict__.setdefault(name, function)


def release_sizes(model: nn.Module) -> None:
    """Undo `hold_sizes`."""
    for _, module in walk(model):
        for name in (_RESIZE, *_GETTERS):
            if getattr(module.__dict__.get(name), "func", None) in (_resize, _set):
                del module.__dict__[name]


def _resize(
    model: nn.Module,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`resize_token_embeddings` of a model that is held: nothing may change its size."""
    for path, layer in _adapted_tables(model).items():
        rows = _rows(layer)
        size = rows if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of:
            size += -size % pad_to_multiple_of
        if size != rows:
            raise _refusal(path, layer, f"be resized from {rows} to {size} rows")
    resize: Callable[..., Any] = getattr(type(model), _RESIZE)
    return resize(model, new_num_tokens, pad_to_multiple_of, *args, **kwargs)


def _set(model: nn.Module, name: str, new: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`set_input_embeddings` or `set_output_embeddings` of a model that is held."""
    old = _part(model, _GETTERS[name])
    for path, layer in _adapted_tables(model).items():
        if layer is old and unwrapped(new) is not old:
            raise _refusal(path, layer, "be exchanged")
    return getattr(type(model), name)(model, new, *args, **kwargs)


def _refusal(path: str, layer: nn.Module, what: str) -> AdapterStateError:
    kind = layer.base_type if isinstance(layer, AdaptedLayer) else type(layer)
    return AdapterStateError(
        f"{path!r} ({kind.__name__}) carries adapters and would {what}: they would be lost, or fit "
        "no more. Resize the embeddings first and add adapters afterwards, or leave this module "
        "out of them (lora.target_modules, lora.modules_to_save, lora.trainable_token_indices)."
    )


def _adapted_tables(model: nn.Module) -> dict[str, nn.Module]:
    """The embeddings and heads of all transformers models inside that carry adapters, by path."""
    tables = list(_tables(model))
    weights = {id(table._parameters.get("weight")) for table in tables} - {id(None)}
    biases = {id(record.parameter(module)) for _, module, record in trained_biases(model)}
    found = {}
    for path, module in walk(model):
        shared = id(module._parameters.get("weight")) in weights
        carries = isinstance(module, AdaptedLayer) and len(module.adapters) > 0
        carries |= id(module._parameters.get("bias")) in biases
        if carries and (shared or any(module is table for table in tables)):
            found[path] = module
    return found


def _tables(model: nn.Module) -> Iterator[nn.Module]:
    for _, module in walk(model):
        for getter in _GETTERS.values():
            part = _part(module, getter)
            if part is not None:
                yield part


def _part(module: nn.Module, getter: str) -> nn.Module | None:
    if not (hasattr(type(module), getter) and hasattr(module, "base_model_prefix")):
        return None
    try:
        part = unwrapped(getattr(module, getter)())
    except NotImplementedError:  # a model that has none, of images say
        return None
    return part if isinstance(part, nn.Module) else None


def _rows(table: nn.Module) -> int:
    weight = table._parameters.get("weight")
    if weight is not None:
        return len(weight)
    return int(getattr(table, "num_embeddings", getattr(table, "out_features", 0)))
