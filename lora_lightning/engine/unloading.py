"""Take all adapters off a model: as if they had never been, or made part of it for good."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lora_lightning.engine.bias import trained_biases
from lora_lightning.engine.injection import delete_adapter
from lora_lightning.engine.merging import check_mergeable, merge_adapter, unmerge_adapter
from lora_lightning.engine.switching import active_adapters, adapter_names, set_adapter
from lora_lightning.errors import AdapterStateError
from lora_lightning.layers.conversion import check_detachable
from lora_lightning.layers.traversal import named_adapted_layers


def merge_and_unload(model: nn.Module, names: str | Sequence[str] | None = None) -> nn.Module:
    """Make the active adapters part of the base for good and take all adapters off.

    Returns:
        `model`, with the classes and parameter names it had before any adapter.

    Raises:
        AdapterStateError: As `merge_adapter`; nothing is changed then.

    """
    for path, layer in named_adapted_layers(model):
        check_detachable(layer, path)
    before = active_adapters(model)
    trained = [(p, p.requires_grad) for p in model.parameters()]
    if names is not None:
        set_adapter(model, names)
    try:
        check_mergeable(model)
        merge_adapter(model)
    except AdapterStateError:
        if names is not None:
            set_adapter(model, before)
            for parameter, required in trained:
                parameter.requires_grad_(required)
        raise
    for _, layer in list(named_adapted_layers(model)):
        layer.forget_originals()
        layer.keep_trained()
    for _, module, record in list(trained_biases(model)):
        record.hidden = record.parameter(module).detach().clone()
    return unload(model)


def unload(model: nn.Module) -> nn.Module:
    """Take all adapters off; the model is its base model again, bit for bit.

    Returns:
        `model`.

    """
    for path, layer in named_adapted_layers(model):
        check_detachable(layer, path)
    unmerge_adapter(model)
    for name in adapter_names(model):
        delete_adapter(model, name)
    return model
