"""What people read afterwards: a study's report, the card of an exported model, and a comparison in four formats."""

import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from camri_tune.bundle import BundleConfig, ModelSpec
from camri_tune.calibration import BINS, Calibration
from camri_tune.claims import few_test_images, floor_in_words, provenance
from camri_tune.config import printable
from camri_tune.constraint_claims import TABLE_HEAD, constraint_table
from camri_tune.differences import PairedDifference, SeedDifference, Share
from camri_tune.evidence import Evidence
from camri_tune.files import write_text
from camri_tune.overview import EVIDENCE, REPORT, read_overview
from camri_tune.pages import comparison_page
from camri_tune.records import Figure, biases_of, csv_cell, named, recall_of, value_text, without_nan
from camri_tune.result import Result
from camri_tune.search import parameter_importance
from camri_tune.storage import StudyStore
from camri_tune.study_page import study_page
from camri_tune.table1 import TITLES, Cell, Outcome, Table, below, best_of, legend

MOST_OF_A_TEXT = 4_000  # characters of foreign text in one place of a card
_PIPE = "\\|"  # it would end a table's cell


def write_report(store: StudyStore) -> Path:
    """Write a study's `report.html` from what is stored, whether or not it is finished. Returns the file's path."""
    overview = read_overview(store)
    evidence = Evidence.load(overview.folder / EVIDENCE, len(overview.classes)) if overview.result is not None else None
    path = overview.folder / REPORT
    path.parent.mkdir(parents=True, exist_ok=True)  # the study's folder may be on another machine
    write_text(path, study_page(overview, parameter_importance(store), evidence))
    return path


@dataclass(frozen=True)
class Facts:
    """What a model card says beside the result: how the model was made and when, and its weights' SHA-256.

    `asked` are the important classes as the study was told them: names, indices or ranks.
    """

    command: str
    asked: str
    network: str
    epochs: int
    sha256: str
    date: str


def model_card(result: Result, bundle: BundleConfig, facts: Facts) -> str:
    """Markdown for the bundle's README: what a reviewer files, all of it from what is stored.

    What the model is for, its data, training and figures, what its probabilities are worth, what is not claimed, and
    how it is used. Names from elsewhere are escaped, so that none can be markup.
    """
    best = result.best
    assert best is not None, "only an exported model has a card"
    accuracy, classes = best.accuracy_difference, [escaped(name) for name in result.classes]
    names = ", ".join(named(c, classes) for c in result.important)
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
    of_answers = "; ".join(
        f"of the test images that it takes for {named(c, classes)}, {new} are, of those that the baseline model takes "
        f"for it, {old}"
        for c, (old, new) in best.precision.items()
    )
    over_seeds = ", ".join(
        f"recall of {named(c, classes)} on test {_gain(found)} points" for c, found in best.recall_over_seeds.items()
    )
    params = ", ".join(f"{name} = {value_text(value, 4)}" for name, value in sorted(best.params.items()))
    claims = "\n".join(f"- {escaped(line)}" for line in [*provenance(result), *few_test_images(best, result.classes)])
    stays = f"within {result.tolerance:g} points of" if result.tolerance else "at"
    of_fold = " of the first fold (the other folds' are about as many)" if result.folds > 1 else ""
    spec, images = bundle.spec, result.images
    colours = {1: "one channel", 3: "RGB"}.get(spec.channels, f"{spec.channels} channels")
    taken = f"images of {spec.image_size}x{spec.image_size}, {colours}"
    shape, dtype = f"(N, {spec.channels}, {spec.image_size}, {spec.image_size})", "uint8"
    if spec.are_embeddings:
        taken, shape, dtype = f"embeddings of {spec.channels:,} numbers", f"(N, {spec.channels})", "float32"
    versions = "; ".join(f"{name} {escaped(version)}" for name, version in result.versions.items())
    return f"""# {escaped(result.study)}

Classifier of {len(classes)} classes ({escaped(result.dataset)}), chosen so that class {names} be
missed less often while accuracy stays {stays} the cross-entropy baseline's; what came of that, the next line says. Written by camri-tune {result.versions["camri-tune"]}.

**{escaped(result.sentence)}**

## What it is for
To tell the {len(classes)} classes of {escaped(result.dataset)} from each other in images like the test set's, where to miss one of class
{names} costs more than other errors do. The study was told so (`--important`: "{escaped(facts.asked)}"; worst1, worst2 and median are
ranks by the baseline's recall on validation). Its recall, the share of its images that are found, is what was to rise, and
accuracy what was to stay; what was shown of both, and what was not, is said above and in the figures below.

## This model (one seed, {best.exported_seed})
| figure | value | right | {exact}95 % interval |
|---|---|---|---|
{rows}

Against the baseline model of seed {best.baseline_seed}, on the same test images: accuracy {_paired(accuracy)};
{of_recall}.

Precision, which is also a matter of how frequent a class is among the images: {of_answers}.

## Over {result.seeds} seeds
| mean ± sd | baseline (cross-entropy) | this setting ({result.loss}: {params}) |
|---|---|---|
| {recall_of(result.important)}, test | {_text(result.baseline.test.recall)} | {_text(best.side.test.recall)} |
| accuracy, test | {_text(result.baseline.test.accuracy)} | {_text(best.side.test.accuracy)} |
| {recall_of(result.important)}, validation | {_text(result.baseline.validation.recall)} | {_text(best.side.validation.recall)} |
| accuracy, validation | {_text(result.baseline.validation.accuracy)} | {_text(best.side.validation.accuracy)} |

All seeds, beside the baseline's, with other images in mind as well (95 % interval over seeds and images):
{over_seeds}, accuracy {_gain(best.accuracy_over_seeds)} points.

## Probabilities
{_probabilities(best.calibration, result, spec)}

## Data
- {escaped(result.dataset)} (fingerprint {escaped(bundle.dataset_fingerprint)}), {taken}.
- Trained on {images["train"]:,} images{of_fold}; validation {images["validation"]:,} ({images["validation_important"]:,} of the important class); test {images["test"]:,} ({images["test_important"]:,}).

## Training
- Network {escaped(facts.network)}, loss {result.loss} ({params}), {facts.epochs} epochs; weights of seed {best.exported_seed}.
- {result.trials["complete"]} trials complete, {result.trials["pruned"]} pruned, {result.trials["failed"]} failed; {result.seeds} seeds; tolerance {result.tolerance:g} points of validation accuracy.
- The command, where a folder's path is that of the machine it ran on:

      {printable(facts.command, 4000)}

{_asked_as_well(result)}## How it was judged
{claims}
- Margin of the certificate {result.epsilon:g} points (Tango's paired score bound; {_counts(accuracy)}).
{_bias_line(best.params, result.tolerance, classes)}
## Input, and how to use it
Takes {escaped(bundle.input)}. Here: {taken}.

```python
import camri_tune

model = camri_tune.load("FOLDER")  # a torch.nn.Module in evaluation mode
logits = model(inputs)  # {dtype} {shape} -> (N, {len(classes)}); the class is the argmax
```

`camri-tune predict FOLDER FILE…`, `camri-tune evaluate FOLDER` (these figures again), `camri-tune export FOLDER --format
onnx`. The logits have no margin. Class names are in `config.json`, all figures in `metrics.json`.

## What it is
- {facts.date}; {versions}.
- Weights: `model.safetensors`, no code, SHA-256 `{facts.sha256}`.
"""


