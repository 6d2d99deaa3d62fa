"""State of a run under each strategy: how it gets into checkpoints and out of them.

A checkpoint of ours is the same under all of them: whole tensors of the adapters, under the names
that they have in the LightningModule, and the optimizers' state under the same names. So it is
read whole by every process, which then keeps its own part. What is not of the adapters is neither
gathered nor copied.

Lightning asks the strategy for all of this, so its methods are overridden on the instance. They
find the callbacks through the module; without one of ours they do what the strategy does.

| | saving | loading |
|---|---|---|
| single device, DDP | the module's tensors | `load_state_dict` |
| ModelParallel, one file | gathered on rank 0 | every process takes its part |
| ModelParallel, folder | every process its part | every process takes its part |
| FSDP1, one file or folder | the adapters, whole everywhere | every process all |
| DeepSpeed | the module's tensors, moments gathered | every process all, moments its part |
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer

from lora_lightning.checkpoint.sharded_folder import is_checkpoint_folder, read_checkpoint_folder
from lora_lightning.errors import CheckpointError
from lora_lightning.training import _lightning
from lora_lightning.training.checkpoint_io.metadata import expect_only_adapters
from lora_lightning.training.checkpoint_io.trained_state import load_trained_state, trained_state
from lora_lightning.training.module_state import Handed, callbacks_of, module_state
from lora_lightning.training.optimizers import plain_optimizer
from lora_lightning.training.resume.hook_turns import finish_turn
from lora_lightning.training.strategies import deepspeed, fsdp1
from lora_lightning.training.strategies.fsdp2 import is_fsdp, is_model_parallel
from lora_lightning.training.strategies.meta_device import load_base
from lora_lightning.training.strategies.optimizer_names import with_names, with_numbers
from lora_lightning.training.strategies.sharded_files import save_sharded_checkpoint
from lora_lightning.training.weight_averaging import averaged_models
from lora_lightning.utilities.dtensor import full_state, reshard

State = dict[str, Any]


def override_state_methods(strategy: Strategy) -> None:
    """Have the strategy save and load adapters only; doing it again changes nothing."""
    overrides = _WHOLE
    if is_model_parallel(strategy):
        overrides = _SHARDED
    if is_fsdp(strategy):
        fsdp1.check_fsdp(strategy)
        overrides = _FSDP
    if deepspeed.is_deepspeed(strategy):
        overrides = _DEEPSPEED
    for name, override in overrides.items():
        setattr(strategy, name, MethodType(_with_adapters(name, override), strategy))


def _with_adapters(name: str, override: Callable[..., Any]) -> Callable[..., Any]:
    """The method `override(strategy, module, ...)`, or the class's own without a LoraCallback."""

    def method(self: Strategy, *args: Any, **kwargs: Any) -> Any:
        module = self.lightning_module
        if module is None or not callbacks_of(module):
            return getattr(type(self), name)(self, *args, **kwargs)
        return override(self, module, *args, **kwargs)

    method.__name__ = name
    return method


