"""Every name, expression and index of an adapter's options selects something: else TargetError."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace

from torch import nn

from lora_lightning.adapters.config import ALL_LAYERS, ALL_LINEAR, AdapterConfig
from lora_lightning.engine.targets.hints import adaptable, linear_names, near
from lora_lightning.engine.targets.matching import (
    is_excluded,
    layer_index,
    matches_name,
    matches_target,
    wanted_layers,
)
from lora_lightning.errors import TargetError, first_few
from lora_lightning.layers.traversal import walk

_OTHER_KINDS = f"{ALL_LAYERS!r} takes in convolutions, embeddings and attentions, too."


def check_something_is_left(
    candidates: Collection[str], config: AdapterConfig, more: str = ""
) -> None:
    """Refuse options that take out all `candidates`, which target_modules selects.

    `more` is said at the end.
    """
    if not candidates or not all(is_excluded(config, path) for path in candidates):
        return
    alone = replace(config, modules_to_save=None)
    if all(is_excluded(alone, path) for path in candidates):
        option, value = "exclude_modules", config.exclude_modules
    else:
        option, value = "modules_to_save", config.modules_to_save
    raise TargetError(
        f"{option}={value!r} takes out all that target_modules={config.target_modules!r} selects: "
        f"{first_few(candidates)}. Name fewer modules there, or other targets. (lora.{option})"
        f"{more}"
    )


def check_every_target_matched(
    modules: dict[str, nn.Module], targets: dict[str, nn.Module], config: AdapterConfig
) -> None:
    """Refuse listed names, or an expression, that select no module, and say why they do not."""
    wanted = config.target_modules or []
    if isinstance(wanted, str):
        if targets:
            return
        check_something_is_left([p for p in modules if re.fullmatch(wanted, p)], config)
        by_name = [path for path in modules if matches_name(wanted, path)]
        hint = (
            f" As a name it would match {len(by_name)} modules: write it as a list, [{wanted!r}]."
            if by_name
            else near(wanted, adaptable(modules))
        )
        raise TargetError(
            f"target_modules {wanted!r}, a regular expression over whole paths, matched nothing."
            f"{hint}\n  {linear_names(modules)}\n"
            f"Use {ALL_LINEAR!r} for every Linear except the output head. {_OTHER_KINDS} "
            "(lora.target_modules)"
        )
    if not targets:
        check_something_is_left([p for p in modules if matches_target(config, p)], config)
    named = {*targets, *(path for path in modules if _is_put_aside(path, config))}
    unmatched = [name for name in wanted if not any(matches_name(name, p) for p in named)]
    if not unmatched:
        return
    lines = [
        f"target_modules {wanted}: {len(unmatched)} of {len(wanted)} "
        f"{'name' if len(wanted) == 1 else 'names'} matched nothing."
    ]
    for name in unmatched:
        outside = [path for path in modules if matches_name(name, path)]
        if outside:
            lines.append(f"  {name!r} {_why_not(outside, config)}")
        else:
            hint = near(name, adaptable(modules))
            lines.append(f"  {name!r}{hint or ' is unlike every name in this model.'}")
    lines.append(f"  {linear_names(modules)}")
    lines.append(
        f"Use {ALL_LINEAR!r} for every Linear except the output head, or list names. "
        f"{_OTHER_KINDS} (lora.target_modules)"
    )
    raise TargetError("\n".join(lines))


def _is_put_aside(path: str, config: AdapterConfig) -> bool:
    """True if `exclude_modules` takes a target out: a wish, as in PEFT, where others are left."""
    return matches_target(config, path) and is_excluded(replace(config, modules_to_save=None), path)


def _why_not(paths: list[str], config: AdapterConfig) -> str:
    """Reason why modules that have a listed name are no targets."""
    there = f"is there ({first_few(paths, 2)}), but"
    saved = config.modules_to_save or ()
    if any(matches_name(name, path) for name in saved for path in paths):
        return f"is in modules_to_save already ({first_few(paths, 2)})"
    if all(is_excluded(replace(config, exclude_modules=None), path) for path in paths):
        return f"{there} inside of what trains in full: {first_few(saved)} (lora.modules_to_save)"
    layers = sorted({i for p in paths if (i := layer_index(config, p)) is not None})
    if layers:
        return (
            f"{there} in layers {layers}; layers_to_transform is {config.layers_to_transform} "
            "(lora.layers_to_transform)"
        )
    if config.layers_pattern is None:
        return (
            f"{there} its path has no layer number: say with layers_pattern which list of modules "
            "layers_to_transform counts in (lora.layers_pattern)"
        )
    lists = {found for path in paths for found in re.findall(r"([^.]+)\.\d+\.", path)}
    known = f"lists of modules there: {first_few(sorted(lists))}" if lists else "it is in no list"
    return (
        f"{there} not in a list of modules called {config.layers_pattern!r}; {known} "
        "(lora.layers_pattern)"
    )


def check_not_of_peft(model: nn.Module) -> None:
    """Refuse (TargetError) a model that carries adapters of the peft package, wherever they are."""
    for path, module in walk(model):
        kind = type(module)
        if kind.__module__.startswith("peft.tuners."):
            raise TargetError(
                f"{path!r} is a {kind.__module__}.{kind.__name__}: the model carries adapters of "
                "peft already, which would be frozen, and be a part of the base. Give the model "
                "without them (peft's model.unload(), or merge_and_unload() to keep their "
                "effect); to train a PEFT folder on, name it in init_from. (lora.init_from)"
            )


def check_every_exclusion_matched(modules: dict[str, nn.Module], config: AdapterConfig) -> None:
    """Refuse a name in exclude_modules, or an expression, that fits no module."""
    excluded = config.exclude_modules
    if excluded is None:
        return
    if isinstance(excluded, str):
        unmatched = [] if any(re.fullmatch(excluded, path) for path in modules) else [excluded]
    else:
        unmatched = [n for n in excluded if not any(matches_name(n, path) for path in modules)]
    if unmatched:
        hint = near(unmatched[0], adaptable(modules))
        raise TargetError(
            f"exclude_modules {unmatched[0]!r} excludes nothing.{hint} Correct it or take it out. "
            "(lora.exclude_modules)"
        )


def check_every_layer_matched(targets: dict[str, nn.Module], config: AdapterConfig) -> None:
    """Refuse indices in layers_to_transform that have no target."""
    found = {layer_index(config, path) for path in targets}
    missing = [index for index in wanted_layers(config) if index not in found]
    if missing:
        raise TargetError(
            f"layers_to_transform {config.layers_to_transform}: no target in layer "
            f"{first_few(map(str, missing))}; targets were found in layers "
            f"{sorted(index for index in found if index is not None)}. Indices count from 0. "
            "(lora.layers_to_transform)"
        )


def check_every_pattern_matched(targets: list[str], config: AdapterConfig) -> None:
    """Refuse a key of rank_pattern or alpha_pattern that fits no target."""
    for option in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, option, ()):
            if not any(re.match(rf"(.*\.)?({key})$", path) for path in targets):
                raise TargetError(
                    f"{option} {key!r} fits none of the {len(targets)} targets."
                    f"{near(key, targets)} Correct it or take it out. (lora.{option})"
                )
