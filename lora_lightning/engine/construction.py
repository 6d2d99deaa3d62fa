"""Make adapters for the weights that they are to sit on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import Adapter, AdapterModule, AdapterSpec, MultiWeightAdapter
from lora_lightning.adapters.config import AdapterConfig, pattern_value
from lora_lightning.adapters.registry import classes_for
from lora_lightning.adapters.trainable_tokens import (
    TiedTrainableTokensAdapter,
    TrainableTokensAdapter,
)
from lora_lightning.engine.targets.selection import Selection
from lora_lightning.errors import AdapterMismatchError, ConfigError, LoraError, RankError
from lora_lightning.layers.base import AdaptedLayer
from lora_lightning.layers.by_weight import AdaptedByWeight
from lora_lightning.layers.conversion import (
    attach_adapter,
    check_convertible,
    convert_back,
    convert_to_adapted,
)
from lora_lightning.layers.experts import AdaptedExperts
from lora_lightning.layers.offloading import compute_device, weights_in_place
from lora_lightning.layers.parametrized import value
from lora_lightning.layers.registry import layer_type_for
from lora_lightning.utilities.dtensor import full_tensor
from lora_lightning.utilities.wrappers import unwrapped


@dataclass(frozen=True)
class BuildContext:
    """Options that all adapters of one injection are made from, whatever weights they are for.

    Attributes:
        config: The options.
        adapter_name: The name that they get.
        seed: What random start values depend on, beside each tensor's name. Default: the seed that
            PyTorch was given.
        low_cpu_mem_usage: Make them on the meta device, without memory and start values.
        start: Start values of A by module path, as `eva_start` finds them.
        autocast_adapter_dtype: Whether 16-bit bases get fp32 adapters (PEFT's name for it).
        check_rank: Whether a rank that exceeds the weight's is an error.
        fit_rank: Whether it is lowered instead. Default: where target_modules names no module.
        shared: What all of them share; `config.prepare` makes it.

    """

    config: AdapterConfig
    adapter_name: str
    seed: int | None = None
    low_cpu_mem_usage: bool = False
    start: Mapping[str, Tensor] | None = None
    autocast_adapter_dtype: bool = True
    check_rank: bool = True
    fit_rank: bool | None = None
    shared: Any = None

    @property
    def device(self) -> torch.device | None:
        """Device of all tensors, or None where each lies with its weight."""
        return torch.device("meta") if self.low_cpu_mem_usage else None


def leave_out_unfit(
    context: BuildContext, selection: Selection, known: Mapping[str, AdapterModule]
) -> None:
    """Take those targets out of a default selection that this adapter cannot sit on.

    They are told by a try on the meta device: groups that the rank does not fit, a type that has
    no meaning there, a weight that is too small. `known` are the adapters of that name on the
    model already.

    Raises:
        LoraError: If there is none that it can sit on.

    """
    if not context.config.names_no_module:
        return
    tried = selection.targets.keys() - known.keys() - selection.parameters.keys()
    targets = {path: module for path, module in selection.targets.items() if path in tried}
    for path, module in targets.items():
        check_convertible(module, path)
    reasons: dict[str, LoraError] = {}
    with _layers(targets, selection, keep=False) as layers, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again
        trial = _prepared(replace(context, low_cpu_mem_usage=True, start=None), layers, known)
        for path, layer in layers.items():
            try:
                _make_adapter(trial, path, layer, selection)
            except (RankError, ConfigError) as error:
                named = getattr(context.config, "rank_pattern", {})
                if pattern_value(named, path, None) is not None:  # asked for
                    raise
                reasons[path] = error
    if len(reasons) == len(selection.targets) > 0:
        raise next(iter(reasons.values()))
    for path, reason in reasons.items():
        del selection.targets[path]
        selection.passed_over.unfit[path] = str(reason).partition(". ")[0]


def make_adapters(
    context: BuildContext,
    targets: dict[str, nn.Module],
    selection: Selection,
    known: Mapping[str, AdapterModule],
) -> dict[str, AdapterModule]:
    """The adapters for `targets`, by path; the modules become layers, without the adapters yet.

    All are made before the first one is put on: a rank that does not fit shows here, and then the
    modules become again what they were. `known` are those of the same name on other modules.
    """
    with _layers(targets, selection, keep=True) as layers:
        context = _prepared(context, layers, known)
        adapters = {
            path: _make_adapter(context, path, layer, selection) for path, layer in layers.items()
        }
        for path, values in (context.start or {}).items():
            _start_with(adapters.get(path), path, values)
    return adapters


@contextmanager
def _layers(
    targets: dict[str, nn.Module], selection: Selection, *, keep: bool
) -> Iterator[dict[str, AdaptedLayer]]:
    """Inside, the modules are layers; afterwards, too, unless `keep` is False or on an error."""
    fresh = [module for module in targets.values() if not isinstance(module, AdaptedLayer)]
    try:
        for path, module in targets.items():
            layer_type = AdaptedExperts if path in selection.parameters else layer_type_for(module)
            convert_to_adapted(module, cast(type[AdaptedLayer], layer_type))
        yield cast(dict[str, AdaptedLayer], targets)
    except BaseException:
        keep = False
        raise
    finally:
        for module in fresh:
            if isinstance(module, AdaptedLayer) and not keep:
                convert_back(module)


def _prepared(
    context: BuildContext, layers: dict[str, AdaptedLayer], known: Mapping[str, AdapterModule]
) -> BuildContext:
    """`context` with what the adapters of all these layers share."""
    shapes = {path: list(layer.weight_shapes().values()) for path, layer in layers.items()}
    return replace(context, shared=context.config.prepare(shapes, known)) if shapes else context


def _make_adapter(
    context: BuildContext, path: str, layer: AdaptedLayer, selection: Selection
) -> AdapterModule:
    parts: dict[str, Adapter] = {}
    for weight_name in selection.parameters.get(path, layer.weight_shapes()):
        spec = make_spec(context, path, layer, weight_name)
        spec = replace(spec, attention=selection.attentions.get(path))
        adapter = classes_for(context.config)[layer.kind](spec)
        if isinstance(layer, AdaptedByWeight):
            layer.check_adapter(adapter, path)
        if adapter.needs_weight and not context.low_cpu_mem_usage:
            if spec.device.type == "meta":
                raise ConfigError(
                    f"The adapter of {path!r} starts from the base weight, which is on the meta "
                    "device and has no values yet: load the base first. (lora.init_lora_weights)"
                )
            with weights_in_place(layer):
                adapter.start_from_weight(full_tensor(layer.base_weight(weight_name).detach()))
        parts[weight_name] = adapter
    if parts.keys() == {"weight"} and not isinstance(layer, AdaptedExperts):
        return parts["weight"]
    return MultiWeightAdapter(context.config, parts)


@torch.no_grad()
def _start_with(adapter: AdapterModule | None, path: str, values: Tensor) -> None:
    a = getattr(adapter, "lora_A", None)
    if a is None or a.shape != values.shape:
        found = "no adapter with an A" if a is None else f"an A of shape {tuple(a.shape)}"
        raise AdapterMismatchError(
            f"start has values of shape {tuple(values.shape)} for {path!r}, where this config puts "
            f"{found}. Give the config that eva_start returned with them."
        )
    a.copy_(values)


def fitted_ranks(adapters: Mapping[str, AdapterModule]) -> dict[str, int]:
    """The ranks that were lowered to what a layer allows, by its path."""
    return {
        path: r
        for path, adapter in adapters.items()
        for part in adapter.by_weight().values()
        if (r := part.fitted_rank) is not None
    }


def make_spec(
    context: BuildContext, path: str, layer: AdaptedLayer, weight_name: str = "weight"
) -> AdapterSpec:
    """Gather what an adapter on one weight of `layer` is made from."""
    weight = cast(Tensor, value(layer, weight_name))
    full_name = f"{path}.{weight_name}"
    fit = context.config.names_no_module if context.fit_rank is None else context.fit_rank
    fit &= len(layer.weight_shapes()) == 1 and not isinstance(layer, AdaptedExperts)
    name = path if weight_name == "weight" else full_name
    return AdapterSpec(
        config=context.config,
        kind=layer.kind,
        shape=layer.weight_shapes()[weight_name],
        path=full_name if isinstance(layer, AdaptedExperts) else path,
        name=f"{name}.{context.adapter_name}",
        seed=torch.initial_seed() if context.seed is None else context.seed,
        device=context.device or compute_device(layer, weight),
        base_dtype=layer.weight_dtype(weight_name),
        conv=layer.convolution(),
        transposed=bool(getattr(layer, "is_transposed", False)),
        check_rank=context.check_rank,
        fit_rank=fit,
        shared=context.shared,
        autocast_adapter_dtype=context.autocast_adapter_dtype,
    )


def train_tokens(
    context: BuildContext, model: nn.Module, path: str, module: nn.Module, selection: Selection
) -> None:
    """Put trained rows on an embedding, and on every head that is tied to it."""
    convert_to_adapted(module, cast(type[AdaptedLayer], layer_type_for(module)))
    layer = cast(AdaptedLayer, module)
    rows = TrainableTokensAdapter(make_spec(context, path, layer), selection.tokens[path])
    if not context.low_cpu_mem_usage:
        with weights_in_place(layer):
            rows.start_from_weight(full_tensor(layer.base_weight().detach()))
    attach_adapter(layer, AdaptedLayer, context.adapter_name, rows)
    for other, owner in selection.tied.items():
        if owner == path:
            head = unwrapped(model.get_submodule(other))
            layer_type = layer_type_for(head) or AdaptedLayer
            attach_adapter(head, layer_type, context.adapter_name, TiedTrainableTokensAdapter(rows))
