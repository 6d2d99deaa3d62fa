"""Put adapters on a model, in place, and take them off again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor, nn

from lora_lightning.adapters.base import AdapterDict, AdapterModule
from lora_lightning.adapters.config import AdapterConfig
from lora_lightning.adapters.config_errors import explain_no_config
from lora_lightning.adapters.modules_to_save import ModulesToSaveCopy
from lora_lightning.adapters.trainable_tokens import check_token_ids
from lora_lightning.engine.bias import (
    TrainedBias,
    biases_to_train,
    forget_bias,
    train_bias,
    trained_biases,
)
from lora_lightning.engine.construction import (
    BuildContext,
    leave_out_unfit,
    make_adapters,
    train_tokens,
)
from lora_lightning.engine.first_step import watch_first_step
from lora_lightning.engine.followers import drop_carried
from lora_lightning.engine.freezing import (
    freeze_parameters,
    frozen_for_adapters,
    keep_records_beside,
    partly_frozen,
    remember_frozen,
)
from lora_lightning.engine.loftq import original_weights, start_from_rounding_error
from lora_lightning.engine.norm_stats import freeze_norm_stats, unfreeze_norm_stats
from lora_lightning.engine.resizing import hold_sizes, release_sizes
from lora_lightning.engine.saving import hold_saving, release_saving
from lora_lightning.engine.switching import (
    activate_new,
    active_adapters,
    adapter_names,
    check_enabled,
    layers_with,
)
from lora_lightning.engine.targets.selection import Selection, select_modules
from lora_lightning.errors import AdapterStateError, ConfigError, TargetError
from lora_lightning.layers.base import AdaptedLayer
from lora_lightning.layers.conversion import (
    attach_adapter,
    check_convertible,
    check_detachable,
    detach_adapter,
)
from lora_lightning.layers.in_place import kept_beside
from lora_lightning.layers.multihead_attention import route_out_projections
from lora_lightning.layers.offloading import offloaded_as_a_whole, offloading_hook
from lora_lightning.layers.parametrized import value
from lora_lightning.layers.quantized.bitsandbytes import close_cpu_packing, reopen_cpu_packing
from lora_lightning.layers.registry import layer_type_for
from lora_lightning.layers.sequential import AdaptedSequential
from lora_lightning.layers.torch_fast_path import close_fast_path, reopen_fast_path
from lora_lightning.layers.traversal import named_adapted_layers
from lora_lightning.utilities.wrappers import unwrapped


def inject_adapter(
    model: nn.Module,
    config: AdapterConfig,
    adapter_name: str = "default",
    *,
    seed: int | None = None,
    low_cpu_mem_usage: bool = False,
    start: Mapping[str, Tensor] | None = None,
    autocast_adapter_dtype: bool = True,
) -> Selection:
    """Put one adapter on every module that `config` selects, in place, and freeze the base.

    The first adapter on a model is active and trainable; later ones are neither until
    `set_adapter` names them. Frozen norm layers that track statistics stay in eval mode as long as
    adapters are on. Everything is checked before anything is touched.

    Args:
        model: Any module. Its parameters keep their names; its own state dict still loads.
        config: What to adapt and how.
        adapter_name: A name for it; a model can carry several.
        seed: What random start values depend on, beside each tensor's name. Default: the seed
            PyTorch was given (`seed_everything`, `torch.manual_seed`).
        low_cpu_mem_usage: Make the adapter on the meta device, without memory and start values;
            `load_adapter_state_dict` or `load_adapter` then fills it.
        start: Start values of A by module path, as `eva_start` finds them.
        autocast_adapter_dtype: Adapters on a base in bf16 or fp16 are fp32 and stay so when the
            model is cast. False: they have the base's dtype and are cast along with it; on a
            quantised base they start in fp32. Trained copies (modules_to_save) and single trained
            rows count as adapters; biases always have the dtype of what they replace.

    Returns:
        What was selected.

    Raises:
        ConfigError: If `config` is none, or stands in the model's place.
        TargetError: If the config selects nothing, or something that cannot be adapted.
        RankError: If a rank exceeds what a layer's size allows.
        AdapterStateError: If the model already has an adapter of that name, or merged ones.

    """
    if not isinstance(config, AdapterConfig) or not isinstance(model, nn.Module):
        raise ConfigError(explain_no_config(config, "inject_adapter"))
    check_new_name(model, adapter_name)
    context = BuildContext(
        config, adapter_name, seed, low_cpu_mem_usage, start, autocast_adapter_dtype
    )
    return extend_adapter(model, context)


def extend_adapter(model: nn.Module, context: BuildContext) -> Selection:
    """`inject_adapter` for a model that grows: modules that carry the adapter already keep it."""
    name = context.adapter_name
    if not name or not name.isprintable() or "." in name or hasattr(AdapterDict(), name):
        raise ConfigError(
            f"adapter_name {name!r} cannot be used: a name is not empty, can be printed, has "
            "no '.', and is no attribute of a torch ModuleDict (such as 'keys'). "
            "(lora.adapter_name)"
        )
    needs_start = getattr(context.config, "init_lora_weights", True) == "eva"
    if needs_start and context.start is None and not context.low_cpu_mem_usage:
        raise ConfigError(
            "init_lora_weights='eva' starts from data: LoraCallback takes the first batches of the "
            "run; by hand, config, start = eva_start(model, config, batches, forward), then "
            "inject_adapter(model, config, start=start). (lora.init_lora_weights)"
        )
    with unchanged_on_error(model):
        selection = select_modules(model, context.config)
        leave_out_unfit(context, selection, adapters_named(model, name))
        new = _new_modules(model, context, selection)
        if new.targets or new.saved or new.tokens or new.biases:
            check_enabled(model)
            check_unmerged(model)
            _put_on(model, context, selection, new)
            watch_first_step(model)
        return selection


@dataclass
class _NewModules:
    """Selected modules that do not carry the adapter yet, by path, and the owners of new biases."""

    targets: dict[str, nn.Module]
    saved: dict[str, nn.Module]
    tokens: dict[str, nn.Module]
    biases: list[nn.Module] = field(default_factory=list)


def _new_modules(model: nn.Module, context: BuildContext, selection: Selection) -> _NewModules:
    name = context.adapter_name
    new = _NewModules(
        _without_adapter(selection.targets, name),
        _without_adapter(selection.saved, name),
        _without_adapter(_modules(model, selection.tokens), name),
    )
    for path, module in {**new.targets, **_modules(model, selection.tied)}.items():
        check_convertible(module, path)
        if (outer := offloaded_as_a_whole(model, path)) is not None:
            raise TargetError(
                f"{path!r} ({type(module).__name__}) is offloaded (accelerate) together with all "
                f"that is inside {outer!r}, and an adapter would be, too. Load the model without "
                "preload_module_classes, or without offloading. (lora.target_modules)"
            )
    for path, module in new.tokens.items():
        check_convertible(module, path, "trainable_token_indices")
        rows = cast(Tensor, value(module, "weight")).shape[0]
        check_token_ids(selection.tokens[path], rows, path)
    for path, module in new.saved.items():
        check_convertible(module, path, "modules_to_save")
        _check_not_offloaded(module, path, "modules_to_save")
        _check_in_place(model, path, module)
    new.biases = _new_biases(model, context, selection)
    for module in new.biases:
        _check_not_offloaded(module, f"the bias of a {type(module).__name__}", "bias")
    return new


def _check_not_offloaded(module: nn.Module, what: str, option: str) -> None:
    if any(offloading_hook(part) is not None for part in module.modules()):
        raise TargetError(
            f"{option} would train {what!r} itself, but it is offloaded (accelerate): what it "
            "learns would be lost after the next forward. Give it an adapter, or load the model "
            f"without offloading. (lora.{option})"
        )


def _check_in_place(model: nn.Module, path: str, module: nn.Module) -> None:
    """Refuse to train a module in full whose places cannot take other tensors."""
    if any(hasattr(type(child), "set_reshard_after_forward") for child in module.modules()):
        raise TargetError(
            f"modules_to_save names a {type(module).__name__} that fully_shard made a unit of its "
            "own, which cannot be copied. Build the model in __init__, so that the copy is made "
            "before it is sharded. (lora.modules_to_save)"
        )
    if (beside := kept_beside(model, module)) is not None:
        raise TargetError(
            f"{path!r} ({type(module).__name__}) cannot train in full: {beside!r} keeps some of "
            "its tensors by itself, and what reads them there would go on with those of the base. "
            "Register them where they are used (nn.ParameterList, nn.ModuleList) or read them from "
            "the module each time. (lora.modules_to_save)"
        )
    for other, layer in named_adapted_layers(model):
        inside, around = other.startswith(path + "."), path.startswith(other + ".")
        if layer.trains_in_place and (inside or around):
            raise AdapterStateError(
                f"{path!r} cannot train in full beside {other!r}, which adapter "
                f"{next(iter(layer.trained_copies()))!r} trains in full: one is part of the other. "
                "Name the same module for both. (lora.modules_to_save)"
            )


def _put_on(
    model: nn.Module, context: BuildContext, selection: Selection, new: _NewModules
) -> None:
    config, name = context.config, context.adapter_name
    adapters = make_adapters(context, new.targets, selection, adapters_named(model, name))
    others = adapter_names(model)
    active = not others or name in active_adapters(model)
    modes = {path: _mode_of(module, model) for path, module in new.saved.items()}
    if not others:
        freeze(model)
    for path, adapter in adapters.items():
        attach_adapter(new.targets[path], AdaptedLayer, name, adapter)
    for path, module in new.tokens.items():
        train_tokens(context, model, path, module, selection)
    for path, module in new.saved.items():
        trained = ModulesToSaveCopy(module, config, context.device, partly_frozen(module))
        plain = AdaptedSequential if isinstance(module, nn.Sequential) else AdaptedLayer
        attach_adapter(module, layer_type_for(module) or plain, name, trained)
        module.get_submodule("adapters").train(modes[path])
    fused = (m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer))
    inside = {part for layer in fused for part in layer.modules()}
    for module in new.biases:
        train_bias(module, name, module not in inside)
    for adapter in adapters_named(model, name).values():
        adapter.set_autocast_dtype(context.autocast_adapter_dtype)
    route_out_projections(model)
    close_fast_path(model)
    close_cpu_packing(model)
    hold_sizes(model)
    hold_saving(model)
    activate_new(model, name, active)
    freeze_norm_stats(model)
    loftq = getattr(config, "loftq_config", None)
    if loftq is not None and not context.low_cpu_mem_usage:
        start_from_rounding_error(model, original_weights(loftq.weights), name)


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Take one adapter off; modules without any other become what they were.

    Raises:
        AdapterStateError: If there is no such adapter, or it is merged.

    """
    check_enabled(model)
    names = adapter_names(model)
    if adapter_name not in names:
        raise AdapterStateError(
            f"The model has no adapter {adapter_name!r}; it has {names or 'none at all'}."
        )
    check_unmerged(model, adapter_name)
    layers = layers_with(model, adapter_name)
    for path, layer in layers:
        if len(layer.adapters) == 1:
            check_detachable(layer, path)
    for _, layer in layers:
        detach_adapter(layer, adapter_name)
    drop_carried(model, adapter_name)
    route_out_projections(model)
    for _, module, _ in list(trained_biases(model, adapter_name)):
        forget_bias(module)
    reopen_fast_path(model)
    close_fast_path(model)  # other adapters may still need it closed
    reopen_cpu_packing(model)
    close_cpu_packing(model)
    release_sizes(model)
    hold_sizes(model)
    release_saving(model)
    hold_saving(model)
    if not adapter_names(model):
        unfreeze_norm_stats(model)
        keep_records_beside(model)


