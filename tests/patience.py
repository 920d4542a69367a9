"""What does not end becomes a failure."""

import faulthandler
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def ending_within(seconds: int) -> Iterator[None]:
    """Fail what takes longer, a pipe or a device that is waited for; where it is inside C, which no signal interrupts,
    end the whole run."""

    def stop(*_: object) -> None:
        pytest.fail(f"nothing came of it in {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    faulthandler.dump_traceback_later(2 * seconds, exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
