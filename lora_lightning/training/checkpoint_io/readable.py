"""What a checkpoint could be written with, but not read again.

torch loads checkpoints with weights_only=True: tensors and plain values, no objects of classes.
What is of another kind in the states of schedulers, optimizers and callbacks or among the
hyperparameters is said when the run begins, not when it is to be resumed; what turns up later, with
the first checkpoint that holds it. Only numbers of numpy in the states of optimizers and schedulers
become Python's, which compute the same (a schedule by `np.cos` has them).
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lora_lightning.checkpoint.state_dict import KEY
from lora_lightning.errors import first_few
from lora_lightning.training._lightning import all_callbacks
from lora_lightning.training.messages import rank_zero_warn
from lora_lightning.training.module_state import module_state

_SAME_IN_PYTHON = (np.float64, np.int64, np.bool_, np.str_)
_OURS = {KEY, "state_dict", "current_model_state"}


def check_hyperparameters(owner: object) -> list[str]:
    """Warn of hyperparameters that cannot be read; returns their names.

    `owner` is the module or data module; what it keeps goes into every checkpoint.
    """
    hyperparameters = getattr(owner, "hparams", {})
    broken = [name for name, value in hyperparameters.items() if not _can_be_read(value)]
    if broken:
        rank_zero_warn(
            f"{type(owner).__name__} keeps hyperparameters that torch does not load with "
            f"weights_only=True: {first_few(broken)}. To resume from checkpoints of this run, pass "
            f"weights_only=False to fit, or leave them out: save_hyperparameters(ignore={broken})."
        )
    return broken


def check_states(trainer: Trainer, module: LightningModule) -> None:
    """Warn, at the start, of states and hyperparameters that cannot be read.

    Every process must call it: the states of callbacks may be gathered.
    """
    states: dict[str, Any] = {"callbacks": {}}
    for callback in all_callbacks(trainer):
        with suppress(Exception):  # it may have none yet
            states["callbacks"][callback.state_key] = callback.state_dict()
    groups = [optimizer.param_groups for optimizer in trainer.optimizers]
    states["optimizer_states"] = [[{**group, "params": []} for group in of] for of in groups]
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    states["lr_schedulers"] = [scheduler.state_dict() for scheduler in schedulers]
    make_plain(states)
    said = module_state(module).unreadable = set()
    for owner in (module, trainer.datamodule):  # type: ignore[attr-defined]
        said.update(f"hyper_parameters[{name!r}]" for name in check_hyperparameters(owner))
    _warn_of(states, module)


def check_content(checkpoint: dict[str, Any], module: LightningModule) -> None:
    """Warn of what cannot be read in a checkpoint that is about to be written, once for each."""
    _warn_of({key: value for key, value in checkpoint.items() if key not in _OURS}, module)


def make_plain(checkpoint: dict[str, Any]) -> None:
    """Have the states of optimizers and schedulers hold Python's numbers in place of numpy's."""
    for part in checkpoint.keys() & {"optimizer_states", "lr_schedulers"}:
        checkpoint[part] = _plain(checkpoint[part])


def _warn_of(parts: dict[str, Any], module: LightningModule) -> None:
    said = module_state(module).unreadable
    new = [(name, value) for name, value in _entries(parts) if name not in said]
    found = [name for name, value in new if not _can_be_read(value)]
    said.update(found)
    if found:
        # Lightning does not pass it on to strategies that restore later.
        later = module.trainer.strategy.restore_checkpoint_after_setup
        way = "" if later else "pass weights_only=False to fit, or "
        rank_zero_warn(
            "Checkpoints of this run hold what torch does not load with weights_only=True: "
            f"{first_few(found)}. To resume from them, {way}have these hold tensors and plain "
            "values only."
        )


def _entries(parts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The parts of a checkpoint by the names that one would index it with, two deep."""
    found: list[tuple[str, Any]] = []
    for key, value in parts.items():
        if type(value) is dict:
            found += [(f"{key}[{name!r}]", inner) for name, inner in value.items()]
        elif type(value) is list:
            found += [(f"{key}[{index}]", inner) for index, inner in enumerate(value)]
        else:
            found.append((key, value))
    return found


def _plain(value: Any) -> Any:
    if type(value) is dict:
        return {key: _plain(inner) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    return value.item() if isinstance(value, _SAME_IN_PYTHON) else value


def _without_tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        return None
    if type(value) is dict:
        return {key: _without_tensors(inner) for key, inner in value.items()}
    return [_without_tensors(v) for v in value] if type(value) in (list, tuple) else value


def _can_be_read(value: object) -> bool:
    if isinstance(value, nn.Module):  # told without writing a base that may not fit twice
        return False
    buffer = io.BytesIO()
    try:
        torch.save(_without_tensors(value), buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception:  # pickle calls the value's own code
        return False
    return True
