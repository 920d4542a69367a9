"""Waiting in tests: for what comes, and no longer than that what does not end becomes a failure."""

import faulthandler
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest

Found = TypeVar("Found")


def wait_for(
    condition: Callable[[], Found | None], process: "subprocess.Popen[str] | None" = None, seconds: float = 300
) -> Found:
    """Poll until true, while `process` goes on; the bound only ends a test that would otherwise hang."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end, "what the test waits for never happened"
        time.sleep(0.05)
    return found


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
