"""What people read afterwards: a study's report, the card of an exported model, and a comparison in four formats."""

import csv
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from camri_tune.claims import few_test_images, floor_in_words, provenance
from camri_tune.constraint_claims import TABLE_HEAD, constraint_table
from camri_tune.differences import PairedDifference, SeedDifference, Share
from camri_tune.evidence import Evidence
from camri_tune.files import write_text
from camri_tune.overview import EVIDENCE, REPORT, read_overview
from camri_tune.pages import comparison_page
from camri_tune.records import Figure, biases_of, named, without_nan
from camri_tune.result import Result
from camri_tune.search import parameter_importance
from camri_tune.storage import StudyStore
from camri_tune.study_page import study_page
from camri_tune.table1 import TITLES, Cell, Outcome, Table, below, best_of, legend

_PIPE = "\\|"  # it would end a table's cell


def write_report(store: StudyStore) -> Path:
    """Write a study's `report.html` from what is stored, whether or not it is finished. Returns the file's path."""
    overview = read_overview(store)
    evidence = Evidence.load(overview.folder / EVIDENCE, len(overview.classes)) if overview.result is not None else None
    path = overview.folder / REPORT
    path.parent.mkdir(parents=True, exist_ok=True)  # the study's folder may be on another machine
    write_text(path, study_page(overview, parameter_importance(store), evidence))
    return path


def model_card(result: Result) -> str:
    """Markdown for the bundle's README: what the model is for, what was measured on which data, what is not claimed."""
    best = result.best
    assert best is not None, "only an exported model has a card"
    accuracy, classes = best.accuracy_difference, result.classes
    shares = {f"recall of {named(c, classes)}": share for c, share in best.exported_recall.items()}
    shares["accuracy"] = best.exported_accuracy
    rows = "\n".join(
        f"| {name}, test | {share.value:.4f} | {share.right} of {share.n}{_count_as(share)} | "
        f"[{share.interval.low:.4f}, {share.interval.high:.4f}] |"
        for name, share in shares.items()
    )
    exact = "exact " if all(share.exact for share in shares.values()) else ""
    of_recall = "; ".join(
        f"recall of {named(c, classes)} {_paired(found)}" for c, found in best.recall_difference.items()
    )
    over_seeds = ", ".join(
        f"recall of {named(c, classes)} on test {_gain(found)} points" for c, found in best.recall_over_seeds.items()
    )
    params = ", ".join(f"{name} = {value:.4g}" for name, value in sorted(best.params.items()))
    claims = "\n".join(f"- {line}" for line in [*provenance(result), *few_test_images(best, classes)])
    stays = f"within {result.tolerance:g} points of" if result.tolerance else "at"
    of_fold = " of the first fold (the other folds' are about as many)" if result.folds > 1 else ""
    return f"""# {result.study}

Image classifier of {len(classes)} classes ({result.dataset}), trained so that class {result.important_names} is
missed less often, while accuracy stays {stays} the cross-entropy baseline's. Written by camri-tune {result.versions["camri-tune"]}.

**{result.sentence}**

## This model (one seed, {best.exported_seed})
| figure | value | right | {exact}95 % interval |
|---|---|---|---|
{rows}

Against the baseline model of seed {best.baseline_seed}, on the same test images: accuracy {_paired(accuracy)};
{of_recall}.

## Over {result.seeds} seeds
| mean ± sd | baseline (cross-entropy) | this setting ({result.loss}: {params}) |
|---|---|---|
| recall, test | {_text(result.baseline.test.recall)} | {_text(best.side.test.recall)} |
| accuracy, test | {_text(result.baseline.test.accuracy)} | {_text(best.side.test.accuracy)} |
| recall, validation | {_text(result.baseline.validation.recall)} | {_text(best.side.validation.recall)} |
| accuracy, validation | {_text(result.baseline.validation.accuracy)} | {_text(best.side.validation.accuracy)} |

All seeds, beside the baseline's, with other images in mind as well (95 % interval over seeds and images):
{over_seeds}, accuracy {_gain(best.accuracy_over_seeds)} points.

{_asked_as_well(result)}## How it was judged
{claims}
- Trained on {result.images["train"]:,} images{of_fold}. {result.trials["complete"]} trials complete, {result.trials["pruned"]} pruned, {result.trials["failed"]} failed; tolerance {result.tolerance:g} points of validation accuracy;
  margin of the certificate {result.epsilon:g} points (Tango's paired score bound; {_counts(accuracy)}).
{_bias_line(best.params, result.tolerance)}- The logits have no margin; their softmax is not a calibrated probability.

Use: `camri-tune evaluate FOLDER`. Weights: safetensors, no code.
"""


def _asked_as_well(result: Result) -> str:
    """The constraints on recall, if any, as a section."""
    rows = constraint_table(without_nan(result.as_json()["constraints"]), result.classes)
    if not rows:
        return ""
    lines = [TABLE_HEAD, ("---",) * len(TABLE_HEAD), *rows]
    table = "\n".join(f"| {' | '.join(cell.replace('|', _PIPE) for cell in line)} |" for line in lines)
    return f"## Asked as well\n{table}\n\nWhat is kept but not shown may not hold for other images.\n\n"


