"""What `adapter_config.json` says of an adapter on a model, and whether PEFT can have it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_lightning.adapters.base import AdapterModule
from lora_lightning.adapters.config import SELECTION
from lora_lightning.adapters.trainable_tokens import (
    TiedTrainableTokensAdapter,
    TrainableTokensAdapter,
)
from lora_lightning.checkpoint.peft.base_model import (
    auto_mapping,
    head_names,
    plain_class,
    taken_for_experts,
    task_type,
)
from lora_lightning.checkpoint.peft.config import OWN, PEFT_TYPES, TOKENS, WITH_BIAS
from lora_lightning.checkpoint.peft.file_content import exact_names
from lora_lightning.checkpoint.peft.keys import also_saved_by_peft
from lora_lightning.checkpoint.peft.relocation import moved_config
from lora_lightning.engine.construction import fitted_ranks
from lora_lightning.engine.injection import adapters_named
from lora_lightning.errors import first_few
from lora_lightning.layers.conv1d import is_conv1d
from lora_lightning.layers.traversal import named_adapted_layers, walk


@dataclass(frozen=True)
class Description:
    """What adapter_config.json says of an adapter.

    Attributes:
        options: Its content.
        obstacles: Why PEFT cannot have it, so that the type is one which PEFT refuses; else none.

    """

    options: dict[str, Any]
    obstacles: list[str]


def describe(model: nn.Module, adapter_name: str) -> Description:
    """The content of adapter_config.json for an adapter that is on `model`."""
    adapters = adapters_named(model, adapter_name)
    layers = dict(named_adapted_layers(model))
    saved = [path for path in adapters if adapter_name in layers[path].trained_copies()]
    # Trained rows have an option of their own, too.
    rows_of = (TrainableTokensAdapter, TiedTrainableTokensAdapter)
    targets = [p for p, a in adapters.items() if p not in saved and not isinstance(a, rows_of)]
    config = moved_config(next(iter(adapters.values())).config, _moved_to(adapters))
    obstacles = _obstacles(model, adapters, targets, saved)
    common = _of_base(model, targets, saved)
    if not targets and config.peft_type in PEFT_TYPES:  # PEFT has a type of its own for that
        rows = {
            p: a.token_ids for p, a in adapters.items() if isinstance(a, TrainableTokensAdapter)
        }
        ids = next(iter(rows.values()), None)
        alike = all(other == ids for other in rows.values())
        if not obstacles and alike and not saved and config.bias == "none":
            tokens = {"token_indices": ids, "target_modules": sorted(rows)}
            return Description({**common, **tokens, "peft_type": TOKENS, "init_weights": True}, [])
        obstacles.append(
            "only rows of embeddings train, for which PEFT has a type without other options: the "
            "same tokens in every table, no modules_to_save and no bias"
        )
    options = config.with_ranks(fitted_ranks(adapters)).file_options()
    # What was selected, in so many words: PEFT's rules for "all-linear" depend on the model.
    options |= dict.fromkeys(SELECTION)
    outs = {f"{p}.out_proj" for p in targets if isinstance(layers[p], nn.MultiheadAttention)}
    # PEFT adapts an attention's out_proj along with it.
    by_module = {p for p in targets if layers[p].kind != "experts" and p not in outs}
    options["target_modules"] = exact_names([path for path, _ in walk(model)], by_module)
    options["modules_to_save"] = sorted(saved) or None
    if options.get("bias") == "none" and config.peft_type not in WITH_BIAS:
        del options["bias"]
    options |= {
        **common,
        "peft_type": OWN + config.peft_type if obstacles else config.peft_type,
        "fan_in_fan_out": bool(targets) and all(is_conv1d(layers[path]) for path in targets),
    }
    return Description(options, obstacles)


def _of_base(model: nn.Module, targets: list[str], saved: list[str]) -> dict[str, Any]:
    """The base's name, and by which class PEFT can load it."""
    base = getattr(model, "config", None)
    base_name = getattr(base, "name_or_path", None)
    task = task_type(model)
    heads = also_saved_by_peft(model, saved, head_names(task))
    if any(_is_inside(target, heads) for target in targets):
        task = None  # PEFT would put a trained copy in its place
    return {
        "task_type": task,
        "auto_mapping": None if task else auto_mapping(model),
        "inference_mode": True,
        "base_model_name_or_path": base_name if base_name and isinstance(base_name, str) else None,
        # The commit on the hub that it came from; what the name stands for may move on.
        "revision": getattr(base, "_commit_hash", None),
    }


def names_in_the_way(model: nn.Module, adapted: list[str], lora: list[str]) -> list[str]:
    """Why PEFT would adapt other modules than those at `adapted`, of which `lora` carry LoRA."""
    modules = dict(walk(model))
    found = []
    # PEFT adapts a module in the first of the places that it has.
    places = Counter(id(child) for module in model.modules() for child in module._modules.values())
    shared = [path for path in adapted if places[id(modules[path])] > 1]
    if shared:
        found.append(f"PEFT adapts a module in one place only: {first_few(shared, 3)} have several")
    if experts := taken_for_experts(model, lora):
        found.append(
            f"PEFT takes {first_few(experts, 3)} for parts of fused experts, by their names and "
            "the model's type, and adapts those"
        )
    return found


def _obstacles(
    model: nn.Module, adapters: dict[str, AdapterModule], targets: list[str], saved: list[str]
) -> list[str]:
    """Why PEFT would compute something else, or could not load the adapter."""
    layers = dict(named_adapted_layers(model))
    found = names_in_the_way(model, list(adapters), targets if _is_lora(adapters) else [])
    copied = also_saved_by_peft(model, saved)
    inside = [target for target in targets if _is_inside(target, copied)]
    if inside:
        found.append(
            f"PEFT takes {first_few(copied, 3)} for trained copies too, by the end of the name, "
            f"and {first_few(inside, 3)} carry adapters"
        )
    kind = next(iter(adapters.values())).config.peft_type
    if kind not in PEFT_TYPES:
        return [*found, f"PEFT has no adapters of the type {kind}"]
    on_weights = [path for path in adapters if path not in saved]  # targets, and tables with rows
    others = [path for path in on_weights if not layers[path].peft_supports(adapters[path])]
    if others:
        listed = [f"{path} ({plain_class(layers[path]).__name__})" for path in others]
        found.append(f"PEFT has no such adapter, or computes it otherwise, on {first_few(listed)}")
    attentions = [path for path in targets if isinstance(layers[path], nn.MultiheadAttention)]
    for path in targets:  # PEFT adapts an out_proj without its attention, but it has no effect
        outer = path.rpartition(".")[0]
        if isinstance(layers.get(outer), nn.MultiheadAttention) and outer not in attentions:
            found.append(f"PEFT's adapter on {path} without its attention would have no effect")
    return found


def _is_lora(adapters: dict[str, AdapterModule]) -> bool:
    return next(iter(adapters.values())).config.peft_type == "LORA"


def _is_inside(path: str, others: Iterable[str]) -> bool:
    return any(path == other or path.startswith(f"{other}.") for other in others)


def _moved_to(adapters: dict[str, AdapterModule]) -> dict[str, str]:
    """The path of every module, and of single parameters, by the path that its options mean."""
    moved = {}
    for path, adapter in adapters.items():
        if isinstance(adapter, TiedTrainableTokensAdapter):
            continue
        for name, part in adapter.by_weight().items():
            if part.spec.attention is None:  # of which the attention's options hold
                of_parameter = part.spec.path.endswith(f".{name}")
                moved[part.spec.path] = f"{path}.{name}" if of_parameter else path
    return moved
