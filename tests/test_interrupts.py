"""An interrupt ends what runs, once, and neither amid a call to a database nor swallowed by a library."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy

from camri_tune import database
from camri_tune.database import SqlStorage, open_storage
from camri_tune.interrupts import heard, held_back, raise_swallowed


@pytest.fixture(autouse=True)
def usual_handler() -> Iterator[None]:
    """As from a terminal: in a job in the background interrupts are ignored, and that is inherited."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def _interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@contextmanager
def _interrupted() -> Iterator[None]:
    """What is within hears interrupts, and ends by one."""
    with pytest.raises(KeyboardInterrupt), heard(signal.SIGINT):
        yield


def test_an_interrupt_waits_for_the_end_of_a_block() -> None:
    done = []
    with _interrupted():
        with held_back():
            with held_back():
                _interrupt()
                done.append("inner")
            done.append("outer")
        done.append("after")
    assert done == ["inner", "outer"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_one_does_not_wait() -> None:
    with _interrupted(), held_back():
        _interrupt()
        _interrupt()
        pytest.fail("it went on")


def test_once_raised_it_does_not_disturb_what_tidies_up() -> None:
    tidied = []
    with _interrupted():
        try:
            _interrupt()
        finally:
            with held_back():
                tidied.append(1)
            tidied.append(2)
    assert tidied == [1, 2]


def test_what_a_library_swallows_is_raised_again() -> None:
    with _interrupted():
        with suppress(KeyboardInterrupt):
            _interrupt()
        raise_swallowed()
    with heard(signal.SIGINT):
        raise_swallowed()  # another run's


def test_what_a_library_makes_another_error_of_is_an_interrupt() -> None:
    """As NumPy and SciPy do while they are imported."""

    def library() -> None:
        try:
            _interrupt()
        except BaseException:
            raise ValueError("not a valid PEP 3118 buffer format string") from None

    with _interrupted():
        library()
    with pytest.raises(ValueError, match="by itself"), heard(signal.SIGINT):
        raise ValueError("by itself")


def test_who_ignores_a_signal_goes_on_doing_so() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with heard(signal.SIGINT):
        _interrupt()
        raise_swallowed()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_other_threads_have_no_part_in_it() -> None:
    found: list[BaseException] = []

    def other() -> None:
        try:
            with heard(signal.SIGINT), held_back():
                time.sleep(0.2)
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=other)
    with _interrupted():
        thread.start()
        _interrupt()
        time.sleep(5)
    thread.join()
    assert not found


def test_an_interrupted_write_does_not_lock_everybody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the statement that it comes at, the study can be written to at once, and holds what it held or more."""
    monkeypatch.setattr(database, "PATIENCE_SECONDS", 2.0)
    url = f"sqlite:///{tmp_path / 'study.db'}"
    storage = open_storage(url)
    assert isinstance(storage, SqlStorage)
    study_id = storage.create_new_study([optuna.study.StudyDirection.MAXIMIZE], "d")
    statements, wanted = 0, 0

    def after(*_: Any) -> None:
        nonlocal statements
        statements += 1
        if statements == wanted:
            _interrupt()

    sqlalchemy.event.listen(storage.engine, "after_cursor_execute", after)
    storage.set_study_user_attr(study_id, "place", 0)
    in_all = statements
    assert in_all > 1
    for place in range(1, in_all + 1):
        with _interrupted():
            statements, wanted = 0, place
            storage.set_study_user_attr(study_id, "place", place)
        wanted = 0
        storage.set_study_user_attr(study_id, "own last words", place)
        other = open_storage(url)
        assert isinstance(other, SqlStorage)
        other.set_study_user_attr(study_id, "others", place)
        assert other.get_study_user_attrs(study_id)["place"] == place
        other.close()
    storage.close()
