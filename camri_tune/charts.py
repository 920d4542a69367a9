"""Plotly figures of a study on validation: its trials, floor, baseline and finalists, and learning curves."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from camri_tune.chart_style import (
    BASELINE,
    BLUE,
    EXPORTED,
    FEASIBLE,
    FINALIST,
    FLOOR,
    GREEN,
    INFEASIBLE,
    INK,
    PALE,
    PRUNED,
    VERMILION,
    dressed,
)
from camri_tune.constraints import why_infeasible
from camri_tune.overview import Overview
from camri_tune.ranges import SearchRange
from camri_tune.records import EpochScores, Figure, TrialRecord, parameters, recall_of
from camri_tune.search import search_space

_ARROW: dict[str, Any] = {"showarrow": True, "arrowhead": 0, "ax": 0, "ay": -28, "font": {"size": 12}}


def recall_accuracy(overview: Overview) -> go.Figure:
    """The plane that the study is about: every trial, the floor, the baseline and the finalists, on validation."""
    figure = go.Figure()
    for name, marker, trials in _kinds(overview.search):
        _trials(figure, overview, trials, name, marker, x=lambda t: 100 * (t.accuracy or 0.0))
    if (best := overview.best) is not None and overview.result is None:
        figure.add_annotation(
            x=100 * (best.accuracy or 0.0), y=100 * (best.recall or 0.0), text=f"best so far: #{best.number}", **_ARROW
        )
    baseline = overview.baseline
    if baseline is not None and overview.important:
        measured = baseline.measured(overview.important)
        _means(
            figure, [_Mean(measured.accuracy, measured.recall, "")], f"baseline, {_seeds(measured.recall)}", BASELINE
        )
    exported = (overview.result or {}).get("best") or {}
    settings: dict[bool, list[_Mean]] = {False: [], True: []}
    for number, (accuracy, recall) in overview.finalist_figures.items():
        settings[number == exported.get("trial")].append(_Mean(accuracy, recall, f"#{number}"))
    _means(figure, settings[False], "finalists, mean over fresh seeds", FINALIST)
    _means(figure, settings[True], "exported setting, mean over fresh seeds", EXPORTED)
    if overview.floor is not None:
        floor = 100 * overview.floor
        figure.add_vline(x=floor, line=FLOOR)
        figure.add_vrect(x0=floor - 1000, x1=floor, fillcolor=PALE, line_width=0, layer="below")
        figure.add_annotation(
            x=floor, y=1.0, yref="paper", yanchor="bottom", text=f"floor: {floor:.2f} %", showarrow=False
        )
        _focus(figure, overview, floor)
    return dressed(figure, "accuracy on validation, %", "recall on validation, %", top=95)


def search_history(overview: Overview) -> go.Figure:
    """Recall of each trial in turn, and the best that kept the floor so far."""
    figure = go.Figure()
    for name, marker, trials in _kinds(overview.search):
        _trials(figure, overview, trials, name, marker, x=lambda t: t.number)
    feasible = [t for t in overview.search if t.feasible and t.recall is not None]
    if feasible:
        tops = np.maximum.accumulate([100 * _known(t.recall) for t in feasible])
        numbers = [t.number for t in feasible]
        figure.add_scatter(
            x=[*numbers, max(t.number for t in overview.search)],
            y=[*tops, tops[-1]],
            mode="lines",
            line={"shape": "hv", "color": BLUE, "width": 2},
            name="best above the floor so far",
            hoverinfo="skip",
        )
    failed = [t for t in overview.search if t.state == "failed"]
    if failed:
        figure.add_scatter(
            x=[t.number for t in failed],
            y=[0] * len(failed),
            yaxis="y2",
            mode="markers",
            marker={"symbol": "triangle-up", "color": INK, "size": 9},
            text=[f"#{t.number} failed: {escape(t.failure or '')}" for t in failed],
            hovertemplate="%{text}<extra></extra>",
            name="failed",
        )
        figure.update_layout(yaxis2={"overlaying": "y", "range": [0, 1], "visible": False})
    if overview.baseline is not None and overview.important:
        recall = overview.baseline.measured(overview.important).recall
        text = f"baseline, {_seeds(recall)}: {100 * recall.mean:.2f} %"
        figure.add_hline(y=100 * recall.mean, line=FLOOR, annotation={"text": text, "xanchor": "right"})
    return dressed(figure, "trial", "recall on validation, %")


def slices(overview: Overview) -> go.Figure | None:
    """Recall over each parameter alone; None while no trial has ended."""
    trials = [t for t in overview.search if t.recall is not None and t.state in ("complete", "pruned")]
    if not trials:
        return None
    space = search_space(overview.config, overview.important, len(overview.classes), base=1.0)  # for its scales
    names = [name for name in space if all(name in t.params for t in trials)]
    figure = make_subplots(cols=len(names), shared_yaxes=True, horizontal_spacing=0.02)
    for column, name in enumerate(names, start=1):
        for title, marker, some in _kinds(trials):
            _trials(
                figure,
                overview,
                some,
                title,
                {**marker, "size": 7},
                x=partial(_parameter, name),
                legendgroup=title,
                showlegend=column == 1,
                row=1,
                col=column,
            )
        allowed = space[name]
        log = isinstance(allowed, SearchRange) and allowed.log
        ticks = _log_ticks([t.params[name] for t in trials]) if log else {"nticks": 6}
        figure.update_xaxes(title=name, tickangle=0, row=1, col=column, **ticks)
    figure.update_yaxes(title="recall on validation, %", col=1)
    return dressed(figure, None, None, height=320)


def importance(values: Mapping[str, Mapping[str, float]]) -> go.Figure:
    """How much each parameter moves what varies, as shares of 1 (see `parameter_importance`)."""
    figure = go.Figure()
    styles = {"recall": (BLUE, ""), "accuracy": (VERMILION, "/")}
    for what, shares in values.items():
        names = sorted(shares, key=lambda name: sum(v.get(name, 0.0) for v in values.values()))
        colour, pattern = styles[what]
        figure.add_bar(
            y=names,
            x=[100 * shares[name] for name in names],
            orientation="h",
            name=what,
            marker={"color": colour, "pattern": {"shape": pattern, "fgcolor": "white", "fillmode": "overlay"}},
            hovertemplate=f"%{{y}}: %{{x:.0f}} % of what moves {what}<extra></extra>",
        )
    parameters = len(next(iter(values.values())))
    return dressed(figure, "share of what moves it, by fANOVA, %", None, height=140 + 50 * parameters)


def learning_curves(overview: Overview, trial: int | None) -> go.Figure | None:
    """Accuracy and recall on validation over the epochs: the baseline's models and a setting's. None without any."""
    ours = overview.retrained.get(trial, []) if trial is not None else []
    sides: list[tuple[str, Sequence[TrialRecord], str, str]] = [
        ("baseline", overview.baseline.records if overview.baseline else (), INK, "dash"),
        (f"setting of trial #{trial}", ours, GREEN, "solid"),
    ]
    if not ours and overview.best is not None:
        sides[1] = (f"trial #{overview.best.number}", [overview.best], BLUE, "solid")
    if not any(record.curve for _, records, _, _ in sides for record in records):
        return None
    figure = make_subplots(cols=2, subplot_titles=("accuracy, %", f"{recall_of(overview.important)}, %"))
    reads: list[Callable[[EpochScores], float]] = [
        lambda p: p.accuracy,
        lambda p: min(p.recall_per_class[c] for c in overview.important),
    ]
    for column, read in enumerate(reads, start=1):
        for name, records, colour, dash in sides:
            for place, record in enumerate(records):
                points = sorted(record.curve, key=lambda p: p.epoch)
                figure.add_scatter(
                    x=[p.epoch for p in points],
                    y=[100 * read(p) for p in points],
                    mode="lines+markers",
                    line={"color": colour, "dash": dash, "width": 1.5},
                    marker={"size": 5},
                    opacity=0.75,
                    name=name,
                    legendgroup=name,
                    showlegend=column == 1 and place == 0,
                    hovertemplate=f"{name}, seed {record.seed}, epoch %{{x}}: %{{y:.2f}} %<extra></extra>",
                    row=1,
                    col=column,
                )
    epochs = sorted({p.epoch for _, records, _, _ in sides for record in records for p in record.curve})
    figure.update_xaxes(title="epoch", tickvals=epochs)
    return dressed(figure, None, None, height=360)


def _kinds(trials: Sequence[TrialRecord]) -> list[tuple[str, dict[str, Any], list[TrialRecord]]]:
    """Trials that have scores, by what became of them."""
    scored = [t for t in trials if t.recall is not None and t.accuracy is not None]
    complete = [t for t in scored if t.state == "complete"]
    feasible = "trials that meet every constraint" if any(t.shortfalls for t in trials) else "trials above the floor"
    kinds: list[tuple[str, dict[str, Any], list[TrialRecord]]] = [
        ("trials below the floor", INFEASIBLE, [t for t in complete if not t.feasible and not _accurate(t)]),
        (
            "above the floor, but recall not as asked",
            {**INFEASIBLE, "symbol": "cross-thin"},
            [t for t in complete if not t.feasible and _accurate(t)],
        ),
        ("stopped early", PRUNED, [t for t in scored if t.state == "pruned"]),
        (feasible, FEASIBLE, [t for t in complete if t.feasible]),
    ]
    return [kind for kind in kinds if kind[2]]


def _accurate(trial: TrialRecord) -> bool:
    return trial.constraint is not None and trial.constraint <= 0


def _trials(
    figure: go.Figure,
    overview: Overview,
    trials: Sequence[TrialRecord],
    name: str,
    marker: dict[str, Any],
    *,
    x: Callable[[TrialRecord], float],
    **where: Any,
) -> None:
    texts = [
        f"#{t.number}: recall {100 * _known(t.recall):.2f} %, accuracy {100 * _known(t.accuracy):.2f} %<br>"
        + parameters(t.params)
        + "".join(f"<br>{escape(reason)}" for reason in _reasons(t, overview))
        for t in trials
    ]
    figure.add_scatter(
        x=[x(t) for t in trials],
        y=[100 * _known(t.recall) for t in trials],
        mode="markers",
        marker=marker,
        name=name,
        text=texts,
        hovertemplate=f"%{{text}}<extra>{name}</extra>",
        **where,
    )


def _reasons(trial: TrialRecord, overview: Overview) -> list[str]:
    """Why a trial is infeasible, where its place in the plane does not say it all."""
    if trial.state != "complete" or not overview.constraints:
        return []
    return why_infeasible(trial, overview.constraints, overview.classes)


class _Mean(NamedTuple):
    accuracy: Figure
    recall: Figure
    label: str


def _means(figure: go.Figure, settings: Sequence[_Mean], name: str, marker: dict[str, Any]) -> None:
    """Means over seeds of accuracy and recall with 95 % intervals over seeds."""
    if not settings:
        return
    bars = []
    for figures in ([s.accuracy for s in settings], [s.recall for s in settings]):
        ends = [f.interval or (f.mean, f.mean) for f in figures]
        bars.append(
            {
                "type": "data",
                "symmetric": False,
                "array": [100 * (high - f.mean) for f, (_, high) in zip(figures, ends, strict=True)],
                "arrayminus": [100 * (f.mean - low) for f, (low, _) in zip(figures, ends, strict=True)],
                "thickness": 1,
                "width": 4,
                "color": marker["color"],
            }
        )
    figure.add_scatter(
        x=[100 * s.accuracy.mean for s in settings],
        y=[100 * s.recall.mean for s in settings],
        error_x=bars[0],
        error_y=bars[1],
        mode="markers+text",
        marker=marker,
        text=[s.label for s in settings],
        textposition="top center",
        cliponaxis=False,
        name=name,
        hovertemplate="%{text} recall %{y:.2f} %, accuracy %{x:.2f} %<extra>" + name + "</extra>",
    )


def _focus(figure: go.Figure, overview: Overview, floor: float) -> None:
    """Show what is near the floor: a trial that went to pieces must not squeeze all others into a corner."""
    complete = [t for t in overview.search if t.state == "complete" and t.accuracy is not None]
    if not complete:
        return
    values = sorted(100 * _known(t.accuracy) for t in complete)
    means = [[100 * figure.mean for figure in pair] for pair in overview.finalist_figures.values()]
    if overview.baseline is not None:
        measured = overview.baseline.measured(overview.important)
        means.append([100 * measured.accuracy.mean, 100 * measured.recall.mean])
    lowest = min(values[len(values) // 4], floor, *(accuracy for accuracy, _ in means))
    highest = max(values[-1], floor, *(accuracy for accuracy, _ in means))
    room = max(highest - lowest, 0.2)
    left = lowest - 0.4 * room
    figure.update_xaxes(range=[left, min(highest + 0.25 * room, 100.2)])
    if (beyond := sum(value < left for value in values)) > 0:
        text = f"← {beyond} trial{'s' if beyond > 1 else ''} further left"
        at_the_left = {"x": 0.0, "xref": "paper", "xanchor": "left", "y": 0.0, "yref": "paper", "yanchor": "bottom"}
        figure.add_annotation(text=text, showarrow=False, **at_the_left)
    recalls = [100 * _known(t.recall) for t in complete if 100 * _known(t.accuracy) >= left]
    recalls += [recall for _, recall in means]
    room = max(max(recalls) - min(recalls), 1.0)
    figure.update_yaxes(range=[min(recalls) - 0.2 * room, max(recalls) + 0.2 * room])


def _log_ticks(values: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis with ticks at 1, 2 and 5 written out: Plotly's own are a lone '2' or '5' between decades."""
    decades = range(math.floor(math.log10(min(values))) - 1, math.ceil(math.log10(max(values))) + 1)
    ticks = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def _parameter(name: str, trial: TrialRecord) -> Any:
    return trial.params[name]


def _columns(records: Sequence[TrialRecord]) -> tuple[list[float], list[float]]:
    return [_known(r.accuracy) for r in records], [_known(r.recall) for r in records]


def _seeds(figure: Figure) -> str:
    return f"mean of {len(figure.values)} seeds" if len(figure.values) > 1 else "one seed"


def _known(value: float | None) -> float:
    assert value is not None, "a finished training has its scores"
    return value
