"""What the tensors of a PEFT file say about which modules they belong to.

The names in adapter_config.json are rules; the tensors are facts. So a folder is loaded onto
exactly the modules that it holds tensors for.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lora_lightning.config import AdapterConfig
from lora_lightning.errors import AdapterMismatchError, did_you_mean, first_few
from lora_lightning.hosts import host_type_for
from lora_lightning.hosts.base import walk
from lora_lightning.peft_keys import PREFIX

_ROWS = "trainable_tokens_delta"


@dataclass
class FileContent:
    """What a file of tensors holds, for one model.

    Attributes:
        config: The options, narrowed to the modules that the file holds tensors for.
        own: Key of the adapter's tensor (as in `peft_keys`) by key in the file.
        of_base: Name of the base model's tensor by key in the file, where PEFT saved one along.

    """

    config: AdapterConfig
    own: dict[str, str] = field(default_factory=dict)
    of_base: dict[str, str] = field(default_factory=dict)


def content_of_file(
    model: nn.Module, config: AdapterConfig, keys: Iterable[str], where: str
) -> FileContent:
    """What belongs where, of a file with these keys.

    Raises:
        AdapterMismatchError: If a tensor belongs to no module of `model`, or none to an adapter.

    """
    modules = {path: module for path, module in walk(model) if path}
    aliases = _aliases(model)
    targets: set[str] = set()
    saved: set[str] = set()
    tables: list[str] = []
    tied: dict[str, str] = {}  # path of the module by key of what may be tied to another
    lost: list[str] = []
    content = FileContent(config)
    for key in keys:
        if key in config.shared_file_keys:
            content.own[key] = key
            continue
        name = _canonical(key.removeprefix(PREFIX), aliases)
        path, tensor = _owner(name, modules)
        if path is None or not key.startswith(PREFIX):
            lost.append(name)
            continue
        content.own[key] = PREFIX + name
        outer = _saved_module(path, config)
        if tensor.removeprefix("token_adapter.") == _ROWS:
            tables += [path] if isinstance(modules[path], nn.Embedding) else []
            tied |= {} if isinstance(modules[path], nn.Embedding) else {key: path}
        elif tensor in _own_tensors(modules[path]):
            if outer is not None:
                saved.add(outer)
            elif not (config.bias != "none" and tensor == "bias"):
                content.of_base[key] = f"{path}.{tensor}"
                tied |= {} if ".base_layer." in key else {key: path}
        elif host_type_for(modules[path]) is not None:
            targets.add(path)
    if lost:
        near = did_you_mean(lost[0].rpartition(".lora")[0] or lost[0], modules)
        hint = f" Nearest module: {near!r}." if near else ""
        raise AdapterMismatchError(
            f"{where} holds tensors for modules that this model does not have: "
            f"{first_few(lost, 3)}.{hint} Is it an adapter of another model, or of one around or "
            "inside this one?"
        )
    if not (targets or tables):
        raise AdapterMismatchError(f"{where} holds no tensors of an adapter on any module.")
    for key, path in tied.items():
        # With tied weights PEFT saves the rows, or the copy, of both modules.
        for other in (*tables, *saved):
            if getattr(modules[other], "weight", None) is not modules[path].weight:
                continue
            if other in tables and key not in content.of_base:
                content.own[key] = f"{PREFIX}{other}.token_adapter.{_ROWS}"
            elif other in saved and key in content.of_base:
                del content.of_base[key]
                saved.add(path)
    for path in tables:
        content.own |= {
            key: f"{PREFIX}{path}.token_adapter.{_ROWS}"
            for key, name in content.own.items()
            if name == f"{PREFIX}{path}.{_ROWS}"
        }
    for key in content.of_base:
        del content.own[key]
    changes: dict[str, Any] = {
        "target_modules": exact_names(modules, targets),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": sorted(saved) or None,
    }
    return content
