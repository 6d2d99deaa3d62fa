"""Agreement of the processes of a run: what happens to one of them happens to all."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy
from torch.distributed.constants import default_pg_timeout

from lora_lightning.errors import CheckpointError
from lora_lightning.training._lightning import collective_timeout, trainer_of
from lora_lightning.training.messages import show
from lora_lightning.training.module_state import module_state
from lora_lightning.utilities._torch import default_store

WAIT = timedelta(minutes=5)  # for the others; a timeout given to the strategy goes before
NOTICE = timedelta(seconds=10)  # after which a process says what it waits for

_meetings = 0  # of this process


def any_process(strategy: Strategy, flag: bool) -> bool:
    """Tell whether `flag` is set on any process; all of them must ask."""
    if getattr(strategy, "world_size", 1) == 1:  # a strategy for one device has none
        return flag
    return bool(strategy.reduce_boolean_decision(flag, all=False))


def all_or_none(strategy: Strategy, save: Callable[[], None], path: object) -> None:
    """Run `save` on every process; where it fails on one (rank 0 writes), fail on all.

    The others would wait for it at the barrier that follows: they raise CheckpointError. After a
    run rank 0 may save alone, so nobody waits for anybody; where the model is sharded, it cannot.
    """
    if is_over(trainer_of(strategy.lightning_module)) and not (
        strategy.restore_checkpoint_after_setup
    ):
        save()
        return
    wait_for_all(strategy)
    failure: Exception | None = None
    try:
        save()
    except Exception as error:
        failure = error
    if any_process(strategy, failure is not None):
        raise failure or CheckpointError(
            f"Checkpoint {str(path)!r} could not be written by another process, whose error says "
            "why. Nothing was overwritten or deleted."
        )


def gathered(strategy: Strategy, own: Any) -> list[Any]:
    """What each process gives, by rank; CheckpointError if one does not come."""
    if getattr(strategy, "world_size", 1) == 1 or not _is_distributed():
        return [own]
    wait_for_all(strategy)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def is_over(trainer: Trainer | None) -> bool:
    """True once training has ended: from then on processes need not do the same."""
    if trainer is None or trainer.lightning_module is None:
        return False
    return trainer.state.finished or bool(module_state(trainer.lightning_module).final_states)


def wait_for_all(strategy: Strategy) -> None:
    """Return once every process has come here; a checkpoint is taken on all of them.

    CheckpointError, after a line that says what it waits for, if others do not come. By the store
    of the process group: a collective would hang, or meet another one of theirs.
    """
    global _meetings
    if not _is_distributed() or dist.get_world_size() == 1:
        return
    store, rank = default_store(), dist.get_rank()
    names = {r: f"lora_lightning/{_meetings}/{r}" for r in range(dist.get_world_size())}
    store.set(names[rank], "here")
    _meetings += 1
    limit = collective_timeout(strategy)
    if limit is None or limit == default_pg_timeout:
        limit = WAIT
    notice = min(NOTICE, limit / 2)
    if _all_came(store, list(names.values()), notice):
        return
    missing = ", ".join(str(r) for r, name in names.items() if not store.check([name]))
    said = (
        f"rank {rank} takes a checkpoint within the run and waits for rank {missing}. It holds the "
        "random numbers and the position in the data of every process, so each of them has to take "
        "it (save_checkpoint or dump_checkpoint; rank 0 writes): not under rank_zero_only or "
        "is_global_zero."
    )
    show(said)
    if not _all_came(store, list(names.values()), limit - notice):
        _meetings -= 1
        store.delete_key(names[rank])
        raise CheckpointError(
            f"No checkpoint was written: {said} They did not come within "
            f"{limit.total_seconds():g} s. Once training has ended (on_train_end), rank 0 may save "
            "alone. (trainer.strategy)"
        )


def _all_came(store: Any, names: list[str], within: timedelta) -> bool:
    try:
        store.wait(names, within)
    except RuntimeError:  # torch's DistStoreError
        return False
    return True


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
