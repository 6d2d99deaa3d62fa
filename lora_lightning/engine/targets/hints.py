"""Names of modules, as messages about targets list them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import nn

from lora_lightning.errors import did_you_mean
from lora_lightning.layers.registry import SUPPORTED, layer_type_for


def near(name: str, paths: Iterable[str]) -> str:
    """The name nearest to `name`, as the end of a sentence; empty where nothing else is near."""
    paths = [path for path in paths if path != name]
    names = Counter(shown_name(path) for path in paths)
    del names[name]  # it is there, and not what is wanted
    near = did_you_mean(shown_name(name), names) or did_you_mean(name, paths)
    if near is None:
        return ""
    count = names.get(near, 1)
    return f" -> did you mean {near!r} ({count} {'module' if count == 1 else 'modules'})?"


def adaptable(modules: dict[str, nn.Module]) -> list[str]:
    """The paths of the modules that an adapter can sit on."""
    return [path for path, module in modules.items() if layer_type_for(module)]


def linear_names(modules: dict[str, nn.Module]) -> str:
    """The names of all adaptable modules as one would type them, with how often each occurs."""
    names = Counter(map(shown_name, adaptable(modules)))
    if not names:
        return f"This model has no module of an adaptable kind ({SUPPORTED})."
    return f"Adaptable names in this model: {_counts(names)}"


def shown_name(path: str) -> str:
    """The last part of a path; where that is only a number (Sequential), with what it counts in."""
    parts = path.split(".")
    named = [index for index, part in enumerate(parts) if not part.isdigit()]
    return ".".join(parts[named[-1] if named else 0 :])


def kinds_in(model: nn.Module, modules: dict[str, nn.Module]) -> str:
    """The classes of all modules in a model that have parameters, with how often each occurs."""
    if not any(True for _ in model.children()) and any(True for _ in model.parameters()):
        return (
            f"it is a single {type(model).__name__}, and adapters go on layers inside of what they "
            "are put on. Give what holds it instead, and its name in target_modules"
        )
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
