"""Names of modules, as messages about targets list them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import nn

from lora_lightning.errors import did_you_mean
from lora_lightning.layers.registry import SUPPORTED, layer_type_for


def near(name: str, modules: Iterable[str]) -> str:
    """The name nearest to `name`, as the end of a sentence; empty where nothing is near."""
    paths = list(modules)
    last_parts = Counter(path.rpartition(".")[2] for path in paths)
    near = did_you_mean(name.rpartition(".")[2], last_parts) or did_you_mean(name, paths)
    if near is None:
        return ""
    count = last_parts.get(near, 1)
    return f" -> did you mean {near!r} ({count} {'module' if count == 1 else 'modules'})?"


def linear_names(modules: dict[str, nn.Module]) -> str:
    """The last parts of the paths of all adaptable modules, with how often each occurs."""
    names = Counter(
        path.rpartition(".")[2] for path, module in modules.items() if layer_type_for(module)
    )
    if not names:
        return f"This model has no module of an adaptable kind ({SUPPORTED})."
    return f"Adaptable names in this model: {_counts(names)}"


def kinds_in(modules: dict[str, nn.Module]) -> str:
    """The classes of all modules that have parameters, with how often each occurs."""
    kinds = Counter(
        type(m).__name__
        for m in modules.values()
        if next(m.parameters(recurse=False), None) is not None
    )
    if not kinds:
        return "the model has no parameters yet"
    return f"the model's modules with parameters are {_counts(kinds)}"


def _counts(names: Counter[str]) -> str:
    return ", ".join(f"{name} x{count}" for name, count in names.items())
