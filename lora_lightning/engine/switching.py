"""Choose which adapters act: by name, by row of a batch, none at all; and how strongly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import isfinite

from torch import nn

from lora_lightning.adapters.base import Adapter, AdapterModule, DeltaAdapter
from lora_lightning.adapters.carried import is_carried
from lora_lightning.adapters.modules_to_save import ModulesToSaveCopy
from lora_lightning.engine.bias import trained_biases
from lora_lightning.errors import AdapterStateError, first_few, nearest_hint, warn
from lora_lightning.layers.base import AdaptedLayer
from lora_lightning.layers.torch_fast_path import close_fast_path, reopen_fast_path
from lora_lightning.layers.traversal import named_adapted_layers
from lora_lightning.utilities.dtensor import reshard


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the adapters on `model`, in the order they were added."""
    names = (name for _, layer in named_adapted_layers(model) for name in layer.adapters)
    return list(dict.fromkeys(names))


def active_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that act on `model`."""
    names = (name for _, layer in named_adapted_layers(model) for name in layer.active_adapters)
    return list(dict.fromkeys(names))


def layers_with(model: nn.Module, adapter_name: str) -> list[tuple[str, AdaptedLayer]]:
    """(path, layer) of every module that the adapter is on.

    Teachers that carry it (`engine/followers.py`) are left out.
    """
    return [
        (path, layer)
        for path, layer in named_adapted_layers(model)
        if adapter_name in layer.adapters and not is_carried(layer.adapters[adapter_name])
    ]


def set_adapter(model: nn.Module, names: str | Sequence[str], *, trainable: bool = True) -> None:
    """Make exactly these adapters active; their deltas add up.

    Args:
        model: A model with adapters.
        names: One name or several; none at all (`[]`) leaves the base alone.
        trainable: Whether the active ones require gradients. The others never do.

    Raises:
        AdapterStateError: If a name is unknown, if adapters are merged, or if two of the names
            both train the same module in full.

    """
    check_enabled(model)
    names = [names] if isinstance(names, str) else list(names)
    check_known(model, *names)
    layers = list(named_adapted_layers(model))
    for path, layer in layers:
        if layer.merged_adapters and layer.active_adapters != [
            n for n in names if n in layer.adapters
        ]:
            raise AdapterStateError(
                f"Adapters {layer.merged_adapters} are merged into the base; "
                "call unmerge_adapter(model) before switching."
            )
        copies = [n for n in names if n in layer.trained_copies()]
        if len(copies) > 1:
            raise AdapterStateError(
                f"Adapters {copies} each train {path!r} in full, and it can be only one of them "
                "at a time. Activate one; give the rows of a batch theirs (adapters_per_row); or "
                "make one of both: add_weighted_adapter(..., modules_to_save='mean'). "
                "(lora.modules_to_save)"
            )
    for _, layer in layers:
        layer.active_adapters = [name for name in names if name in layer.adapters]
        for name, adapter in layer.adapters.items():
            _require_grad(adapter, trainable and name in names)
    for _, module, record in trained_biases(model):
        record.show(module, record.adapter_name in names)
        record.parameter(module).requires_grad_(trainable and record.adapter_name in names)
    reshard(model)  # so that what FSDP2 has gathered goes where it is used now


@contextmanager
def adapters_per_row(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Inside, row i of every batch goes through adapter `names[i]` alone; None: the base.

        with adapters_per_row(model, ["french", "german", None]):
            model(batch_of_three)

    Active adapters play no part inside. The rows of one adapter are computed together, and just as
    a batch of their own would be.

    Args:
        model: A model with adapters, none of them merged. Every adapted module must get the batch
            in its first dimension.
        names: The name of an adapter, or None, for each row.

    Raises:
        AdapterStateError: If a name is unknown, adapters are merged, or an adapter trains biases
            of the base, which all rows share. Inside: if a module is called with another number
            of rows.

    """
    _check_not_disabled(model)
    check_known(model, *(name for name in names if name is not None))
    for path, layer in named_adapted_layers(model):
        if layer.kind == "experts" and any(a.by_weight() for a in layer.adapters.values()):
            raise AdapterStateError(
                f"{path!r} ({layer.base_type.__name__}) carries adapters on several weights; such "
                "modules cannot give every row an adapter of its own. Run one batch per adapter."
            )
        if layer.merged_adapters:
            raise AdapterStateError(
                f"Adapters {layer.merged_adapters} are merged into the base, which every row would "
                "go through; call unmerge_adapter(model) first."
            )
    for path, _, record in trained_biases(model):
        if record.shown or record.adapter_name in names:
            raise AdapterStateError(
                f"Adapter {record.adapter_name!r} trains {path!r} of the base itself (bias), which "
                "all rows of a batch share. Run its rows as a batch of their own."
            )
    before = [(layer, layer.row_adapters) for _, layer in named_adapted_layers(model)]
    for layer, _ in before:
        layer.row_adapters = list(names)
    try:
        with _heads_called(model, names):
            yield
    finally:
        for layer, rows in before:
            layer.row_adapters = rows


