"""Tables of the adapters on a model, layer by layer."""

from __future__ import annotations

import io
from dataclasses import dataclass, field

from torch import nn

from lora_lightning.engine.bias import trained_biases
from lora_lightning.engine.switching import active_adapters, adapter_names
from lora_lightning.errors import first_few, printable
from lora_lightning.layers.instance_forward import PatchableLayer, is_patched, why_not_run
from lora_lightning.layers.traversal import named_adapted_layers
from lora_lightning.utilities.rng import random_state_kept


@dataclass
class LayerStatus:
    """One module that carries adapters.

    Attributes:
        path, module_type: The module and its own class.
        enabled: False inside `disable_adapter`.
        training: False in eval mode.
        has_acted: Whether an adapter on it took part in a forward so far, outside of compiled code.
        adapters: Name and type of every adapter on it, {"default": "LoraAdapter"}.
        active, merged: Names of those that act in forward, and of those in the weight.
        trainable: Whether it requires gradients, by name: True, False, or None where some of its
            tensors do and some do not, or where it has none (in a head that shares its table's
            token rows).
        parameters: By name, how many numbers it has.
        devices, dtypes: By name, of its tensors.

    """

    path: str
    module_type: str
    enabled: bool
    training: bool = True
    has_acted: bool = False
    adapters: dict[str, str] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    merged: list[str] = field(default_factory=list)
    trainable: dict[str, bool | None] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    devices: dict[str, list[str]] = field(default_factory=dict)
    dtypes: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class AdapterStatus:
    """Adapters on a model; printing it gives a table.

    Attributes:
        layers: The modules that carry adapters.
        adapters, active: Names of all adapters, and of those that act somewhere.
        biases: By name of the adapter, the biases of the base that train with it.
        idle: Paths of those that no forward came by, though it came by others.
        trainable_parameters, total_parameters: Counted over the whole model.
        irregular: What differs from layer to layer though it is set for the whole model at once,
            and layers that may not run their adapters.

    """

    layers: list[LayerStatus]
    adapters: list[str]
    active: list[str]
    biases: dict[str, list[str]]
    idle: list[str]
    trainable_parameters: int
    total_parameters: int
    irregular: list[str]

    @random_state_kept()  # rich draws from Python's generator
    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table()
        for column in ("module", "kind", "adapter", "type", "state", "trains", "parameters"):
            table.add_column(column, justify="right" if column == "parameters" else "left")
        for layer in self.layers:
            for name, adapter_type in layer.adapters.items():
                trains = _trains(layer, name)
                cells = (layer.path, layer.module_type, name, adapter_type, _state(layer, name))
                table.add_row(*map(Text, cells), trains, f"{layer.parameters[name]:,}")
        # As wide as it takes: names that are cut off tell nothing.
        console = Console(file=io.StringIO(), width=10_000, color_system=None)
        with console.capture() as captured:
            console.print(table)
        lines = [captured.get().rstrip()]
        lines += [
            f"adapter {name!r} trains {len(biases)} biases of the base: {first_few(biases, 3)}"
            for name, biases in self.biases.items()
        ]
        if self.idle:
            lines.append(
                f"adapted, but not called so far: {first_few(self.idle, 3)}; where a weight is "
                "read past its module, or the module is not part of the model's forward, an "
                "adapter has no effect (lora.exclude_modules)"
            )
        lines.append(
            f"trainable {self.trainable_parameters:,} of {self.total_parameters:,} parameters"
        )
        return printable("\n".join([*lines, *self.irregular]))


def adapter_status(model: nn.Module) -> AdapterStatus:
    """Report which adapters sit where, and which of them act, are merged, or train."""
    entries = []
    biases: dict[str, list[str]] = {}
    for path, _, record in trained_biases(model):
        biases.setdefault(record.adapter_name, []).append(path)
    shadowed = []
    for path, layer in named_adapted_layers(model):
        if layer.adapters and (reason := why_not_run(layer)) is not None:
            shadowed.append(f"{path!r} ({layer.base_type.__name__}): {reason}")
        entry = LayerStatus(
            path,
            layer.base_type.__name__,
            layer.adapters_enabled,
            layer.training,
            layer._has_acted,
            active=list(layer.active_adapters),
            merged=list(layer.merged_adapters),
        )
        for name, adapter in layer.adapters.items():
            parameters = list(adapter.parameters())
            required = {p.requires_grad for p in parameters if p.is_floating_point()}
            entry.adapters[name] = type(adapter).__name__
            entry.trainable[name] = required.pop() if len(required) == 1 else None
            entry.parameters[name] = sum(p.numel() for p in parameters)
            entry.devices[name] = sorted({str(p.device) for p in parameters})
            entry.dtypes[name] = sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
        entries.append(entry)
    return AdapterStatus(
        layers=entries,
        adapters=adapter_names(model),
        active=active_adapters(model),
        biases=biases,
        idle=_idle(model, entries),
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total_parameters=sum(p.numel() for p in model.parameters()),
        irregular=[*_irregular(entries), *shadowed],
    )


def _state(layer: LayerStatus, name: str) -> str:
    if "meta" in layer.devices[name]:
        return "without values"
    if name in layer.merged:
        return "merged"
    if name not in layer.active:
        return "inactive"
    return "active" if layer.enabled else "disabled"


def _trains(layer: LayerStatus, name: str) -> str:
    if not layer.parameters[name]:
        return ""
    if layer.trainable[name] is False:
        return "no"
    if not layer.training:
        return "not in eval mode"
    return "yes" if layer.trainable[name] else "in part"


def _idle(model: nn.Module, layers: list[LayerStatus]) -> list[str]:
    # Of compiled code nobody notes what it calls.
    compiled = any(
        "_orig_mod" in module._modules
        or module.__dict__.get("_compiled_call_impl")
        or (
            isinstance(module, PatchableLayer) and is_patched(module)
        )  # layer.forward = compile(...)
        for module in model.modules()
    )
    acting = [la for la in layers if any(_state(la, name) == "active" for name in la.adapters)]
    if compiled or not any(layer.has_acted for layer in acting):
        return []
    return [layer.path for layer in acting if not layer.has_acted]


def _irregular(layers: list[LayerStatus]) -> list[str]:
    lines = []
    for name in dict.fromkeys(name for layer in layers for name in layer.adapters):
        carrying = [layer for layer in layers if name in layer.adapters]
        for what, values in (
            ("state", {_state(layer, name) for layer in carrying}),
            ("requires_grad", {la.trainable[name] for la in carrying if la.parameters[name]}),
        ):
            if len(values) > 1:
                shown = ", ".join(sorted(map(str, values)))
                lines.append(f"adapter {name!r}: {what} differs between layers ({shown})")
    return lines
