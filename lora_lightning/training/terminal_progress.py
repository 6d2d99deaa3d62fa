"""The progress of a run in the terminal: a bar that fits it, or lines where there is none."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from lora_lightning.errors import printable
from lora_lightning.training import messages
from lora_lightning.training._lightning import (
    accumulates,
    all_callbacks,
    logged_step,
    logs_this_batch,
)
from lora_lightning.training.run_lines import (
    folded,
    last_step,
    left_in_words,
    measured_items,
    seconds_left,
    step_items,
    total_steps,
    validation_items,
)
from lora_lightning.training.stopwatch import Stopwatch

_SECONDS = 0.5  # between two looks at what was logged, for the bar
_PATIENCE = 30.0  # seconds between two lines of an evaluation


class TerminalProgress(ProgressBar):
    """How far a run is: on a terminal a bar, elsewhere lines without control codes.

        Trainer(callbacks=[LoraCallback(), TerminalProgress()])

    It stands in the place of the Trainer's own bar; the command has it unless another is among
    `trainer.callbacks`, or `trainer.enable_progress_bar` is false. What it says of a step: the
    loss, what is logged with `prog_bar=True`, learning rate, speed and the time that is left, as
    long as the run has taken for each step so far. Without a terminal (a file, a pipe, a job of
    SLURM, a notebook) that is a line every `log_every_n_steps` steps and one for the last step.
    After each validation there is a line with its metrics; an evaluation says every half minute
    how far it is. Process 0 alone looks and prints, at values that were logged already.

    Args:
        bar: True for the bar, False for lines; default: by what standard output is.
    """

    def __init__(self, bar: bool | None = None) -> None:
        super().__init__()
        self.bar = bar
        self.watch = Stopwatch()
        self._enabled = True
        self._live: _Live | None = None
        self._rate: float | None = None
        self._looked = -math.inf  # when the bar was told of a step
        self._begun, self._first = 0.0, 0  # when training began, and after how many steps
        self._since, self._before = 0.0, 0  # the same of the step that was shown before

    def disable(self) -> None:
        """Show nothing."""
        self._enabled = False

    def enable(self) -> None:
        """Show it."""
        self._enabled = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Go behind the callbacks that log; before those that write checkpoints."""
        super().setup(trainer, pl_module, stage)
        others = [callback for callback in all_callbacks(trainer) if callback is not self]
        ordered = sorted([*others, self], key=lambda callback: isinstance(callback, Checkpoint))
        trainer.callbacks = ordered  # type: ignore[attr-defined]

    # -- training --------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._begun, self._looked, self._since = time.monotonic(), -math.inf, 0.0
        self._first = self._before = logged_step(trainer)
        self.watch.start()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the epoch's bar."""
        epochs = f" of {trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
        self._show_bar(f"epoch {trainer.current_epoch + 1}{epochs}", self.total_train_batches)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the learning rate: after the step, schedulers have set the next."""
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self._rate = groups[0]["lr"] if groups else None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the step, if it is time to."""
        if not self._enabled:
            return
        if self._live:
            self._live.count(batch_idx + 1)
        automatic = pl_module.automatic_optimization
        if automatic and accumulates(trainer):
            return
        step = last_step(trainer)
        total = total_steps(trainer, step)
        if self._live is None:
            logs = logs_this_batch(trainer) or trainer.fast_dev_run  # type: ignore[attr-defined]
            if logs or step == total:
                messages.show("  ".join(self._items(trainer, outputs, step, total)))
        elif time.monotonic() - self._looked >= _SECONDS or step == total:
            self._looked = time.monotonic()
            self._live.say(self._items(trainer, outputs, step, total))

    def _items(self, trainer: Trainer, outputs: Any, step: int, total: int | None) -> list[str]:
        seconds = self.watch.seconds()
        speed = (step - self._before) / max(seconds - self._since, 1e-9)
        self._since, self._before = seconds, step
        rate = None if self._rate is None else float(self._rate)
        passed, done = time.monotonic() - self._begun, step - self._first
        left = seconds_left(trainer, passed, done, None if total is None else total - step)
        left = None if step == total else left
        items = [_step(step, total), *step_items(trainer, outputs)]
        return [*items, *measured_items(trainer, rate, speed), *left_in_words(left)]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the bar as it is: what follows is below it."""
        self._close()

    # -- evaluation ------------------------------------------------------------------------------

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take its bar away."""
        self._close()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of training."""
        self.watch.stop()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Begin the bar of a data loader."""
        if self.has_dataloader_changed(dataloader_idx):
            name = "sanity check" if trainer.sanity_checking else "validating"
            self._begin(name, dataloader_idx, self.total_val_batches_current_dataloader)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any,
        batch_idx: int, dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Count."""
        total = self.total_val_batches_current_dataloader
        self._count(trainer, "validating", batch_idx, total)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show its metrics."""
        self._end(trainer)
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._enabled:
            items = validation_items(trainer)
            step = last_step(trainer)
            if items:
                messages.show("  ".join([_step(step, total_steps(trainer, step)), *items]))
        self.watch.go_on()

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Begin the bar of a data loader."""
        if self.has_dataloader_changed(dataloader_idx):
            self._begin("testing", dataloader_idx, self.total_test_batches_current_dataloader)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any,
        batch_idx: int, dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Count."""
        self._count(trainer, "testing", batch_idx, self.total_test_batches_current_dataloader)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the bar away."""
        self._end(trainer)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Begin the bar of a data loader."""
        if self.has_dataloader_changed(dataloader_idx):
            self._begin("predicting", dataloader_idx, self.total_predict_batches_current_dataloader)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any,
        batch_idx: int, dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Count."""
        total = self.total_predict_batches_current_dataloader
        self._count(trainer, "predicting", batch_idx, total)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the bar away."""
        self._end(trainer)

    def _begin(self, name: str, loader: int, total: float) -> None:
        if self.trainer.state.fn != "fit":
            self._looked = time.monotonic()
        self._show_bar(f"{name} {loader + 1}" if loader else name, total, second=True)

    def _count(self, trainer: Trainer, name: str, batch_idx: int, total: float) -> None:
        done, now = batch_idx + 1, time.monotonic()
        if self._live:
            self._live.count(done, second=True)
        elif self._enabled and trainer.state.fn != "fit" and now - self._looked >= _PATIENCE:
            self._looked = now
            messages.show(f"{name}: batch {_of(done, None if math.isinf(total) else int(total))}")

    def _end(self, trainer: Trainer) -> None:
        self.reset_dataloader_idx_tracker()
        if self._live:
            self._live.hide_second()
        if trainer.state.fn != "fit":
            self._close()

    # -- the bar ---------------------------------------------------------------------------------

    def _show_bar(self, name: str, total: float, second: bool = False) -> None:
        if self._live is None and self._enabled and self._has_bar():
            passes = self.trainer.state.fn != "fit" or self.trainer.sanity_checking
            self._live = _Live(transient=passes)
            self._live.start()
        if self._live:
            self._live.begin(name, None if math.isinf(total) else int(total), second)

    def _has_bar(self) -> bool:
        if self.bar is not None:
            return self.bar
        return sys.stdout.isatty() and not messages.console_of_terminal().is_dumb_terminal

    def _close(self) -> None:
        live, self._live = self._live, None
        if live:
            live.stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave the terminal as it was."""
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the terminal as it was."""
        self._close()

    def __getstate__(self) -> dict[str, Any]:  # threads cannot be pickled
        return {**vars(self), "_live": None}


