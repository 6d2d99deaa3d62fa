"""What happens to one process of a run happens to all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lora_lightning.errors import CheckpointError


def any_process(trainer_or_strategy: Any, flag: bool) -> bool:
    """Whether `flag` is set on any process; all of them must ask."""
    strategy = getattr(trainer_or_strategy, "strategy", trainer_or_strategy)
    if getattr(strategy, "world_size", 1) == 1:
        return flag
    return bool(strategy.reduce_boolean_decision(flag, all=False))


def save_together(strategy: Any, save: Callable[[], None], path: Any) -> None:
    """Run `save` on every process; where it fails on one (rank 0 writes), the others fail as well.

    Without, they would wait for it at the barrier that follows.

    Raises:
        CheckpointError: On the processes on which it did not fail itself.

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
