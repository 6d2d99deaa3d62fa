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
from lora_lightning.checkpoint.peft.key_reading import Place, Reading, own_tensors, read_keys
from lora_lightning.checkpoint.peft.keys import PREFIX, TOKEN_ROWS
from lora_lightning.checkpoint.peft.relocation import moved_config
from lora_lightning.engine.targets.embeddings import input_embeddings
from lora_lightning.engine.targets.matching import matches_name
from lora_lightning.engine.targets.parameters import matching_parameters
from lora_lightning.errors import AdapterMismatchError
from lora_lightning.layers.registry import layer_type_for
from lora_lightning.layers.traversal import walk


class Origin(NamedTuple):
    """What a folder says of the model that it was written for.

    Attributes:
        made_for: Its path, where a module around it was saved.
        heads: Ends of the paths of modules that PEFT takes for trained copies in it.

    """

    made_for: str
    heads: tuple[str, ...]


@dataclass
class FileContent:
    """Contents of a file of tensors, for one model.

    Attributes:
        config: The options, narrowed to the modules that the file holds tensors for.
        own: Key of the adapter's tensor (as in `peft_keys`) by key in the file. Of tied modules,
            and of modules with two names, the file may hold a tensor twice.
        of_base: Name of the base model's tensor by key in the file, where PEFT saved one along.
        adds_twice: Whether B of out_proj in an attention stands for half of it.
        of_peft: Whether its type is one of PEFT's, so that it means what PEFT computes from it.

    """

    config: AdapterConfig
    own: dict[str, str] = field(default_factory=dict)
    of_base: dict[str, str] = field(default_factory=dict)
    adds_twice: bool = False
    of_peft: bool = False


def content_of_file(
    model: nn.Module,
    config: AdapterConfig,
    keys: Collection[str],
    unchanged: Callable[[str, str], bool],
    origin: Origin,
    where: str,
) -> FileContent:
    """Find the place of every tensor of a file with these keys.

    Args:
        model, config, keys: The model that the file is for, its options, its tensors' names.
        unchanged: Whether what the file has under a key is the base's tensor of a name.
        origin: The model that the file was written for.
        where: The file, for messages.

    Raises:
        AdapterMismatchError: If a tensor belongs to no module of `model`, or none to an adapter.

    """
    reading = read_keys(model, keys, config.shared_file_keys, origin.made_for, where)
    modules, places, outside = reading.modules, reading.places, reading.outside
    tables = _tables(modules, places)
    ends = (*(config.modules_to_save or ()), *origin.heads)
    saved = _trained_in_full(reading, config, ends, unchanged)
    content = FileContent(config, dict(reading.shared))
    adapted = {p for _, p, tensor in places.values() if tensor not in own_tensors(modules[p])}
    targets: set[str] = set()
    for key, (name, path, tensor) in places.items():
        copied = _saved_module(path, ends) in saved
        own = PREFIX + outside(name.removeprefix(PREFIX))
        if _is_rows(tensor):
            table = path if path in tables else _tied(modules, path, tables)
            content.own[key] = f"{PREFIX}{outside(table or path)}.{TOKEN_ROWS}"
        elif tensor not in own_tensors(modules[path]):
            content.own[key] = own
            if layer_type_for(modules[path]) is not None and not copied:
                targets.add(path)
        elif copied or (tensor == "bias" and _trains_bias(config, path in adapted)):
            content.own[key] = own
        elif ".base_layer." not in key and _tied(modules, path, saved):
            content.own[key] = own  # PEFT's ensure_weight_tying saves the copies of both
            saved.add(path)
        else:
            content.of_base[key] = outside(f"{path}.{tensor}")
    parameters = matching_parameters(modules, getattr(config, "target_parameters", None) or ())
    targets -= {path for path, _ in parameters.values()}
    if not (targets or tables or parameters):
        raise AdapterMismatchError(f"{where} holds no tensors of an adapter.")
    config = dataclasses.replace(config, **_fitting_patterns(config, [*targets, *parameters]))
    config = moved_config(config, {p: outside(p) for p in (*targets, *parameters, *tables)})
    around = {path: module for path, module in walk(model) if path}
    changes = _selecting(around, set(map(outside, targets)))
    changes["modules_to_save"] = sorted(map(outside, saved)) or None
    ids = getattr(config, "trainable_token_indices", None)
    rows = sorted(map(outside, tables))
    if isinstance(ids, list) and set(rows) != set(input_embeddings(model)):
        changes["trainable_token_indices"] = dict.fromkeys(rows, ids) or None
    content.config = dataclasses.replace(config, **changes)
    return content


def _trained_in_full(
    reading: Reading,
    config: AdapterConfig,
    ends: tuple[str, ...],
    unchanged: Callable[[str, str], bool],
) -> set[str]:
    """The modules that the file holds as a whole because they were trained.

    PEFT copies more than what has the name, and may not have trained it.
    """
    saved = set()
    for key, (_, path, tensor) in reading.places.items():
        outer = _saved_module(path, ends)
        if tensor in own_tensors(reading.modules[path]) and outer:
            named = any(matches_name(name, outer) for name in config.modules_to_save or ())
            bias = tensor == "bias" and _trains_bias(config, False)
            if named or not (bias or unchanged(key, reading.outside(f"{path}.{tensor}"))):
                saved.add(outer)
    return saved


def _trains_bias(config: AdapterConfig, is_adapted: bool) -> bool:
    """Tell whether the option `bias` has a module's bias train, in a model of PEFT's."""
    return config.bias == "all" or (config.bias != "none" and is_adapted)


def _tables(modules: dict[str, nn.Module], places: dict[str, Place]) -> set[str]:
    """The modules whose rows the file holds; of those that share a weight, the embedding."""
    with_rows = {
        path
        for _, path, tensor in places.values()
        if _is_rows(tensor) and tensor not in own_tensors(modules[path])
    }
    tables = {path for path in with_rows if isinstance(modules[path], nn.Embedding)}
    heads = {path for path in with_rows - tables if isinstance(modules[path], nn.Linear)}
    return tables | {path for path in heads if _tied(modules, path, tables) is None}


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


def _is_rows(tensor: str) -> bool:
    return tensor == TOKEN_ROWS or tensor == TOKEN_ROWS.partition(".")[2]


def _saved_module(path: str, ends: tuple[str, ...]) -> str:
    """The module around `path` that PEFT takes for a trained copy by its path's end; or ""."""
    parts = path.split(".")
    outer = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
    return next((module for module in outer if module.endswith(ends)), "") if ends else ""


def _tied(modules: dict[str, nn.Module], path: str, others: Iterable[str]) -> str | None:
    """The one of `others` that shares its weight with the module at `path`."""
    weight = modules[path]._parameters.get("weight")
    shared = (p for p in sorted(others) if modules[p]._parameters.get("weight") is weight)
    return next(shared, None) if weight is not None else None


def _fitting_patterns(config: AdapterConfig, paths: list[str]) -> dict[str, Any]:
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
