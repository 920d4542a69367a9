"""Progress on the terminal: what is said where there is no terminal, and that nothing is said twice."""

import re

import pytest

from camri_tune.console import Console
from camri_tune.progress import Schedule
from camri_tune.records import TrialRecord, TrialState


def _record(number: int, state: TrialState, **values: object) -> TrialRecord:
    return TrialRecord(number, state, {"learning_rate": 0.004}, seconds=10.0, **values)  # type: ignore[arg-type]


def _said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    out, err = capsys.readouterr()
    assert out == "", "standard output carries the result alone"
    return err.splitlines()


@pytest.fixture
def console() -> Console:
    console = Console()
    console.plan(Schedule({"baseline": 6, "search": 2, "finalists": 2}, epochs=2, workers=1))
    return console


def test_each_training_is_said_once_when_it_ends(console: Console, capsys: pytest.CaptureFixture[str]) -> None:
    with console:
        console.update("search", {"search": {"": [_record(0, "running"), _record(1, "waiting")]}})
        assert _said(capsys) == []
        ended = _record(0, "complete", accuracy=0.9, recall=0.8, constraint=-0.1)
        for _ in range(2):
            console.update("search", {"search": {"": [ended, _record(1, "running", epoch=1)]}})
        (line,) = _said(capsys)
    assert line.startswith("Search #0: complete, accuracy 0.9000, recall 0.8000, feasible, learning_rate 0.004")
    # Half a trial and two finalists, 10 seconds each.
    assert line.endswith("about 25 s to go")


def test_what_was_finished_before_is_counted_and_not_listed(
    console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [_record(0, "complete"), _record(1, "failed", failure="no"), _record(2, "waiting")]
    console.update("search", {"search": {"3.wce": records}})
    assert _said(capsys) == ["Search 3.wce: 2 of 3 were finished before, and are kept"]
    console.update("search", {"search": {"3.wce": [*records[:2], _record(2, "failed", failure="ValueError: no")]}})
    (line,) = _said(capsys)
    assert line.startswith("Search 3.wce #2: failed, ValueError: no")


def test_another_data_set_begins_anew_and_is_named(console: Console, capsys: pytest.CaptureFixture[str]) -> None:
    """Its trainings have the labels and the numbers of the first one's."""
    console.begin("digits", "mnist")
    schedule = Schedule({"baseline": 0, "search": 2, "finalists": 0}, epochs=2, workers=1)
    said = []
    for _ in range(2):
        console.plan(schedule)
        for ended in (0, 1, 2):
            records = [_record(n, "complete" if n < ended else "waiting", accuracy=0.9) for n in range(2)]
            console.update("search", {"search": {"l2": records}})
            console.plan(schedule)
        said.append(_said(capsys))
        console.begin("mnist", "the judgement")
    assert [[line.rsplit(", ", 1)[-1] for line in lines] for lines in said] == [
        ["about 10 s to go on digits", "then mnist"],
        ["about 10 s to go on mnist", "then the judgement"],
    ]
    assert all(line.startswith("Search l2 #") for lines in said for line in lines)


def test_reading_says_how_far_and_how_long(console: Console, capsys: pytest.CaptureFixture[str]) -> None:
    for done in range(500, 30_250, 500):
        console.reading(done, 30_250)
    console.reading(30_250, 30_250)
    lines = _said(capsys)
    assert [re.sub(r", about \d+ (s|min) to go", "", line) for line in lines] == [
        f"Reading images: {done:,} of 30,250" for done in (10_000, 20_000, 30_000, 30_250)
    ]
    assert all("to go" in line for line in lines[:3])
    assert "to go" not in lines[3]
    console.reading(250, 250)  # another part
    assert _said(capsys) == ["Reading images: 250 of 250"]


def test_a_terminal_that_cannot_be_drawn_on_gets_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("FORCE_COLOR", "1")  # to Rich it is a terminal
    console = Console()
    console.plan(Schedule({"baseline": 6, "search": 2, "finalists": 2}, epochs=2, workers=1))
    with console:
        console.update("search", {"search": {"": [_record(0, "complete", accuracy=0.9), _record(1, "waiting")]}})
    console.update("search", {"search": {"": [_record(0, "complete"), _record(1, "complete")]}})
    assert any(line.startswith("Search #1: complete") for line in _said(capsys))


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(quiet=True)
    with console:
        console.say("hello")
        console.reading(10, 10)
        console.update("search", {"search": {"": [_record(0, "complete")]}})
        console.judging(0, 3)
    assert _said(capsys) == []
