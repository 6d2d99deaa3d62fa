"""Selection of modules by an adapter's options: PEFT's rules, but nothing in silence.

The rules are PEFT 0.21.2's (`check_target_module_exists`, `get_pattern_key`). What differs is
what happens to a name that selects nothing: there it is dropped, here it is an error.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from lora_lightning.adapters.config import AdapterConfig
from lora_lightning.adapters.registry import classes_for
from lora_lightning.engine.targets import checks
from lora_lightning.engine.targets.defaults import LeftOut, is_within, select_by_default
from lora_lightning.engine.targets.embeddings import input_embeddings
from lora_lightning.engine.targets.hints import linear_names, near, shown_name
from lora_lightning.engine.targets.matching import is_excluded, matches_name, matches_target
from lora_lightning.engine.targets.outputs import output_obstacle
from lora_lightning.engine.targets.parameters import select_parameters
from lora_lightning.errors import TargetError, first_few
from lora_lightning.layers.conversion import check_convertible
from lora_lightning.layers.linear import AdaptedLinear
from lora_lightning.layers.multihead_attention import attention_obstacle
from lora_lightning.layers.registry import SUPPORTED, layer_type_for
from lora_lightning.layers.traversal import walk


@dataclass
class Selection:
    """Modules and parameters of a model that a config selects.

    Attributes:
        targets: Modules to adapt, by path.
        parameters: Of the targets that are adapted by parameter (`target_parameters`), the names
            of those parameters, by path.
        saved: Modules to train as a copy (`modules_to_save`), by path.
        left_out: Output heads that "all-linear" and "all-layers" leave alone.
        passed_over: All that these two leave alone, with the reasons.
        attentions: Path of the attention by path of every `out_proj` that is adapted only because
            the attention was named.
        tokens: Ids of the tokens whose rows train, by path of the embedding or head.
        tied: Path of the one in `tokens` by path of every other module that shares its weight.

    """

    targets: dict[str, nn.Module] = field(default_factory=dict)
    parameters: dict[str, list[str]] = field(default_factory=dict)
    saved: dict[str, nn.Module] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    passed_over: LeftOut = field(default_factory=LeftOut)
    attentions: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)


def _is_selectable(path: str, module: nn.Module) -> bool:
    """False for a parametrization (`0.parametrizations.weight.0`), which a name like "0" fits."""
    return ".parametrizations." not in f".{path}" or layer_type_for(module) is not None


def select_modules(model: nn.Module, config: AdapterConfig) -> Selection:
    """The modules of `model` that `config` selects.

    Raises:
        TargetError: If a name, expression or index selects nothing, or a module of a kind that
            cannot be adapted.

    """
    checks.check_not_of_peft(model)
    modules = {
        path: module for path, module in walk(model) if path and _is_selectable(path, module)
    }
    obstacles = _attention_obstacles(model)
    selection = Selection(saved=_select_saved(modules, config, obstacles))
    _select_tokens(model, modules, config, selection)
    if not config.target_modules:
        pass  # only tokens or parameters train
    elif config.names_no_module:
        found = select_by_default(model, modules, config, selection.tokens, obstacles)
        selection.targets, selection.passed_over = found
        selection.left_out = selection.passed_over.heads
    else:
        selection.targets = {
            path: module
            for path, module in modules.items()
            if not is_excluded(config, path) and matches_target(config, path)
        }
        checks.check_every_target_matched(modules, selection.targets, config)
        _add_output_projections(modules, config, selection)
    checks.check_every_exclusion_matched(modules, config)
    checks.check_every_layer_matched(selection.targets, config)
    wanted = getattr(config, "target_parameters", None) or []
    selection.parameters = select_parameters(modules, wanted, selection.targets, selection.saved)
    parameters = [f"{path}.{n}" for path, names in selection.parameters.items() for n in names]
    checks.check_every_pattern_matched([*selection.targets, *parameters], config)
    with_rows = {*selection.tokens, *selection.tied}
    for path in sorted(path for path in with_rows if is_within(path, selection.saved)):
        raise TargetError(
            f"{path!r} trains in full (modules_to_save), and single rows of it beside that "
            "(trainable_token_indices). Do one of the two. (lora.trainable_token_indices)"
        )
    for path in selection.targets.keys() & with_rows:
        raise TargetError(
            f"{path!r} is adapted as a whole (target_modules) and single rows of its weight train "
            "beside that (trainable_token_indices). Do one of the two: exclude_modules: "
            f"[{path!r}], or no trainable tokens. (lora.trainable_token_indices)"
        )
    for path, module in selection.targets.items():
        _check_adaptable(path, module, modules, config, obstacles)
    selection.targets |= {path: modules[path] for path in selection.parameters}
    trained = {*selection.saved, *selection.targets, *with_rows}
    selection.left_out = [p for p in selection.left_out if not is_within(p, trained)]
    return selection


def _select_saved(
    modules: dict[str, nn.Module], config: AdapterConfig, obstacles: dict[str, str]
) -> dict[str, nn.Module]:
    saved: dict[str, nn.Module] = {}
    for name in config.modules_to_save or ():
        found = {path: module for path, module in modules.items() if matches_name(name, path)}
        if not found:
            trainable = [path for path, module in modules.items() if [*module.parameters()]]
            top = first_few([path for path in modules if path.count(".") <= 1], 12)
            raise TargetError(
                f"modules_to_save {name!r} matched nothing.{near(name, trainable)} Names at the "
                f"top of this model: {top or 'none'}. (lora.modules_to_save)"
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
        if len({id(modules[path]._parameters.get("weight")) for path in embeddings}) == 1:
            embeddings = embeddings[:1]  # several tables of one weight
        if len(embeddings) != 1:
            has = f"has {first_few(embeddings)}" if embeddings else "names none"
            raise TargetError(
                "trainable_token_indices as a list means the rows of the input embeddings, but "
                f"this model {has}. Say which: trainable_token_indices: {{NAME: ids}}. "
                "(lora.trainable_token_indices)"
            )
        wanted = {embeddings[0]: wanted}
    chosen: list[tuple[str, list[int]]] = []
    tables = [path for path, module in modules.items() if _has_rows(module)]
    for name, ids in wanted.items():
        found = [path for path in modules if matches_name(name, path)]
        paths = [path for path in found if path in tables]
        if not paths:
            kind = f" is a {type(modules[found[0]]).__name__}," if found else " matched nothing,"
            raise TargetError(
                f"trainable_token_indices {name!r}{kind} no nn.Embedding and no nn.Linear (a head)."
                f"{near(name, tables)} (lora.trainable_token_indices)"
            )
        chosen += [(path, list(ids)) for path in paths]
    # An embedding owns the rows that it shares with a head, whichever was named first.
    for path, ids in sorted(chosen, key=lambda c: not isinstance(modules[c[0]], nn.Embedding)):
        owner = selection.tied.get(path, path)  # named before, if only by what is tied to it
        if selection.tokens.setdefault(owner, ids) != ids:
            raise TargetError(
                f"trainable_token_indices names other tokens for {path!r} than for {owner!r}, "
                "which share one weight. Name it once. (lora.trainable_token_indices)"
            )
        # A head that is named alone trains alone, as in PEFT, though a table shares its weight.
        if owner != path or not isinstance(modules[path], nn.Embedding):
            continue
        weight = modules[path]._parameters.get("weight")  # None of one that is parametrized
        for other, module in modules.items() if weight is not None else ():
            if other != path and module._parameters.get("weight") is weight:
                selection.tied[other] = path


def _has_rows(module: nn.Module) -> bool:
    """Tell whether single rows of the module's weight can train."""
    return isinstance(module, nn.Embedding) or layer_type_for(module) is AdaptedLinear


