"""Weighted combinations of LoRA adapters of a model, as one new adapter.

`task_arithmetic.py` has the formulas; here is what they are applied to.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.lora.config import LoraConfig
from lora_lightning.adapters.lora.conv import LoraConvAdapter
from lora_lightning.adapters.lora.embedding import LoraEmbeddingAdapter
from lora_lightning.adapters.lora.linear import LoraAdapter, LowRankAdapter
from lora_lightning.engine.bias import trained_biases
from lora_lightning.engine.combined_modules import (
    TrainedModules,
    check_mean,
    fill_with_mean,
    trained_modules,
)
from lora_lightning.engine.construction import BuildContext
from lora_lightning.engine.injection import check_new_name, check_unmerged, extend_adapter
from lora_lightning.engine.switching import check_enabled, check_known
from lora_lightning.engine.targets.selection import select_modules
from lora_lightning.engine.task_arithmetic import (
    Combination,
    CombinationType,
    MajoritySignMethod,
    Update,
)
from lora_lightning.errors import AdapterStateError, ConfigError
from lora_lightning.layers.traversal import named_adapted_layers
from lora_lightning.utilities.wrappers import unwrapped

COMBINABLE = (LoraAdapter, LoraConvAdapter, LoraEmbeddingAdapter)
WeightPath = tuple[str, str]  # path of a module, and name of one of its weights


@torch.no_grad()
def add_weighted_adapter(
    model: nn.Module,
    names: str | Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: CombinationType = "svd",
    *,
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    density: float | None = None,
    majority_sign_method: MajoritySignMethod = "total",
    modules_to_save: str | None = None,
    seed: int | None = None,
) -> None:
    """Add a LoRA adapter that combines others, which stay as they are.

    The new adapter sits on every module that one of them sits on and combines those that are there.
    Its scaling is 1 everywhere (lora_alpha = r); ranks that differ by module stand in its
    rank_pattern. It is inactive and not trainable until `set_adapter` names it. What one of the
    adapters trains in full (`modules_to_save`) is taken over as it is.

    Args:
        model: A model with LoRA adapters, whatever their rank, alpha, scaling and start values.
        names: The adapters to combine.
        weights: A number of any sign for each; it multiplies the adapter as it acts at present.
        adapter_name: A name for the new adapter.
        combination_type: "cat": the exact sum; ranks add up, but never beyond what the layer's
            size has. "svd": the best approximation of that sum of one rank. "linear", "ties",
            "dare_linear", "dare_ties", "magnitude_prune": A and B apart, which needs equal ranks
            and is rough. "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd": of
            dense updates, which takes time and memory on large layers. The formulas stand at the
            head of `engine/task_arithmetic.py`.
        svd_rank: For the types with svd: the new rank, but never more than the layer's size has.
            Default: by module, the largest of the ranks that are combined.
        svd_clamp: For the types with svd: clamp the new A and B to [-q, q], where q is this
            quantile of their entries and the entries' negatives, 0.5 < svd_clamp <= 1.
        density: For ties, dare and magnitude_prune: the share of entries to keep, 0 < density <= 1.
        majority_sign_method: For ties: keep the sign of the sum, or of the majority ("frequency").
        modules_to_save: Of a module that several train in full: the "mean" by weights, the "first"
            in `names`, or that of the adapter of this name.
        seed: For dare: what the random choice depends on, beside each tensor's name. Default: the
            seed PyTorch was given (`seed_everything`, `torch.manual_seed`).

    Raises:
        ConfigError: If an option is unknown, missing, out of range or without meaning here, or a
            weight is missing.
        RankError: If ranks are unequal where they must not be, or svd_rank does not fit groups.
        AdapterStateError: If a name is unknown or taken, if adapters are merged or disabled, or if
            an adapter cannot be combined: no LoRA, DoRA, trained biases, or several that train a
            module in full, without modules_to_save. Nothing is changed then.

    """
    seed = torch.initial_seed() if seed is None else seed
    combination = Combination(
        combination_type, svd_rank, svd_clamp, density, majority_sign_method, seed
    )
    names, numbers = [names] if isinstance(names, str) else list(names), list(map(float, weights))
    _add_combined(model, names, numbers, adapter_name, combination, modules_to_save)


def _add_combined(
    model: nn.Module,
    names: list[str],
    weights: list[float],
    adapter_name: str,
    combination: Combination,
    choice: str | None,
) -> None:
    _check_request(model, names, weights, adapter_name)
    modules = trained_modules(model, names, choice)
    weight_of: dict[str, float] = defaultdict(float)
    for name, number in zip(names, weights, strict=True):
        weight_of[name] += number
    check_mean(modules, weight_of)
    updates = _updates(model, names, modules)
    for (path, _), by_index in updates.items():
        combination.check(path, list(by_index.values()))
    combined = {
        (path, weight): combination.combine(
            path if weight == "weight" else f"{path}.{weight}",
            list(by_index.values()),
            [weights[i] for i in by_index],
        )
        for (path, weight), by_index in updates.items()
    }

    trained = [copy.config for own in modules.values() for copy in own.values()]
    saved = {key for config in trained for key in config.modules_to_save or ()}
    config = _config(model, combined, sorted(saved))
    # A module of several weights has one rank: it may exceed what the smallest of them has.
    context = BuildContext(config, adapter_name, combination.seed, check_rank=False)
    extend_adapter(model, context)
    layers = dict(named_adapted_layers(model))
    for (path, weight), update in combined.items():
        _fill(layers[path].adapters[adapter_name].by_weight()[weight], update)
    for path, own in modules.items():
        fill_with_mean(layers[path].trained_copies()[adapter_name], own, weight_of)


def _check_request(
    model: nn.Module, names: list[str], weights: list[float], adapter_name: str
) -> None:
    check_known(model, *names)
    if not names or len(names) != len(weights) or not all(map(math.isfinite, weights)):
        raise ConfigError(
            f"names {names} and weights {weights}: give at least one name, and a finite weight for "
            "each. (lora.weights)"
        )
    check_new_name(model, adapter_name)
    check_enabled(model)
    check_unmerged(model)
    for path, _, record in trained_biases(model):
        if record.adapter_name in names:
            raise AdapterStateError(
                f"Adapter {record.adapter_name!r} trains {path!r} in place; biases cannot be "
                "combined, only updates of weights. (lora.bias)"
            )


def _updates(
    model: nn.Module, names: list[str], modules: TrainedModules
) -> dict[WeightPath, dict[int, Update]]:
    """Updates of each weight by the adapters `names`, by their index in `names`."""
    updates: dict[WeightPath, dict[int, Update]] = defaultdict(dict)
    for path, layer in named_adapted_layers(model):
        for index, name in enumerate(names):
            if name not in layer.adapters or name in layer.trained_copies():
                continue
            for trained, own in modules.items():
                if f"{path}.".startswith(f"{trained}."):
                    raise AdapterStateError(
                        f"{name!r} adapts {path!r}, but {next(iter(own))!r} trains {trained!r} in "
                        "full; the two cannot be combined. (lora.modules_to_save)"
                    )
            for weight, adapter in layer.adapters[name].by_weight().items():
                updates[path, weight][index] = _update(path, name, adapter)
    if not updates:
        raise AdapterStateError(f"The adapters {names} update no weight: nothing to combine.")
    return updates


def _update(path: str, name: str, adapter: Adapter) -> Update:
    config = adapter.config
    if not (isinstance(config, LoraConfig) and isinstance(adapter, COMBINABLE)):
        raise AdapterStateError(
            f"On {path!r}, {name!r} is of type {type(adapter).__name__}; only LoRA adapters of "
            "whole modules can be combined. Leave it out of names."
        )
    if config.use_dora:
        raise AdapterStateError(
            f"{name!r} is a DoRA adapter: it rescales the rows of the weight, which no sum of "
            "updates can say. Only plain LoRA adapters can be combined. (lora.use_dora)"
        )
    a, b = adapter.factors()
    if a.is_meta:
        raise AdapterStateError(f"{name!r} is on the meta device ({path!r}): load it first.")
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise AdapterStateError(f"{name!r} has values on {path!r} that are not finite.")
    groups = cast(int, getattr(adapter, "groups", 1))
    bias = cast("Tensor | None", getattr(adapter, "lora_B_bias", None))
    a, b = (t.reshape(groups, t.shape[0] // groups, -1) for t in (a, b))
    return Update(name, adapter.scaling, a, b, bias)


def _config(model: nn.Module, combined: dict[WeightPath, Update], saved: list[str]) -> LoraConfig:
    """Scaling 1 and the right rank on the modules of `combined`, and nothing anywhere else."""
    ranks: dict[str, int] = {}
    for (path, _), update in sorted(combined.items()):
        ranks[path] = max(update.rank, ranks.get(path, 0))
    r = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != r}
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        rank_pattern=pattern,
        alpha_pattern={path: float(rank) for path, rank in pattern.items()},
        lora_bias=any(update.bias is not None for update in combined.values()),
        target_modules=list(ranks),
        exclude_modules=[
            f"{path}.out_proj"
            for path in ranks
            if isinstance(unwrapped(model.get_submodule(path)), nn.MultiheadAttention)
            and f"{path}.out_proj" not in ranks
        ]
        or None,
        modules_to_save=saved or None,
    )
    if select_modules(model, config).targets.keys() == ranks.keys():
        return config
    # A listed path fits longer paths that end like it, too; an expression fits whole paths only.
    return replace(config, target_modules="|".join(map(re.escape, ranks)))


def _fill(adapter: Adapter, update: Update) -> None:
    """Write an update into a new adapter, with zeros where its rank is larger."""
    embedding = hasattr(adapter, "lora_embedding_A")
    a, b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    new_a, new_b = cast(Tensor, getattr(adapter, a)), cast(Tensor, getattr(adapter, b))
    surplus = cast(LowRankAdapter, adapter).r // update.a.shape[0] - update.a.shape[1]
    new_a.copy_(F.pad(update.a, (0, 0, 0, surplus)).reshape(new_a.shape))
    new_b.copy_(F.pad(update.b, (0, surplus)).reshape(new_b.shape))
    if update.bias is not None:
        cast(Tensor, adapter.lora_B_bias).copy_(update.bias)
