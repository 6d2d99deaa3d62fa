"""Mistakes that Lightning finds late or says at length: monitors, loggers, a run that is done."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lora_lightning.cli.loggers import missing_package
from lora_lightning.errors import ConfigError, first_few, nearest_hint

# So alike are two names of which one is misspelt; val_loss and train_loss are at 0.67.
_ALIKE = 0.8
_LATE = {
    "EarlyStopping": re.compile(
        r"conditioned on metric `(.*)` which is not available\..*following: `(.*)`"
    ),
    "ModelCheckpoint": re.compile(
        r"monitor='(.*)'\)` could not find the monitored key in the .*metrics: \[(.*?)\]"
    ),
}


class MonitorCheck(Callback):
    """Refuses a misspelt `monitor` before the first step.

    The validation before it shows the names of its metrics. One that is not there, but for a
    letter or two, is misspelt; one that is unlike all of them may be of training, and comes later.
    """

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare what callbacks monitor with what the validation logged."""
        logged = [str(name) for name in trainer.callback_metrics]
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            monitor = getattr(callback, "monitor", None)
            if not isinstance(monitor, str) or monitor in logged:
                continue
            if difflib.get_close_matches(monitor, logged, 1, _ALIKE):
                raise _not_logged(monitor, logged, type(callback).__name__)


def monitor_error(error: BaseException) -> ConfigError | None:
    """Lightning's error about a metric that was never logged, in one line; None of any other."""
    for who, pattern in _LATE.items():
        if found := pattern.search(str(error)):
            names = re.findall(r"[^`', ]+", found.group(2))
            return _not_logged(found.group(1), names, who)
    return None


def _not_logged(monitor: str, logged: list[str], who: str) -> ConfigError:
    metrics = [name for name in logged if name not in ("epoch", "step")]
    return ConfigError(
        f"{who} monitors {monitor!r}, which the module does not log."
        f"{nearest_hint(monitor, metrics)} Logged are: {first_few(metrics, 12) or 'no metrics'}. "
        "(trainer.callbacks)"
    )


def check_loggers(loggers: Any) -> None:
    """Refuse a logger whose package is not installed."""
    for entry in loggers if isinstance(loggers, list) else [loggers]:
        text = missing_package(str(getattr(entry, "class_path", "")))
        if text:
            raise ConfigError(f"{text} (trainer.logger)")


def nothing_left(checkpoint: Path, trainer: Any) -> str | None:
    """Why a run that goes on from a checkpoint would do nothing; None if it would train."""
    if checkpoint.is_dir():
        return None
    try:
        content = torch.load(checkpoint, weights_only=True, map_location="cpu", mmap=True)
    except Exception:  # a damaged file can raise anything; who goes on from it, says so at length
        return None
    epochs = _completed(content, ("loops", "fit_loop", "epoch_progress", "current", "processed"))
    progress = _completed(content, ("loops", "fit_loop", "epoch_loop.batch_progress"))
    begun = _completed(content, ("loops", "fit_loop", "epoch_progress", "current", "ready"))
    # Saved behind the last batch of an epoch, by the validation that comes before its end.
    if _completed(progress, ("is_last_batch",)) is True and begun == epochs + 1:
        epochs = begun
    limits: Iterable[tuple[str, Any, Any]] = (
        ("max_epochs", trainer.get("max_epochs"), epochs),
        ("max_steps", trainer.get("max_steps"), content.get("global_step")),
    )
    for name, limit, done in limits:
        if isinstance(limit, int) and isinstance(done, int) and 0 < limit <= done:
            return f"nothing left to train: {name}={limit} is reached (raise trainer.{name})"
    return None


def _completed(content: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content
