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
from dataclasses import dataclass, field
from types import MethodType
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lora_lightning.engine.injection import freeze
from lora_lightning.engine.switching import adapter_names, set_trainable
from lora_lightning.errors import CheckpointError
from lora_lightning.training.optimizers import (
    cover_trainable,
    default_optimizer,
    find_optimizers,
    frozen_left_out,
    may_be_fused,
)
from lora_lightning.utilities.wrappers import under_own_names

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    from lora_lightning.callback import LoraCallback
    from lora_lightning.checkpoint.fingerprint import Fingerprint

_BINDING = "_lora_binding"
_LIGHTNING_CORE = ("lightning.pytorch.core.", "pytorch_lightning.core.")


@dataclass
class Binding:
    """What is remembered on a module.

    Attributes:
        originals: What was in the instance's own dictionary before each override, or None.
        fingerprint: The base model's, taken when the adapters were grown.
        buffers: Digests of the base's persistent buffers at that time.
        base_to_come: Whether the base was built on the meta device and is not loaded yet.
        returned: What child processes trained, until the module has the layers for it.
        fsdp: FSDP1's wrapper of the module, and what averages the adapters' gradients.
        reached: Parameters (ids) that had a gradient, where gradients do not stay.
        run_state: What a checkpoint says of this process, until training starts.
        learning_rates: As configured in this run, one for each parameter group.

    """

    originals: dict[str, Any] = field(default_factory=dict)
    fingerprint: Fingerprint | None = None
    buffers: dict[str, list[str]] = field(default_factory=dict)
    base_to_come: bool = False
    returned: dict[str, Any] = field(default_factory=dict)
    fsdp: tuple[Any, Any] | None = None
    reached: set[int] = field(default_factory=set)
    run_state: dict[str, Any] | None = None
    learning_rates: list[float] = field(default_factory=list)


def binding_of(module: LightningModule) -> Binding:
    """The module's binding, made on first use."""
    return module.__dict__.setdefault(_BINDING, Binding())


def overrides(module: LightningModule, hook: str) -> bool:
    """Whether the user's module defines `hook` itself, on its class or on the instance."""
    if (
        _own_attribute(module, hook) is not None
        or binding_of(module).originals.get(hook) is not None
    ):
        return True
    owner = next(cls for cls in type(module).__mro__ if hook in cls.__dict__)
    # By name, so that modules of the `pytorch_lightning` package count as well.
    return not owner.__module__.startswith(_LIGHTNING_CORE)


def bind(module: LightningModule) -> None:
    """Install the overrides; doing it again changes nothing."""
    for hook, override in _OVERRIDES.items():
        if hook == "configure_model" and not overrides(module, hook):
            continue  # Lightning asks whether it is overridden and would then call it
        if not _is_ours(module.__dict__.get(hook)):
            binding_of(module).originals[hook] = _own_attribute(module, hook)
            setattr(module, hook, MethodType(override, module))


def _own_attribute(module: LightningModule, hook: str) -> Any:
    """What the user has put on the instance under this name, if anything."""
    current = module.__dict__.get(hook)
    # A bound override comes back from pickle as the class's own method of the same name.
    from_class = getattr(current, "__func__", None) is getattr(type(module), hook)
    return None if _is_ours(current) or from_class else current


def _is_ours(method: Any) -> bool:
    return getattr(method, "__func__", None) in _OVERRIDES.values()


def _original(module: LightningModule, hook: str) -> Callable[..., Any]:
    on_instance = binding_of(module).originals.get(hook)
    return on_instance or MethodType(getattr(type(module), hook), module)


def callbacks_of(module: LightningModule) -> list[LoraCallback]:
    """The enabled LoraCallbacks of the module's Trainer, in order."""
    from lora_lightning.callback import LoraCallback

    trainer = getattr(module, "_trainer", None)
    callbacks = getattr(trainer, "callbacks", [])
    return [c for c in callbacks if isinstance(c, LoraCallback) and c.enabled]


def let_train(module: LightningModule, root: nn.Module) -> None:
    """Freeze all but the adapters on `root` whose callbacks say that they train."""
    freeze(module)
    for callback in callbacks_of(module):
        if callback.adapter_name in adapter_names(root):
            set_trainable(root, callback.adapter_name, callback.trainable)


def averaged_models(trainer: Any) -> list[Any]:
    """The copies of the module that WeightAveraging callbacks keep during fit."""
    models = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]
    return [model for model in models if model is not None]


# -- the overrides, under the names of the hooks (pickle looks bound methods up by name) -----------


