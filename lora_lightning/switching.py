"""Which adapters act: names, activation, and a context in which none does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from lora_lightning.adapters.trained_copy import TrainedCopy
from lora_lightning.bias import trained_biases
from lora_lightning.errors import AdapterStateError, did_you_mean
from lora_lightning.hosts.base import named_hosts
from lora_lightning.hosts.fast_path import close_fast_path, reopen_fast_path


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the adapters on `model`, in the order they were added."""
    return list(dict.fromkeys(name for _, host in named_hosts(model) for name in host.adapters))


def active_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that act on `model`."""
    return list(
        dict.fromkeys(name for _, host in named_hosts(model) for name in host.active_adapters)
    )


def set_adapter(model: nn.Module, names: str | Sequence[str], *, trainable: bool = True) -> None:
    """Make exactly these adapters active; their deltas add up.

    Args:
        model: A model with adapters.
        names: One name or several; none at all (`[]`) leaves the base alone.
        trainable: Whether the active ones require gradients. The others never do.

    Raises:
        AdapterStateError: If a name is unknown, if adapters are merged, or if two of the names
            both replace the same module by a trained copy.

    """
    check_enabled(model)
    names = [names] if isinstance(names, str) else list(names)
    known = adapter_names(model)
    for name in names:
        if name not in known:
            near = did_you_mean(name, known)
            hint = f" Did you mean {near!r}?" if near else ""
            raise AdapterStateError(f"No adapter {name!r}; the model has {known or 'none'}.{hint}")
    hosts = list(named_hosts(model))
    for path, host in hosts:
        if host.merged_adapters and host.active_adapters != [
            n for n in names if n in host.adapters
        ]:
            raise AdapterStateError(
                f"Adapters {host.merged_adapters} are merged into the base; "
                "call unmerge_adapter(model) before switching."
            )
        copies = [
            n for n in names if n in host.adapters and isinstance(host.adapters[n], TrainedCopy)
        ]
        if len(copies) > 1:
            raise AdapterStateError(
                f"Adapters {copies} each replace {path!r} by a copy of their own "
                "(modules_to_save); only one of them can be active at a time."
            )
    for _, host in hosts:
        host.active_adapters = [name for name in names if name in host.adapters]
        for name, adapter in host.adapters.items():
            _require_grad(adapter, trainable and name in names)
    for _, module, record in trained_biases(model):
        record.show(module, record.adapter_name in names)
        record.parameter(module).requires_grad_(trainable and record.adapter_name in names)


def activate_new(model: nn.Module, name: str, active: bool) -> None:
    """Bring freshly grown adapters `name` into the state `active`; others stay as they are."""
    for _, host in named_hosts(model):
        if name not in host.adapters:
            continue
        if active and name not in host.active_adapters:
            host.active_adapters = [*host.active_adapters, name]
        _require_grad(host.adapters[name], active)
    for _, module, record in trained_biases(model):
        if record.adapter_name == name:
            record.show(module, active)
            record.parameter(module).requires_grad_(active)


def _require_grad(adapter: nn.Module, wanted: bool) -> None:
    for parameter in adapter.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(wanted)


def check_enabled(model: nn.Module) -> None:
    """Refuse to change adapters inside `disable_adapter`, which puts back what it found.

    Raises:
        AdapterStateError: If the adapters are disabled at present.

    """
    if not all(host.adapters_enabled for _, host in named_hosts(model)):
        raise AdapterStateError(
            "The adapters are disabled at present: leave `with disable_adapter(model):` first."
        )


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Inside, the model is its base model bit for bit; afterwards everything is as it was."""
    hosts = [host for _, host in named_hosts(model)]
    enabled = [host.adapters_enabled for host in hosts]
    merged = [list(host.merged_adapters) for host in hosts]
    biases = [(module, record, record.shown) for _, module, record in trained_biases(model)]
    for host in hosts:
        host.unmerge()
        host.adapters_enabled = False
    for module, record, _ in biases:
        record.show(module, False)
    reopen_fast_path(model)
    try:
        yield
    finally:
        for host, was_enabled, names in zip(hosts, enabled, merged, strict=True):
            host.adapters_enabled = was_enabled
            host.merge(names)
        for module, record, shown in biases:
            record.show(module, shown)
        close_fast_path(model)
