"""Training time: the clock of a fit, stopped while something else is done."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any


class Stopwatch:
    """Seconds since `start`, without those between `stop` and `go_on`; stops may be nested."""

    def __init__(self) -> None:
        self._from = 0.0
        self._left_out = 0.0
        self._stopped_at: list[float] = []
        # What an object itself had in the place of a method that is left out, or None.
        self._before: dict[tuple[int, str], Any] = {}

    def start(self) -> None:
        """Begin at zero."""
        self._from, self._left_out = time.perf_counter(), 0.0
        self._stopped_at.clear()

    def stop(self) -> None:
        """Leave out what follows."""
        self._stopped_at.append(time.perf_counter())

    def go_on(self) -> None:
        """Count again."""
        if self._stopped_at:
            since = self._stopped_at.pop()
            if not self._stopped_at:
                self._left_out += time.perf_counter() - since

    def seconds(self) -> float:
        """Training time so far."""
        until = self._stopped_at[0] if self._stopped_at else time.perf_counter()
        return until - self._from - self._left_out

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Leave out what is done inside."""
        self.stop()
        try:
            yield
        finally:
            self.go_on()

    def leave_out(self, owner: object, method: str) -> None:
        """Leave out every call of this method of an object, until `count_in`."""
        original = getattr(owner, method)
        self._before[id(owner), method] = vars(owner).get(method)

        @wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.stopped():
                return original(*args, **kwargs)

        setattr(owner, method, call)

    def count_in(self, owner: object, method: str) -> None:
        """Undo `leave_out`."""
        if (id(owner), method) in self._before:
            del vars(owner)[method]
            before = self._before.pop((id(owner), method))
            if before is not None:
                setattr(owner, method, before)
