"""Modules that the tensors of a PEFT file belong to.

The names in adapter_config.json are rules; the tensors are facts. So a folder is loaded onto
exactly the modules that it holds tensors for.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from lora_lightning.adapters.config import SELECTION, AdapterConfig
from lora_lightning.checkpoint.peft.keys import PREFIX, TOKEN_ROWS
from lora_lightning.engine.targets.embeddings import input_embeddings
from lora_lightning.engine.targets.matching import matches_name
from lora_lightning.engine.targets.parameters import matching_parameters
from lora_lightning.errors import AdapterMismatchError, did_you_mean, first_few
from lora_lightning.layers.registry import layer_type_for
from lora_lightning.layers.traversal import walk


@dataclass
class FileContent:
    """Contents of a file of tensors, for one model.

    Attributes:
        config: The options, narrowed to the modules that the file holds tensors for.
        own: Key of the adapter's tensor (as in `peft_keys`) by key in the file. Of tied modules,
            and of modules with two names, the file may hold a tensor twice.
        of_base: Name of the base model's tensor by key in the file, where PEFT saved one along.
        adds_twice: Whether B of out_proj in an attention stands for half of it.

    """

    config: AdapterConfig
    own: dict[str, str] = field(default_factory=dict)
    of_base: dict[str, str] = field(default_factory=dict)
    adds_twice: bool = False


class _Place(NamedTuple):
    key: str  # in the file, and with the first name of every module
    path: str  # of the module
    tensor: str  # its name in the module


def content_of_file(
    model: nn.Module,
    config: AdapterConfig,
    keys: Collection[str],
    unchanged: Callable[[str, str], bool],
    where: str,
) -> FileContent:
    """Find the place of every tensor of a file with these keys.

    Args:
        model, config, keys: The model that the file is for, its options, its tensors' names.
        unchanged: Whether what the file has under a key is the base's tensor of a name.
        where: The file, for messages.

    Raises:
        AdapterMismatchError: If a tensor belongs to no module of `model`, or none to an adapter.

    """
    modules = {path: module for path, module in walk(model) if path}
    shared = config.shared_file_keys.intersection(keys)
    places = _places(model, modules, [key for key in keys if key not in shared], where)
    tables = {
        place.path
        for place in places.values()
        if _is_rows(place.tensor)
        and isinstance(modules[place.path], nn.Embedding)
        and place.tensor not in _own_tensors(modules[place.path])
    }
    saved = _saved_modules(modules, places, config, unchanged)
    content = FileContent(config, {key: key for key in shared})
    targets: set[str] = set()
    for key, (name, path, tensor) in places.items():
        copied = _saved_module(path, config)[0] in saved
        if _is_rows(tensor):
            table = path if path in tables else _tied(modules, path, tables)
            content.own[key] = f"{PREFIX}{table or path}.{TOKEN_ROWS}"
        elif tensor not in _own_tensors(modules[path]):
            content.own[key] = name
            if layer_type_for(modules[path]) is not None and not copied:
                targets.add(path)
        elif copied or (config.bias != "none" and tensor == "bias"):
            content.own[key] = name
        elif ".base_layer." not in key and _tied(modules, path, saved):
            content.own[key] = name  # PEFT's ensure_weight_tying saves the copies of both
            saved.add(path)
        else:
            content.of_base[key] = f"{path}.{tensor}"
    parameters = matching_parameters(modules, getattr(config, "target_parameters", None) or ())
    targets -= {path for path, _ in parameters.values()}
    if not (targets or tables or parameters):
        raise AdapterMismatchError(f"{where} holds no tensors of an adapter.")
    changes = {**_selecting(modules, targets), "modules_to_save": sorted(saved) or None}
    ids = getattr(config, "trainable_token_indices", None)
    if isinstance(ids, list) and tables != set(input_embeddings(model)):
        changes["trainable_token_indices"] = dict.fromkeys(sorted(tables), ids) or None
    changes |= _fitting_patterns(config, [*targets, *parameters])
    content.config = dataclasses.replace(config, **changes)
    return content


def _saved_modules(
    modules: dict[str, nn.Module],
    places: dict[str, _Place],
    config: AdapterConfig,
    unchanged: Callable[[str, str], bool],
) -> set[str]:
    saved = set()
    for key, (_, path, tensor) in places.items():
        if tensor in _own_tensors(modules[path]):
            outer, named = _saved_module(path, config)
            # PEFT copies more than what has the name, and may not have trained it.
            if outer and (named or not unchanged(key, f"{path}.{tensor}")):
                saved.add(outer)
    return saved


def _selecting(modules: dict[str, nn.Module], targets: set[str]) -> dict[str, Any]:
    # An attention stands for its out_proj too, unless the file has nothing for that.
    outs = {f"{p}.out_proj" for p in targets if isinstance(modules[p], nn.MultiheadAttention)}
    return {
        **dict.fromkeys(SELECTION),
        "target_modules": exact_names(modules, targets - outs),
        "exclude_modules": exact_names(modules, outs - targets) or None,
    }


def exact_names(paths: Iterable[str], wanted: set[str]) -> list[str] | str:
    """Value of `target_modules` that selects exactly `wanted`, a part of `paths`.

    The last parts of the paths if these select nothing else (what other programs, vLLM and
    llama.cpp, look at), else whole paths, else a regular expression: a whole path as a name also
    selects every longer one that ends with it.
    """
    by_last = defaultdict(set)
    for path in paths:
        by_last[path.rpartition(".")[2]].add(path)
    names = set()
    for path in wanted:
        last = path.rpartition(".")[2]
        names.add(last if by_last[last] <= wanted and not last.isdigit() else path)
    endings = tuple("." + name for name in names)
    others = set().union(*by_last.values()) - wanted
    if any(path.endswith(endings) for path in others):
        return "|".join(re.escape(path) for path in sorted(wanted))
    return sorted(names)


def _places(
    model: nn.Module, modules: dict[str, nn.Module], keys: Iterable[str], where: str
) -> dict[str, _Place]:
    first_names = {id(module): path for path, module in modules.items()}
    aliases = {
        alias: first_names[id(module)]
        for alias, module in model.named_modules(remove_duplicate=False)
        if first_names.get(id(module), alias) != alias
    }
    places: dict[str, _Place] = {}
    lost: list[str] = []
    for key in keys:
        name = _with_first_names(key.removeprefix(PREFIX), aliases)
        path, tensor = _owner(name, modules)
        here = path in modules and _may_hold(modules[path], tensor)
        if here and key.startswith(PREFIX):
            places[key] = _Place(PREFIX + name, path, tensor)
        else:
            lost.append(key)
    if lost:
        name = lost[0].removeprefix(PREFIX)
        near = did_you_mean(name.rpartition(".lora")[0] or name, modules)
        hint = f" Nearest module: {near!r}." if near else ""
        raise AdapterMismatchError(
            f"{where} holds tensors for modules that this model does not have: "
            f"{first_few(lost, 3)}.{hint} Is it an adapter of another model, or of one around or "
            "inside this one?"
        )
    return places


def _with_first_names(name: str, aliases: dict[str, str]) -> str:
    """`name` with the path that `walk` gives to a module that has several."""
    parts = name.split(".")
    for length in range(len(parts) if aliases else 0, 0, -1):
        path = aliases.get(".".join(parts[:length]))
        if path is not None:
            return ".".join([path, *parts[length:]])
    return name


def _owner(name: str, modules: dict[str, nn.Module]) -> tuple[str, str]:
    """(the deepest module whose path begins `name`, the rest of it); PEFT's wrappers left out."""
    parts = name.split(".")
    path = ""
    for i, part in enumerate(parts):
        inner = f"{path}.{part}" if path else part
        if inner in modules:
            path = inner
        elif part != "base_layer":
            return path, ".".join(parts[i:])
    return path, ""


