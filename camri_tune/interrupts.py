"""Interrupts that neither tear a call to a database apart nor get lost in a library.

Python raises KeyboardInterrupt wherever it stands. Amid a transaction that leaves the database locked, for the run's
own last words as well; in a library's import or a finalizer it may become another error, or none at all.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_asked = False  # whether there was one
_waiting = False  # one that was not raised yet
_held = 0  # how many blocks hold it back


@contextmanager
def heard(*signals: signal.Signals) -> Iterator[None]:
    """Within, these signals raise KeyboardInterrupt; so does an error that a library has made of one.

    Signals that are ignored stay so, as those of a terminal are in a job in the background. Does nothing but in the
    main thread.
    """
    global _asked, _waiting  # noqa: PLW0603 - a process has one set of handlers
    before = {number: signal.getsignal(number) for number in signals} if _in_main_thread() else {}
    outermost = _note not in before.values()
    if outermost:
        _asked = _waiting = False
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _note)
    try:
        yield
    except Exception as error:
        if _asked and before:
            raise KeyboardInterrupt from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held_back() -> Iterator[None]:
    """Within, an interrupt waits until the end of the block; a second one does not."""
    global _held, _waiting  # noqa: PLW0603
    if not _in_main_thread():  # where no signal arrives
        yield
        return
    _held += 1
    try:
        yield
    finally:
        _held -= 1
        if _waiting and not _held:
            _waiting = False
            raise KeyboardInterrupt


def raise_swallowed() -> None:
    """Raise KeyboardInterrupt if there was one: for whoever is still there to ask."""
    if _asked:
        raise KeyboardInterrupt


def _note(_number: int, _frame: FrameType | None) -> None:
    global _asked, _waiting  # noqa: PLW0603
    first, _asked = not _asked, True
    if _held and first:
        _waiting = True
    else:
        raise KeyboardInterrupt


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
