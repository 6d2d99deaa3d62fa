"""SIGTERM and SLURM's requeue: stop where the run can be resumed exactly.

Lightning notices SIGTERM, but saves nothing, stops between two batches of validation too, and exits
with 0, as if the run were done; SLURM's requeue signal it answers at once, in the middle of an
optimizer step perhaps; and with several processes its signal handler broadcasts, beside whatever
the process group is just doing. So its handlers are exchanged for one that takes a note. What is to
be done is done at the next safe point, the end of a training batch, where all processes agree.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lora_lightning.training import _lightning, messages
from lora_lightning.training.collectives import any_process
from lora_lightning.utilities.is_a import is_a

EXIT_CODE = 128 + signal.SIGTERM  # 143, as a shell reports a process that SIGTERM ended


class Preemption:
    """Signals that come during a run of `fit`, and what follows from them."""

    def __init__(self) -> None:
        self._asked: set[int] = set()
        self._requeue: int | None = None  # the signal for it, under SLURM

    def watch(self, trainer: Trainer) -> None:
        """Take the place of Lightning's signal handlers until the Trainer takes its own away."""
        _keep_last_up_to_date(trainer)
        self._asked, self._requeue = set(), None
        if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
            return  # as Lightning: there it installs none either
        if trainer.received_sigterm:  # before we came
            self._asked.add(signal.SIGTERM)
        self._note(trainer, signal.SIGTERM)
        environment = _lightning.cluster_environment(trainer)
        if getattr(environment, "auto_requeue", False):
            self._requeue = getattr(environment, "requeue_signal", None) or signal.SIGUSR1
            self._note(trainer, self._requeue)

    def _note(self, trainer: Trainer, signum: int) -> None:
        own, others = _lightning.lightnings_signal_handlers(trainer, signum)
        if own:  # otherwise the user's handler stands there alone, as Lightning has left it
            signal.signal(signum, _Note(self._asked, others))

    def at_safe_point(self, trainer: Trainer) -> None:
        """Do what was asked for since the last safe point; every process must come by.

        SIGTERMException after saving, if the process is to end.
        """
        sharded = trainer.strategy.restore_checkpoint_after_setup
        if sharded and _lightning.accumulates(trainer):
            return  # gradients that are under way cannot be saved there
        if not any_process(trainer.strategy, bool(self._asked)):
            return
        if any_process(trainer.strategy, self._requeue in self._asked):
            self._asked.discard(self._requeue or 0)
            _lightning.save_and_requeue(trainer, self._requeue)
        if any_process(trainer.strategy, signal.SIGTERM in self._asked):
            path = save_last(trainer)
            saved = f"saved {path}; go on with ckpt_path='last'"
            nothing = "nothing was saved, as this Trainer writes no checkpoints"
            if trainer.is_global_zero:
                messages.show(f"SIGTERM: {saved if path else nothing}")
            raise SIGTERMException


class _Note:
    """A signal handler that only remembers, and calls those that were there before Lightning's."""

    def __init__(self, asked: set[int], others: list[_lightning.SignalHandler]):
        self.asked = asked
        self.others = others

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        self.asked.add(signum)
        for handler in self.others:
            handler(signum, frame)


def set_exit_code(trainer: Trainer, exception: BaseException) -> None:
    """Have a process that SIGTERM ended say so: exit code 143."""
    if isinstance(exception, SIGTERMException):
        # Lightning kills the main process of a script as soon as a child that it started fails.
        environment = _lightning.cluster_environment(trainer)
        child = isinstance(environment, LightningEnvironment) and trainer.local_rank > 0
        exception.code = 0 if child else EXIT_CODE


def lines_without_checkpoint(trainer: Trainer) -> list[str]:
    """Lines about a run that was interrupted (Ctrl-C) before it wrote a checkpoint."""
    if any(map(_lightning.has_saved, _savers(trainer))):
        return []
    if trainer.ckpt_path is not None:
        return [f"interrupted before the next checkpoint: {trainer.ckpt_path} is the newest still"]
    return ["interrupted before the first checkpoint: nothing is left to go on from"]


def _keep_last_up_to_date(trainer: Trainer) -> None:
    """Go on writing the `last.ckpt` that this run resumes from, though none was asked for.

    A run without `save_last` has one only because SIGTERM came; left behind, it would be taken for
    the newest one.
    """
    for callback in _savers(trainer):
        last = callback.last_model_path
        if not callback.save_last and trainer.ckpt_path is not None and last:
            callback.save_last = os.path.realpath(trainer.ckpt_path) == os.path.realpath(last)


def save_last(trainer: Trainer) -> str:
    """Write all that a resume needs to the Trainer's `last.ckpt`, by its ModelCheckpoint.

    Returns its path, empty where the Trainer has no ModelCheckpoint or only tries one out.
    """
    savers = _savers(trainer)
    if not savers or getattr(trainer, "fast_dev_run", False):
        return ""
    saver = next((s for s in savers if s.save_last), savers[0])
    options = saver.save_last, saver.save_weights_only
    saver.save_last, saver.save_weights_only = True, False
    try:
        _lightning.save_last_checkpoint(saver, trainer)
    finally:
        saver.save_last, saver.save_weights_only = options
    return str(saver.last_model_path)


def _savers(trainer: Trainer) -> list[ModelCheckpoint]:
    savers: list[Any] = [c for c in trainer.checkpoint_callbacks if is_a(c, "ModelCheckpoint")]
    return savers
