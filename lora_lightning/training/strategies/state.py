"""How state gets in and out under each strategy.

A checkpoint of ours is the same under all of them: whole tensors of the adapters, under the names
that they have in the LightningModule, and the optimizers' state under the same names. So it is
read whole by every process, which then keeps its own part. What is not of the adapters is neither
gathered nor copied.

Lightning asks the strategy for all of this, so its methods are overridden on the instance. They
are functions of this file, which find the callbacks through the module; without one of ours they
do what the strategy does.

| | saving | loading |
|---|---|---|
| single device, DDP | the module's tensors | `load_state_dict` |
| ModelParallel, one file | gathered on rank 0 | every process takes its part |
| ModelParallel, folder | every process its part | every process takes its part |
| FSDP1, one file or folder | the adapters, whole everywhere | every process all |
| DeepSpeed | the module's tensors, moments gathered | every process all, moments its part |
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn

from lora_lightning.checkpoint.sharded_folder import is_checkpoint_folder, read_checkpoint_folder
from lora_lightning.errors import CheckpointError, first_few
from lora_lightning.training.checkpoints.metadata import expect_only_adapters, kept_state
from lora_lightning.training.module_state import callbacks_of
from lora_lightning.training.strategies.deepspeed import (
    is_deepspeed,
    save_whole_checkpoint,
    setup_deepspeed,
    setup_engine,
    whole_optimizers,
)
from lora_lightning.training.strategies.fsdp import (
    check_fsdp,
    fsdp_module_state,
    load_fsdp_module_state,
    setup_fsdp,
)
from lora_lightning.training.strategies.meta_base import load_base
from lora_lightning.training.strategies.model_parallel import is_fsdp, is_model_parallel, reshard
from lora_lightning.training.strategies.optimizer_names import with_names, with_numbers
from lora_lightning.training.strategies.sharded_files import save_sharded_checkpoint, writes_folders
from lora_lightning.training.weight_averaging import averaged_models
from lora_lightning.utilities.dtensor import distribute_like, full_state


def override_state_methods(strategy: Any) -> None:
    """Let the strategy save and load adapters only; doing it again changes nothing."""
    overrides = _WHOLE
    if is_model_parallel(strategy):
        overrides = _SHARDED
    if is_fsdp(strategy):
        check_fsdp(strategy)
        overrides = _FSDP
    if is_deepspeed(strategy):
        overrides = _DEEPSPEED
    for name, override in overrides.items():
        if getattr(strategy.__dict__.get(name), "__func__", None) is not override:
            setattr(strategy, name, MethodType(override, strategy))


def read_checkpoint(
    strategy: Any, path: str | os.PathLike[str], *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """A checkpoint as it lies on disk, whole and on the CPU; nothing is loaded yet.

    Args:
        strategy: Whose `load_checkpoint` was called.
        path: A file or the folder of a sharded checkpoint.
        *args: What else `load_checkpoint` was given (weights_only).
        **kwargs: The same by name.

    """
    if "://" not in str(path) and is_checkpoint_folder(path):
        return read_checkpoint_folder(path, *args, **kwargs)
    # Their own would load it, unchecked.
    if is_model_parallel(strategy) or is_fsdp(strategy) or is_deepspeed(strategy):
        checkpoint: dict[str, Any] = strategy.checkpoint_io.load_checkpoint(path, *args, **kwargs)
        return checkpoint
    return type(strategy).load_checkpoint(strategy, path, *args, **kwargs)


# -- the overrides ---------------------------------------------------------------------------------


def optimizer_state(self: Any, optimizer: Any) -> dict[str, Any]:
    """The state of an optimizer by names."""
    state = type(self).optimizer_state(self, optimizer)
    if not state or not callbacks_of(self.lightning_module):
        return state  # empty on ranks that do not write
    return with_names(state, getattr(optimizer, "_optimizer", optimizer), self.lightning_module)


def load_model_state_dict(self: Any, checkpoint: dict[str, Any], strict: bool = True) -> None:
    """The tensors of a checkpoint, which has been compared with the module before."""
    module = self.lightning_module
    if not callbacks_of(module):
        type(self).load_model_state_dict(self, checkpoint, strict=strict)
        return
    load_adapters(module, checkpoint["state_dict"])
    if "current_model_state" in checkpoint:  # WeightAveraging loads this one by itself
        for averaged in averaged_models(module.trainer):
            expect_only_adapters(module)
            expect_only_adapters(averaged)


def load_optimizer_state_dict(self: Any, checkpoint: dict[str, Any]) -> None:
    """The states of the optimizers, by names or (of older checkpoints) by numbers."""
    if callbacks_of(self.lightning_module):
        checkpoint = {**checkpoint, "optimizer_states": _numbered(self, checkpoint)}
    type(self).load_optimizer_state_dict(self, checkpoint)


def sharded_module_state_dict(self: Any) -> dict[str, Any]:
    """The tensors that are saved: this process's parts, or on rank 0 all of them."""
    module = self.lightning_module
    callbacks = callbacks_of(module)
    if not callbacks:
        return type(self).lightning_module_state_dict(self)
    reshard(module)
    state = kept_state(module.state_dict(), module, callbacks)
    return _to_be_written(self, state)


def sharded_optimizer_state(self: Any, optimizer: Any) -> dict[str, Any]:
    """The state of an optimizer by names: this process's parts, or on rank 0 the whole."""
    module = self.lightning_module
    if not callbacks_of(module):
        return type(self).optimizer_state(self, optimizer)
    reshard(module)
    optimizer = getattr(optimizer, "_optimizer", optimizer)
    return _to_be_written(self, with_names(optimizer.state_dict(), optimizer, module))


