"""What the tensors of a PEFT file say about which modules they belong to.

The names in adapter_config.json are rules; the tensors are facts. So a folder is loaded onto
exactly the modules that it holds tensors for.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from lora_lightning.config import AdapterConfig
from lora_lightning.errors import AdapterMismatchError, did_you_mean, first_few
from lora_lightning.hosts import host_type_for
from lora_lightning.hosts.base import walk
from lora_lightning.peft_keys import PREFIX
from lora_lightning.target_parameters import matching_parameters


def selection_of_file(
    model: nn.Module, config: AdapterConfig, keys: Iterable[str], where: str
) -> tuple[AdapterConfig, list[str]]:
    """(`config` narrowed to what the file holds, keys of base tensors that it holds as well).

    Raises:
        AdapterMismatchError: If a tensor belongs to no module of `model`.

    """
    modules = {path: module for path, module in walk(model) if path}
    targets: set[str] = set()
    saved: set[str] = set()
    copies_of_base: list[str] = []
    lost: list[str] = []
    for key in keys:
        if not key.startswith(PREFIX):
            if key in config.shared_file_keys:
                continue
            lost.append(key)
            continue
        name = key.removeprefix(PREFIX)
        path, tensor = _owner(name.replace(".base_layer", ""), modules)
        if path is None:
            lost.append(name)
        elif tensor in _own_tensors(modules[path]):
            outer = _saved_module(path, config)
            if outer is not None:
                saved.add(outer)
            elif not (config.bias != "none" and tensor == "bias"):
                copies_of_base.append(key)
        elif not tensor.startswith("token_adapter.") and host_type_for(modules[path]) is not None:
            targets.add(path)
    if lost:
        near = did_you_mean(lost[0].rpartition(".lora")[0] or lost[0], modules)
        hint = f" Nearest module: {near!r}." if near else ""
        raise AdapterMismatchError(
            f"{where} holds tensors for modules that this model does not have: "
            f"{first_few(lost, 3)}.{hint} Is it an adapter of another model, or of one around or "
            "inside this one?"
        )
    parameters = matching_parameters(modules, getattr(config, "target_parameters", None) or ())
    owners = {path for path, _ in parameters.values()}
    targets -= owners
    # An attention stands for its out_proj too, unless the file has nothing for that.
    outs = {f"{p}.out_proj" for p in targets if isinstance(modules[p], nn.MultiheadAttention)}
    changes: dict[str, Any] = {
        "target_modules": sorted(targets - outs),
        "exclude_modules": sorted(outs - targets) or None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": sorted(saved) or None,
    }
    for option in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(config, option, None)
        if pattern and all(isinstance(value, (int, float)) for value in pattern.values()):
            changes[option] = {  # entries for modules that are not in the file
                expression: value
                for expression, value in pattern.items()
                if any(
                    re.match(rf"(.*\.)?({expression})$", path) for path in (*targets, *parameters)
                )
            }
    return dataclasses.replace(config, **changes), copies_of_base


def _owner(name: str, modules: dict[str, nn.Module]) -> tuple[str | None, str]:
    """The deepest module whose path begins `name`, and the rest of the name."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        path = ".".join(parts[:length])
        if path in modules:
            return path, ".".join(parts[length:])
    return None, name


def _own_tensors(module: nn.Module) -> set[str]:
    return {
        *dict(module.named_parameters(recurse=False)),
        *dict(module.named_buffers(recurse=False)),
    }


def _saved_module(path: str, config: AdapterConfig) -> str | None:
    """The module that was saved in full: PEFT takes every path that ends with a listed name."""
    parts = path.split(".")
    for length in range(1, len(parts) + 1):
        outer = ".".join(parts[:length])
        if any(outer.endswith(name) for name in config.modules_to_save or ()):
            return outer
    return None