@contextmanager
def _heads_called(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Warn where rows have heads of their own, and what a head is was not asked for as a whole."""
    layers = dict(named_adapted_layers(model))
    heads = [path for path, layer in layers.items() if {*layer.trained_copies()} & {*names}]
    acted = {path: layer._has_acted for path, layer in layers.items()}
    for layer in layers.values():
        layer._has_acted = False
    try:
        yield
        passed_over = [path for path in heads if not layers[path]._has_acted]
        if passed_over and any(layer._has_acted for layer in layers.values()):
            warn(
                f"adapters_per_row: {first_few(passed_over)} trains in full, and was not called "
                "itself. If its parts were called, or its weights read, these were those of the "
                "base for all rows: call it as a whole. (lora.modules_to_save)",
                stacklevel=4,
            )
    finally:
        for path, layer in layers.items():
            layer._has_acted |= acted[path]


def scale_adapter(model: nn.Module, adapter_name: str, factor: float) -> None:
    """Scale an adapter by `factor` times the scaling of its own config; 1 restores it.

    W + factor * delta: between 0 (the base) and 1 (as trained) this interpolates (WiSE-FT), beyond
    it exaggerates. Not so with DoRA, where B A is scaled inside the norm and the magnitude is not,
    and for trained copies, which stay as they are. Compiled code is not compiled again. Not saved:
    a property of the run.

    Raises:
        AdapterStateError: If there is no such adapter, it is merged, or its type has no scaling.

    """
    check_known(model, adapter_name)
    scaled = []
    for path, layer in layers_with(model, adapter_name):
        if adapter_name in layer.merged_adapters:
            raise AdapterStateError(
                f"Adapter {adapter_name!r} is merged into the base; call unmerge_adapter(model) "
                "before scaling it."
            )
        for part in layer.adapters[adapter_name].modules():
            if isinstance(part, DeltaAdapter):
                scaled.append(part)
            elif isinstance(part, Adapter):
                raise AdapterStateError(
                    f"The adapter {adapter_name!r} on {path!r} is a {type(part).__name__}, which "
                    "has no scaling."
                )
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not isfinite(factor):
        raise AdapterStateError(f"factor is {factor!r}; it must be a finite number.")
    for part in scaled:
        part.set_scaling(part.config_scaling * factor)
    for _, layer in layers_with(model, adapter_name):
        layer.note_switch()


def activate_new(model: nn.Module, name: str, active: bool) -> None:
    """Bring new adapters `name` into the state `active`; others stay as they are."""
    for _, layer in layers_with(model, name):
        if active and name not in layer.active_adapters:
            layer.active_adapters = [*layer.active_adapters, name]
        _require_grad(layer.adapters[name], active)
    for _, module, record in trained_biases(model, name):
        record.show(module, active)
        record.parameter(module).requires_grad_(active)


def set_trainable(model: nn.Module, name: str, trainable: bool) -> None:
    """Set whether an adapter's tensors require gradients; which adapters act stays as it is."""
    check_known(model, name)
    for _, layer in layers_with(model, name):
        _require_grad(layer.adapters[name], trainable)
    for _, module, record in trained_biases(model, name):
        # Hidden values do not train: in their place the base's own would.
        record.parameter(module).requires_grad_(trainable and record.shown)


def check_known(model: nn.Module, *names: str) -> None:
    """Refuse names that no adapter on `model` has by an AdapterStateError with the nearest one."""
    known = adapter_names(model)
    for name in names:
        if name not in known:
            hint = nearest_hint(name, known)
            raise AdapterStateError(f"No adapter {name!r}; the model has {known or 'none'}.{hint}")


def _require_grad(adapter: AdapterModule, wanted: bool) -> None:
    wanted = wanted and not is_carried(adapter)
    frozen = adapter.kept_frozen if isinstance(adapter, ModulesToSaveCopy) else ()
    for name, parameter in adapter.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(wanted and name not in frozen)


def check_enabled(model: nn.Module) -> None:
    """Refuse to change adapters inside `disable_adapter` and `adapters_per_row`."""
    _check_not_disabled(model)
    if any(layer.row_adapters is not None for _, layer in named_adapted_layers(model)):
        raise AdapterStateError(
            "Every row has an adapter of its own at present: leave "
            "`with adapters_per_row(model, names):` first."
        )


def _check_not_disabled(model: nn.Module) -> None:
    if not all(layer.adapters_enabled for _, layer in named_adapted_layers(model)):
        raise AdapterStateError(
            "The adapters are disabled at present: leave `with disable_adapter(model):` first."
        )


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Inside, the model is its base model bit for bit; afterwards everything is as it was."""
    layers = [(m, m.adapters_enabled, [*m.merged_adapters]) for _, m in named_adapted_layers(model)]
    biases = [(module, record, record.shown) for _, module, record in trained_biases(model)]
    for layer, _, _ in layers:
        layer.unmerge()
        layer.adapters_enabled = False
    for module, record, _ in biases:
        record.show(module, False)
    reopen_fast_path(model)
    reshard(model)
    try:
        yield
    finally:
        for layer, was_enabled, names in layers:
            layer.adapters_enabled = was_enabled
            layer.merge(names)
        for module, record, shown in biases:
            record.show(module, shown)
        close_fast_path(model)
        reshard(model)