def freeze(model: nn.Module) -> None:
    """`requires_grad=False` on everything that is in no adapter; norm statistics frozen too."""
    freeze_parameters(model)
    freeze_norm_stats(model)


def check_new_name(model: nn.Module, adapter_name: str) -> None:
    """Refuse a name that an adapter on `model` has already."""
    if adapter_name in adapter_names(model):
        raise AdapterStateError(
            f"The model already has an adapter {adapter_name!r}. Take it off first with "
            f"delete_adapter(model, {adapter_name!r}), or choose another name."
        )


def check_unmerged(model: nn.Module, adapter_name: str | None = None) -> None:
    """Refuse adapters that are merged into the base: this one, or any."""
    for path, layer in named_adapted_layers(model):
        if layer.merged_adapters if adapter_name is None else adapter_name in layer.merged_adapters:
            raise AdapterStateError(
                f"Adapters {layer.merged_adapters} are merged into the base ({path!r}, for one). "
                "Call unmerge_adapter(model) first."
            )


def _mode_of(module: nn.Module, model: nn.Module) -> bool:
    """Whether the module is in train mode, or would be if it were no norm frozen for adapters."""
    if isinstance(module, AdaptedLayer):
        return module.adapters.training
    return model.training if "train" in module.__dict__ else module.training


