"""Throughput, learning rate and peak memory of training."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from lightning.pytorch.utilities.data import extract_batch_size

from lora_lightning.training import messages, summary
from lora_lightning.training._lightning import accumulates, all_callbacks, logs_this_batch
from lora_lightning.training.stopwatch import Stopwatch

_EVERY = 10  # optimizer steps between two measurements; the first ones are measured each


class TrainingProgress(Callback):
    """Throughput, learning rate and peak memory, in the progress bar and every logger.

    * `tokens_per_second`, where the module counts tokens (`tokens_seen`, as the language models of
      this package do); else `samples_per_second`; `batches_per_second` where a batch does not say
      its size. Of all processes together, since the measurement before. Validation, checkpoints
      and `TextSamples` are left out; waiting for data is not.
    * `lr`: learning rate of the last step, of the optimizer's first parameter group; those of
      further groups are logged as `lr_2`, ..., or by the group's name.
    * `peak_memory_gb`, 1 GB = 1e9 bytes: the most that PyTorch has had allocated on the CUDA
      device; on a CPU, the most main memory that the process has had (not known on Windows). The
      largest of all processes.

    The bar shows them as `tokens/s`, `lr` and `peak memory`; rich's own bar gets a line for each
    metric, unless it has a theme.
    Measured in each of the first ten optimizer steps, in every tenth, and whenever the Trainer logs
    (`log_every_n_steps`): only then it waits for the device. At the end a line sums the run up.
    """

    def __init__(self) -> None:
        super().__init__()
        self.watch = Stopwatch()
        self._unit = "samples"
        self._batches = 0
        self._steps = 0
        self._counted = 0.0  # by this process, since training began
        self._base = 0.0  # where the module's own count stood then
        self._total = 0.0  # by all processes, at the last measurement
        self._last = (0.0, 0.0)  # its own count, and the time, at the last measurement
        self._peak = 0.0
        self._rates: list[tuple[str | None, Any]] = []  # name, learning rate of each group

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the bar's metrics a line each: what it has beside them is broken anywhere."""
        bar: Any = trainer.progress_bar_callback
        if isinstance(bar, RichProgressBar) and bar.theme == RichProgressBarTheme():
            bar.theme = RichProgressBarTheme(metrics_text_delimiter="\n")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        has_tokens = getattr(pl_module, "tokens_seen", None) is not None
        self._unit = "tokens" if has_tokens else "samples"
        self._base = float(pl_module.tokens_seen) if has_tokens else 0.0  # type: ignore[arg-type]
        self._batches, self._steps = 0, 0
        self._counted, self._total, self._last = 0.0, 0.0, (0.0, 0.0)
        self.watch.count_in(trainer, "save_checkpoint")  # of a run that failed
        self.watch.leave_out(trainer, "save_checkpoint")
        self.watch.start()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the learning rates: after the step, schedulers have set the next."""
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self._rates = [(group.get("name"), group["lr"]) for group in groups]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count, and measure now and then."""
        self._batches += 1
        self._count(pl_module, batch)
        if accumulates(trainer):
            return  # an optimizer step is measured as a whole
        self._steps += 1
        logs = logs_this_batch(trainer) or trainer.fast_dev_run  # type: ignore[attr-defined]
        if not (logs or self._steps < _EVERY or self._steps % _EVERY == 0):
            return
        throughput, rates = self._measure(trainer), self._learning_rates()
        if logs:
            values = {f"{self._unit}_per_second": throughput, **rates}
            values.update({"peak_memory_gb": self._peak / 1e9} if self._peak else {})
            for name, value in values.items():
                pl_module.log(name, value, on_step=True, on_epoch=False, batch_size=1)
        # As text: the bar shows numbers with three digits after the point, a rate of 1e-4 as 0.000.
        shown = {f"{self._unit}/s": f"{throughput:,.0f}"}
        shown.update({"lr": f"{rates['lr']:.1e}"} if rates else {})
        shown.update({"peak memory": summary.readable_bytes(self._peak)} if self._peak else {})
        trainer.progress_bar_metrics.update(shown)  # type: ignore[arg-type]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self.watch.stop()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock again."""
        self.watch.go_on()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the last measurement."""
        self.watch.count_in(trainer, "save_checkpoint")
        if self._batches:
            self._measure(trainer)
        self.watch.stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave the Trainer as it was."""
        self.watch.count_in(trainer, "save_checkpoint")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sum the run up."""
        if self._batches and trainer.is_global_zero:
            seconds = self.watch.seconds()
            lines = [
                f"trained on {self._total:,.0f} {self._unit} in {readable_time(seconds)}, "
                f"{self._total / max(seconds, 1e-9):,.1f} {self._unit}/s, without validation and "
                "checkpoints"
            ]
            if self._peak:
                on_gpu = trainer.strategy.root_device.type == "cuda"
                where = "allocated on the GPU" if on_gpu else "of the process"
                lines.append(f"peak memory {where}: {summary.readable_bytes(self._peak)}")
            messages.show(*lines)

    def _count(self, pl_module: LightningModule, batch: Any) -> None:
        if self._unit == "tokens":
            self._counted = float(pl_module.tokens_seen) - self._base  # type: ignore[arg-type]
        elif self._unit == "samples":
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the sizes inside a batch may differ
                    self._counted += extract_batch_size(batch)
            except (MisconfigurationException, RecursionError):
                self._unit, self._counted = "batches", float(self._batches)
        else:
            self._counted += 1

    def _measure(self, trainer: Trainer) -> float:
        """Units per second since the last measurement; all processes take part."""
        device = trainer.strategy.root_device
        if device.type != "cpu" and torch.accelerator.is_available():
            torch.accelerator.synchronize(device)
        counted, seconds = self._counted, self.watch.seconds()
        fresh, peak = counted - self._last[0], peak_memory(device)
        if trainer.world_size > 1:
            own = torch.tensor([fresh, peak], device=device, dtype=torch.float32)
            fresh = float(trainer.strategy.reduce(own[0], reduce_op="sum"))
            peak = float(trainer.strategy.reduce(own[1], reduce_op="max"))
        passed = seconds - self._last[1]
        self._last, self._peak = (counted, seconds), peak
        self._total += fresh
        return fresh / max(passed, 1e-9)

    def _learning_rates(self) -> dict[str, float]:
        rates: dict[str, float] = {}
        for number, (name, rate) in enumerate(self._rates, 1):
            key = "lr" if number == 1 else f"lr_{name or number}"
            rates[f"lr_{number}" if key in rates else key] = float(rate)
        return rates


@contextmanager
def left_out(trainer: Trainer) -> Iterator[None]:
    """Leave what is done inside out of the training time."""
    with ExitStack() as stopped:
        for callback in all_callbacks(trainer):
            watch = getattr(callback, "watch", None)
            if isinstance(watch, Stopwatch):
                stopped.enter_context(watch.stopped())
        yield


def peak_memory(device: torch.device) -> float:
    """Bytes: allocated by PyTorch on a CUDA device, else held by the process; 0: not known."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(most if sys.platform == "darwin" else most * 1024)


def readable_time(seconds: float) -> str:
    """45.2 -> '45.2 s', 312 -> '5 min 12 s', 7380 -> '2 h 3 min'."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
