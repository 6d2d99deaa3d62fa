"""A training loader that knows its position, the epoch, and when the other processes end."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from torchdata.stateful_dataloader import StatefulDataLoader

from lora_lightning.errors import RecordError
from lora_lightning.training.collectives import any_process
from lora_lightning.training.resume.loop_state import in_epoch
from lora_lightning.training.resume.resumable_loader import LazyLoader


class TextLoader(StatefulDataLoader[Any]):
    """torchdata's loader, whose state is the position, of batches whose order the epoch says.

    What is `ordered` is told the epoch when a pass begins, of a sampler or a stream. A pass over a
    stream ends where the first process has no batch left: shares of a stream are seldom equally
    long, and a process without a batch would leave the others waiting for its gradients for ever.
    """

    # Its current epoch is that of the order; without one, passes are counted.
    trainer: Trainer | None = None
    streams: bool = False
    _passes = 0
    _before: dict[str, Any] | None = None
    _gives = False  # whether a batch has come out of it, in this run or the one that goes on

    def __init__(self, *args: Any, **options: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".set_vital. is deprecated")  # torchdata calls it
            super().__init__(*args, **options)

    @property
    def ordered(self) -> Any:
        """Sampler or stream, which has the order."""
        return self.dataset if self.streams else self.sampler

    def __iter__(self) -> Iterator[Any]:
        if hasattr(self.ordered, "set_epoch"):  # not of a sampler that Lightning put there
            self.ordered.set_epoch(_coming_epoch(self.trainer) if self.trainer else self._passes)
        self._passes += 1
        batches = super().__iter__()
        return iter(partial(self.next_of, batches), None) if self.streams else batches

    def state_dict(self) -> dict[str, Any]:
        """The position; of a stream that Lightning reads one batch ahead, before that batch."""
        return super().state_dict() if self._before is None else self._before

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a position, behind which there may be no batch left."""
        super().load_state_dict(state_dict)
        self._gives = True

    def next_of(self, batches: Iterator[Any]) -> Any:
        """The next batch of a stream; None where one of the processes has none.

        Raises:
            RecordError: If there is none at all: the Trainer, which waits for steps, would begin
                one empty epoch after the other.
        """
        # Under LoraCallback, which makes it a LazyLoader, it is the callback that looks back.
        if self.trainer is not None and not isinstance(self, LazyLoader):
            self._before = super().state_dict()
        batch = next(batches, None)
        ended = batch is None
        if self.trainer is not None:
            ended = any_process(self.trainer.strategy, ended)
        if ended and not self._gives:
            raise RecordError(
                "streaming: a whole pass over the training data gave no batch, at least on one of "
                f"{self.dataset.processes} processes: all rows were left out (data.too_long, "
                "data.untrainable) or held out (data.val), or there are fewer rows than processes. "
                "(data.train)"
            )
        if ended:
            self._before = batch = None
        self._gives = True
        return batch


def _coming_epoch(trainer: Any) -> int:
    """The epoch whose batches come next.

    While Lightning sets up the data of a resumed run, `current_epoch` is still the one that was
    over when the checkpoint was written: at its end, or in the validation after its last batch.
    """
    fit_loop = trainer.fit_loop
    over = fit_loop.restarting and in_epoch(trainer)
    over = over and fit_loop.epoch_loop.batch_progress.is_last_batch
    return int(fit_loop.epoch_progress.current.processed + over)