def _may_hold(module: nn.Module, tensor: str) -> bool:
    """True if `tensor` can be a name below `module` itself, and not below a child that is missing.

    Adapters' tensors have names of one or two parts, behind that of one of several weights.
    """
    first, _, rest = tensor.partition(".")
    name = rest if rest and first in _own_tensors(module) else tensor
    return bool(name) and name.count(".") < 2


def _own_tensors(module: nn.Module) -> set[str]:
    return {*module._parameters, *module._buffers}


def _is_rows(tensor: str) -> bool:
    return tensor == TOKEN_ROWS or tensor == TOKEN_ROWS.partition(".")[2]


def _saved_module(path: str, config: AdapterConfig) -> tuple[str, bool]:
    """(the module around `path` that was saved in full, whether it was listed by its name).

    PEFT also takes every path that merely ends with a listed name.
    """
    parts = path.split(".")
    for length in range(1, len(parts) + 1):
        outer = ".".join(parts[:length])
        fitting = [name for name in config.modules_to_save or () if outer.endswith(name)]
        if fitting:
            return outer, any(matches_name(name, outer) for name in fitting)
    return "", False


def _tied(modules: dict[str, nn.Module], path: str, others: Iterable[str]) -> str | None:
    """The one of `others` that shares its weight with the module at `path`."""
    weight = getattr(modules[path], "weight", None)
    shared = (p for p in sorted(others) if getattr(modules[p], "weight", None) is weight)
    return next(shared, None) if weight is not None else None


def _fitting_patterns(config: AdapterConfig, paths: list[str]) -> dict[str, dict[str, float]]:
    """Rank and alpha patterns without the entries for modules that are not in the file."""
    fitting: dict[str, dict[str, float]] = {}
    for option in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(config, option, None)
        if not pattern or not all(isinstance(value, (int, float)) for value in pattern.values()):
            continue
        fitting[option] = {}
        for expression, value in pattern.items():
            fits = re.compile(rf"(.*\.)?({expression})$").match  # once: a file may list very many
            if any(fits(path) for path in paths):
                fitting[option][expression] = value
    return fitting
