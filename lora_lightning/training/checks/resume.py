"""Checks of a resumed run: no callback may search for a learning rate or batch size once more."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder

from lora_lightning.errors import ConfigError


def check_no_search(trainer: Any) -> None:
    """Raise ConfigError if a resumed fit would search: Lightning then forgets the progress."""
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
