"""The one way in which adapters are attached to a module, and the moments at which that is done.

| moment                                    | reason                                              |
|-------------------------------------------|-----------------------------------------------------|
| the callback's `setup`, if the module     | callbacks that come after it find the adapters:     |
| defines neither `setup` nor               | WeightAveraging copies the module in its `setup`    |
| `configure_model`                         |                                                     |
| after the module's `setup`, if it defines | it may build its layers there; other callbacks may  |
| no `configure_model`                      | have loaded a base, whose fingerprint is then taken |
| before its `configure_model`, under FSDP  | what that shards is sharded with the adapters on it |
| after its `configure_model`               | it may build its layers there                       |
| after a fit in child processes (spawn)    | no hook is called in the main process, which gets   |
|                                           | back what they trained                              |

An adapter that is there already stays: to come by more than once does no harm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lora_lightning.adapters.registry import config_type_of
from lora_lightning.checkpoint.loading import put_adapter_on
from lora_lightning.checkpoint.moved_state import load_moved
from lora_lightning.checkpoint.state_dict import materialize
from lora_lightning.engine import injection, switching
from lora_lightning.engine.construction import BuildContext
from lora_lightning.engine.first_step import forget_first_step
from lora_lightning.engine.followers import carry_adapters, drop_carried, find_followers
from lora_lightning.errors import ConfigError, TargetError
from lora_lightning.layers.traversal import named_adapted_layers
from lora_lightning.training.adapter_callback import AdapterCallback
from lora_lightning.training.checkpoint_io.metadata import remember_base
from lora_lightning.training.checkpoint_io.trained_state import load_trained_state
from lora_lightning.training.checks import check_base_has_values, check_no_unmanaged_adapters
from lora_lightning.training.eva import ranks_of_checkpoint, start_values, take_over_ranks
from lora_lightning.training.module_state import callbacks_of, module_state
from lora_lightning.training.new_modules import train_new_modules
from lora_lightning.training.options import check_same_adapter
from lora_lightning.training.own_averages import check_teachers, find_notes
from lora_lightning.training.precision import convert_before_attaching
from lora_lightning.training.strategies.fsdp1 import check_not_wrapped
from lora_lightning.training.strategies.fsdp2 import is_fsdp, is_model_parallel
from lora_lightning.training.strategies.meta_device import expect_base, load_base_at_once
from lora_lightning.utilities.dtensor import reshard


def attach(callback: AdapterCallback, module: LightningModule) -> None:
    """Attach the callback's adapter to the module, which keeps one that it carries already.

    LoraError if options, model, strategy or precision do not allow it; nothing is attached then.
    """
    check_not_wrapped(module)
    load_base_at_once(module)
    if not switching.adapter_names(module):  # later values differ, and quantised ones say nothing
        module_state(module).followers = find_followers(module)
        module_state(module).notes = find_notes(module)
    convert_before_attaching(module)
    check_base_has_values(module)
    root = callback._root(module)
    _attach_what_children_trained(callback, module, root)
    moved: dict[str, Any] = {}
    if callback.init_from is not None:
        moved = _attach_from_file(callback, root, callback.init_from)
    else:
        take_over_ranks(callback, module, root)
    train_new_modules(callback, module, root)
    check_same_adapter(callback, module, root)
    check_no_unmanaged_adapters(module)
    first = not switching.adapter_names(module)
    start = start_values(callback, module, root)
    # Processes that nobody seeded have seeds of their own.
    seed = module.trainer.strategy.broadcast(torch.initial_seed())
    _make_and_activate(callback, module, root, seed, start)
    expect_base(module)
    remember_base(module, first)
    if moved:  # the base is what the module brought
        load_moved(root, moved)
    returned = module_state(module).from_children.get("moved", {})
    module_state(module).baseline.moved |= dict.fromkeys(returned, "")


def attach_all(module: LightningModule) -> None:
    """Attach the adapters of all callbacks."""
    for callback in callbacks_of(module):
        attach(callback, module)


def attach_before_sharding(module: LightningModule) -> None:
    """Attach the adapters whose layers are there before `configure_model`, which may shard them."""
    strategy = module.trainer.strategy
    if not (is_model_parallel(strategy) or is_fsdp(strategy)):
        return
    reshard(module)  # a run before may have left it gathered
    for callback in callbacks_of(module):
        try:
            attach(callback, module)
        except (TargetError, ConfigError):  # not built yet; what is wrong shows again afterwards
            continue


def attach_with_saved_ranks(
    callback: AdapterCallback, module: LightningModule, saved: dict[str, Any]
) -> None:
    """Attach the adapter anew, if EVA found other ranks when the run of a checkpoint began.

    `saved` is what the checkpoint says of the adapter. Called before the checkpoint's tensors are
    loaded, and before there are optimizers.
    """
    config = ranks_of_checkpoint(callback, module.trainer.strategy, saved)
    if config is None:
        return
    root = callback._root(module)
    order = switching.adapter_names(root)
    injection.delete_adapter(root, callback.adapter_name)
    drop_carried(module, callback.adapter_name)
    callback.config = config
    _make_and_activate(callback, module, root)
    for _, layer in named_adapted_layers(root):  # in the order that the optimizer's state goes by
        for name in filter(layer.adapters.__contains__, order):
            layer.adapters[name] = layer.adapters.pop(name)


def _make_and_activate(
    callback: AdapterCallback,
    module: LightningModule,
    root: nn.Module,
    seed: int | None = None,
    start: dict[str, Tensor] | None = None,
) -> None:
    """Make the adapter on the layers that do not carry it, activate it, and freeze the rest."""
    context = BuildContext(
        callback.config,
        callback.adapter_name,
        seed,
        start=start,
        autocast_adapter_dtype=callback.autocast_adapter_dtype,
    )
    fresh = callback.adapter_name not in switching.adapter_names(root)
    with injection.unchanged_on_error(root):
        callback._selection = injection.extend_adapter(root, context)
        if callback.adapter_name not in switching.active_adapters(root):
            switching.set_adapter(root, [*switching.active_adapters(root), callback.adapter_name])
        check_teachers(module, module_state(module).followers)
        carry_adapters(module, module_state(module).followers, callback.adapter_name, fresh)
    injection.freeze(module)
    forget_first_step(module)  # `check_first_gradients` says more
    for other in callbacks_of(module):
        if other.adapter_name in switching.adapter_names(root):
            switching.set_trainable(root, other.adapter_name, other.trainable)


def _attach_from_file(callback: AdapterCallback, root: nn.Module, path: str) -> dict[str, Any]:
    """Attach the adapter of a file, unless it is there already, and take its options over.

    Returns:
        What the file's run has moved of the base, still to be loaded.

    """
    name, moved = callback.adapter_name, {}
    if name not in switching.adapter_names(root):
        with injection.unchanged_on_error(root):
            moved = put_adapter_on(root, Path(path), name, callback.autocast_adapter_dtype).moved
    (adapter, *_) = injection.adapters_named(root, name).values()
    callback.config = adapter.config
    return moved


def _attach_what_children_trained(
    callback: AdapterCallback, module: LightningModule, root: nn.Module
) -> None:
    """Attach the adapter as it came back from child processes, if it did."""
    returned = module_state(module).from_children
    entry = returned.get("adapters", {}).pop(callback.adapter_name, None)
    if entry is None:
        return
    if callback.adapter_name not in switching.adapter_names(root):
        injection.inject_adapter(
            root,
            config_type_of(entry["peft_type"]).from_dict(entry["config"]),
            callback.adapter_name,
            low_cpu_mem_usage=True,
            autocast_adapter_dtype=callback.autocast_adapter_dtype,
        )
        materialize(root, callback.adapter_name)
        carry_adapters(module, module_state(module).followers, callback.adapter_name)
    own = {key: returned["state_dict"].pop(key) for key in entry["tensors"]}
    load_trained_state(module, {**own, **returned["moved"]})