def load_after_setup(self: Any, checkpoint: dict[str, Any], strict: bool = True) -> None:
    """Adapters and, in fit, optimizers: the strategy restores after it has set them up."""
    module = self.lightning_module
    if not callbacks_of(module):
        type(self).load_model_state_dict(self, checkpoint, strict=strict)
        return
    load_adapters(module, checkpoint["state_dict"])
    _load_optimizers(self, checkpoint)


def fsdp_module_state_dict(self: Any) -> dict[str, Any]:
    """The tensors that are saved, from the process or the processes that write."""
    module = self.lightning_module
    if not callbacks_of(module):
        return type(self).lightning_module_state_dict(self)
    return fsdp_module_state(module) if _writes(self) else {}


def fsdp_optimizer_state(self: Any, optimizer: Any) -> dict[str, Any]:
    """The state of an optimizer by names, from the process or the processes that write."""
    module = self.lightning_module
    if not callbacks_of(module):
        return type(self).optimizer_state(self, optimizer)
    optimizer = getattr(optimizer, "_optimizer", optimizer)
    return with_names(optimizer.state_dict(), optimizer, module) if _writes(self) else {}


def load_fsdp_state_dict(self: Any, checkpoint: dict[str, Any], strict: bool = True) -> None:
    """Adapters and, in fit, optimizers: the strategy restores after it has set them up."""
    module = self.lightning_module
    if not callbacks_of(module):
        type(self).load_model_state_dict(self, checkpoint, strict=strict)
        return
    load_fsdp_module_state(module, checkpoint["state_dict"])
    _load_optimizers(self, checkpoint)


def zero_optimizer_state(self: Any, optimizer: Any) -> dict[str, Any]:
    """The state of a partitioned optimizer by names, put together on rank 0."""
    module = self.lightning_module
    if not callbacks_of(module):
        return type(self).optimizer_state(self, optimizer)
    (whole,) = whole_optimizers([optimizer])
    state = with_names(whole.state_dict(), whole, module)
    return state if self.is_global_zero else {}


def place_and_load_base(self: Any) -> None:
    """Move the module to its device; a base that was on the meta device gets its weights."""
    type(self).model_to_device(self)
    load_base(self.lightning_module)


_WHOLE: dict[str, Callable[..., Any]] = {
    "optimizer_state": optimizer_state,
    "load_model_state_dict": load_model_state_dict,
    "load_optimizer_state_dict": load_optimizer_state_dict,
}
_SHARDED: dict[str, Callable[..., Any]] = {
    "lightning_module_state_dict": sharded_module_state_dict,
    "optimizer_state": sharded_optimizer_state,
    "load_model_state_dict": load_after_setup,
    "save_checkpoint": save_sharded_checkpoint,
    "model_to_device": place_and_load_base,
}

_FSDP: dict[str, Callable[..., Any]] = {
    "_setup_model": setup_fsdp,
    "lightning_module_state_dict": fsdp_module_state_dict,
    "optimizer_state": fsdp_optimizer_state,
    "load_model_state_dict": load_fsdp_state_dict,
    "save_checkpoint": save_sharded_checkpoint,
}


_DEEPSPEED: dict[str, Callable[..., Any]] = {
    "_setup_model": setup_deepspeed,
    "_setup_model_and_optimizer": setup_engine,
    "optimizer_state": zero_optimizer_state,
    "load_model_state_dict": load_after_setup,
    "save_checkpoint": save_whole_checkpoint,
}


def load_adapters(module: nn.Module, state: dict[str, Any]) -> None:
    """Load whole tensors into a module that may be sharded; the base may be missing.

    Raises:
        CheckpointError: If the module has no place for a tensor.

    """
    reshard(module)
    own = module.state_dict()
    parts = {
        key: distribute_like(value, own.get(key)) if isinstance(value, Tensor) else value
        for key, value in state.items()
    }
    left = module.load_state_dict(parts, strict=False).unexpected_keys
    if left:
        raise CheckpointError(
            f"The module has no place for {first_few(sorted(left))} of the checkpoint. (ckpt_path)"
        )


def _numbered(strategy: Any, checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    states, optimizers = checkpoint["optimizer_states"], whole_optimizers(strategy.optimizers)
    if len(states) != len(optimizers):
        raise CheckpointError(
            f"The checkpoint has the state of {len(states)} optimizers, this run has "
            f"{len(optimizers)}. Use the configure_optimizers that it was trained with. (ckpt_path)"
        )
    module = strategy.lightning_module
    return [with_numbers(s, o, module) for s, o in zip(states, optimizers, strict=True)]


def _load_optimizers(strategy: Any, checkpoint: dict[str, Any]) -> None:
    fits = strategy.lightning_module.trainer.state.fn == "fit"
    if "optimizer_states" in checkpoint and fits:
        states = _numbered(strategy, checkpoint)
        for optimizer, state in zip(whole_optimizers(strategy.optimizers), states, strict=True):
            optimizer.load_state_dict(state)


def _writes(strategy: Any) -> bool:
    return strategy.is_global_zero or writes_folders(strategy)


def _to_be_written(strategy: Any, state: dict[str, Any]) -> dict[str, Any]:
    if writes_folders(strategy):
        return state
    gathered: dict[str, Any] = full_state(state)
    return gathered if strategy.is_global_zero else {}
