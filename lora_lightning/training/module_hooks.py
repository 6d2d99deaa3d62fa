"""Reach the hooks of a LightningModule that no callback hook reaches.

A callback can act neither between `configure_model` and the restore of a checkpoint, nor on the
result of `configure_optimizers`, nor on a checkpoint written with `save_weights_only=True`. So the
module's own hooks are overridden on the instance, as LightningCLI does for `configure_optimizers`.
The overrides are plain functions of this file, bound to the module: they survive deepcopy and
pickle, and find the callbacks through the module's Trainer; without one of ours they do what the
hook did before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn

from lora_lightning.checkpoint.state_dict import KEY
from lora_lightning.engine.switching import adapter_names
from lora_lightning.errors import CheckpointError
from lora_lightning.training import attachment
from lora_lightning.training._lightning import trainer_of
from lora_lightning.training.checkpoint_io.metadata import check_checkpoint, reduce_checkpoint
from lora_lightning.training.checkpoint_io.readable import check_content, make_plain
from lora_lightning.training.messages import rank_zero_warn
from lora_lightning.training.module_state import (
    callbacks_of,
    defines_hook,
    module_state,
    original_hook,
    override_hook,
)
from lora_lightning.training.optimizers import (
    cover_trainable,
    default_optimizer,
    find_optimizers,
    frozen_left_out,
    mark_left_out,
    may_be_fused,
)
from lora_lightning.training.resume.hook_turns import run_in_turn
from lora_lightning.training.resume.loop_state import end_resumed_epoch
from lora_lightning.training.resume.run_state import continue_run, prepare_run_state
from lora_lightning.training.strategies.fsdp1 import leave_out_adapters
from lora_lightning.training.strategies.fsdp2 import shard_adapters
from lora_lightning.utilities.wrappers import plain_name, under_own_names


def bind(module: LightningModule) -> None:
    """Install the overrides; doing it again changes nothing."""
    for hook, override in _OVERRIDES.items():
        # Lightning asks whether configure_model is overridden and would then call it.
        if hook != "configure_model" or defines_hook(module, hook):
            override_hook(module, hook, override)


# -- the overrides, under the names of the hooks (pickle looks bound methods up by name) -----------


def setup(self: LightningModule, *args: Any, **kwargs: Any) -> None:
    """The module's own `setup`; adapters after it, unless `configure_model` is still to build."""
    module_state(self).resumed_from = None  # of a run that never came to train
    module_state(self).had_gradient = set()
    trainer = trainer_of(self)
    fits = trainer is not None and trainer.state.fn == "fit"
    if fits and adapter_names(self) and not callbacks_of(self):
        rank_zero_warn(
            f"The module carries the adapters {adapter_names(self)} of an earlier run, but this "
            "Trainer has no LoraCallback: its checkpoints will hold the whole model, and nothing "
            "checks what trains. Add the LoraCallback again, or make the adapters part of the "
            "model with merge_and_unload(module). (trainer.callbacks)"
        )
    original_hook(self, "setup")(*args, **kwargs)
    if not defines_hook(self, "configure_model"):
        attachment.attach_all(self)


def configure_model(self: LightningModule) -> None:
    """The module's own `configure_model`, and the adapters before or after it."""
    if not callbacks_of(self):
        original_hook(self, "configure_model")()
        return
    attachment.attach_before_sharding(self)
    leave_out_adapters(self)
    original_hook(self, "configure_model")()
    attachment.attach_all(self)
    shard_adapters(self)


def configure_optimizers(self: LightningModule) -> Any:
    """The module's own optimizers, narrowed to what trains; AdamW where it has none."""
    callbacks = callbacks_of(self)
    if not callbacks:
        return original_hook(self, "configure_optimizers")()
    mark_left_out(self, [])
    configured = None
    with frozen_left_out() as meant_for:
        if defines_hook(self, "configure_optimizers"):
            configured = original_hook(self, "configure_optimizers")()
    if configured is None:
        return default_optimizer(self, callbacks[0].lr, may_be_fused(self.trainer))
    optimizers = find_optimizers(configured)
    if optimizers:
        unnamed = {i for callback in callbacks for i in callback._unnamed_parameters(self)}
        mark_left_out(self, cover_trainable(optimizers, self, meant_for, unnamed))
    return configured  # whatever it is: Lightning judges it


def configure_gradient_clipping(self: LightningModule, *args: Any, **kwargs: Any) -> None:
    """The module's own clipping, except in a step that is left out: no gradients are there."""
    if not any(callback._leaves_step_out() for callback in callbacks_of(self)):
        original_hook(self, "configure_gradient_clipping")(*args, **kwargs)


