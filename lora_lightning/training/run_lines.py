"""What a run says of itself in one line: how far it is, what was logged, the time left."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from torch import Tensor

from lora_lightning.training._lightning import (
    accumulates,
    all_callbacks,
    last_value,
    logged_results,
    logged_step,
)
from lora_lightning.training.progress import readable_time
from lora_lightning.training.summary import readable_bytes

SHOWN = 6  # metrics in a line, at most

# What `TrainingProgress` logs, and how it is shown.
_SPEEDS = {f"{unit}_per_second": f"{unit}/s" for unit in ("tokens", "samples", "batches")}
_MEMORY, _RATE = "peak_memory_gb", "lr"


def last_step(trainer: Trainer) -> int:
    """The optimizer steps made so far, that of the batch that has just ended included."""
    return logged_step(trainer) + (0 if accumulates(trainer) else 1)


def total_steps(trainer: Trainer, step: int) -> int | None:
    """The steps until the end; None where that is not known (no length, no limit)."""
    try:
        total = trainer.estimated_stepping_batches
    except MisconfigurationException:  # accumulate_grad_batches changes on the way
        return None
    if total == trainer.max_steps and step:
        # The Trainer counts the steps of each optimizer by itself there.
        total = round(total * step / max(trainer.global_step, 1))
    return int(total) if 0 < total < math.inf else None


def seconds_left(trainer: Trainer, passed: float, done: int, left: int | None) -> float | None:
    """How long a run that made `done` steps in `passed` seconds still takes; None: not known."""
    found = [] if left is None or not done else [passed / done * left]
    timers = [c for c in all_callbacks(trainer) if isinstance(c, Timer)]  # of max_time
    found += [rest for rest in (timer.time_remaining() for timer in timers) if rest is not None]
    return max(0.0, min(found)) if found else None


def step_items(trainer: Trainer, outputs: Any) -> list[str]:
    """Loss and what has `prog_bar=True`, as they were logged of the last batch.

    The loss is what the step returned, where it logs none.
    """
    results = [result for result in logged_results(trainer).values() if result.meta.on_step]
    values = {result.meta.name: last_value(result) for result in results}
    ours = {*_SPEEDS, _MEMORY, _RATE}
    chosen = [r.meta.name for r in results if r.meta.prog_bar and r.meta.name not in ours]
    usual = [name for name in ("train_loss", "loss", "train/loss") if name in values]
    losses = [name for name in (*usual, *chosen, *values) if "loss" in name.lower()]
    loss = losses[0] if losses else "loss"
    if not losses:
        values[loss] = outputs.get(loss) if isinstance(outputs, Mapping) else outputs
    names = [loss, *(name for name in chosen if name != loss)]
    return in_words({name: values[name] for name in names})


def measured_items(trainer: Trainer, rate: float | None, steps_per_second: float) -> list[str]:
    """Learning rate, speed and memory: those of `TrainingProgress`, where it is there."""
    found = {r.meta.name: last_value(r) for r in logged_results(trainer).values()}
    values = {name: found[name] for name in (*_SPEEDS, _MEMORY) if _is_number(found.get(name))}
    items = [] if rate is None else [f"lr {rate:.1e}"]
    speeds = {_SPEEDS[name]: float(values[name]) for name in values if name in _SPEEDS}
    items += [f"{_round(value)} {unit}" for unit, value in speeds.items()]
    if not speeds and steps_per_second > 0:
        slow = steps_per_second < 1
        items.append(
            f"{_round(1 / steps_per_second)} s/step"
            if slow
            else f"{_round(steps_per_second)} steps/s"
        )
    return [*items, *(readable_bytes(float(v) * 1e9) for n, v in values.items() if n == _MEMORY)]


def validation_items(trainer: Trainer) -> list[str]:
    """The metrics of the validation that has just ended, those with `prog_bar=True` first."""
    results = [result.meta for result in logged_results(trainer).values() if result.meta.on_epoch]
    results.sort(key=lambda meta: not meta.prog_bar)
    found = trainer.callback_metrics  # computed before, by all processes together
    numbered = {
        meta.name
        if meta.dataloader_idx is None
        else f"{meta.name}/dataloader_idx_{meta.dataloader_idx}": None
        for meta in results
    }
    return in_words({name: found[name] for name in numbered if name in found})


def in_words(values: Mapping[str, Any]) -> list[str]:
    """`name value` of each that is a number, `SHOWN` at most."""
    numbers = {name: value for name, value in values.items() if _is_number(value)}
    items = [f"{name} {float(numbers[name]):.4g}" for name in [*numbers][:SHOWN]]
    return items if len(numbers) <= SHOWN else [*items, f"+ {len(numbers) - SHOWN} more"]


def left_in_words(seconds: float | None) -> list[str]:
    """`12 min 3 s left`; nothing where it is not known."""
    if seconds is None:
        return []
    return [f"{f'{seconds:.0f} s' if seconds < 60 else readable_time(seconds)} left"]


def folded(items: Iterable[str], width: int, most: int = 3) -> str:
    """Items on as few lines as they need, at most `most`, none of them split; long ones are cut."""
    lines: list[str] = [""]
    for item in items:
        cut = item if len(item) <= width else f"{item[: width - 1]}…"
        if lines[-1] and len(lines[-1]) + 2 + len(cut) > width:
            if len(lines) == most:
                break
            lines.append("")
        lines[-1] += f"{'  ' if lines[-1] else ''}{cut}"
    return "\n".join(lines)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)


def _round(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
