"""Learning-rate schedule over the whole run."""

from __future__ import annotations

import math
from typing import Any, Literal

from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lora_lightning.errors import ConfigError
from lora_lightning.tasks.model_options import check_choice

Shape = Literal["linear", "cosine", "constant"]


class Schedule(LambdaLR):
    """Linear warm-up, then a decay to 0 or none, counted in optimizer steps.

    The factor of the peak learning rate at step t, after w warm-up steps, of T in all:
    t / w while t < w; then, with p = (t - w) / (T - w), 1 - p (linear), (1 + cos(pi p)) / 2
    (cosine) or 1 (constant). These are the values of `transformers.get_scheduler`.

    T is asked for when training starts, not when optimizers are made: the data are set up by then,
    and Lightning would drop the position of a stateful data loader that is asked for its length
    while a checkpoint is still to be restored. And a run that goes on with another T, as
    `max_epochs` was raised, or with another shape or warm-up, is on its own curve from its first
    step on.

    Args:
        optimizer: Whose groups are at their peak learning rates.
        shape: `linear`, `cosine` or `constant`.
        warmup_fraction: Share of all steps that are warm-up.
        warmup_steps: Their number instead.
    """

    def __init__(
        self, optimizer: Optimizer, shape: Shape, warmup_fraction: float, warmup_steps: int | None
    ) -> None:
        self.shape = shape
        self.warmup_fraction = warmup_fraction
        self.asked_warmup = warmup_steps
        # Until `begin`: enough to know the factor at step 0.
        self.warmup_steps = math.ceil(warmup_fraction) if warmup_steps is None else warmup_steps
        self.total_steps: float = math.inf
        super().__init__(optimizer, lambda step: self.factor(step))

    def factor(self, step: int) -> float:
        """The share of the peak learning rate at an optimizer step."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if self.shape == "constant":
            return 1.0
        left = self.total_steps - self.warmup_steps
        progress = (step - self.warmup_steps) / left if left > 0 else 1.0
        if self.shape == "linear":
            return max(0.0, 1 - progress)
        return max(0.0, 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the step of a checkpoint, but on the curve that this run asks for."""
        own = {name: getattr(self, name) for name in ("shape", "warmup_fraction", "asked_warmup")}
        super().load_state_dict({**state_dict, **own})

    def begin(self, total_steps: float, trial: bool = False) -> None:
        """Learn how long the run is, and set the learning rates of its next step.

        Args:
            total_steps: Optimizer steps of the whole run; infinite where nothing ends it.
            trial: Whether these are a few steps for a try, which may end before warm-up does.

        Raises:
            ConfigError: If the curve has no place in the run.
        """
        if not trial:
            check_length(self.shape, self.asked_warmup, total_steps)
        self.total_steps = total_steps
        asked = self.asked_warmup
        self.warmup_steps = round(self.warmup_fraction * total_steps) if asked is None else asked
        factor = self.factor(self.last_epoch)
        self._last_lr = [peak * factor for peak in self.base_lrs]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate


def check_schedule(shape: str, warmup_fraction: float, warmup_steps: int | None) -> None:
    """Refuse what is no curve."""
    check_choice("lr_schedule", shape, Shape)
    if not 0 <= warmup_fraction <= 1:
        raise ConfigError(
            f"warmup_fraction must be from 0 to 1, found {warmup_fraction}. (model.warmup_fraction)"
        )
    if warmup_steps is not None and warmup_steps < 0:
        raise ConfigError(
            f"warmup_steps must be 0 or more, found {warmup_steps}. (model.warmup_steps)"
        )


def check_not_negative(**numbers: float) -> None:
    """Refuse rates that would climb the loss, or are no numbers."""
    for name, number in numbers.items():
        if not 0 <= number < math.inf:
            raise ConfigError(
                f"{name} must be 0 or more, and finite, found {number}. (model.{name})"
            )


def check_length(shape: str, warmup_steps: int | None, total_steps: float) -> None:
    """Refuse a curve that needs a length which the run does not have."""
    if math.isinf(total_steps):
        if shape != "constant":
            raise ConfigError(
                "the learning rate falls to 0 at the last step, but the run has none: set "
                "trainer.max_steps, or trainer.max_epochs with data whose length is known; or keep "
                "it constant. (model.lr_schedule)"
            )
        if warmup_steps is None:
            raise ConfigError(
                "warmup_fraction is a share of all steps, but the run has no last one: say how "
                "many are warm-up (0: none), or set trainer.max_steps. (model.warmup_steps)"
            )
    elif warmup_steps is not None and warmup_steps > total_steps:
        raise ConfigError(
            f"warmup_steps={warmup_steps}, but the whole run has {total_steps:g} optimizer steps: "
            "the learning rate would not reach its peak. (model.warmup_steps)"
        )


def count_steps(trainer: Any) -> float:
    """Optimizer steps of the whole run; infinite where nothing ends it.

    An epoch's last, partial window of accumulation is a step. To be asked when the data are set up.
    """
    epochs = trainer.max_epochs
    by_steps: float = math.inf if trainer.max_steps == -1 else trainer.max_steps
    if epochs in (-1, None) or math.isinf(trainer.num_training_batches):
        return by_steps
    windows = [trainer.accumulate_grad_batches] * epochs
    for callback in trainer.callbacks:
        if isinstance(callback, GradientAccumulationScheduler):
            windows = [callback.get_accumulate_grad_batches(epoch) for epoch in range(epochs)]
    by_epochs: float = sum(math.ceil(trainer.num_training_batches / window) for window in windows)
    return min(by_steps, by_epochs)


def is_trial(trainer: Any) -> bool:
    """True if this is `fast_dev_run`, or a search, for which Lightning takes all callbacks away."""
    return bool(trainer.fast_dev_run) or not trainer.callbacks