class _Live(Progress):
    """The bar of the epoch, below it one of the validation, and the items of the last step."""

    def __init__(self, transient: bool) -> None:
        self._said: list[str] = []
        self._moved: list[Any] = []  # handlers
        self._task: Any = None
        self._second: Any = None
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        )  # fmt: skip
        super().__init__(*columns, transient=transient)

    def start(self) -> None:
        """Begin, and have what Lightning says keep above, as all that is printed does."""
        before = sys.stderr
        super().start()
        handlers: Any = logging.getLogger("lightning.pytorch").handlers
        self._moved = [one for one in handlers if getattr(one, "stream", None) is before]
        for handler in self._moved:
            handler.setStream(sys.stderr)

    def stop(self) -> None:
        """End."""
        super().stop()
        for handler in self._moved:
            handler.setStream(sys.stderr)

    def begin(self, name: str, total: int | None, second: bool) -> None:
        """Begin the one or the other."""
        old = self._second if second else self._task
        if old is not None:
            self.remove_task(old)
        task = self.add_task(name, total=total)
        if second:
            self._second = task
        else:
            self._task = task

    def count(self, done: int, second: bool = False) -> None:
        """So many batches are done."""
        task = self._second if second else self._task
        if task is not None:
            self.update(task, completed=done)

    def hide_second(self) -> None:
        """Show the epoch's alone."""
        if self._second is not None:
            self.remove_task(self._second)
            self._second = None

    def say(self, items: list[str]) -> None:
        """Show these."""
        self._said = [printable(item) for item in items]

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bars, and the items as the width allows."""
        yield from super().get_renderables()
        if self._said:
            yield Text(folded(self._said, self.console.width), no_wrap=True)


def _step(step: int, total: int | None) -> str:
    return f"step {_of(step, total)}"


def _of(done: int, total: int | None) -> str:
    return f"{done}" if total is None else f"{done}/{total}"
