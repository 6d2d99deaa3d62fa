"""Warning of a learning rate that was changed before a resume, which has no effect.

Optimizers and schedulers go on with what their states say, as they must for an exact resume. What
`configure_optimizers` has set is overwritten by Lightning without a word.
"""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn


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
