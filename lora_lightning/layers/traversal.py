"""Find the layers of a model that carry adapters."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lora_lightning.adapters.base import AdapterDict
from lora_lightning.adapters.modules_to_save import HeldTensors
from lora_lightning.layers.base import AdaptedLayer
from lora_lightning.utilities.wrappers import WRAPPED, is_wrapper, plain_name


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` without the inside of adapters and torch.compile's wrappers."""
    seen: set[nn.Module] = set()
    ahead: list[tuple[str, nn.Module]] = [("", model)]
    while ahead:
        path, module = ahead.pop()
        if module in seen or isinstance(module, (AdapterDict, HeldTensors)):
            continue
        seen.add(module)
        if not is_wrapper(module):
            yield path, module
        below = path + "." if path else ""
        children = [(n, child) for n, child in module._modules.items() if child is not None]
        for name, child in reversed(children):
            ahead.append((path if name in WRAPPED else below + name, child))


def named_adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """Every module of `model` that carries adapters, by path."""
    for path, module in walk(model):
        if isinstance(module, AdaptedLayer):
            yield path, module


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """`model.named_parameters()` by plain names, those of adapters as state dicts name them.

    What trains in the base's own places (`modules_to_save`) is no tensor of the base.
    """
    owned = {
        id(p): ".".join(filter(None, (path, "adapters", name)))
        for path, layer in named_adapted_layers(model)
        for name, p in layer.adapters.named_parameters()
    }
    for name, parameter in model.named_parameters():
        yield plain_name(owned.get(id(parameter), name)), parameter


def adapter_owners(model: nn.Module) -> dict[int, str]:
    """Path of the layer by `id` of every parameter that its adapters own."""
    return {
        id(p): path
        for path, layer in named_adapted_layers(model)
        for p in layer.adapters.parameters()
    }