def on_train_batch_end(self: LightningModule, *args: Any) -> None:
    """The last hook of a batch, after those of all callbacks: stop here if the machine is taken."""
    run_in_turn(self, "on_train_batch_end", *args)
    for callback in callbacks_of(self)[:1]:
        callback._stop_if_asked(self.trainer)


def on_validation_end(self: LightningModule) -> None:
    """The module's own hook, before the checkpoint that is written after a validation."""
    run_in_turn(self, "on_validation_end")


def on_train_epoch_end(self: LightningModule) -> None:
    """The module's own hook; an epoch that was resumed ends as any other."""
    run_in_turn(self, "on_train_epoch_end")
    if callbacks_of(self):
        end_resumed_epoch(self.trainer)


def on_save_checkpoint(self: LightningModule, checkpoint: dict[str, Any]) -> None:
    """The last hook before a checkpoint is written, of whatever kind: drop the base."""
    before = dict(checkpoint)
    if "state_dict" in before:  # the hook may change what is in it
        before["state_dict"] = dict(before["state_dict"])
    original_hook(self, "on_save_checkpoint")(checkpoint)
    callbacks = callbacks_of(self)
    # Without a fingerprint no adapter is attached yet: a run that failed in setup is being saved.
    if callbacks and module_state(self).base_fingerprint is not None:
        reduce_checkpoint(checkpoint, self, callbacks, before)
        make_plain(checkpoint)
        check_content(checkpoint, self)


def on_load_checkpoint(self: LightningModule, checkpoint: dict[str, Any]) -> None:
    """The last hook before weights are loaded: refuse what does not fit."""
    callbacks = callbacks_of(self)
    if callbacks and KEY in checkpoint:
        _show_whole_state(self, checkpoint, original_hook(self, "on_load_checkpoint"))
    else:
        original_hook(self, "on_load_checkpoint")(checkpoint)
    if not callbacks and KEY in checkpoint:
        raise CheckpointError(
            "This is an adapter checkpoint, but no LoraCallback is at work in this Trainer. Add "
            "one with the options that it was trained with, or enable it. (lora.enabled)"
        )
    if callbacks:
        for callback in callbacks:
            saved = checkpoint.get(KEY, {}).get("adapters", {}).get(callback.adapter_name)
            if saved is not None:
                attachment.attach_with_saved_ranks(callback, self, saved)
        check_checkpoint(checkpoint, self, callbacks)
        _go_back_to_base(self, checkpoint)
        for part in checkpoint.keys() & {"state_dict", "current_model_state"}:
            if module_state(self).fsdp is not None:
                continue  # goes by plain names, and a unit's state dict would gather the base
            checkpoint[part] = under_own_names(self, checkpoint[part])
        prepare_run_state(checkpoint, self)


def _show_whole_state(
    module: LightningModule, checkpoint: dict[str, Any], hook: Callable[..., Any]
) -> None:
    """Call the module's hook with the base in the state dict, as it knows it.

    What is loaded is what the file has: the hook cannot take it away.
    """
    saved = checkpoint["state_dict"]
    if module.trainer.strategy.restore_checkpoint_after_setup:
        checkpoint["state_dict"] = dict(saved)  # to show the base would gather it
    else:
        checkpoint["state_dict"] = {**nn.Module.state_dict(module), **saved}
    hook(checkpoint)
    checkpoint["state_dict"] = saved


def _go_back_to_base(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Add to a checkpoint what has moved since, but had not when it was written."""
    saved, baseline = checkpoint["state_dict"], module_state(module).baseline
    owned = {key for entry in checkpoint[KEY]["adapters"].values() for key in entry["tensors"]}
    names = [key for key in map(plain_name, saved) if key not in owned]
    checkpoint["state_dict"] = {**saved, **baseline.start_from(module, names)}
    baseline.loaded(names)


def on_train_start(self: LightningModule) -> None:
    """The last hook before batches are asked for: go on where a checkpoint left off."""
    original_hook(self, "on_train_start")()
    if callbacks_of(self):
        continue_run(self)


_OVERRIDES: dict[str, Callable[..., Any]] = {
    "setup": setup,
    "configure_model": configure_model,
    "configure_optimizers": configure_optimizers,
    "configure_gradient_clipping": configure_gradient_clipping,
    "on_train_batch_end": on_train_batch_end,
    "on_validation_end": on_validation_end,
    "on_train_epoch_end": on_train_epoch_end,
    "on_save_checkpoint": on_save_checkpoint,
    "on_load_checkpoint": on_load_checkpoint,
    "on_train_start": on_train_start,
}
