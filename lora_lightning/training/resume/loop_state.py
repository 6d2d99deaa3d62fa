"""Resume of Lightning's loops: what they leave out is put right.

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
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler

from lora_lightning.training import _lightning
from lora_lightning.training.messages import rank_zero_info


def complete_loops(loops: dict[str, Any], trainer: Trainer) -> None:
    """Change `checkpoint["loops"]["fit_loop"]` so that the work on a batch is finished.

    In `on_train_batch_end` a batch counts as processed, not yet as completed.
    """
    batches = _lightning.saved_batch_progress(loops)
    underway = batches["current"]["processed"] == batches["current"]["completed"] + 1
    if not underway or _lightning.data_fetcher(trainer) is None or not in_epoch(trainer):
        return
    validates = _lightning.validates_after_batch(trainer)
    if not validates and not _lightning.is_last_batch(trainer):
        return
    for count in (batches["current"], batches["total"]):
        count["completed"] = count["processed"]
    if validates:  # as if it had begun: Lightning goes back to it
        progress = _lightning.saved_validation_progress(loops)
        progress["current"] = dict.fromkeys(progress["current"], 0)
        done = progress["total"]["completed"]
        progress["total"].update(ready=done + 1, started=done + 1, processed=done)
    elif not _lightning.accumulates(trainer):
        _lightning.count_logged_step(loops)


def monitored(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The metrics that callbacks and schedulers see."""
    metrics = trainer.callback_metrics
    return {name: torch.as_tensor(value).detach().cpu().clone() for name, value in metrics.items()}


def continue_loops(trainer: Trainer, metrics: dict[str, torch.Tensor]) -> None:
    """Make up for what is left out, once loops and schedulers are restored, before any batch."""
    fit_loop = trainer.fit_loop
    loop, fetcher = fit_loop.epoch_loop, _lightning.data_fetcher(trainer)
    trainer.callback_metrics.update(metrics)
    for callback in _lightning.all_callbacks(trainer):
        if isinstance(callback, GradientAccumulationScheduler):
            batches = callback.get_accumulate_grad_batches(trainer.current_epoch)
            trainer.accumulate_grad_batches = batches
    ends = fit_loop.restarted_on_epoch_end or fit_loop.resumed_on_epoch_end
    epoch: Any = fit_loop.epoch_progress  # of a narrower type than its class says
    if ends:
        epoch.current.completed = epoch.current.processed - 1  # as at the end of the epoch
        loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
        epoch.current.completed = epoch.current.processed
        epoch.total.completed = epoch.total.processed
        fit_loop.reset_restart_stage()
    if fit_loop.restarted_on_epoch_start:
        epoch.current.ready = epoch.current.started + 1
    if ends or fit_loop.restarted_on_epoch_start:
        _lightning.stop_restarting(loop)
        _lightning.stop_restarting(loop.val_loop)
    elif loop.restarting:
        last = loop.batch_progress.is_last_batch
        validated = not loop.val_loop.restarted_mid_evaluation
        passed_over = loop.restarted_on_train_batch_end or (
            last and validated and not _lightning.validates_after_batch(trainer)
        )
        if passed_over:
            loop.update_lr_schedulers("step", update_plateau_schedulers=True)
        if last and fetcher is not None:  # there is no other batch in this epoch
            fetcher.done = True
            _lightning.fetched_ahead(fetcher).clear()
    for callback in _lightning.all_callbacks(trainer):
        if isinstance(callback, EarlyStopping) and _has_stopped(callback):
            trainer.should_stop = True
            rank_zero_info(
                f"EarlyStopping had stopped this run by {callback.monitor}, and it ends here. To "
                "go on, leave it out: what it has seen, and its patience, come from the checkpoint."
            )


def end_resumed_epoch(trainer: Trainer) -> None:
    """Have the first epoch of a resumed run end as any other, after its hooks.

    Until then `trainer.fit_loop.restarting` says what Lightning says. It would leave out schedulers
    of the kind ReduceLROnPlateau.
    """
    _lightning.stop_restarting(trainer.fit_loop)


def _has_stopped(callback: EarlyStopping) -> bool:
    """Tell whether it had stopped the run, be it for patience, a threshold or NaN."""
    reason = getattr(callback, "stopping_reason", None)
    if reason is None:  # not of every Lightning 2.6
        return callback.wait_count >= max(callback.patience, 1)
    # Where another process had the reason, this one has the epoch only.
    return reason.name != "NOT_STOPPED" or callback.stopped_epoch > 0


def in_epoch(trainer: Trainer) -> bool:
    """Tell whether batches of an epoch are under way, rather than what is between two epochs."""
    epoch: Any = trainer.fit_loop.epoch_progress.current
    return bool(epoch.started > epoch.processed)
