"""What the terminal shows: one live display while it works, plain lines where there is no terminal, a table at the end.

Progress goes to standard error; standard output carries the result alone.
"""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from camri_tune.progress import ENDED, STAGE_TITLES, Schedule, done, duration, seconds_left, total
from camri_tune.records import Figure, Result, Side, TrialRecord
from camri_tune.selection import finalists
from camri_tune.table1 import TITLES, Outcome, below, best_of
from camri_tune.table1 import Table as Comparison


class Console:
    """Progress of one run. `live` draws in place; otherwise finished trainings are printed as lines."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._rich = RichConsole(stderr=True, quiet=quiet, highlight=False)
        self._live: Live | None = None
        self._reported: set[tuple[str, str, int]] = set()
        self._schedule: Schedule | None = None
        self._records: dict[str, list[TrialRecord]] = {}  # of each stage, all studies together

    def __enter__(self) -> Self:
        if self._rich.is_terminal and not self._rich.quiet:
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
        """Progress of decoding images."""
        if self._live is not None:
            self._live.update(Group(Text(f"Reading images: {done:,} of {total:,}"), _bar(done, total)))
        elif done == total or done % 10_000 == 0:
            self.say(f"Reading images: {done:,} of {total:,}")

    def plan(self, schedule: Schedule) -> None:
        """What the whole run will train, for the time to go."""
        self._schedule = schedule

    def update(self, stage: str, records: Mapping[str, Sequence[TrialRecord]]) -> None:
        """Show where a stage stands, with each study's records by its label."""
        self._records[stage] = [r for found in records.values() for r in found]
        for label, found in records.items():
            for record in found:
                key = (stage, label, record.number)
                if record.state in ENDED and key not in self._reported:
                    self._reported.add(key)
                    if self._live is None or record.state == "failed":
                        self.say(self._line(stage, label, record))
        if self._live is not None and self._schedule is not None:
            self._live.update(_view(stage, records, self._schedule, self._time_to_go()))

    def judging(self, done: int, total: int) -> None:
        """Progress of measuring models on the test part."""
        text = f"Judging on the test part: model {done + 1} of at most {total}"
        if self._live is not None:
            self._live.update(Group(Text(text, style="bold"), _bar(done, total)))
        else:
            self.say(text)

    def _time_to_go(self) -> str:
        left = seconds_left(self._records, self._schedule) if self._schedule is not None else None
        return f"about {duration(left)} to go" if left is not None else "time to go: after the first training"

    def _line(self, stage: str, label: str, record: TrialRecord) -> str:
        parts = [f"{STAGE_TITLES[stage]} {label} #{record.number}: {record.state}".replace("  ", " ")]
        if record.accuracy is not None:
            parts.append(f"accuracy {record.accuracy:.4f}")
        if record.recall is not None:
            parts.append(f"recall {record.recall:.4f}")
        if record.state == "complete" and record.constraint is not None:
            parts.append("feasible" if record.feasible else "below the floor")
        if record.failure:
            parts.append(record.failure)
        parts += [_parameters(record.params), self._time_to_go()]
        return ", ".join(part for part in parts if part)


def _view(stage: str, records: Mapping[str, Sequence[TrialRecord]], schedule: Schedule, time_to_go: str) -> Group:
    """A stage as it stands: how far, what is running, and the best so far."""
    everything = [r for found in records.values() for r in found]
    ended, count = sum(r.state in ENDED for r in everything), total(everything, stage, schedule)
    lines: list[RenderableType] = [
        Text(f"{STAGE_TITLES[stage]}: {ended} of {count} · {time_to_go}", style="bold"),
        _bar(done(everything, stage, schedule), count),
    ]
    epochs = schedule.epochs * schedule.trainings_of(stage)
    lines += [
        Text(f"  {label} #{r.number}  epoch {r.epoch}/{epochs}  {_parameters(r.params)}")
        for label, found in records.items()
        for r in found
        if r.state == "running"
    ]
    if stage == "search" and len(records) == 1:
        best = finalists(everything, 1)
        lines.append(
            Text(f"  best feasible: #{best[0].number}, recall {best[0].recall:.4f}, accuracy {best[0].accuracy:.4f}")
            if best
            else Text("  best feasible: none yet")
        )
    return Group(*lines)


