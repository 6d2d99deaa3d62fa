"""Metrics in the middle of what they sum up: what a checkpoint holds of them for an exact resume.

Lightning averages what `self.log(..., on_epoch=True)` is given over the epoch, and the states of
torchmetrics are in no state dict, unless they are persistent. Each process has its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.wrappers.abstract import WrapperMetric

from lora_lightning.training import _lightning
from lora_lightning.training.messages import rank_zero_warn
from lora_lightning.training.resume.loop_state import in_epoch


def metrics_so_far(module: LightningModule) -> dict[str, Any]:
    """The states of the module's metrics, and what it has logged in the epoch under way."""
    loop, within = module.trainer.fit_loop.epoch_loop, in_epoch(module.trainer)
    # Once an epoch has ended, Lightning is about to reset what was logged in it.
    over = [] if within else [result.value for result in _lightning.logged_results(loop).values()]
    states = {
        path: _state(metric)
        for path, metric in _metrics(module)
        if _was_updated(metric) and not any(metric is value for value in over)
    }
    logged = _lightning.saved_results(loop) if within else []
    so_far: dict[str, Any] = _copied({"states": states, "logged": logged})
    return so_far


def continue_metrics(module: LightningModule, saved: dict[str, Any]) -> None:
    """Go on from what a checkpoint holds, before the first batch."""
    for path, metric in _metrics(module):
        if path in saved["states"]:
            count, state = saved["states"][path]
            _lightning.restore_metric(metric, count, _copied(state, metric.device))
        elif _was_updated(metric):
            metric.reset()
    logged = _copied(saved["logged"], module.device)
    _lightning.restore_results(module, [entry for entry in logged if entry["options"]])
    lost = [entry["name"] for entry in logged if not entry["options"]]
    if lost:
        rank_zero_warn(
            f"{', '.join(map(repr, lost))} is logged with a sync_dist_group, which no checkpoint "
            "can hold: its average over this epoch begins anew. Leave sync_dist_group out, or "
            "resume from the end of an epoch, for an exact resume. (self.log)"
        )


def _metrics(module: LightningModule) -> Iterator[tuple[str, Metric]]:
    for path, part in module.named_modules():
        if isinstance(part, MetricCollection):
            part.items()  # brings those in line that share their states with another
        if isinstance(part, Metric):
            yield path, part


def _was_updated(metric: Metric) -> bool:
    return metric.update_called or isinstance(metric, WrapperMetric)  # which does not count


def _state(metric: Metric) -> tuple[int, dict[str, Any]]:
    """How often it was updated, and its tensors, among them those of `MinMaxMetric`: no states."""
    public = {name: value for name, value in vars(metric).items() if not name.startswith("_")}
    tensors = {name: value for name, value in public.items() if isinstance(value, Tensor)}
    return metric.update_count, {**tensors, **metric.metric_state}


def _copied(value: Any, device: torch.device | str = "cpu") -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, dict):
        return {key: _copied(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item, device) for item in value)
    return value
