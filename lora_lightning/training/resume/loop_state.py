"""What Lightning's loops leave out when they resume.

A checkpoint is written somewhere in the work on a batch or an epoch, and Lightning resumes after
it: what was still to come is not made up for. These are put right here:

* Written after the last batch of an epoch, or after one that a validation follows: the validation
  and the end of the epoch are left out.
* Written at the end of an epoch: schedulers of the kind ReduceLROnPlateau miss the epoch; also when
  an epoch is resumed in its middle.
* With `max_steps`, an epoch that has ended is taken up once more: its hooks run twice, it counts
  twice, or it gets a batch too many.
* An epoch resumed in its middle does not begin: GradientAccumulationScheduler would not act in it.
* Metrics that callbacks monitor are forgotten, as is that EarlyStopping has stopped the run.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

_EPOCH_LOOP = "epoch_loop."


def complete_loops(loops: dict[str, Any], trainer: Any) -> None:
    """Change `checkpoint["loops"]["fit_loop"]` so that the work on a batch is finished.

    In `on_train_batch_end` a batch counts as processed, not yet as completed.
    """
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    batches = loops[f"{_EPOCH_LOOP}batch_progress"]
    underway = batches["current"]["processed"] == batches["current"]["completed"] + 1
    if not underway or fetcher is None or not in_epoch(trainer):
        return
    validates = loop._should_check_val_fx(fetcher)
    if not validates and not loop._num_ready_batches_reached():
        return
    for count in (batches["current"], batches["total"]):
        count["completed"] = count["processed"]
    if validates:  # as if it had begun: Lightning goes back to it
        progress = loops[f"{_EPOCH_LOOP}val_loop.batch_progress"]
        progress["current"] = dict.fromkeys(progress["current"], 0)
        done = progress["total"]["completed"]
        progress["total"].update(ready=done + 1, started=done + 1, processed=done)
    elif not loop._should_accumulate():
        loops[f"{_EPOCH_LOOP}state_dict"]["_batches_that_stepped"] += 1


def monitored(trainer: Any) -> dict[str, torch.Tensor]:
    """The metrics that callbacks and schedulers see."""
    metrics = trainer.callback_metrics
    return {name: torch.as_tensor(value).detach().cpu().clone() for name, value in metrics.items()}


def epoch_averages(trainer: Any) -> list[str]:
    """Names of the metrics that training averages over the epoch under way."""
    if not in_epoch(trainer):
        return []
    logged = [result.meta for result in trainer.fit_loop.epoch_loop._results.values()]
    return sorted({name for m in logged if m.on_epoch for name in (m.name, f"{m.name}_epoch")})


def warn_of_averages(trainer: Any, averages: list[str]) -> None:
    """A checkpoint does not hold the averages so far; say so where something watches one."""
    watching = [*trainer.callbacks, *trainer.lr_scheduler_configs]
    monitors = {str(getattr(watcher, "monitor", None)) for watcher in watching}
    watched = monitors & set(averages)
    if watched:
        rank_zero_warn(
            f"{', '.join(map(repr, sorted(watched)))} is averaged over the training epoch, and a "
            "checkpoint from the middle of an epoch does not hold the average so far: what "
            "monitors it sees the remaining batches of this epoch only. Monitor a validation "
            "metric, or resume from the end of an epoch, for an exact resume. (trainer.callbacks)"
        )


def continue_loops(trainer: Any, metrics: dict[str, torch.Tensor]) -> None:
    """Make up for what is left out; loops and schedulers are restored, no batch was asked for."""
    fit_loop = trainer.fit_loop
    loop, fetcher = fit_loop.epoch_loop, fit_loop._data_fetcher
    trainer._logger_connector._callback_metrics.update(metrics)
    for callback in trainer.callbacks:
        if isinstance(callback, GradientAccumulationScheduler):
            batches = callback.get_accumulate_grad_batches(trainer.current_epoch)
            trainer.accumulate_grad_batches = batches
    ends = fit_loop.restarted_on_epoch_end or fit_loop.resumed_on_epoch_end
    epoch = fit_loop.epoch_progress
    if ends:
        epoch.current.completed = epoch.current.processed - 1  # as at the end of the epoch
        loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
        epoch.current.completed = epoch.current.processed
        epoch.total.completed = epoch.total.processed
        fit_loop.reset_restart_stage()
    if fit_loop.restarted_on_epoch_start:
        epoch.current.ready = epoch.current.started + 1
    if ends or fit_loop.restarted_on_epoch_start:
        loop._restarting = loop.val_loop._restarting = False
    elif loop.restarting:
        last = loop.batch_progress.is_last_batch
        validated = not loop.val_loop.restarted_mid_evaluation
        passed_over = loop.restarted_on_train_batch_end or (
            last and validated and not loop._should_check_val_fx(fetcher)
        )
        if passed_over:
            loop.update_lr_schedulers("step", update_plateau_schedulers=True)
        if last:  # there is no other batch in this epoch
            fetcher.done = True
            getattr(fetcher, "batches", []).clear()
    fit_loop._restarting = False  # else the epoch would end without plateau schedulers
    for callback in trainer.callbacks:
        if isinstance(callback, EarlyStopping) and _has_stopped(callback):
            trainer.should_stop = True
            rank_zero_info(
                f"EarlyStopping had stopped this run by {callback.monitor}, and it ends here. To "
                "go on, leave it out: what it has seen, and its patience, come from the checkpoint."
            )


def _has_stopped(callback: Any) -> bool:
    """Whether it had told the Trainer to stop, be it for patience, a threshold or NaN."""
    if not hasattr(callback, "stopping_reason"):  # not of every Lightning 2.6
        return bool(callback.wait_count >= max(callback.patience, 1))
    # Where another process had the reason, this one has the epoch only.
    return callback.stopping_reason.name != "NOT_STOPPED" or callback.stopped_epoch > 0


def in_epoch(trainer: Any) -> bool:
    """Whether batches of an epoch are under way, rather than what comes between two epochs."""
    epoch = trainer.fit_loop.epoch_progress.current
    return epoch.started > epoch.processed