def _check_adaptable(
    path: str,
    module: nn.Module,
    modules: dict[str, nn.Module],
    config: AdapterConfig,
    obstacles: dict[str, str],
) -> None:
    _check_attention("target_modules", path, obstacles)
    if isinstance(module, torch.jit.ScriptModule):
        check_convertible(module, path)
    layer_type = layer_type_for(module)
    if layer_type is None:
        raise TargetError(
            f"target_modules selects {path!r}, a {type(module).__name__}, which cannot carry an "
            f"adapter. Adaptable kinds: {SUPPORTED}. To train it in full, list it in "
            f"modules_to_save instead.\n  {linear_names(modules)}\n(lora.target_modules)"
        )
    reason = output_obstacle(module)
    if reason is not None:
        raise TargetError(
            f"target_modules selects {path!r}, a {type(module).__name__}, but {reason}: there is "
            f"nothing that an adapter's output could be added to. Leave it out: exclude_modules: "
            f"[{shown_name(path)}]. (lora.target_modules)"
        )
    kinds = classes_for(config)
    if layer_type.kind not in kinds:
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
            selection.attentions[out] = path


def _attention_obstacles(model: nn.Module) -> dict[str, str]:
    """Reasons why attentions, and the out_proj of each, cannot carry adapters, by path."""
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
