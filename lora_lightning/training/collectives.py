"""Agreement of the processes of a run: what happens to one of them happens to all."""

from __future__ import annotations

from collections.abc import Callable

from lightning.pytorch.strategies import Strategy

from lora_lightning.errors import CheckpointError


def any_process(strategy: Strategy, flag: bool) -> bool:
    """Tell whether `flag` is set on any process; all of them must ask."""
    if getattr(strategy, "world_size", 1) == 1:  # a strategy for one device has none
        return flag
    return bool(strategy.reduce_boolean_decision(flag, all=False))


def all_or_none(strategy: Strategy, save: Callable[[], None], path: object) -> None:
    """Run `save` on every process; where it fails on one (rank 0 writes), fail on all.

    The others would wait for it at the barrier that follows: they raise CheckpointError.
    """
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
