"""Progress of a run on the terminal: one live display while it works, plain lines where there is no terminal.

Progress goes to standard error; standard output carries the result alone.
"""

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from camri_tune.progress import STAGE_TITLES, Schedule, done, duration, seconds_left, total
from camri_tune.records import TrialRecord, parameters
from camri_tune.selection import finalists


class Console:
    """Progress of one run. `live` draws in place; otherwise finished trainings are printed as lines."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._rich = RichConsole(stderr=True, quiet=quiet, highlight=False)
        self._live: Live | None = None
        self._reported: dict[tuple[str, str], set[int]] = {}  # of each stage and study
        self._schedule: Schedule | None = None
        self._on, self._then = "", "the judgement"
        self._reading: tuple[float, int] | None = None  # when the first count came, and what it was
        self._records: dict[str, list[TrialRecord]] = {}  # of each stage, all studies together

    def __enter__(self) -> Self:
        if self._rich.is_terminal and not self._rich.is_dumb_terminal and not self._rich.quiet:
            self._live = Live(console=self._rich, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """A line that stays."""
        self._rich.print(Text(text), soft_wrap=not self._rich.is_terminal)

    def reading(self, done: int, total: int) -> None:
        """Progress of decoding images, which the next start is spared."""
        if self._reading is None or done <= self._reading[1]:
            self._reading = time.monotonic(), done
        started, first = self._reading
        text = f"Reading images: {done:,} of {total:,}"
        if first < done < total:
            text += f", about {duration((time.monotonic() - started) * (total - done) / (done - first))} to go"
        if self._live is not None:
            self._live.update(Group(Text(text), _bar(done, total)))
        elif done == total or done % 10_000 == 0:
            self.say(text)

    def begin(self, on: str = "", then: str = "the judgement") -> None:
        """Trainings of other studies come, `on` this data set where that is one of several, and `then` what follows."""
        self._on, self._then = f" on {on}" if on else "", then
        self._reported, self._records = {}, {}

    def plan(self, schedule: Schedule) -> None:
        """What the whole run will train, on the data set at hand, for the time to go."""
        self._schedule = schedule

    def update(self, stage: str, records: Mapping[str, Mapping[str, Sequence[TrialRecord]]]) -> None:
        """Show where `stage` stands. `records` are its own and those of later stages, of each study by its label."""
        for each, of_studies in records.items():
            self._records[each] = [r for found in of_studies.values() for r in found]
        for each, of_studies in records.items():
            for label, found in of_studies.items():
                self._report(each, label, found)
        if self._live is not None and self._schedule is not None:
            self._live.update(_view(stage, records, self._schedule, self._time_to_go()))

    def _report(self, stage: str, label: str, records: Sequence[TrialRecord]) -> None:
        """Say what has ended since the last time, or, at first, how many had."""
        if (stage, label) not in self._reported:
            kept = {r.number for r in records if r.ended}
            self._reported[stage, label] = kept
            if kept:
                self.say(f"{_title(stage, label)}: {len(kept)} of {len(records)} were finished before, and are kept")
        reported = self._reported[stage, label]
        for record in records:
            if record.ended and record.number not in reported:
                reported.add(record.number)
                if self._live is None or record.state == "failed":
                    self.say(self._line(stage, label, record))

    def judging(self, done: int, total: int) -> None:
        """Progress of measuring finalists on the test part: `done` of at most `total`, the baseline before them."""
        text = f"Judging on the test part: {done} of at most {total} finalists"
        if self._live is not None:
            self._live.update(Group(Text(text, style="bold"), _bar(done, max(total, 1))))
        else:
            self.say(text)

    def _time_to_go(self) -> str:
        left = seconds_left(self._records, self._schedule) if self._schedule is not None else None
        if left is None:
            return "time to go: after the first training"
        return f"about {duration(left)} to go{self._on}" if left >= 1 else f"then {self._then}"

    def _line(self, stage: str, label: str, record: TrialRecord) -> str:
        parts = [f"{_title(stage, label)} #{record.number}: {record.state}"]
        if record.accuracy is not None:
            parts.append(f"accuracy {record.accuracy:.4f}")
        if record.recall is not None:
            parts.append(f"recall {record.recall:.4f}")
        if record.state == "complete" and record.constraint is not None:
            parts.append("feasible" if record.feasible else _missed(record))
        if record.failure:
            parts.append(record.failure)
        parts += [parameters(record.params), self._time_to_go()]
        return ", ".join(part for part in parts if part)


def _missed(record: TrialRecord) -> str:
    names = [name for name, value in record.shortfalls.items() if value > 0]
    below = ["below the floor"] if record.constraint is not None and record.constraint > 0 else []
    return " and ".join(below + ([f"misses {', '.join(names)}"] if names else []))


def _title(stage: str, label: str) -> str:
    return f"{STAGE_TITLES[stage]} {label}".rstrip()


def _view(
    stage: str, records: Mapping[str, Mapping[str, Sequence[TrialRecord]]], schedule: Schedule, time_to_go: str
) -> Group:
    """A stage as it stands: how far, what is running, of later stages as well, and the best so far."""
    together = {each: [r for found in of_studies.values() for r in found] for each, of_studies in records.items()}
    everything = together[stage]
    ended, count = sum(r.ended for r in everything), total(together, stage, schedule)
    lines: list[RenderableType] = [
        Text(f"{STAGE_TITLES[stage]}: {ended} of {count} · {time_to_go}", style="bold"),
        _bar(done(everything, stage, schedule), count),
    ]
    lines += [
        Text(
            f"  {label if each == stage else _title(each, label)} #{r.number}  "
            f"epoch {r.epoch}/{schedule.epochs_of(r, each)}  {parameters(r.params)}"
        )
        for each, of_studies in records.items()
        for label, found in of_studies.items()
        for r in found
        if r.state == "running"
    ]
    if stage == "search" and len(records[stage]) == 1:
        best = finalists(everything, 1)
        lines.append(
            Text(f"  best feasible: #{best[0].number}, recall {best[0].recall:.4f}, accuracy {best[0].accuracy:.4f}")
            if best
            else Text("  best feasible: none yet")
        )
    return Group(*lines)


def _bar(done: float, total: float) -> Table:
    line = Table.grid()  # a bar alone does not end its line
    line.add_row(ProgressBar(total=total, completed=done, width=50))
    return line
