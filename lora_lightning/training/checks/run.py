"""Checks before a run starts: strategies, plugins and callbacks that cannot work are refused."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lora_lightning.errors import ConfigError
from lora_lightning.training.adapter_callback import AdapterCallback
from lora_lightning.training.eva import starts_from_data
from lora_lightning.training.module_state import callbacks_of
from lora_lightning.training.nonfinite import check_same_policy
from lora_lightning.training.precision import check_precision
from lora_lightning.training.strategies.deepspeed import check_deepspeed
from lora_lightning.training.strategies.model_parallel import check_model_parallel
from lora_lightning.utilities.is_a import is_a

_STRATEGIES = {"SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy", "FSDPStrategy"}
_BASE_CHANGERS = {"BaseFinetuning", "ModelPruning"}


def check_run(callback: AdapterCallback, trainer: Trainer, module: LightningModule) -> None:
    """Refuse what cannot work, before anything is changed: ConfigError says what to use instead."""
    callbacks = callbacks_of(module)
    check_names(callbacks)
    check_callbacks(trainer)
    check_strategy(trainer)
    check_deepspeed(trainer, [c._requested_config for c in callbacks])
    check_model_parallel(trainer, starts_from_data(callback))
    check_precision(trainer)
    if trainer.state.fn == "fit" and not any(c.trainable for c in callbacks):
        raise ConfigError(
            "Nothing would train: every LoraCallback has trainable=False. (lora.trainable)"
        )
    check_same_policy({c.adapter_name: c.nonfinite for c in callbacks})


def check_strategy(trainer: Any) -> None:
    """Refuse (ConfigError) strategies under which adapters may not train, save and resume."""
    name = type(trainer.strategy).__name__
    if not is_a(trainer.strategy, *_STRATEGIES):
        raise ConfigError(
            f"LoraCallback does not support {name} in this version: adapters would not be sharded, "
            "saved or restored correctly. Use a single device, strategy='ddp' or 'fsdp', or "
            "ModelParallelStrategy. (trainer.strategy)"
        )


def check_callbacks(trainer: Any) -> None:
    """Refuse (ConfigError) callbacks that change base weights, which checkpoints do not hold."""
    for callback in trainer.callbacks:
        if is_a(callback, *_BASE_CHANGERS):
            raise ConfigError(
                f"{type(callback).__name__} changes base weights, but with LoraCallback the base "
                "is frozen and checkpoints hold adapters only: its work would be lost. Take one of "
                "the two out. (trainer.callbacks)"
            )


def check_names(callbacks: list[AdapterCallback]) -> None:
    """Raise ConfigError if two LoraCallbacks of the Trainer have the same adapter name."""
    names = [callback.adapter_name for callback in callbacks]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"Two LoraCallbacks of this Trainer have adapter_name={name!r}. "
                "Give each a name of its own. (lora.adapter_name)"
            )
