"""Make adapters for the weights that they are to sit on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import Adapter, AdapterParts, Site
from lora_lightning.adapters.config import AdapterConfig
from lora_lightning.adapters.registry import classes_for
from lora_lightning.adapters.trainable_tokens import TiedTokenRows, TokenRows
from lora_lightning.engine.targets.selection import Selection
from lora_lightning.errors import AdapterMismatchError, ConfigError
from lora_lightning.layers.base import Host
from lora_lightning.layers.conversion import become_host, grow, leave_host
from lora_lightning.layers.experts import ExpertsHost
from lora_lightning.layers.registry import host_type_for
from lora_lightning.utilities.compiled import uncompiled
from lora_lightning.utilities.dtensor import whole


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
    """The adapters for `targets`, by path; the modules become hosts, without the adapters yet.

    All are made before the first one is put on: a rank that does not fit shows here, and then the
    modules become again what they were. `known` are those of the same name on other modules,
    `start` has start values of A by path.
    """
    fresh = [module for module in targets.values() if not isinstance(module, Host)]
    try:
        for path, module in targets.items():
            host_type = ExpertsHost if path in selection.parameters else host_type_for(module)
            become_host(module, cast(type[Host], host_type))
        shapes = {
            path: list(cast(Host, module).weight_shapes().values())
            for path, module in targets.items()
        }
        shared = config.prepare(shapes, known) if shapes else None
        adapters = {
            path: _make_adapter(
                path,
                cast(Host, module),
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
            if isinstance(module, Host):
                leave_host(module)
        raise


def _make_adapter(
    path: str,
    host: Host,
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
    for weight_name in host.weight_shapes() if parameters is None else parameters:
        stored = cast(Tensor, getattr(host, weight_name))
        site = make_site(
            path, host, weight_name, config, adapter_name, seed, device, check_rank, along
        )
        site = replace(site, shared=shared, autocast_adapter_dtype=autocast_adapter_dtype)
        adapter = classes_for(config)[host.kind](site)
        if adapter.needs_weight and device is None:
            if stored.is_meta:
                raise ConfigError(
                    f"The adapter of {path!r} starts from the base weight, which is on the meta "
                    "device and has no values yet: load the base first. (lora.init_lora_weights)"
                )
            adapter.start_from_weight(whole(host.base_weight(weight_name).detach()))
        parts[weight_name] = adapter
    if parts.keys() == {"weight"} and not isinstance(host, ExpertsHost):
        return parts["weight"]
    return AdapterParts(config, parts)


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


def make_site(
    path: str,
    host: Host,
    weight_name: str,
    config: AdapterConfig,
    adapter_name: str,
    seed: int,
    device: torch.device | None,
    check_rank: bool,
    along: str | None = None,
) -> Site:
    """All that an adapter on one weight of `host` is made from."""
    name = path if weight_name == "weight" else f"{path}.{weight_name}"
    return Site(
        config=config,
        kind=host.kind,
        shape=host.weight_shapes()[weight_name],
        path=f"{path}.{weight_name}" if isinstance(host, ExpertsHost) else path,
        name=f"{name}.{adapter_name}",
        seed=seed,
        device=cast(Tensor, getattr(host, weight_name)).device if device is None else device,
        base_dtype=host.weight_dtype(weight_name),
        conv=host.convolution(),
        transposed=bool(getattr(host, "is_transposed", False)),
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
    become_host(module, cast(type[Host], host_type_for(module)))
    site = make_site(path, cast(Host, module), "weight", config, adapter_name, 0, device, True)
    site = replace(site, autocast_adapter_dtype=autocast_adapter_dtype)
    rows = TokenRows(site, selection.tokens[path])
    if device is None:
        rows.start_from_weight(whole(cast(Host, module).base_weight().detach()))
    grow(module, Host, adapter_name, rows)
    for other, owner in selection.tied.items():
        if owner == path:
            head = uncompiled(model.get_submodule(other))
            grow(head, host_type_for(head) or Host, adapter_name, TiedTokenRows(rows))
