"""A limit on how long code of somebody else may compute."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError inside after so many seconds; by SIGALRM, which a main thread can have.

    No limit in other threads, where there is no such signal (Windows), and where its user has a
    timer of his own running.
    """
    main = threading.current_thread() is threading.main_thread()
    if not (main and hasattr(signal, "setitimer")) or any(signal.getitimer(signal.ITIMER_REAL)):
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it did not end within {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    # Again and again: code may take the first one for an error of its own, and go on.
    signal.setitimer(signal.ITIMER_REAL, seconds, max(seconds / 10, 1.0))
    try:
        yield
    finally:
        while signal.getsignal(signal.SIGALRM) is stop:
            with suppress(TimeoutError):  # of one that came while this one was on its way
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)
