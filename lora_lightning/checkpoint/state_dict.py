"""Adapter state in and out of a model, and what a checkpoint says about it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_lightning.checkpoint.compatibility import tensor_differences
from lora_lightning.engine.bias import trained_biases
from lora_lightning.engine.switching import check_known, layers_with
from lora_lightning.errors import AdapterMismatchError, AdapterStateError
from lora_lightning.layers.traversal import named_adapted_layers
from lora_lightning.utilities.wrappers import plain_name

KEY = "lora_lightning"  # under which a Lightning checkpoint says whose adapters it holds
FORMAT = 1  # of what it says there
# Under which a LightningModule without hyperparameters says how it is made again.
OPTIONS = "module_options"
TASK = "lora_lightning_task"  # the class of one that this library has


def adapter_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """The tensors of one adapter, by module path and tensor name, without the adapter's name.

    Returns:
        {"encoder.query.lora_A": (r, in), "encoder.query.lora_B": (out, r), ...}; trained copies
        and biases under the names they have in the base ("head.weight"). The tensors are the
        model's own, detached.

    Raises:
        AdapterStateError: If the model has no adapter of that name.

    """
    return {short: tensor for short, _, tensor in _tensors(model, adapter_name)}


def load_adapter_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], adapter_name: str = "default"
) -> None:
    """Copy `state` (as `adapter_state_dict` gives it) into an adapter that is on the model.

    Raises:
        AdapterMismatchError: If a tensor is missing, left over or of another shape. Nothing is
            loaded then.
        AdapterStateError: If there is no such adapter, or it is merged.

    """
    own = adapter_state_dict(model, adapter_name)
    if any(adapter_name in layer.merged_adapters for _, layer in named_adapted_layers(model)):
        raise AdapterStateError(
            f"Adapter {adapter_name!r} is merged into the base, where other values would not act; "
            "call unmerge_adapter(model) first."
        )
    differences = tensor_differences(
        {name: list(tensor.shape) for name, tensor in state.items()},
        {name: list(tensor.shape) for name, tensor in own.items()},
    )
    if differences:
        raise AdapterMismatchError(
            f"This state does not fit adapter {adapter_name!r}:\n  " + "\n  ".join(differences)
        )
    materialize(model, adapter_name)
    with torch.no_grad():
        for name, tensor in adapter_state_dict(model, adapter_name).items():
            tensor.copy_(state[name])


def materialize(model: nn.Module, adapter_name: str) -> None:
    """Give an adapter that was made on the meta device memory beside its module's own weights."""
    for path, layer in layers_with(model, adapter_name):
        adapter = layer.adapters[adapter_name]
        if not any(t.is_meta for t in (*adapter.parameters(), *adapter.buffers())):
            continue
        device = layer.compute_device()
        if device.type == "meta":
            raise AdapterMismatchError(
                f"The base weight of {path!r} is on the meta device: load the base model before "
                "its adapters."
            )
        # Not `to_empty`: what is not in files (buffers of trained copies) has its values already.
        adapter._apply(  # type: ignore[no-untyped-call]
            lambda t, to=device: torch.empty_like(t, device=to) if t.is_meta else t
        )
        adapter.reset_parameters()
        if layer.trains_in_place:
            layer.show_active()


def saved_keys(model: nn.Module, adapter_name: str) -> dict[str, list[int]]:
    """Key in `model.state_dict()` and shape of every tensor that belongs to an adapter."""
    return {key: list(tensor.shape) for _, key, tensor in _tensors(model, adapter_name)}


def _tensors(model: nn.Module, adapter_name: str) -> list[tuple[str, str, Tensor]]:
    """(short name, key in the model's state dict, tensor) of everything an adapter owns."""
    check_known(model, adapter_name)
    found = []
    for path, layer in layers_with(model, adapter_name):
        adapter, copies = layer.adapters[adapter_name], layer.trained_copies()
        prefix = path + "." if path else ""
        for name, tensor in adapter.state_dict().items():
            name = plain_name(name)
            short = name.removeprefix("module.") if adapter_name in copies else name
            found.append((prefix + short, f"{prefix}adapters.{adapter_name}.{name}", tensor))
    for name, module, record in trained_biases(model, adapter_name):
        found.append((name, name, record.trained(module).detach()))
    return found
