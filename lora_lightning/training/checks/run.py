"""What is refused before a run starts: strategies, plugins and callbacks that cannot work."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder

from lora_lightning.errors import ConfigError
from lora_lightning.utilities.is_a import is_a

_STRATEGIES = {"SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy", "FSDPStrategy"}
_BASE_CHANGERS = {"BaseFinetuning", "ModelPruning"}


def check_strategy(trainer: Any) -> None:
    """Only strategies under which adapters are known to train, save and resume.

    Raises:
        ConfigError: For every other one.

    """
    name = type(trainer.strategy).__name__
    if not is_a(trainer.strategy, *_STRATEGIES):
        raise ConfigError(
            f"LoraCallback does not support {name} in this version: adapters would not be sharded, "
            "saved or restored correctly. Use a single device, strategy='ddp' or 'fsdp', or "
            "ModelParallelStrategy. (trainer.strategy)"
        )


def check_callbacks(trainer: Any) -> None:
    """No callback that trains or changes base weights, which adapter checkpoints do not hold.

    Raises:
        ConfigError: For those that do.

    """
    for callback in trainer.callbacks:
        if is_a(callback, *_BASE_CHANGERS):
            raise ConfigError(
                f"{type(callback).__name__} changes base weights, but with LoraCallback the base "
                "is frozen and checkpoints hold adapters only: its work would be lost. Take one of "
                "the two out. (trainer.callbacks)"
            )


def check_no_search(trainer: Any) -> None:
    """No search at the head of a resumed fit: Lightning then forgets the checkpoint's progress.

    Raises:
        ConfigError: For the callback that would search.

    """
    for callback in searching(trainer):
        raise ConfigError(
            f"{type(callback).__name__} searches again at the head of a resumed fit, and Lightning "
            "then starts from step 0 with a fresh optimizer. Leave it out to resume: the learning "
            "rate it has found is in the checkpoint; a batch size is not, so set it. "
            "(trainer.callbacks)"
        )


def searching(trainer: Any) -> list[Any]:
    """The callbacks that search for a learning rate or a batch size at the head of a fit."""
    searches = (LearningRateFinder.on_fit_start, BatchSizeFinder.on_fit_start)
    return [c for c in trainer.callbacks if type(c).on_fit_start in searches]


def check_names(callbacks: list[Any]) -> None:
    """Every LoraCallback of the Trainer has an adapter of its own.

    Raises:
        ConfigError: If two have the same name.

    """
    names = [callback.adapter_name for callback in callbacks]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"Two LoraCallbacks of this Trainer have adapter_name={name!r}. "
                "Give each a name of its own. (lora.adapter_name)"
            )
