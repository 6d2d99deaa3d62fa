"""The model that a PEFT folder is for, and how its adapter_config.json names it."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from lora_lightning.engine.bias import trained_biases
from lora_lightning.engine.switching import layers_with
from lora_lightning.engine.targets.embeddings import input_embeddings, output_heads
from lora_lightning.layers.carried_adapters import CarriedAdapters
from lora_lightning.layers.traversal import walk
from lora_lightning.utilities.is_a import is_a

# PEFT's task types: transformers' mapping from configs to the classes of the task, and the modules
# that PEFT takes for trained copies in such a model, whatever the file says.
_TASKS = {
    "CAUSAL_LM": ("MODEL_FOR_CAUSAL_LM_MAPPING", ()),
    "SEQ_2_SEQ_LM": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", ()),
    "SEQ_CLS": ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING", ("classifier", "score")),
    "TOKEN_CLS": ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING", ("classifier", "score")),
    "QUESTION_ANS": ("MODEL_FOR_QUESTION_ANSWERING_MAPPING", ("qa_outputs",)),
    "FEATURE_EXTRACTION": ("MODEL_MAPPING", ()),
}

# Linears of old mixtures of experts. PEFT takes the names for transformers' fused experts in every
# model that transformers converts by the same rules (peft.utils.transformers_weight_conversion).
_FUSED = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}


class Target(NamedTuple):
    """The model that a folder is for.

    Attributes:
        model: It itself; every name in the folder is one below it.
        prefix: Its path in the model that was given, with a dot at the end; "" for that one.

    """

    model: nn.Module
    prefix: str


def is_pretrained(module: nn.Module) -> bool:
    """True for a model of transformers or diffusers, which its users load by a name."""
    return is_a(module, "PreTrainedModel", module="transformers.modeling_utils") or is_a(
        module, "ModelMixin", module="diffusers.models.modeling_utils"
    )


def pretrained_inside(model: nn.Module) -> list[Target]:
    """The pretrained models in `model`, without those that are a part of another one or `model`."""
    found: list[Target] = []
    for path, module in walk(model):
        known = any(f"{path}.".startswith(target.prefix) for target in found)
        if not known and is_pretrained(module):
            if not path:
                return []
            inside = {id(part) for part in module.modules()}  # by another name, say
            found = [target for target in found if id(target.model) not in inside]
            found.append(Target(module, f"{path}."))
    return found


def folder_target(model: nn.Module, adapter_name: str) -> Target:
    """The model that a folder with this adapter is for.

    A LightningModule is nothing that others have: where all of the adapter lies in one pretrained
    model inside, it is for that one. Else it is for `model` as it is.
    """
    if is_a(model, "LightningModule"):
        carriers = _carriers(model, adapter_name)
        for target in pretrained_inside(model):
            if carriers and carriers <= {*target.model.modules()}:
                return target
    return Target(model, "")


def _carriers(model: nn.Module, adapter_name: str) -> set[nn.Module]:
    """The modules that have an adapter, or whose bias trains with it."""
    layers = {layer for _, layer in layers_with(model, adapter_name)}
    return layers | {module for _, module, _ in trained_biases(model, adapter_name)}


def head_names(task_type: object) -> tuple[str, ...]:
    """Ends of the paths of modules that PEFT takes for trained copies in a model of this task."""
    return _TASKS[task_type][1] if isinstance(task_type, str) and task_type in _TASKS else ()


def task_type(model: nn.Module) -> str | None:
    """PEFT's task type of a model whose class transformers has for that task; else None."""
    if not is_a(model, "PreTrainedModel", module="transformers.modeling_utils"):
        return None
    from transformers.models.auto import modeling_auto

    pretrained: Any = model
    if pretrained.main_input_name != "input_ids":  # which PEFT would call it with
        return None
    for task, (mapping, _) in _TASKS.items():
        classes = getattr(modeling_auto, mapping).get(type(pretrained.config), ())
        known = classes if isinstance(classes, (tuple, list)) else [classes]
        if plain_class(model) in known:
            return task
    return None


def grown_tables(model: nn.Module) -> list[str]:
    """Embeddings and heads with other rows than the base has where its name says: added tokens.

    Their random start is in no file of the base. Nothing where that cannot be looked up here.
    """
    config: Any = getattr(model, "config", None)
    name = getattr(config, "name_or_path", None)
    if not (is_a(model, "PreTrainedModel", module="transformers.modeling_utils") and name):
        return []
    try:
        base = type(config).from_pretrained(name, local_files_only=True)
        rows = base.get_text_config().vocab_size
    except Exception:  # of anybody's config: it cannot be looked up
        return []
    weights = {
        path: weight
        for path in (*input_embeddings(model), *output_heads(model))
        if (weight := model.get_submodule(path)._parameters.get("weight")) is not None
    }
    sizes = {len(weights[path]) for path in input_embeddings(model) if path in weights} - {rows}
    return [path for path, weight in weights.items() if len(weight) in sizes]


def taken_for_experts(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """The modules in whose place PEFT would adapt fused experts, if the model has any or not."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if not is_a(model, "PreTrainedModel", module="transformers.modeling_utils"):
        return []
    from transformers import conversion_mapping

    families: dict[Any, str] = vars(conversion_mapping).get("_MODEL_TO_CONVERSION_PATTERN", {})
    names = _FUSED.get(families.get(model_type, ""), ())
    return [path for path in paths if path.rpartition(".")[2] in names]


def auto_mapping(model: nn.Module) -> dict[str, str]:
    """What PEFT writes where there is no task type: the class, and where it is imported from."""
    found = plain_class(model)
    return {"base_model_class": found.__name__, "parent_library": found.__module__}


def plain_class(model: nn.Module) -> type:
    """The first class of `model` that can be imported, not one that FSDP or this library made."""
    classes: tuple[type, ...] = type(model).__mro__
    for found in classes:
        if issubclass(found, CarriedAdapters):
            continue
        home = sys.modules.get(found.__module__)
        is_there = home is not None and vars(home).get(found.__name__) is found
        if is_there:
            return found
    return type(model)