def setup(self: LightningModule, stage: str) -> None:
    """The module's own `setup`, then growth, unless `configure_model` is still to build."""
    binding_of(self).run_state = None  # of a run that never came to train
    binding_of(self).reached = set()
    if stage == "fit" and adapter_names(self) and not callbacks_of(self):
        rank_zero_warn(
            f"The module carries the adapters {adapter_names(self)} of an earlier run, but this "
            "Trainer has no LoraCallback: its checkpoints will hold the whole model, and nothing "
            "checks what trains. Add the LoraCallback again, or make the adapters part of the "
            "model with merge_and_unload(module). (trainer.callbacks)"
        )
    _original(self, "setup")(stage)
    if not overrides(self, "configure_model"):
        for callback in callbacks_of(self):
            callback.grow(self)


def configure_model(self: LightningModule) -> None:
    """The module's own `configure_model`, then growth."""
    from lora_lightning.training.strategies.fsdp import leave_out_adapters
    from lora_lightning.training.strategies.model_parallel import (
        grow_before_sharding,
        shard_adapters,
    )

    callbacks = callbacks_of(self)
    if callbacks:
        grow_before_sharding(self, callbacks)
        leave_out_adapters(self)
    _original(self, "configure_model")()
    for callback in callbacks:
        callback.grow(self)
    if callbacks:
        shard_adapters(self)


def configure_optimizers(self: LightningModule) -> Any:
    """The module's own optimizers, narrowed to what trains; AdamW where it has none."""
    callbacks = callbacks_of(self)
    if not callbacks:
        return _original(self, "configure_optimizers")()
    configured = None
    with frozen_left_out() as meant_for:
        if overrides(self, "configure_optimizers"):
            configured = _original(self, "configure_optimizers")()
    optimizers = find_optimizers(configured)
    if not optimizers:
        return default_optimizer(self, callbacks[0].lr, may_be_fused(self.trainer))
    cover_trainable(optimizers, self, meant_for)
    return configured


def configure_gradient_clipping(self: LightningModule, *args: Any, **kwargs: Any) -> None:
    """The module's own clipping, except in a step that is left out: no gradients are there."""
    if not any(callback.guard.skipping for callback in callbacks_of(self)):
        _original(self, "configure_gradient_clipping")(*args, **kwargs)


def on_train_batch_end(self: LightningModule, *args: Any, **kwargs: Any) -> None:
    """The last hook of a batch, after those of all callbacks: stop here if the machine is taken."""
    _original(self, "on_train_batch_end")(*args, **kwargs)
    for callback in callbacks_of(self)[:1]:
        callback.preemption.at_safe_point(self.trainer)


def on_save_checkpoint(self: LightningModule, checkpoint: dict[str, Any]) -> None:
    """The last hook before a checkpoint is written, of whatever kind: drop the base."""
    from lora_lightning.training.checkpoints.metadata import reduce_checkpoint

    _original(self, "on_save_checkpoint")(checkpoint)
    callbacks = callbacks_of(self)
    # Without a fingerprint nothing has grown yet: a run that failed in setup is being saved.
    if callbacks and binding_of(self).fingerprint is not None:
        reduce_checkpoint(checkpoint, self, callbacks)


def on_load_checkpoint(self: LightningModule, checkpoint: dict[str, Any]) -> None:
    """The last hook before weights are loaded: refuse what does not fit."""
    from lora_lightning.training.checkpoints.metadata import KEY, check_checkpoint
    from lora_lightning.training.eva import adopt_ranks
    from lora_lightning.training.resume.run_state import prepare_run_state

    _original(self, "on_load_checkpoint")(checkpoint)
    callbacks = callbacks_of(self)
    if not callbacks and KEY in checkpoint:
        raise CheckpointError(
            "This is an adapter checkpoint, but no LoraCallback is at work in this Trainer. Add "
            "one with the options that it was trained with, or enable it. (lora.enabled)"
        )
    if callbacks:
        for callback in callbacks:
            saved = checkpoint.get(KEY, {}).get("adapters", {}).get(callback.adapter_name)
            if saved is not None:
                adopt_ranks(callback, self, saved)
        check_checkpoint(checkpoint, self, callbacks)
        for part in checkpoint.keys() & {"state_dict", "current_model_state"}:
            if binding_of(self).fsdp is not None:
                continue  # goes by plain names, and a unit's state dict would gather the base
            checkpoint[part] = under_own_names(self, checkpoint[part])
        prepare_run_state(checkpoint, self)


def on_train_start(self: LightningModule) -> None:
    """The last hook before batches are asked for: go on where a checkpoint left off."""
    from lora_lightning.training.resume.run_state import continue_run

    _original(self, "on_train_start")()
    if callbacks_of(self):
        continue_run(self)


_OVERRIDES: dict[str, Callable[..., Any]] = {
    "setup": setup,
    "configure_model": configure_model,
    "configure_optimizers": configure_optimizers,
    "configure_gradient_clipping": configure_gradient_clipping,
    "on_train_batch_end": on_train_batch_end,
    "on_save_checkpoint": on_save_checkpoint,
    "on_load_checkpoint": on_load_checkpoint,
    "on_train_start": on_train_start,
}