def _without_adapter(modules: dict[str, nn.Module], name: str) -> dict[str, nn.Module]:
    return {
        path: module
        for path, module in modules.items()
        if not (isinstance(module, AdaptedLayer) and name in module.adapters)
    }


def _modules(model: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    return {path: unwrapped(model.get_submodule(path)) for path in paths}


def _new_biases(model: nn.Module, context: BuildContext, selection: Selection) -> list[nn.Module]:
    owners = {
        id(record.parameter(module)): record.adapter_name
        for _, module, record in trained_biases(model)
    }
    found = []
    for path, module in biases_to_train(model, context.config.bias, set(selection.targets)):
        if any(path == outer or path.startswith(outer + ".") for outer in selection.saved):
            continue
        owner = owners.get(id(TrainedBias.parameter(module)))
        if owner is None:
            found.append(module)
        elif owner != context.adapter_name:
            raise AdapterStateError(
                f"The bias of {path!r} already trains with adapter {owner!r}; it cannot also "
                f"train with {context.adapter_name!r}. Use bias='none' for one of them. (lora.bias)"
            )
    return found


def adapters_named(model: nn.Module, adapter_name: str) -> dict[str, AdapterModule]:
    """The adapters of that name, by path of their module."""
    return {path: layer.adapters[adapter_name] for path, layer in layers_with(model, adapter_name)}


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """On an error inside, take off the adapters that are new and restore what trains, and how."""
    names = adapter_names(model)
    required = [(p, p.requires_grad) for p in model.parameters()]
    training = [(module, module.training) for module in model.modules()]
    frozen = [(module, frozen_for_adapters(module)) for module in model.modules()]
    try:
        yield
    except BaseException:
        for name in adapter_names(model):
            if name not in names:
                delete_adapter(model, name)
        for parameter, wanted in required:
            if parameter.requires_grad != wanted:  # a lazy parameter cannot even be asked to stay
                parameter.requires_grad_(wanted)
        for module, mode in training:
            module.training = mode
        for module, frozen_here in frozen:
            remember_frozen(module, frozen_here)
        raise
