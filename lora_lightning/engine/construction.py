"""Make adapters for the weights that they are to sit on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import Adapter, AdapterSpec, MultiWeightAdapter
from lora_lightning.adapters.config import AdapterConfig
from lora_lightning.adapters.registry import classes_for
from lora_lightning.adapters.trainable_tokens import (
    TiedTrainableTokensAdapter,
    TrainableTokensAdapter,
)
from lora_lightning.engine.targets.selection import Selection
from lora_lightning.errors import AdapterMismatchError, ConfigError
from lora_lightning.layers.base import AdaptedLayer
from lora_lightning.layers.conversion import attach_adapter, convert_back, convert_to_adapted
from lora_lightning.layers.experts import AdaptedExperts
from lora_lightning.layers.registry import layer_type_for
from lora_lightning.utilities.dtensor import full_tensor
from lora_lightning.utilities.wrappers import unwrapped


def make_adapters(
    targets: dict[str, nn.Module],
    selection: Selection,
    config: AdapterConfig,
    adapter_name: str,
    seed: int,
    device: torch.device | None,
    check_rank: bool,
    known: dict[str, Adapter],
    start: Mapping[str, Tensor],
    autocast_adapter_dtype: bool,
) -> dict[str, Adapter]:
    """The adapters for `targets`, by path; the modules become layers, without the adapters yet.

    All are made before the first one is put on: a rank that does not fit shows here, and then the
    modules become again what they were. `known` are those of the same name on other modules,
    `start` has start values of A by path.
    """
    fresh = [module for module in targets.values() if not isinstance(module, AdaptedLayer)]
    try:
        for path, module in targets.items():
            layer_type = AdaptedExperts if path in selection.parameters else layer_type_for(module)
            convert_to_adapted(module, cast(type[AdaptedLayer], layer_type))
        shapes = {
            path: list(cast(AdaptedLayer, module).weight_shapes().values())
            for path, module in targets.items()
        }
        shared = config.prepare(shapes, known) if shapes else None
        adapters = {
            path: _make_adapter(
                path,
                cast(AdaptedLayer, module),
                selection.parameters.get(path),
                config,
                adapter_name,
                seed,
                device,
                check_rank,
                selection.along.get(path),
                shared,
                autocast_adapter_dtype,
            )
            for path, module in targets.items()
        }
        for path, values in start.items():
            _start_with(adapters.get(path), path, values)
        return adapters
    except BaseException:
        for module in fresh:
            if isinstance(module, AdaptedLayer):
                convert_back(module)
        raise


def _make_adapter(
    path: str,
    layer: AdaptedLayer,
    parameters: list[str] | None,
    config: AdapterConfig,
    adapter_name: str,
    seed: int,
    device: torch.device | None,
    check_rank: bool,
    along: str | None,
    shared: Any,
    autocast_adapter_dtype: bool,
) -> Adapter:
    parts: dict[str, Adapter] = {}
    for weight_name in layer.weight_shapes() if parameters is None else parameters:
        stored = cast(Tensor, getattr(layer, weight_name))
        spec = make_spec(
            path, layer, weight_name, config, adapter_name, seed, device, check_rank, along
        )
        spec = replace(spec, shared=shared, autocast_adapter_dtype=autocast_adapter_dtype)
        adapter = classes_for(config)[layer.kind](spec)
        if adapter.needs_weight and device is None:
            if stored.is_meta:
                raise ConfigError(
                    f"The adapter of {path!r} starts from the base weight, which is on the meta "
                    "device and has no values yet: load the base first. (lora.init_lora_weights)"
                )
            adapter.start_from_weight(full_tensor(layer.base_weight(weight_name).detach()))
        parts[weight_name] = adapter
    if parts.keys() == {"weight"} and not isinstance(layer, AdaptedExperts):
        return parts["weight"]
    return MultiWeightAdapter(config, parts)


@torch.no_grad()
def _start_with(adapter: Adapter | None, path: str, values: Tensor) -> None:
    a = getattr(adapter, "lora_A", None)
    if a is None or a.shape != values.shape:
        found = "no adapter with an A" if a is None else f"an A of shape {tuple(a.shape)}"
        raise AdapterMismatchError(
            f"start has values of shape {tuple(values.shape)} for {path!r}, where this config puts "
            f"{found}. Give the config that eva_start returned with them."
        )
    a.copy_(values)


def make_spec(
    path: str,
    layer: AdaptedLayer,
    weight_name: str,
    config: AdapterConfig,
    adapter_name: str,
    seed: int,
    device: torch.device | None,
    check_rank: bool,
    along: str | None = None,
) -> AdapterSpec:
    """All that an adapter on one weight of `layer` is made from."""
    name = path if weight_name == "weight" else f"{path}.{weight_name}"
    return AdapterSpec(
        config=config,
        kind=layer.kind,
        shape=layer.weight_shapes()[weight_name],
        path=f"{path}.{weight_name}" if isinstance(layer, AdaptedExperts) else path,
        name=f"{name}.{adapter_name}",
        seed=seed,
        device=cast(Tensor, getattr(layer, weight_name)).device if device is None else device,
        base_dtype=layer.weight_dtype(weight_name),
        conv=layer.convolution(),
        transposed=bool(getattr(layer, "is_transposed", False)),
        check_rank=check_rank,
        along=along,
    )


def train_tokens(
    model: nn.Module,
    path: str,
    module: nn.Module,
    selection: Selection,
    config: AdapterConfig,
    adapter_name: str,
    device: torch.device | None,
    autocast_adapter_dtype: bool,
) -> None:
    """Put trained rows on an embedding, and on every head that is tied to it."""
    convert_to_adapted(module, cast(type[AdaptedLayer], layer_type_for(module)))
    spec = make_spec(
        path, cast(AdaptedLayer, module), "weight", config, adapter_name, 0, device, True
    )
    spec = replace(spec, autocast_adapter_dtype=autocast_adapter_dtype)
    rows = TrainableTokensAdapter(spec, selection.tokens[path])
    if device is None:
        rows.start_from_weight(full_tensor(cast(AdaptedLayer, module).base_weight().detach()))
    attach_adapter(module, AdaptedLayer, adapter_name, rows)
    for other, owner in selection.tied.items():
        if owner == path:
            head = unwrapped(model.get_submodule(other))
            attach_adapter(
                head,
                layer_type_for(head) or AdaptedLayer,
                adapter_name,
                TiedTrainableTokensAdapter(rows),
            )