def _paired(difference: PairedDifference) -> str:
    return (
        f"{100 * difference.estimate:+.2f} points ({100 * difference.confidence:.4g} % lower bound "
        f"{100 * difference.lower_bound:+.2f}; {difference.gained} images gained, {difference.lost} lost, of "
        f"{difference.n}{_count_as(difference)})"
    )


def _count_as(measured: Share | PairedDifference) -> str:
    return "" if measured.effective_n >= measured.n else f", which count as {measured.effective_n:,.0f}"


def _gain(difference: SeedDifference) -> str:
    return " ".join(difference.in_points()).rstrip()


def _counts(difference: PairedDifference) -> str:
    if difference.effective_n >= difference.n:
        return "every image counts alone"
    if difference.hidden is not None:
        tracks = difference.n / difference.hidden.size
        return f"{difference.n:,} images of about {tracks:,.0f} unnamed tracks, which count as {difference.effective_n:,.0f}"
    return f"images in groups, resampled whole, count as {difference.effective_n:,.0f}"


def _bias_line(params: Mapping[str, float], tolerance: float) -> str:
    """What calibration did to the model, if anything."""
    lines = [
        f"- Calibrated: {value:+.4g} is added to the logit of class {c}, tuned on validation so that "
        f"accuracy there stays {floor_in_words(tolerance)}.\n"
        for c, value in biases_of(params).items()
    ]
    return "".join(lines)


def _text(figure: Figure) -> str:
    return f"{figure.mean:.4f}" if figure.sd is None else f"{figure.mean:.4f} ± {figure.sd:.4f}"


def write_comparison(table: Table) -> None:
    """Write `comparison.json`, `.csv`, `.md` and `.html` into the table's folder (`comparison-paper.*` where it chose)."""
    texts = {
        "json": json.dumps(without_nan(table.as_json()), indent=1) + "\n",
        "csv": comparison_csv(table),
        "md": comparison_markdown(table),
        "html": comparison_page(table),
    }
    for suffix, text in texts.items():
        write_text(table.folder / f"{table.stem}.{suffix}", text)


def comparison_csv(table: Table) -> str:
    """One row for each data set, class and method; shares as they are, empty where nothing kept accuracy."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = ["recall", "recall_sd", "accuracy", "accuracy_sd", "recall_gain", "recall_gain_low", "recall_gain_high"]
    head = ["dataset", "important", "class", "class_name", "method", *names]
    head += [f"matched_{name}" for name in names] + ["paper_recall", "paper_accuracy", "best"]
    writer.writerow(head)
    for column in table.columns():
        cells = table.column(*column)
        for cell in cells:
            row: list[object] = [cell.dataset, cell.token, cell.important, cell.class_name, cell.method]
            for outcome in (cell.trained, cell.matched):
                row += [""] * len(names) if outcome is None else _csv_values(outcome)
            writer.writerow([*row, *(cell.paper or ("", "")), int(cell is best_of(cells))])
    return out.getvalue()


def _csv_values(outcome: Outcome) -> list[object]:
    low, high = outcome.recall_difference.interval or ("", "")
    recall, accuracy = outcome.test
    numbers = [recall.mean, recall.sd, accuracy.mean, accuracy.sd, outcome.recall_difference.mean, low, high]
    return [round(value, 6) if isinstance(value, float) else "" for value in numbers]


def comparison_markdown(table: Table) -> str:
    """A table for each data set, methods down and classes across: recall / accuracy on test, as in the paper."""
    parts = []
    for dataset in dict.fromkeys(cell.dataset for cell in table.cells):
        tokens = [token for name, token in table.columns() if name == dataset]
        columns = {token: table.column(dataset, token) for token in tokens}
        heads = [
            f"{token}: {named(first.important, {first.important: first.class_name})}"
            for token, (first, *_) in columns.items()
        ]
        heads = [head.replace("|", _PIPE) for head in heads]
        views: list[tuple[str, Callable[[Cell], str]]] = [("as trained", lambda c: cell_text(c, c.trained))]
        views.append(("with a bias tuned to the baseline's validation accuracy", lambda c: cell_text(c, c.matched)))
        if any(cell.paper for cells in columns.values() for cell in cells):
            views.append(("the paper's figures", lambda c: f"{c.paper[0]:.4f} / {c.paper[1]:.4f}" if c.paper else "-"))
        for what, show in views:
            parts.append(
                f"### {dataset}, {what}\n\n| recall / accuracy | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}"
            )
            for place, first in enumerate(next(iter(columns.values()))):
                texts = []
                for cells in columns.values():
                    text = show(cells[place])
                    best = what == "as trained" and cells[place] is best_of(cells)
                    texts.append(f"**{text}**" if best else text)
                parts[-1] += f"\n| {TITLES[first.method]} | {' | '.join(texts)} |"
    return "\n\n".join([*parts, legend(table)]) + "\n"


def cell_text(cell: Cell, outcome: Outcome | None) -> str:
    """Recall / accuracy on test, means ± sd over seeds; '-' where no setting kept accuracy."""
    if outcome is None:
        return "-"
    return " / ".join(_text(figure) for figure in outcome.test) + (" †" if below(outcome.accuracy_difference) else "")
