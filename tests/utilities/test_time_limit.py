"""A limit on how long code may compute, which leaves signals as they were."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from lora_lightning.utilities.time_limit import time_limit


def endless() -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        pass
    raise AssertionError("nobody stopped it")


def test_what_takes_too_long_is_stopped() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(TimeoutError, match=r"did not end within 0.1 seconds"), time_limit(0.1):
        endless()
    with time_limit(0.05):
        pass
    time.sleep(0.1)  # nothing comes afterwards
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_others_keep_their_timer_and_threads_have_none() -> None:
    with time_limit(30):
        running = signal.getitimer(signal.ITIMER_REAL)
        with time_limit(0.01):
            time.sleep(0.05)
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] < running[0]
    done = []

    def work() -> None:
        with time_limit(0.01):
            time.sleep(0.05)
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