def read_checkpoint(
    strategy: Strategy, path: str | Path, *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """Read a checkpoint as it lies on disk, whole and on the CPU; nothing is loaded yet.

    `path` is a file or the folder of a sharded one; the rest is what `load_checkpoint` was given.
    """
    if "://" not in str(path) and is_checkpoint_folder(path):
        return read_checkpoint_folder(path, *args, **kwargs)
    # Their own would load it, unchecked.
    if is_model_parallel(strategy) or is_fsdp(strategy) or deepspeed.is_deepspeed(strategy):
        return strategy.checkpoint_io.load_checkpoint(path, *args, **kwargs)
    return type(strategy).load_checkpoint(strategy, path, *args, **kwargs)


# -- the overrides ---------------------------------------------------------------------------------


def whole_module_state_dict(self: Strategy, module: LightningModule) -> State:
    """The module's own state dict, for its hook; noted, to tell what callbacks make of it."""
    finish_turn(module)
    return _handed(module, type(self).lightning_module_state_dict(self), trained=False)


def optimizer_state(self: Strategy, module: LightningModule, optimizer: Optimizer) -> State:
    """The state of an optimizer by names; empty on ranks that do not write."""
    state: State = type(self).optimizer_state(self, optimizer)
    return with_names(state, plain_optimizer(optimizer), module) if state else state


def load_model_state_dict(
    self: Strategy, module: LightningModule, checkpoint: State, strict: bool = True
) -> None:
    """Load a checkpoint's state, which has been compared with the module before."""
    load_trained_state(module, checkpoint["state_dict"])
    if "current_model_state" in checkpoint:  # WeightAveraging loads this one by itself
        for averaged in averaged_models(module.trainer):
            expect_only_adapters(module)
            expect_only_adapters(averaged)


def load_optimizer_state_dict(self: Strategy, module: LightningModule, checkpoint: State) -> None:
    """Load the states of the optimizers, by names or (of older checkpoints) by numbers."""
    numbered = {**checkpoint, "optimizer_states": _numbered(self, module, checkpoint)}
    type(self).load_optimizer_state_dict(self, numbered)


def sharded_module_state_dict(self: Strategy, module: LightningModule) -> State:
    """The tensors that are saved: this process's parts, or on rank 0 all of them."""
    finish_turn(module)
    return _handed(module, _to_be_written(self, trained_state(module)), trained=True)


def sharded_optimizer_state(self: Strategy, module: LightningModule, optimizer: Optimizer) -> State:
    """The state of an optimizer by names: this process's parts, or on rank 0 the whole."""
    reshard(module)
    optimizer = plain_optimizer(optimizer)
    return _to_be_written(self, with_names(optimizer.state_dict(), optimizer, module))


def load_after_setup(
    self: Strategy, module: LightningModule, checkpoint: State, strict: bool = True
) -> None:
    """Load adapters and, in fit, optimizers: the strategy restores after it has set them up."""
    reshard(module)
    load = fsdp1.load_fsdp_module_state if is_fsdp(self) else load_trained_state
    load(module, checkpoint["state_dict"])
    if "optimizer_states" in checkpoint and module.trainer.state.fn == "fit":
        optimizers = deepspeed.whole_optimizers(self.optimizers)
        states = _numbered(self, module, checkpoint)
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def fsdp_module_state_dict(self: Strategy, module: LightningModule) -> State:
    """The tensors that are saved, from the process or the processes that write."""
    finish_turn(module)
    return _handed(module, _to_be_written(self, trained_state(module)), trained=True)


def zero_optimizer_state(self: Strategy, module: LightningModule, optimizer: Optimizer) -> State:
    """The state of a partitioned optimizer by names, put together on rank 0."""
    (whole,) = deepspeed.whole_optimizers([optimizer])
    state = with_names(whole.state_dict(), whole, module)
    return state if self.is_global_zero else {}


def place_and_load_base(self: Strategy, module: LightningModule) -> None:
    """Move the module to its device; a base that was on the meta device gets its weights."""
    type(self).model_to_device(self)
    load_base(module)


_WHOLE: dict[str, Callable[..., Any]] = {
    "lightning_module_state_dict": whole_module_state_dict,
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
    _lightning.SETUP_MODEL: fsdp1.setup_fsdp,
    "lightning_module_state_dict": fsdp_module_state_dict,
    "optimizer_state": sharded_optimizer_state,
    "load_model_state_dict": load_after_setup,
    "save_checkpoint": save_sharded_checkpoint,
}
_DEEPSPEED: dict[str, Callable[..., Any]] = {
    _lightning.SETUP_MODEL: deepspeed.setup_deepspeed,
    _lightning.SETUP_MODEL_AND_OPTIMIZER: deepspeed.setup_engine,
    "lightning_module_state_dict": whole_module_state_dict,
    "optimizer_state": zero_optimizer_state,
    "load_model_state_dict": load_after_setup,
    "save_checkpoint": deepspeed.save_whole_checkpoint,
}


def _handed(module: LightningModule, state: State, trained: bool) -> State:
    module_state(module).handed = Handed(dict(state), trained)
    return state


def _numbered(strategy: Strategy, module: LightningModule, checkpoint: State) -> list[State]:
    states = checkpoint["optimizer_states"]
    optimizers = deepspeed.whole_optimizers(strategy.optimizers)
    if len(states) != len(optimizers):
        raise CheckpointError(
            f"The checkpoint has the state of {len(states)} optimizers, this run has "
            f"{len(optimizers)}. Use the configure_optimizers that it was trained with. (ckpt_path)"
        )
    return [with_numbers(s, o, module) for s, o in zip(states, optimizers, strict=True)]


def _to_be_written(strategy: Strategy, state: State) -> State:
    if _lightning.writes_folders(strategy):
        return state
    gathered: State = full_state(state)
    return gathered if strategy.is_global_zero else {}
