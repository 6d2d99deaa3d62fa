"""Checks of a resumed run: nothing searches once more, and a changed learning rate has no effect.

Optimizers and schedulers go on with what their states say, as they must for an exact resume. What
`configure_optimizers` has set is overwritten by Lightning without a word.
"""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder

from lora_lightning.errors import ConfigError
from lora_lightning.training._lightning import all_callbacks
from lora_lightning.training.messages import rank_zero_warn


def check_no_search(trainer: Trainer) -> None:
    """Raise ConfigError if a resumed fit would search: Lightning then forgets the progress."""
    for callback in searching(trainer):
        raise ConfigError(
            f"{type(callback).__name__} searches again at the head of a resumed fit, and Lightning "
            "then starts from step 0 with a fresh optimizer. Leave it out to resume: the learning "
            "rate it has found is in the checkpoint; a batch size is not, so set it. "
            "(trainer.callbacks)"
        )


def searching(trainer: Trainer) -> list[Callback]:
    """The callbacks that search for a learning rate or a batch size at the head of a fit."""
    searches = (LearningRateFinder.on_fit_start, BatchSizeFinder.on_fit_start)
    return [c for c in all_callbacks(trainer) if type(c).on_fit_start in searches]


def configured_rates(trainer: Trainer) -> list[float]:
    """The learning rate of every parameter group as configured, before schedules changed it.

    To be asked for between `configure_optimizers` and the moment optimizer states are restored.
    """
    return [
        float(group.get("initial_lr", group["lr"]))
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
    ]


def warn_of_changed_rates(saved: list[float] | None, configured: list[float]) -> None:
    """Warn where other learning rates are configured than `saved` (older checkpoints: None)."""
    if saved is None or saved == configured or len(saved) != len(configured):
        return
    now, then = next((b, a) for a, b in zip(saved, configured, strict=True) if a != b)
    rank_zero_warn(
        f"The learning rate {now:g} of this run has no effect: it goes on with the checkpoint's "
        f"optimizer and schedule, which started from {then:g}. To train these adapters with "
        "another learning rate, start a new run: LoraCallback(init_from=...) with the path of the "
        "checkpoint, and no ckpt_path. (lora.init_from)"
    )