def result_table(result: Result) -> Table:
    """Baseline and best side by side, with what each figure was measured on."""
    table = Table(title=Text(f"{result.study}: important class {result.important_names}"), title_justify="left")
    table.add_column("")
    table.add_column(f"baseline (ce, {result.seeds} seeds)", justify="right")
    best = result.best
    table.add_column(f"best ({result.loss}, {result.seeds} seeds)" if best else "best", justify="right")
    for part in ("test", "validation"):
        for name in ("recall", "accuracy"):
            cells = [_cell(_figure(side, part, name)) for side in (result.baseline, best.side if best else None)]
            # On folds each seed's model has a validation part of its own.
            count = (
                f"n = {_images(result, part, name):,}" if part == "test" or result.folds == 1 else "each seed's fold"
            )
            table.add_row(f"{name} on {part}, {count}", *cells)
    if best is not None:
        over = {"recall": best.recall_over_seeds, "accuracy": best.accuracy_over_seeds}
        for name, difference in over.items():
            table.add_row(f"gain in {name} on test, points", "", " ".join(difference.in_points()))
        for c, share in best.exported_recall.items():
            table.add_row(f"exported model: recall of {c} on test", "", _share(share.value, share.interval))
        table.add_row(
            "exported model: accuracy on test",
            "",
            _share(best.exported_accuracy.value, best.exported_accuracy.interval),
        )
        table.add_row("parameters", f"learning_rate {result.baseline_learning_rate:.3g}", _parameters(best.params))
    table.caption = Text(
        "Mean ± sd over seeds [95 % t interval over seeds]; gains [95 % interval over seeds and images]; "
        "one model [exact 95 % interval]."
    )
    table.caption_justify = "left"
    return table


def comparison_tables(comparison: Comparison) -> list[Table]:
    """A table for each data set and class: recall and accuracy on test, as trained and with a bias; the paper's."""
    tables = []
    for dataset, token in comparison.columns():
        cells = comparison.column(dataset, token)
        best = best_of(cells)
        title = f"{dataset}, {token}: class {cells[0].important} ({cells[0].class_name})"
        table = Table(title=Text(title), title_justify="left")
        for head in ("", "recall", "accuracy", "gain in recall", "recall, bias", "accuracy, bias", "paper"):
            table.add_column(head, justify="left" if not head else "right", no_wrap=True)
        for cell in cells:
            row = [TITLES[cell.method], *_scores(cell.trained), _gain(cell.trained), *_scores(cell.matched)]
            row.append(f"{cell.paper[0]:.4f} / {cell.paper[1]:.4f}" if cell.paper else "-")
            table.add_row(*row, style="bold" if cell is best else "")
        tables.append(table)
    return tables


def _scores(outcome: Outcome | None) -> tuple[str, str]:
    if outcome is None:
        return "-", "-"
    recall, accuracy = (f"{f.mean:.4f}" + (f" ± {f.sd:.4f}" if f.sd is not None else "") for f in outcome.test)
    return recall, accuracy + (" †" if below(outcome.accuracy_difference) else "")


def _gain(outcome: Outcome | None) -> str:
    if outcome is None:
        return "-"
    return " ".join(outcome.recall_difference.in_points()).rstrip()


def _figure(side: Side | None, part: str, name: str) -> Figure | None:
    if side is None:
        return None
    measured = side.test if part == "test" else side.validation
    return measured.recall if name == "recall" else measured.accuracy


def _images(result: Result, part: str, name: str) -> int:
    return result.images[f"{part}_important" if name == "recall" else part]


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    text = f"{figure.mean:.4f}"
    if figure.sd is not None and figure.interval is not None:
        text += f" ± {figure.sd:.4f} [{figure.interval.low:.4f}, {figure.interval.high:.4f}]"
    return text


def _share(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.4f} [{interval[0]:.4f}, {interval[1]:.4f}]"


def _parameters(params: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in sorted(params.items()))


def _bar(done: float, total: float) -> Table:
    line = Table.grid()  # a bar alone does not end its line
    line.add_row(ProgressBar(total=total, completed=done, width=50))
    return line
