"""`save_pretrained` of a model that carries adapters writes what the model computes.

transformers and diffusers write a model's state dict, and their `from_pretrained` passes over names
that it does not know. So what adapters and trained copies have learnt would be lost. While adapters
are on, the method is held, on the instance: it writes the weights with the active adapters in them,
under the names of the base, and the model is afterwards as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from lora_lightning.engine.merging import check_mergeable, merge_adapter
from lora_lightning.errors import AdapterStateError
from lora_lightning.layers.traversal import named_adapted_layers, named_parameters, walk
from lora_lightning.utilities.dtensor import is_sharded
from lora_lightning.utilities.is_a import is_a

_METHOD = "save_pretrained"


def hold_saving(model: nn.Module) -> None:
    """Have every model inside that has the method, and carries adapters, write all of itself."""
    for _, module in walk(model):
        if _writes_state(module) and any(True for _ in named_adapted_layers(module)):
            module.__dict__.setdefault(_METHOD, partial(_save, module))


def release_saving(model: nn.Module) -> None:
    """Undo `hold_saving`."""
    for _, module in walk(model):
        if getattr(module.__dict__.get(_METHOD), "func", None) is _save:
            del module.__dict__[_METHOD]


def _writes_state(module: nn.Module) -> bool:
    """Tell whether the method is that of transformers, diffusers or huggingface_hub."""
    return hasattr(type(module), _METHOD) and is_a(
        module, "PreTrainedModel", "ModelMixin", "PyTorchModelHubMixin"
    )


def _save(model: Any, *args: Any, **kwargs: Any) -> Any:
    save = getattr(type(model), _METHOD)
    if kwargs.get("state_dict") is not None:
        return save(model, *args, **kwargs)
    with _merged(model):
        state = _plain_state(model)
        model.__dict__["state_dict"] = lambda *args, **kwargs: state
        try:
            return save(model, *args, **kwargs)
        finally:
            del model.__dict__["state_dict"]


@contextmanager
def _merged(model: nn.Module) -> Iterator[None]:
    """Inside, the active adapters are in the weights; in `disable_adapter` there are none."""
    layers = [(layer, [*layer.merged_adapters]) for _, layer in named_adapted_layers(model)]
    try:
        if any(is_sharded(parameter) for _, parameter in named_parameters(model)):
            raise AdapterStateError("Its weights are spread over several processes.")
        if all(layer.adapters_enabled for layer, _ in layers):
            check_mergeable(model)
            merge_adapter(model)
    except AdapterStateError as error:
        raise AdapterStateError(
            f"{_METHOD} cannot write this {type(model).__name__} with its adapters in it. {error} "
            "To write the adapter alone: lora_lightning.save_adapter(module, folder)."
        ) from error
    try:
        yield
    finally:
        for layer, merged in layers:
            if layer.merged_adapters != merged:
                layer.unmerge()
                layer.merge(merged)


def _plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict as it would be without adapters, with what trains in full."""
    layers = dict(named_adapted_layers(model))
    prefixes = tuple(f"{path}.adapters." if path else "adapters." for path in layers)
    state = {key: t for key, t in model.state_dict().items() if not key.startswith(prefixes)}
    for path, layer in layers.items():
        copy = layer.trained_copy() if layer.trains_in_place else None
        for name, tensor in copy.module.state_dict().items() if copy is not None else ():
            key = f"{path}.{name}" if path else name
            state[key] = tensor.to(state[key].dtype)
    return state
