"""Which modules an adapter's options select: PEFT's matching rules, but nothing in silence.

The rules are PEFT 0.21.2's (`check_target_module_exists`, `get_pattern_key`). What differs is
what happens to a name that selects nothing: there it is dropped, here it is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch
from torch import nn

from lora_lightning.adapters import classes_for
from lora_lightning.config import ALL_LINEAR, AdapterConfig
from lora_lightning.embeddings import input_embeddings, output_heads
from lora_lightning.errors import TargetError, first_few
from lora_lightning.hosts import SUPPORTED, host_type_for
from lora_lightning.hosts.attention import attention_obstacle
from lora_lightning.hosts.base import walk
from lora_lightning.hosts.conv1d import is_conv1d
from lora_lightning.hosts.growing import check_can_grow
from lora_lightning.target_names import kinds_in, linear_names, near, top_names
from lora_lightning.target_parameters import select_parameters


@dataclass
class Selection:
    """What a config selects on a model.

    Attributes:
        targets: Modules to adapt, by path.
        parameters: Of the targets that are adapted by parameter (`target_parameters`), the names
            of those parameters, by path.
        saved: Modules to train as a copy (`modules_to_save`), by path.
        left_out: Output heads that "all-linear" leaves alone.
        along: Path of the attention by path of every `out_proj` that is adapted along with it.
        tokens: Ids of the tokens whose rows train, by path of the embedding.
        tied: Path of the embedding by path of every head that shares its weight.

    """

    targets: dict[str, nn.Module] = field(default_factory=dict)
    parameters: dict[str, list[str]] = field(default_factory=dict)
    saved: dict[str, nn.Module] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    along: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)


def select_modules(model: nn.Module, config: AdapterConfig) -> Selection:
    """The modules of `model` that `config` selects.

    Raises:
        TargetError: If a name, expression or index selects nothing, or a module of a kind that
            cannot be adapted.

    """
    modules = {path: module for path, module in walk(model) if path}
    obstacles = _attention_obstacles(model)
    selection = Selection(saved=_select_saved(modules, config, obstacles))
    _select_tokens(model, modules, config, selection)
    if not config.target_modules:
        pass  # only tokens or parameters train
    elif config.target_modules == ALL_LINEAR:
        heads = output_heads(model)
        for path, module in modules.items():
            if not (isinstance(module, nn.Linear) or is_conv1d(module)):
                continue
            if path in obstacles:
                continue
            if any(path == head or path.startswith(head + ".") for head in heads):
                selection.left_out.append(path)
            elif not is_excluded(config, path):
                selection.targets[path] = module
        if not selection.targets:
            raise TargetError(
                f"target_modules 'all-linear' matched nothing: {kinds_in(modules)}. "
                f"Adaptable kinds: {SUPPORTED}; name modules explicitly. (lora.target_modules)"
            )
    else:
        selection.targets = {
            path: module
            for path, module in modules.items()
            if not is_excluded(config, path) and matches_target(config, path)
        }
        _check_every_target_matched(modules, selection.targets, config)
        _add_output_projections(modules, config, selection)
    _check_every_exclusion_matched(modules, config)
    _check_every_layer_matched(selection.targets, config)
    wanted = getattr(config, "target_parameters", None) or []
    selection.parameters = select_parameters(modules, wanted, selection.targets, selection.saved)
    parameters = [f"{path}.{n}" for path, names in selection.parameters.items() for n in names]
    _check_every_pattern_matched([*selection.targets, *parameters], config)
    for path in selection.targets.keys() & {*selection.tokens, *selection.tied}:
        raise TargetError(
            f"{path!r} is adapted as a whole (target_modules) and single rows of its weight train "
            "beside that (trainable_token_indices). Do one of the two: exclude_modules: "
            f"[{path!r}], or no trainable tokens. (lora.trainable_token_indices)"
        )
    for path, module in selection.targets.items():
        _check_adaptable(path, module, modules, config, obstacles)
    selection.targets |= {path: modules[path] for path in selection.parameters}
    trained = {*selection.saved, *selection.targets, *selection.tied}
    selection.left_out = [p for p in selection.left_out if not _is_within(p, trained)]
    return selection


def _is_within(path: str, others: set[str]) -> bool:
    return any(path == other or path.startswith(other + ".") for other in others)


# -- the rules ---------------------------------------------------------------------------------


def matches_name(name: str, path: str) -> bool:
    """A listed name selects a module by its whole path or by the last part(s) of it."""
    return path == name or path.endswith("." + name)


def matches_target(config: AdapterConfig, path: str) -> bool:
    """Whether `target_modules` (with `layers_to_transform`) selects `path`."""
    targets = config.target_modules
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    if path in targets:  # a whole path overrules the layer filter, as in PEFT
        return True
    if not any(path.endswith("." + target) for target in targets):
        return False
    wanted = _wanted_layers(config)
    return not wanted or layer_index(config, path) in wanted


def layer_index(config: AdapterConfig, path: str) -> int | None:
    """The index that `layers_to_transform` counts: the first number in `path` after a name."""
    if not config.layers_pattern:
        expressions = [r".*?\.[^.]*\.(?P<index>\d+)\."]
    else:
        patterns = config.layers_pattern
        patterns = [patterns] if isinstance(patterns, str) else patterns
        expressions = [rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\." for pattern in patterns]
    for expression in expressions:
        match = re.match(expression, path)
        if match:
            return int(match["index"])
    return None


def is_excluded(config: AdapterConfig, path: str) -> bool:
    """Whether `exclude_modules` or `modules_to_save` takes `path` out of the targets."""
    excluded = config.exclude_modules
    if isinstance(excluded, str):
        if re.fullmatch(excluded, path):
            return True
    elif excluded and any(matches_name(name, path) for name in excluded):
        return True
    return any(
        re.match(rf"(^|.*\.){saved}($|\..*)", path) for saved in config.modules_to_save or ()
    )


def _wanted_layers(config: AdapterConfig) -> list[int]:
    layers = config.layers_to_transform
    return [layers] if isinstance(layers, int) else list(layers or ())


# -- the checks --------------------------------------------------------------------------------


def _select_saved(
    modules: dict[str, nn.Module], config: AdapterConfig, obstacles: dict[str, str]
) -> dict[str, nn.Module]:
    saved: dict[str, nn.Module] = {}
    for name in config.modules_to_save or ():
        found = {path: module for path, module in modules.items() if matches_name(name, path)}
        if not found:
            raise TargetError(
                f"modules_to_save {name!r} matched nothing.{near(name, modules)} Names at the top "
                f"of this model: {top_names(modules)}. (lora.modules_to_save)"
            )
        for path, module in found.items():
            if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                raise TargetError(
                    f"modules_to_save {name!r} selects {path!r}, a {type(module).__name__}: it is "
                    "never called itself, so a copy of it would not be used. Name the modules "
                    "inside. (lora.modules_to_save)"
                )
            if not isinstance(module, nn.MultiheadAttention):  # itself called, as its copy is
                _check_attention("modules_to_save", path, obstacles)
        saved.update(found)
    # A saved module inside another saved module is part of the outer copy already.
    return {
        path: module
        for path, module in saved.items()
        if not any(path.startswith(outer + ".") for outer in saved)
    }


def _select_tokens(
    model: nn.Module, modules: dict[str, nn.Module], config: AdapterConfig, selection: Selection
) -> None:
    wanted = getattr(config, "trainable_token_indices", None)
    if not wanted:
        return
    if not isinstance(wanted, dict):
        embeddings = input_embeddings(model)
        if len({id(modules[path].weight) for path in embeddings}) == 1:
            embeddings = embeddings[:1]  # several tables of one weight
        if len(embeddings) != 1:
            has = f"has {first_few(embeddings)}" if embeddings else "names none"
            raise TargetError(
                "trainable_token_indices as a list means the rows of the input embeddings, but "
                f"this model {has}. Say which: trainable_token_indices: {{NAME: ids}}. "
                "(lora.trainable_token_indices)"
            )
        wanted = {embeddings[0]: wanted}
    for name, ids in wanted.items():
        found = [path for path in modules if matches_name(name, path)]
        paths = [path for path in found if isinstance(modules[path], nn.Embedding)]
        if not paths:
            kind = f" is a {type(modules[found[0]]).__name__}," if found else " matched nothing,"
            raise TargetError(
                f"trainable_token_indices {name!r}{kind} no nn.Embedding.{near(name, modules)} "
                "(lora.trainable_token_indices)"
            )
        for path in paths:
            owner = selection.tied.get(path, path)  # named before, if only by what is tied to it
            if selection.tokens.setdefault(owner, list(ids)) != list(ids):
                raise TargetError(
                    f"trainable_token_indices names other tokens for {path!r} than for {owner!r}, "
                    "which share one weight. Name it once. (lora.trainable_token_indices)"
                )
            if owner != path:
                continue
            weight = modules[path].weight
            for other, module in modules.items():
                if other != path and getattr(module, "weight", None) is weight:
                    selection.tied[other] = path


def _check_every_target_matched(
    modules: dict[str, nn.Module], targets: dict[str, nn.Module], config: AdapterConfig
) -> None:
    wanted = config.target_modules
    if isinstance(wanted, str):
        if targets:
            return
        by_name = [path for path in modules if matches_name(wanted, path)]
        hint = (
            f" As a name it would match {len(by_name)} modules: write it as a list, [{wanted!r}]."
            if by_name
            else near(wanted, modules)
        )
        raise TargetError(
            f"target_modules {wanted!r}, a regular expression over whole paths, matched nothing."
            f"{hint}\n  {linear_names(modules)}\n"
            f"Use {ALL_LINEAR!r} for every Linear except the output head. (lora.target_modules)"
        )
    unmatched = [name for name in wanted if not any(matches_name(name, path) for path in targets)]
    if not unmatched:
        return
    lines = [
        f"target_modules {wanted}: {len(unmatched)} of {len(wanted)} "
        f"{'name' if len(wanted) == 1 else 'names'} matched nothing."
    ]
    for name in unmatched:
        outside = [path for path in modules if matches_name(name, path)]
        if outside:
            why = f"is there ({first_few(outside, 2)}), but excluded by other options"
            if any(
                matches_name(saved, path)
                for saved in config.modules_to_save or ()
                for path in outside
            ):
                why = f"is in modules_to_save already ({first_few(outside, 2)})"
            elif _wanted_layers(config) and all(layer_index(config, p) is None for p in outside):
                why = (
                    f"is there ({first_few(outside, 2)}), but its path has no layer number: "
                    "say with layers_pattern which list of modules layers_to_transform counts in"
                )
            lines.append(f"  {name!r} {why}")
        else:
            lines.append(
                f"  {name!r}{near(name, modules) or ' is unlike every name in this model.'}"
            )
    lines.append(f"  {linear_names(modules)}")
    lines.append(
        f"Use {ALL_LINEAR!r} for every Linear except the output head, or list names. "
        "(lora.target_modules)"
    )
    raise TargetError("\n".join(lines))


def _check_every_exclusion_matched(modules: dict[str, nn.Module], config: AdapterConfig) -> None:
    excluded = config.exclude_modules
    if excluded is None:
        return
    if isinstance(excluded, str):
        unmatched = [] if any(re.fullmatch(excluded, path) for path in modules) else [excluded]
    else:
        unmatched = [n for n in excluded if not any(matches_name(n, path) for path in modules)]
    if unmatched:
        raise TargetError(
            f"exclude_modules {unmatched[0]!r} excludes nothing.{near(unmatched[0], modules)} "
            "Correct it or take it out. (lora.exclude_modules)"
        )


def _check_every_layer_matched(targets: dict[str, nn.Module], config: AdapterConfig) -> None:
    wanted = _wanted_layers(config)
    if not wanted:
        return
    found = {layer_index(config, path) for path in targets}
    missing = [index for index in wanted if index not in found]
    if missing:
        raise TargetError(
            f"layers_to_transform {config.layers_to_transform}: no target in layer "
            f"{first_few(map(str, missing))}; targets were found in layers "
            f"{sorted(index for index in found if index is not None)}. Indices count from 0. "
            "(lora.layers_to_transform)"
        )


def _check_every_pattern_matched(targets: list[str], config: AdapterConfig) -> None:
    for option in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, option, ()):
            if not any(re.match(rf"(.*\.)?({key})$", path) for path in targets):
                raise TargetError(
                    f"{option} {key!r} fits none of the {len(targets)} targets."
                    f"{near(key, targets)} Correct it or take it out. (lora.{option})"
                )


def _check_adaptable(
    path: str,
    module: nn.Module,
    modules: dict[str, nn.Module],
    config: AdapterConfig,
    obstacles: dict[str, str],
) -> None:
    _check_attention("target_modules", path, obstacles)
    if isinstance(module, torch.jit.ScriptModule):
        check_can_grow(module, path)
    host_type = host_type_for(module)
    if host_type is None:
        raise TargetError(
            f"target_modules selects {path!r}, a {type(module).__name__}, which cannot carry an "
            f"adapter. Adaptable kinds: {SUPPORTED}. To train it in full, list it in "
            f"modules_to_save instead.\n  {linear_names(modules)}\n(lora.target_modules)"
        )
    kinds = classes_for(config)
    if host_type.kind not in kinds:
        raise TargetError(
            f"target_modules selects {path!r}, a {type(module).__name__}, but a "
            f"{config.peft_type} adapter is defined for modules of kind {', '.join(kinds)} only. "
            "Leave it out, or adapt it with another adapter. (lora.target_modules)"
        )


def _add_output_projections(
    modules: dict[str, nn.Module], config: AdapterConfig, selection: Selection
) -> None:
    # As in PEFT, an attention that is named is adapted as a whole: its own weights and out_proj.
    for path, module in list(selection.targets.items()):
        out = f"{path}.out_proj"
        if not isinstance(module, nn.MultiheadAttention) or out in selection.targets:
            continue
        if not is_excluded(config, out):
            selection.targets[out] = modules[out]
            selection.along[out] = path


def _attention_obstacles(model: nn.Module) -> dict[str, str]:
    """Why attentions, and the out_proj of each, cannot carry adapters, by path."""
    obstacles = {}
    for path, module in walk(model):
        if isinstance(module, nn.MultiheadAttention):
            reason = attention_obstacle(module)
            if reason is not None:
                obstacles[path] = obstacles[f"{path}.out_proj".lstrip(".")] = reason
    return obstacles


def _check_attention(option: str, path: str, obstacles: dict[str, str]) -> None:
    if path in obstacles:
        raise TargetError(
            f"{option} selects {path!r}, but {obstacles[path]}. Leave it out, or train the whole "
            f"attention in full with modules_to_save. (lora.{option})"
        )
