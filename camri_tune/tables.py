"""What the terminal shows of a study, a result and a comparison: tables and plain lines."""

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from camri_tune.overview import Overview
from camri_tune.progress import STAGE_TITLES, done, duration, total
from camri_tune.records import Figure, figure_head, named, parameters
from camri_tune.result import Result, Side
from camri_tune.table1 import TITLES, Outcome, below, best_of
from camri_tune.table1 import Table as Comparison


def status_view(overview: Overview) -> Group:
    """A study at a glance: what is tuned, how far it is, the best so far, what failed, and the result, if any."""
    goes_on = f"`{overview.command}`" if overview.is_comparison else "the same command"
    if overview.known_as:
        goes_on = f"{overview.before_command}`{overview.command}`"
    idle = "finished" if overview.finished else f"no run works on it now; {goes_on} goes on"
    state = "running" if overview.running else idle
    left = overview.seconds_left if overview.running else None
    time = "" if left is None else f", about {duration(left)} to go" if left >= 1 else ", then the judgement"
    lines: list[RenderableType] = [
        Text.assemble((overview.name, "bold"), f": {state}{time}"),
        Text(f"{overview.dataset}, important class {overview.important_names}, loss {overview.config.loss}"),
    ]
    if overview.floor is not None and (baseline := overview.baseline) is not None:
        measured = baseline.measured(overview.important)
        lines.append(
            Text(
                f"baseline on validation, {overview.config.seeds} seed(s) [95 % interval over seeds]: accuracy "
                f"{_cell(measured.accuracy)}, recall {_cell(measured.recall)}; floor {overview.floor:.4f}"
            )
        )
    lines += [Text(f"as well: {constraint.in_words(overview.classes)}") for constraint in overview.constraints]
    table = Table(title=None)
    for head in ("", "done", "running", "waiting", "failed", ""):
        table.add_column(head, justify="left" if not head else "right")
    for stage, title in STAGE_TITLES.items():
        records = overview.everything.get(stage, ())
        if overview.schedule is not None and records:
            counts = {state: sum(r.state == state for r in records) for state in ("running", "waiting", "failed")}
            ended = sum(r.ended for r in records)
            count = total(overview.everything, stage, overview.schedule)
            bar = ProgressBar(total=count, completed=done(records, stage, overview.schedule), width=30)
            table.add_row(title, f"{ended} of {count}", *map(str, counts.values()), bar)
    lines.append(table)
    at = "in" if overview.running else "last heard of in"
    for stage, records in overview.records.items():
        lines += [
            Text(f"  {STAGE_TITLES[stage]} #{r.number}, {at} epoch {r.epoch}: {parameters(r.params)}")
            for r in records
            if r.state == "running"
        ]
    if ended := sum(r.state == "complete" for r in overview.search):
        lines.append(Text(f"{overview.feasible} of {ended} complete trial(s) feasible"))
    if overview.result is not None:
        earlier = "" if overview.finished else "of an earlier run: "
        lines.append(Text(f"{earlier}{overview.result['verdict']}: {overview.result['sentence']}"))
    elif (best := overview.best) is not None:
        which = "feasible" if overview.constraints else "above the floor"
        lines.append(
            Text(
                f"best {which} so far: #{best.number}, recall {best.recall:.4f}, accuracy {best.accuracy:.4f} on "
                f"validation ({parameters(best.params)}): a candidate, not a result"
            )
        )
    elif overview.search:
        lines.append(Text("no feasible trial yet" if overview.constraints else "no trial above the floor yet"))
    lines += [Text(f"failed {reason}") for reason in overview.failures[-3:]]
    lines.append(Text(f"files: {overview.folder}"))
    return Group(*lines)


def result_table(result: Result) -> Table:
    """Baseline and best side by side, with what each figure was measured on."""
    table = Table(title=Text(f"{result.study}: important class {result.important_names}"), title_justify="left")
    table.add_column("")
    table.add_column(f"baseline (ce, {result.seeds} seeds)", justify="right")
    best = result.best
    threshold = result.threshold
    if threshold is not None:
        table.add_column("with a bias", justify="right")
    table.add_column(f"best ({result.loss}, {result.seeds} seeds)" if best else "best", justify="right")
    sides = [result.baseline, *([threshold.side] if threshold else []), best.side if best else None]
    before = [""] * (len(sides) - 1)  # what is said of the best alone
    for part in ("test", "validation"):
        for name in ("recall", "accuracy"):
            cells = [_cell(_figure(side, part, name)) for side in sides]
            table.add_row(figure_head(name, part, result.images, result.important, result.folds), *cells)
    if best is not None:
        gains = {f"recall of {named(c, result.classes)}": found for c, found in best.recall_over_seeds.items()}
        if threshold is not None and threshold.recall_difference is not None:
            gains["recall beside a bias alone"] = threshold.recall_difference
        for name, difference in {**gains, "accuracy": best.accuracy_over_seeds}.items():
            table.add_row(f"gain in {name} on test, points", *before, " ".join(difference.in_points()).rstrip())
        for c, share in best.exported_recall.items():
            table.add_row(
                f"exported model: recall of {named(c, result.classes)} on test",
                *before,
                _share(share.value, share.interval),
            )
        table.add_row(
            "exported model: accuracy on test",
            *before,
            _share(best.exported_accuracy.value, best.exported_accuracy.interval),
        )
        for c, (old, new) in best.precision.items():
            name = f"the two models compared: precision of {named(c, result.classes)} on test"
            table.add_row(name, str(old), *before[1:], str(new))
        biases = [", ".join(f"bias {bias:+.3g}" for bias in threshold.biases)] if threshold else []
        rate = f"learning_rate {result.baseline_learning_rate:.3g}"
        table.add_row("parameters", rate, *biases, parameters(best.params))
    table.caption = Text(
        "Mean ± sd over seeds [95 % t interval over seeds]; gains [95 % interval over seeds and images]; "
        f"one model [{'exact ' if best is None or best.exported_accuracy.exact else ''}95 % interval]."
    )
    table.caption_justify = "left"
    return table


def comparison_tables(comparison: Comparison) -> list[Table]:
    """A table for each data set and class: recall and accuracy on test, as trained and with a bias; the paper's."""
    tables = []
    for dataset, token in comparison.columns():
        cells = comparison.column(dataset, token)
        best = best_of(cells)
        table = Table(title=Text(f"{dataset}, {cells[0].heading}"), title_justify="left")
        for head in ("", "recall", "accuracy", "gain in recall, points", "recall, bias", "accuracy, bias", "paper"):
            # On a narrow terminal cells are broken at blanks, and no figure is cut.
            width = 8 if head else 1
            table.add_column(head, justify="left" if not head else "right", overflow="fold", min_width=width)
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


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    text = f"{figure.mean:.4f}"
    if figure.sd is not None:
        text += f" ± {figure.sd:.4f}"
    if figure.interval is not None:
        text += f" [{figure.interval.low:.4f}, {figure.interval.high:.4f}]"
    return text


def _share(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.4f} [{interval[0]:.4f}, {interval[1]:.4f}]"
