"""PEFT's rules (0.21.2: `check_target_module_exists`, `get_pattern_key`) of what a name selects."""

from __future__ import annotations

import re

from lora_lightning.adapters.config import AdapterConfig


def matches_name(name: str, path: str) -> bool:
    """A listed name selects a module by its whole path or by the last part(s) of it."""
    return path == name or path.endswith("." + name)


def matches_target(config: AdapterConfig, path: str) -> bool:
    """True if `target_modules` (with `layers_to_transform`) selects `path`."""
    targets = config.target_modules or []
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    if path in targets:  # a whole path overrules the layer filter, as in PEFT
        return True
    if not any(path.endswith("." + target) for target in targets):
        return False
    wanted = wanted_layers(config)
    return not wanted or layer_index(config, path) in wanted


def layer_index(config: AdapterConfig, path: str) -> int | None:
    """The index that `layers_to_transform` counts: the first number in `path` after a name."""
    names = config.layers_pattern or []
    lists = [rf"(?:^|.*?\.){name}" for name in ([names] if isinstance(names, str) else names)]
    for expression in lists or [r".*?\.[^.]*"]:
        match = re.match(rf"{expression}\.(?P<index>\d+)\.", path)
        if match:
            return int(match["index"])
    return None


def is_excluded(config: AdapterConfig, path: str) -> bool:
    """True if `exclude_modules` or `modules_to_save` takes `path` out of the targets."""
    excluded = config.exclude_modules
    if isinstance(excluded, str):
        if re.fullmatch(excluded, path):
            return True
    elif excluded and any(matches_name(name, path) for name in excluded):
        return True
    return any(
        re.match(rf"(^|.*\.){saved}($|\..*)", path) for saved in config.modules_to_save or ()
    )


def wanted_layers(config: AdapterConfig) -> list[int]:
    """The indices in `layers_to_transform`."""
    layers = config.layers_to_transform
    return [layers] if isinstance(layers, int) else list(layers or ())
