"""What people read afterwards: a study's report, the card of an exported model, and a comparison in four formats."""

import csv
import io
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from camri_tune.claims import few_test_images, provenance
from camri_tune.evidence import Evidence
from camri_tune.overview import EVIDENCE, REPORT, read_overview
from camri_tune.pages import comparison_page
from camri_tune.records import Figure, PairedDifference, Result, SeedDifference, biases_of, without_nan
from camri_tune.search import parameter_importance
from camri_tune.storage import StudyStore
from camri_tune.study_page import study_page
from camri_tune.table1 import TITLES, Cell, Outcome, Table, below, best_of, legend


def write_report(store: StudyStore) -> Path:
    """Write a study's `report.html` from what is stored, whether or not it is finished. Returns the file's path."""
    overview = read_overview(store)
    evidence = Evidence.load(overview.folder / EVIDENCE) if overview.result is not None else None
    path = overview.folder / REPORT
    write_text(path, study_page(overview, parameter_importance(store), evidence))
    return path


def model_card(result: Result) -> str:
    """Markdown for the bundle's README: what the model is for, what was measured on which data, what is not claimed."""
    best = result.best
    assert best is not None, "only an exported model has a card"
    accuracy, recall = best.accuracy_difference, best.recall_difference
    shares = "\n".join(
        f"| recall of {c} ({result.classes[c]}), test | {share.value:.4f} | {share.right} of {share.n} | "
        f"[{share.interval.low:.4f}, {share.interval.high:.4f}] |"
        for c, share in best.exported_recall.items()
    )
    params = ", ".join(f"{name} = {value:.4g}" for name, value in sorted(best.params.items()))
    claims = "\n".join(f"- {line}" for line in [*provenance(result), *few_test_images(best, result.classes)])
    return f"""# {result.study}

Image classifier of {len(result.classes)} classes ({result.dataset}), trained so that class {result.important_names} is
missed less often, while accuracy stays at the cross-entropy baseline's. Written by camri-tune {result.versions["camri-tune"]}.

**{result.sentence}**

## This model (one seed, {best.exported_seed})
| figure | value | right | exact 95 % interval |
|---|---|---|---|
{shares}
| accuracy, test | {best.exported_accuracy.value:.4f} | {best.exported_accuracy.right} of {best.exported_accuracy.n} | [{best.exported_accuracy.interval.low:.4f}, {best.exported_accuracy.interval.high:.4f}] |

Against the baseline model of seed {best.baseline_seed}, on the same test images: accuracy {100 * accuracy.estimate:+.2f} points ({100 * accuracy.confidence:.4g} % lower
bound {100 * accuracy.lower_bound:+.2f}; {accuracy.gained} images gained, {accuracy.lost} lost, of {accuracy.n}); recall {100 * recall.estimate:+.2f} points (lower bound
{100 * recall.lower_bound:+.2f}; {recall.gained} gained, {recall.lost} lost, of {recall.n}).

## Over {result.seeds} seeds
| mean ± sd | baseline (cross-entropy) | this setting ({result.loss}: {params}) |
|---|---|---|
| recall, test | {_text(result.baseline.test.recall)} | {_text(best.side.test.recall)} |
| accuracy, test | {_text(result.baseline.test.accuracy)} | {_text(best.side.test.accuracy)} |
| recall, validation | {_text(result.baseline.validation.recall)} | {_text(best.side.validation.recall)} |
| accuracy, validation | {_text(result.baseline.validation.accuracy)} | {_text(best.side.validation.accuracy)} |

All seeds, beside the baseline's, with other images in mind as well (95 % interval over seeds and images): recall on test
{_gain(best.recall_over_seeds)} points, accuracy {_gain(best.accuracy_over_seeds)} points.

## How it was judged
{claims}
- Trained on {result.images["train"]:,} images. {result.trials["complete"]} trials complete, {result.trials["pruned"]} pruned, {result.trials["failed"]} failed; tolerance {result.tolerance:g} points of validation accuracy;
  margin of the certificate {result.epsilon:g} points (Tango's paired score bound; {_counts(accuracy)}).
{_bias_line(best.params)}- The logits have no margin; their softmax is not a calibrated probability.

Use: `camri-tune evaluate FOLDER`. Weights: safetensors, no code.
"""


def _gain(difference: SeedDifference) -> str:
    return " ".join(difference.in_points()).rstrip()


def _counts(difference: PairedDifference) -> str:
    if difference.effective_n >= difference.n:
        return "every image counts alone"
    return f"images in groups, resampled whole, count as {difference.effective_n:,.0f}"


def _bias_line(params: Mapping[str, float]) -> str:
    """What calibration did to the model, if anything."""
    lines = [
        f"- Calibrated: {value:+.4g} is added to the logit of class {c}, tuned on validation so that "
        f"accuracy there keeps the baseline's.\n"
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


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


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
        heads = [f"{token}: {cells[0].important} ({cells[0].class_name})" for token, cells in columns.items()]
        heads = [head.replace("|", "\\|") for head in heads]  # it would end the table's cell
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
