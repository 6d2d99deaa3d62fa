"""What training changed of a module: collected from it for a checkpoint, and put back into it.

Neither goes through the module's own `state_dict` and `load_state_dict`, which may leave out or
rename what they like. What they add to a state dict is kept and handed back to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor

from lora_lightning.checkpoint.moved_state import load_moved
from lora_lightning.checkpoint.state_dict import adapter_state_dict
from lora_lightning.errors import CheckpointError, first_few
from lora_lightning.training.collectives import any_process
from lora_lightning.training.module_state import callbacks_of, module_state
from lora_lightning.training.strategies.fsdp2 import is_fsdp, is_model_parallel
from lora_lightning.utilities._torch import is_flattened
from lora_lightning.utilities.dtensor import copy_full, reshard


def trained_state(module: LightningModule) -> dict[str, Any]:
    """All that training changed, by plain keys: what moved of the base, and adapters.

    Sharded tensors are given as this process holds them; all processes must call it.
    """
    return {**moved_state(module), **adapter_tensors(module)}


def adapter_tensors(module: LightningModule) -> dict[str, Tensor]:
    """The module's own tensors of all adapters that callbacks manage, detached."""
    tensors: dict[str, Tensor] = {}
    for callback in callbacks_of(module):
        own = adapter_state_dict(callback._root(module), callback.adapter_name)
        tensors.update(zip(callback._saved_keys(module), own.values(), strict=True))
    return tensors


def moved_state(module: LightningModule) -> dict[str, Any]:
    """What has moved of the base, on any process."""
    strategy, baseline = module.trainer.strategy, module_state(module).baseline
    if is_model_parallel(strategy):
        reshard(module)
    changed = baseline.changed(module)
    if is_fsdp(strategy):
        spread = [name for name, value in changed.items() if is_flattened(value)]
        if any_process(strategy, bool(spread)):
            raise CheckpointError(
                f"The module itself moves parameters of its base ({first_few(spread) or 'some'}), "
                "which FSDP has spread over the processes: no checkpoint would hold them. Use "
                "strategy='ddp', or ModelParallelStrategy. (trainer.strategy)"
            )
    elif is_model_parallel(strategy) and strategy.world_size > 1:  # type: ignore[attr-defined]
        names: list[Any] = [None] * strategy.world_size  # type: ignore[attr-defined]
        dist.all_gather_object(names, sorted(changed))
        elsewhere = {name for own in names for name in own} - changed.keys()
        if elsewhere:
            baseline.moved |= dict.fromkeys(elsewhere, "")
            changed = baseline.changed(module)
    return changed


def load_trained_state(module: LightningModule, state: Mapping[str, Any]) -> None:
    """Put what `trained_state` gave, in whole tensors, into a module that may be sharded.

    CheckpointError if the module has no place for an entry.
    """
    saved = {key: value for key, value in state.items() if key in adapter_tensors(module)}
    _fill(module, saved)
    left = load_moved(module, {key: v for key, v in state.items() if key not in saved})
    _fill(module, saved)  # again: the module's own `load_state_dict` was called
    if left:
        raise CheckpointError(
            f"The module has no place for {first_few(sorted(left))} of the checkpoint. (ckpt_path)"
        )


def _fill(module: LightningModule, state: Mapping[str, Tensor]) -> None:
    own = adapter_tensors(module)
    for key, value in state.items():
        copy_full(own[key], value)
