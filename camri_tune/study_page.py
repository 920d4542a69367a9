"""`report.html`: one study on one page that opens without a network, from the verdict down to how it was done."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from camri_tune import charts, error_charts
from camri_tune.constraint_claims import TABLE_HEAD, constraint_table
from camri_tune.evidence import AFTER, BEFORE, SHOWN, Evidence, kinds_of_images
from camri_tune.metrics import Precision
from camri_tune.overview import Overview
from camri_tune.pages import page, picture
from camri_tune.progress import STAGE_TITLES, done, duration, total
from camri_tune.records import Figure, TrialRecord, figure_head, named, parameters, recall_of

VERDICTS = {
    "certified": ("✓", "Certified", "good"),
    "feasible": ("!", "Kept on validation, not certified on test", "fair"),
    "none": ("✗", "No model", "bad"),
}


def study_page(overview: Overview, importance: Mapping[str, Mapping[str, float]], evidence: Evidence | None) -> str:
    """The whole page. Without a result it says how far the study is, and shows what there is."""
    result = overview.result
    parts = [f"<h1>{escape(overview.name)}</h1>", _subtitle(overview)]
    parts.append("" if overview.finished else _progress(overview))
    if result is not None:
        parts += [_verdict(result), _side_by_side(result), _asked_as_well(result), _notices(result)]
    parts += _search(overview, importance)
    if result is not None:
        parts.append(_finalists(result))
    parts += _learning(overview)
    if result is not None:
        parts += _before_and_after(overview, result, evidence)
    parts += [_how(overview), _trials(overview)]
    return page(f"{overview.name}: camri-tune", "\n".join(part for part in parts if part))


def _subtitle(overview: Overview) -> str:
    return (
        f'<p class="lead">Important class <b>{escape(overview.important_names)}</b> of data set '
        f"<b>{escape(overview.dataset)}</b> ({len(overview.classes)} classes); loss "
        f"<b>{escape(overview.config.loss)}</b>; network {escape(overview.config.model)}.</p>"
    )


def _progress(overview: Overview) -> str:
    state = "is running" if overview.running else "is not finished, and nothing works on it here"
    left = overview.seconds_left if overview.running else None
    time = "" if left is None else f" About {duration(left)} to go." if left >= 1 else " Then comes the judgement."
    lines = [f'<div class="verdict fair"><b>This study {state}.</b>{time}<ul>']
    for stage, title in STAGE_TITLES.items():
        records = overview.everything.get(stage, ())
        if overview.schedule is None or not records:
            continue
        count = total(overview.everything, stage, overview.schedule)
        share = 100 * done(records, stage, overview.schedule) / count
        ended = sum(r.ended for r in records)
        lines.append(f"<li>{title}: {ended} of {count} ({share:.0f} %)</li>")
    best = overview.best
    if best is not None:
        lines.append(
            f"<li>{'Best feasible trial' if overview.constraints else 'Best trial above the floor'} so far: #{best.number}, recall {_percent(best.recall)}, accuracy "
            f"{_percent(best.accuracy)} on validation: a candidate, not a result.</li>"
        )
    if not overview.running:
        end = " …, the command that was given" if overview.is_comparison else ""
        first = escape(overview.before_command)
        lines.append(f"<li>Go on with: {first}<code>{escape(overview.command)}{end}</code></li>")
    if overview.result is not None:
        lines.append("<li>The result below is of an earlier run.</li>")
    return "".join(lines) + "</ul></div>"


def _verdict(result: Mapping[str, Any]) -> str:
    sign, title, kind = VERDICTS[result["verdict"]]
    if result["verdict"] == "certified" and any(c["status"] != "shown" for c in result.get("constraints", ())):
        title, kind = "Accuracy certified; not all that was asked of recall is shown", "fair"
    return f'<div class="verdict {kind}"><span class="badge">{sign} {title}</span><p>{escape(result["sentence"])}</p></div>'


def _side_by_side(result: Mapping[str, Any]) -> str:
    """The baseline and, if there is one, the best: large, then every figure. Without a best the baseline alone."""
    best = result["best"]
    compared = {"baseline": "cross-entropy baseline", **({"best": f"best: {result['loss']}"} if best else {})}
    threshold = result.get("threshold")
    biased = {"threshold": "baseline with a bias"} if threshold else {}
    titles = {"baseline": compared["baseline"], **biased, **compared}
    cards, rows = [], []
    for name, of_what in (("recall", recall_of(result["important"]).capitalize()), ("accuracy", "Accuracy")):
        means = {title: _figure(result[side]["test"][name]).mean for side, title in compared.items()}
        pair = "".join(f"<div><small>{escape(title)}</small>{_percent(mean)}</div>" for title, mean in means.items())
        gains = f"<p>{_gains(result, name)}</p>" if best is not None else ""
        cards.append(f'<div class="card"><h3>{of_what} on test</h3><div class="pair">{pair}</div>{gains}</div>')
        for part in ("test", "validation"):
            head = figure_head(name, part, result["images"], result["important"], result["folds"])
            cells = "".join(f"<td>{_with_interval(_figure(result[side][part][name]))}</td>" for side in titles)
            rows.append(f"<tr><td>{head}</td>{cells}</tr>")
    note = "In brackets 95 % intervals over seeds."
    if best is not None:
        exported = best["exported"]["test"]
        shares = {f"recall of {named(int(c), result['classes'])}": share for c, share in exported["recall"].items()}
        for name, share in {**shares, "accuracy": exported["accuracy"]}.items():
            rows.append(
                f"<tr><td>exported model alone: {escape(name)} on test</td>{'<td></td>' * (len(titles) - 1)}"
                f"<td>{_share(share)}</td></tr>"
            )
        exact = "exact binomial" if exported["accuracy"]["exact"] else "binomial, for images that count as fewer,"
        note = (
            f"In brackets 95 % intervals: over seeds for means, {exact} for the exported model alone, over seeds and images "
            "for the gains."
        )
    settings = [_setting(result[side]) for side in titles]
    rows.append(f"<tr><td>parameters</td>{''.join(f'<td>{setting}</td>' for setting in settings)}</tr>")
    note += f" {_biased_in_words(threshold, result['tolerance'])}" if threshold else ""
    heads = "".join(f"<th>{escape(title)}, mean ± sd of {result['seeds']} seed(s)</th>" for title in titles.values())
    table = f'<div class="scroll"><table><tr><th></th>{heads}</tr>{"".join(rows)}</table></div>'
    return f'<div class="cards">{"".join(cards)}</div>{table}<p class="note">{note}</p>'


def _setting(side: Mapping[str, Any]) -> str:
    if "biases" in side:
        return "bias " + ", ".join(f"{bias:+.3g}" for bias in side["biases"])
    return _params(side["params"])


def _biased_in_words(threshold: Mapping[str, Any], tolerance: float) -> str:
    """What the column of the baseline with a bias is, and how the best setting stands beside it."""
    less = f", less {tolerance:g} points," if tolerance else ""
    text = (
        f"With a bias: the baseline's own models, with one added to the important class's logit that is tuned on "
        f"validation to keep accuracy there{less} (threshold tuning). It trains nothing, and is the method to beat"
    )
    if threshold["best_less_this"] is None:
        return f"{text}."
    gains = (
        f"{100 * gain['mean']:+.2f} points of {of}{_points_interval(gain['interval'])}"
        for of, gain in threshold["best_less_this"].items()
    )
    return f"{text}: beside it the best setting has {' and '.join(gains)} on test."


def _asked_as_well(result: Mapping[str, Any]) -> str:
    """The constraints on recall, if any, as a table."""
    rows = constraint_table(result.get("constraints", ()), result["classes"])
    if not rows:
        return ""
    head = "".join(f"<th>{escape(text)}</th>" for text in TABLE_HEAD)
    cells = ("".join(f"<td>{escape(text)}</td>" for text in row) for row in rows)
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return (
        f'<h3>Asked as well</h3><div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
        '<p class="note">Means ± sd over seeds; the exported model alone with one-sided bounds. What is kept but not '
        "shown may not hold for other images. A certificate is of accuracy and does not speak of these.</p>"
    )


def _gains(result: Mapping[str, Any], name: str) -> str:
    """What was gained over all seeds; of recall for each important class by itself."""
    found = result["best"]["over_seeds"][f"{name}_difference"]
    by_class = (
        {f" of {named(int(c), result['classes'])}": gain for c, gain in found.items()} if name == "recall" else {}
    )
    return "; ".join(
        f"{100 * gain['mean']:+.2f} points{escape(whose) if len(by_class) > 1 else ''} over {result['seeds']} seed(s)"
        f"{_points_interval(gain['interval'])}"
        for whose, gain in (by_class or {"": found}).items()
    )


def _notices(result: Mapping[str, Any]) -> str:
    return "".join(f'<p class="warning">{escape(notice)}</p>' for notice in result["notices"])


def _search(overview: Overview, importance: Mapping[str, Mapping[str, float]]) -> list[str]:
    if not any(t.recall is not None for t in overview.search):
        return []
    floor = f", {100 * overview.floor:.2f} %," if overview.floor is not None else ""
    models = (
        f"{overview.schedule.folds} trainings" if overview.schedule and overview.schedule.folds > 1 else "one training"
    )
    parts = [
        "<h2>The search</h2>",
        f'<p class="note">All on validation. Each small mark is a trial ({models}); baseline and finalists are means over '
        f"seeds, with 95 % intervals over them. The floor{floor} is the baseline's mean accuracy{_tolerance(overview)}: what "
        f"lies left of it gives up accuracy for recall.{_constraints(overview)}</p>",
        picture(charts.recall_accuracy(overview), "recall-accuracy"),
        "<h3>How it went</h3>",
        picture(charts.search_history(overview), "search-history"),
    ]
    by_parameter = charts.slices(overview)
    if by_parameter is not None:
        parts += ["<h3>By parameter</h3>", picture(by_parameter, "slices", wide=True)]
    if importance:
        parts += [
            "<h3>Which parameter matters</h3>",
            '<p class="note">fANOVA: how much each parameter by itself moves what a random forest has learnt from the complete '
            "trials, as shares of 100 %. A forest learns the noise of seeds, too: with few trials this is a rough guide.</p>",
            picture(charts.importance(importance), "importance"),
        ]
    return parts


def _constraints(overview: Overview) -> str:
    asked = "; ".join(constraint.in_words(overview.classes) for constraint in overview.constraints)
    return f" Asked as well: {escape(asked)}. Point at a trial to read what it misses." if asked else ""


def _tolerance(overview: Overview) -> str:
    tolerance = overview.config.tolerance
    pooled = ", pooled over the folds by their images," if overview.schedule and overview.schedule.folds > 1 else ""
    return f"{pooled} less {tolerance:g} points" if tolerance else pooled.rstrip(",")


def _finalists(result: Mapping[str, Any]) -> str:
    rows = []
    last = next((f for f in reversed(result["finalists"]) if f["accuracy_difference"] is not None), None)
    for finalist in result["finalists"]:
        validation, judged = finalist["validation"], finalist["accuracy_difference"]
        if validation is None:
            scores = '<td colspan="3">a training failed</td>'
        else:
            recall, accuracy = _figure(validation["recall"]), _figure(validation["accuracy"])
            scores = (
                f"<td>{_with_sd(recall)}</td><td>{_percent(finalist['recall_lower_bound']) or '-'}</td>"
                f"<td>{_with_sd(accuracy)}</td>"
            )
        if judged is None:
            said = "not asked" if finalist["kept_accuracy"] else "below the floor: not asked"
            if not finalist.get("is_candidate", True) and finalist["kept_accuracy"]:
                said = "recall not as asked on validation: not asked"
        else:
            passed = judged["lower_bound"] >= -result["accuracy_difference"]["epsilon"]
            # Accuracy alone is no certificate where test shows that recall is not as asked.
            good = (
                "certified"
                if result["verdict"] == "certified" and finalist is last
                else "accuracy shown, recall broken"
            )
            said = (
                f"{good if passed else 'not certified'}: accuracy {100 * judged['estimate']:+.2f} points, lower "
                f"bound {100 * judged['lower_bound']:+.2f}"
            )
        exported = result["best"] is not None and result["best"]["trial"] == finalist["trial"]
        rows.append(
            f"<tr{' class=best' if exported else ''}><td>#{finalist['trial']}<small>{_params(finalist['params'])}</small>"
            f"</td>{scores}<td>{said}</td></tr>"
        )
    order = " Those that kept accuracy come first, in the order in which test judged them until one was certified."
    order = order if result["best"] is not None else " None was judged on test."
    head = "<tr><th>trial</th><th>recall</th><th>its lower bound (95 %, one-sided)</th><th>accuracy</th><th>what test said</th></tr>"
    return (
        f'<h2>Finalists</h2><p class="note">The best trials, trained again on {result["seeds"]} fresh seed(s): means ± sd '
        f"on validation.{order}</p>"
        f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'
    )


def _learning(overview: Overview) -> list[str]:
    best = (overview.result or {}).get("best")
    figure = charts.learning_curves(overview, best["trial"] if best else None) if overview.important else None
    if figure is None:
        return []
    note = '<p class="note">On validation, after the epochs at which it was measured; one line for each seed.</p>'
    return ["<h2>Learning curves</h2>", note, picture(figure, "learning-curves", wide=True)]


def _before_and_after(overview: Overview, result: Mapping[str, Any], evidence: Evidence | None) -> list[str]:
    classes, important = overview.classes, list(overview.important)
    before = [_figure(f) for f in result["baseline"]["test"]["recall_per_class"]]
    over = f"Mean recall over {result['seeds']} seed(s) on test."
    if result["best"] is None:
        drawn = picture(error_charts.recall_of_classes(before, None, classes, important), "classes")
        return ["<h2>Every class under the baseline</h2>", f'<p class="note">{over}</p>', drawn]
    after = [_figure(f) for f in result["best"]["test"]["recall_per_class"]]
    gains = [100 * (new.mean - old.mean) for new, old in zip(after, before, strict=True)]
    changes = sorted((gain, c) for c, gain in enumerate(gains) if not math.isnan(gain))  # some may have no images
    losers = [f"{named(c, classes)} ({change:+.2f} points)" for change, c in changes[:3] if change < 0]
    note = f"Most was lost by {', '.join(losers)}." if losers else "No class lost recall."
    parts = [
        "<h2>Every class, before and after</h2>",
        f'<p class="note">{over} {escape(note)}</p>',
        picture(error_charts.recall_of_classes(before, after, classes, important), "classes"),
    ]
    if evidence is None:
        return [*parts, '<p class="note">The images behind these figures were not kept (evidence.safetensors).</p>']
    n, own = len(evidence.labels), int(np.isin(evidence.labels, important).sum())
    some = (
        f" Of its own {own:,} images {error_charts.DRAWN:,} are drawn, at random." if own > error_charts.DRAWN else ""
    )
    return [
        *parts,
        "<h2>The important class's errors</h2>",
        f'<p class="note">The exported model (seed {result["best"]["exported"]["seed"]}) beside the baseline model '
        f"(seed {result['best']['exported']['compared_with_seed']}) on the same {n:,} test images. "
        f"{escape(_precision(evidence, classes, important))}</p>",
        picture(error_charts.errors_of(evidence, classes, important), "errors"),
        *_gallery(evidence, classes, important),
        "<h2>Confusion</h2>",
        '<p class="note">Errors alone: what share of each true class was taken for another. The important class is '
        "framed.</p>",
        picture(error_charts.confusions(evidence, classes, important), "confusion", wide=True),
        "<h2>Around the important class</h2>",
        f"<p class=\"note\">Each mark is a test image, by its embedding's angle to the important class's weight and to "
        f"the nearest other weight. Above the line the important class is nearer: there a cosine head answers with it (a dense head, such as the baseline's, also weighs lengths and a bias, and a tuned bias moves the line). Of other classes "
        f"the {error_charts.DRAWN:,} that come nearest are drawn.{some}</p>",
        picture(error_charts.embedding(evidence, classes, important), "embedding", wide=True),
    ]


def _precision(evidence: Evidence, classes: Sequence[str], important: Sequence[int]) -> str:
    """What the errors cost where images are taken for an important class."""
    before, after = (evidence.confusion(side, len(classes)) for side in (BEFORE, AFTER))
    return " ".join(
        f"Of the images that it takes for {named(c, classes)}, {Precision.of(after, c)} are (precision); of those that "
        f"the baseline model takes for it, {Precision.of(before, c)}."
        for c in important
    )


def _gallery(evidence: Evidence, classes: Sequence[str], important: list[int]) -> list[str]:
    kinds = kinds_of_images(evidence.labels, evidence.answers, important)
    said = {
        "still missed": lambda row: f"taken for {name(AFTER, row)}",
        "newly caught": lambda row: f"was taken for {name(BEFORE, row)}",
        "newly lost": lambda row: f"now taken for {name(AFTER, row)}",
        "new false alarms": lambda row: f"a {named(int(evidence.labels[row]), classes)}",
        "false alarms no more": lambda row: f"a {named(int(evidence.labels[row]), classes)}",
    }

    def name(side: int, row: int) -> str:
        return named(int(evidence.answers[side][row]), classes)

    place = {int(row): k for k, row in enumerate(evidence.rows)}
    parts = []
    for kind, rows in kinds.items():
        shown = [int(row) for row in rows[:SHOWN] if int(row) in place]
        more = f", {len(shown)} of them shown" if len(shown) < len(rows) else ""
        parts.append(f"<h3>{kind.capitalize()}: {len(rows)}{more}</h3>")
        tiles = "".join(
            f'<figure><img src="{_png(evidence.pixels[place[row]])}" alt="test image {row}">'
            f"<figcaption>{escape(said[kind](row))}</figcaption></figure>"
            for row in shown
        )
        parts.append(f'<div class="gallery">{tiles}</div>' if tiles else "")
    return parts


def _how(overview: Overview) -> str:
    config, result = overview.config, overview.result
    lines: list[str] = [escape(line) for line in (result or {}).get("provenance", ())]
    if result is not None:
        lines.append(
            f"Trained on {result['images']['train']:,} images{' (of the first fold)' if result['folds'] > 1 else ''}. Groups of images that belong together never stand on both "
            "sides of a split."
        )
        lines.append(escape(", ".join(f"{name} {version}" for name, version in result["versions"].items())))
    devices = sorted({r.device for records in overview.records.values() for r in records if r.device})
    seconds = [r.seconds for records in overview.records.values() for r in records if r.seconds]
    if devices:
        folds = overview.schedule.folds if overview.schedule is not None else 1
        on_folds = f", each of the search on {folds} folds," if folds > 1 else ""
        lines.append(
            f"{len(seconds)} trainings{on_folds} on {escape(', '.join(devices))}, {duration(float(np.median(seconds)))} in the median"
            + (f"; {duration(overview.wall_seconds)} in all." if overview.wall_seconds else ".")
        )
    command = f"{overview.command} …" if overview.is_comparison else config.command()
    lines.append(f"Command: <code>{escape(command)}</code>")
    return f"<h2>How it was done</h2><ul>{''.join(f'<li>{line}</li>' for line in lines)}</ul>"


def _trials(overview: Overview) -> str:
    if not overview.search:
        return ""
    rows = "".join(_trial_row(t) for t in overview.search)
    head = "<tr><th>trial</th><th>state</th><th>recall</th><th>accuracy</th><th>floor</th><th>time</th></tr>"
    return (
        f"<details><summary>All {len(overview.search)} trials of the search</summary>"
        f'<div class="scroll"><table>{head}{rows}</table></div></details>'
    )


def _trial_row(t: TrialRecord) -> str:
    floor = "" if t.constraint is None else "kept" if t.constraint <= 0 else f"missed by {100 * t.constraint:.2f}"
    floor += "".join(f"<small>{name} missed</small>" for name, value in t.shortfalls.items() if floor and value > 0)
    what = escape(t.failure) if t.failure else _params(t.params)
    time = duration(t.seconds) if t.seconds else ""
    return (
        f"<tr><td>#{t.number}<small>{what}</small></td><td>{t.state}</td><td>{_percent(t.recall)}</td>"
        f"<td>{_percent(t.accuracy)}</td><td>{floor}</td><td>{time}</td></tr>"
    )


def _png(pixels: NDArray[np.uint8]) -> str:
    """A data URL of (C, S, S)."""
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _figure(value: Mapping[str, Any]) -> Figure:
    return Figure(tuple(math.nan if v is None else v for v in value["values"]))


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"


def _with_sd(figure: Figure) -> str:
    return _percent(figure.mean) if figure.sd is None else f"{_percent(figure.mean)} ± {100 * figure.sd:.2f}"


def _with_interval(figure: Figure) -> str:
    span = figure.interval
    return _with_sd(figure) + (f"<small>[{100 * span.low:.2f}, {100 * span.high:.2f}]</small>" if span else "")


def _share(share: Mapping[str, Any]) -> str:
    low, high = share["interval"]
    fewer = "" if share["exact"] else f", which count as {share['effective_n']:,.0f}"
    return f"{_percent(share['value'])} ({share['right']:,} of {share['n']:,}{fewer})<small>[{100 * low:.2f}, {100 * high:.2f}]</small>"


def _points_interval(interval: Sequence[float] | None) -> str:
    return f" [{100 * interval[0]:+.2f}, {100 * interval[1]:+.2f}]" if interval else ""


def _params(params: Mapping[str, float]) -> str:
    return escape(parameters(params))