def escaped(text: str) -> str:
    """Text from elsewhere as Markdown shows it, in one line: what it holds is no markup and no HTML."""
    return re.sub(r"([\\`*_\[\]<>|~&#$])", r"\\\1", printable(text, MOST_OF_A_TEXT))


def _less_bias(spec: ModelSpec) -> str:
    return " less the bias of the decision (`logit_bias` of config.json)" if spec.logit_bias else ""


def _probabilities(found: Calibration | None, result: Result, spec: ModelSpec) -> str:
    """What the softmax of the logits is worth."""
    if found is None:
        return "The softmax of the logits is a score, not a probability: no temperature was fitted."
    classes = [escaped(name) for name in result.classes]
    lines = [
        f"The softmax of the logits{_less_bias(spec)} over a temperature of {found.temperature:.4g}, fitted on the {found.fitted_on:,} "
        f"validation images that this model was not trained on (they chose the model, too). On {found.n:,} test images, "
        f"which chose nothing:",
        "",
        f"| | temperature 1 | temperature {found.temperature:.4g} |",
        "|---|---|---|",
        f"| mean negative log-likelihood | {found.nll_before:.4f} | {found.nll:.4f} |",
        f"| expected calibration error of the class decided for ({BINS} bins) | {found.decided_before.error:.4f} | "
        f"{found.decided.error:.4f} |",
    ]
    lines += [
        f"| the same of class {named(c, classes)} against all others | {before.error:.4f} | {after.error:.4f} |"
        for (c, after), before in zip(found.of_class.items(), found.of_class_before.values(), strict=True)
    ]
    lines += ["", "| stated probability of the class decided for | images | share right |", "|---|---|---|"]
    lines += [f"| {b.probability:.3f} | {b.n:,} | {b.share:.3f} |" for b in found.decided.bins]
    lines += [
        "",
        "A bin of few images errs by chance alone, so that the error of perfect probabilities would not be 0 either. "
        "Where classes are rarer or more frequent than in this data, probabilities hold no longer.",
    ]
    if spec.logit_bias:
        lines.append(
            "The class is decided after a bias is added to a logit, which is a rule of decision and in no probability: "
            "the class decided for need not be the likeliest."
        )
    return "\n".join(lines)


def _asked_as_well(result: Result) -> str:
    """The constraints on recall, if any, as a section."""
    rows = constraint_table(without_nan(result.as_json()["constraints"]), result.classes)
    if not rows:
        return ""
    lines = [TABLE_HEAD, ("---",) * len(TABLE_HEAD), *(map(escaped, row) for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
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


def _bias_line(params: Mapping[str, float], tolerance: float, classes: Sequence[str]) -> str:
    """What `--calibrate` did to the model, if anything, with the classes' escaped names."""
    lines = [
        f"- Rule of decision: {value:+.4g} is added to the logit of class {named(c, classes)}, tuned on validation so that "
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
    """One row for each data set, class and method; shares as they are, empty where nothing kept accuracy.

    A name that a spreadsheet would take for a formula begins with an apostrophe.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = ["recall", "recall_sd", "accuracy", "accuracy_sd", "recall_gain", "recall_gain_low", "recall_gain_high"]
    head = ["dataset", "important", "class", "class_name", "method", *names]
    head += [f"matched_{name}" for name in names] + ["paper_recall", "paper_accuracy", "best"]
    writer.writerow(head)
    for column in table.columns():
        cells = table.column(*column)
        for cell in cells:
            named_by = csv_cell(cell.dataset), csv_cell(cell.token), cell.important, csv_cell(cell.class_name)
            row: list[object] = [*named_by, cell.method]
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
        heads = [first.heading.replace("|", _PIPE) for first, *_ in columns.values()]
        views: list[tuple[str, Callable[[Cell], str]]] = [("as trained", lambda c: cell_text(c, c.trained))]
        tuned_to = f"the baseline's validation accuracy{table.less}"
        views.append((f"with a bias tuned to {tuned_to}", lambda c: cell_text(c, c.matched)))
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
