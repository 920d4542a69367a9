"""Plotly figures of one study. Every mark differs in shape as well as in colour, and says what it was measured on."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from camri_tune.evidence import AFTER, BEFORE, Evidence
from camri_tune.overview import Overview
from camri_tune.records import EpochScores, Figure, TrialRecord
from camri_tune.search import SPACES, parameter_names

# Okabe and Ito's colours, which the colour-blind tell apart, too.
BLUE, VERMILION, GREEN, INK, GREY, PALE = "#0072B2", "#D55E00", "#009E73", "#1a1a1a", "#767676", "#f1efe9"
FEASIBLE = {"color": BLUE, "symbol": "circle", "size": 9}
INFEASIBLE = {"color": VERMILION, "symbol": "x-thin", "size": 9, "line": {"color": VERMILION, "width": 2}}
PRUNED = {"color": GREY, "symbol": "triangle-down-open", "size": 8}
BASELINE = {"color": INK, "symbol": "diamond", "size": 12}
FINALIST = {"color": BLUE, "symbol": "square-open", "size": 13, "line": {"width": 2}}
EXPORTED = {"color": GREEN, "symbol": "star", "size": 18, "line": {"color": "white", "width": 1}}
FLOOR = {"color": INK, "width": 1.5, "dash": "dash"}
WHITE_TO_BLUE = [(0, "#ffffff"), (0.02, "#d3e5f2"), (0.2, "#6aaed6"), (1, "#08306b")]
DRAWN = 1_500  # points of a scatter of images


def recall_accuracy(overview: Overview) -> go.Figure:
    """The plane that the study is about: every trial, the floor, the baseline and the finalists, on validation."""
    figure = go.Figure()
    for name, marker, trials in _kinds(overview.search):
        _trials(figure, trials, name, marker, x=lambda t: 100 * (t.accuracy or 0.0))
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
    for number, records in overview.retrained.items():
        accuracy, recall = (Figure(tuple(_known(v) for v in values)) for values in _columns(records))
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
    return _dressed(figure, "accuracy on validation, %", "recall of the important class on validation, %")


def search_history(overview: Overview) -> go.Figure:
    """Recall of each trial in turn, and the best that kept the floor so far."""
    figure = go.Figure()
    for name, marker, trials in _kinds(overview.search):
        _trials(figure, trials, name, marker, x=lambda t: t.number)
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
            text=[f"#{t.number} failed: {t.failure}" for t in failed],
            hovertemplate="%{text}<extra></extra>",
            name="failed",
        )
        figure.update_layout(yaxis2={"overlaying": "y", "range": [0, 1], "visible": False})
    if overview.baseline is not None and overview.important:
        mean = 100 * overview.baseline.measured(overview.important).recall.mean
        figure.add_hline(
            y=mean, line=FLOOR, annotation={"text": f"baseline's recall: {mean:.2f} %", "xanchor": "right"}
        )
    return _dressed(figure, "trial", "recall of the important class on validation, %")


def slices(overview: Overview) -> go.Figure | None:
    """Recall over each parameter alone; None while no trial has ended."""
    trials = [t for t in overview.search if t.recall is not None and t.state in ("complete", "pruned")]
    if not trials:
        return None
    kinds = parameter_names(overview.config.loss, overview.important)
    names = [name for name in ("learning_rate", *kinds) if all(name in t.params for t in trials)]
    figure = make_subplots(cols=len(names), shared_yaxes=True, horizontal_spacing=0.02)
    for column, name in enumerate(names, start=1):
        for title, marker, some in _kinds(trials):
            _trials(
                figure,
                some,
                title,
                {**marker, "size": 7},
                x=partial(_parameter, name),
                legendgroup=title,
                showlegend=column == 1,
                row=1,
                col=column,
            )
        log = name == "learning_rate" or SPACES[overview.config.loss][kinds[name]].log
        ticks = {"type": "log", "dtick": "D2"} if log else {"nticks": 6}
        figure.update_xaxes(title=name, tickangle=0, row=1, col=column, **ticks)
    figure.update_yaxes(title="recall on validation, %", col=1)
    return _dressed(figure, None, None, height=320)


def importance(values: Mapping[str, Mapping[str, float]]) -> go.Figure:
    """Share of the variance over trials that each parameter accounts for, by what varies."""
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
            hovertemplate=f"%{{y}}: %{{x:.0f}} % of the variance of {what}<extra></extra>",
        )
    parameters = len(next(iter(values.values())))
    return _dressed(figure, "share of the variance over trials, %", None, height=140 + 50 * parameters)


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
    figure = make_subplots(cols=2, subplot_titles=("accuracy, %", "recall of the important class, %"))
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
    return _dressed(figure, None, None, height=360)


def confusions(evidence: Evidence, classes: Sequence[str], important: Sequence[int]) -> go.Figure:
    """Where each class's errors go on test, before and after: shares of its images, the right answers left out."""
    count = len(classes)
    figure = make_subplots(cols=2, subplot_titles=("baseline model", "exported model"), horizontal_spacing=0.06)
    names = [_named(c, classes) for c in range(count)]
    for column, side in enumerate((BEFORE, AFTER), start=1):
        matrix = evidence.confusion(side, count)
        totals = np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        shares = 100 * matrix / totals
        np.fill_diagonal(shares, np.nan)
        figure.add_heatmap(
            z=shares.round(3),
            customdata=matrix,
            x=list(range(count)),
            y=list(range(count)),
            coloraxis="coloraxis",
            hovertemplate="true %{y}, taken for %{x}:<br>%{customdata} images, %{z:.1f} % of that class<extra></extra>",
            row=1,
            col=column,
        )
    tick = max(1, math.ceil(count / 15))
    ticks = {"tickvals": list(range(0, count, tick)), "ticktext": names[::tick] if count <= 15 else None}
    figure.update_xaxes(title="taken for", tickangle=-45 if count <= 15 else 0, showgrid=False, **ticks)
    figure.update_yaxes(autorange="reversed", showgrid=False, **ticks)
    figure.update_yaxes(title="true class", col=1)
    for c in important:
        for column in (1, 2):
            figure.add_shape(
                type="rect", x0=-0.5, x1=count - 0.5, y0=c - 0.5, y1=c + 0.5, row=1, col=column,
                line={"color": VERMILION, "width": 1.5},
            )  # fmt: skip
    figure.update_layout(coloraxis={"colorscale": WHITE_TO_BLUE, "cmin": 0, "cmax": 25, "colorbar": {"title": "%"}})
    return _dressed(figure, None, None, height=520)


def errors_of(evidence: Evidence, classes: Sequence[str], important: Sequence[int]) -> go.Figure:
    """What the important class's images were taken for, and what was taken for it: images of test, before and after."""
    figure = make_subplots(
        cols=2, subplot_titles=("missed, and taken for …", "false alarms: images of …"), horizontal_spacing=0.25
    )
    for column, axis in ((1, 0), (2, 1)):
        counts = {}
        for side in (BEFORE, AFTER):
            matrix = evidence.confusion(side, len(classes))
            own = matrix[list(important)] if axis == 0 else matrix[:, list(important)].T
            counts[side] = np.delete(own.sum(axis=0), list(important))
        others = np.delete(np.arange(len(classes)), list(important))
        order = np.argsort(counts[BEFORE] + counts[AFTER], kind="stable")[-8:]
        order = order[(counts[BEFORE] + counts[AFTER])[order] > 0]
        sides = ((AFTER, "exported model", GREEN, ""), (BEFORE, "baseline model", INK, "/"))
        for side, name, colour, pattern in sides:
            figure.add_bar(
                y=[_named(c, classes) for c in others[order]],
                x=counts[side][order],
                orientation="h",
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                marker={"color": colour, "pattern": {"shape": pattern, "fgcolor": "white", "fillmode": "overlay"}},
                hovertemplate=f"{name}: %{{x}} images, %{{y}}<extra></extra>",
                row=1,
                col=column,
            )
        most = int(max(counts[BEFORE].max(initial=0), counts[AFTER].max(initial=0)))
        figure.update_xaxes(dtick=max(1, math.ceil(most / 6)), row=1, col=column)
    figure.update_xaxes(title="images of test", rangemode="tozero")
    figure.update_yaxes(type="category")
    return _dressed(figure, None, None, height=380)


def recall_of_classes(
    before: Sequence[Figure], after: Sequence[Figure], classes: Sequence[str], important: Sequence[int]
) -> go.Figure:
    """Mean recall of each class on test, before and after, the worst losers first."""
    old, new = ([100 * figure.mean for figure in side] for side in (before, after))
    order = sorted(range(len(classes)), key=lambda c: new[c] - old[c], reverse=True)  # the last is drawn on top
    labels = [f"<b>{_named(c, classes)}</b>" if c in important else _named(c, classes) for c in order]
    figure = go.Figure()
    for lost, colour, name in ((True, VERMILION, "lost recall"), (False, BLUE, "gained recall, or kept it")):
        some = [place for place, c in enumerate(order) if (new[c] < old[c]) == lost]
        if not some:
            continue
        xs: list[float | None] = [v for p in some for v in (old[order[p]], new[order[p]], None)]
        ys: list[str | None] = [v for p in some for v in (labels[p], labels[p], None)]
        figure.add_scatter(x=xs, y=ys, mode="lines", line={"color": colour, "width": 3}, name=name, hoverinfo="skip")
    for values, name, marker in (
        (old, "baseline", {"color": INK, "symbol": "line-ns", "size": 10, "line": {"color": INK, "width": 2}}),
        (new, "exported setting", {"color": GREEN, "symbol": "circle", "size": 9}),
    ):
        figure.add_scatter(
            x=[values[c] for c in order],
            y=labels,
            mode="markers",
            marker=marker,
            name=f"{name}, {_seeds(before[0])}",
            hovertemplate="%{y}: %{x:.2f} %<extra>" + name + "</extra>",
        )
    figure.update_yaxes(
        type="category", categoryorder="array", categoryarray=labels, automargin=True, range=[-0.8, len(order) - 0.2]
    )
    return _dressed(figure, "recall on test, %", None, height=150 + 20 * len(order))


def embedding(evidence: Evidence, classes: Sequence[str], important: Sequence[int]) -> go.Figure:
    """Test images by their angle to the important class's weight and to the nearest other one, before and after."""
    figure = make_subplots(
        cols=2,
        subplot_titles=("baseline model", "exported model"),
        shared_yaxes=True,
        shared_xaxes=True,
        horizontal_spacing=0.03,
    )
    own = np.isin(evidence.labels, list(important))
    rng = np.random.default_rng(0)
    # Of the others those that come nearest, in either model.
    near = evidence.to_important.min(axis=0)
    rest = np.flatnonzero(~own)
    rest = np.sort(rest[np.argsort(near[rest])][:DRAWN])
    mine = np.flatnonzero(own)
    if len(mine) > DRAWN:
        mine = np.sort(rng.choice(mine, DRAWN, replace=False))
    most = float(max(evidence.to_important[:, [*mine, *rest]].max(), evidence.to_other[:, [*mine, *rest]].max())) + 2
    for column, side in enumerate((BEFORE, AFTER), start=1):
        right = evidence.answers[side] == evidence.labels
        alarm = np.isin(evidence.answers[side], list(important))
        kinds: list[tuple[str, NDArray[np.int64], dict[str, Any]]] = [
            ("other classes", rest[~alarm[rest]], {"color": GREY, "symbol": "circle-open", "size": 4}),
            ("taken for it by mistake", rest[alarm[rest]], {"color": INK, "symbol": "diamond", "size": 8}),
            ("important class, right", mine[right[mine]], {"color": BLUE, "symbol": "circle", "size": 5}),
            ("important class, missed", mine[~right[mine]], {**INFEASIBLE, "size": 10}),
        ]
        for name, rows, marker in kinds:
            answers = evidence.answers[side][rows]
            figure.add_scatter(
                x=evidence.to_important[side][rows].round(2),
                y=evidence.to_other[side][rows].round(2),
                mode="markers",
                marker=marker,
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                customdata=np.stack([evidence.labels[rows], answers], axis=1),
                hovertemplate="a %{customdata[0]}, taken for %{customdata[1]}<br>"
                "%{x:.1f}° from the important class's weight, %{y:.1f}° from the nearest other<extra></extra>",
                row=1,
                col=column,
            )
        figure.add_shape(type="line", x0=0, y0=0, x1=180, y1=180, line=FLOOR, row=1, col=column)
    figure.update_xaxes(title="degrees to the important class's weight", range=[0, most])
    figure.update_yaxes(range=[0, most])
    figure.update_yaxes(title="degrees to the nearest other weight", col=1)
    return _dressed(figure, None, None, height=500)


_ARROW: dict[str, Any] = {"showarrow": True, "arrowhead": 0, "ax": 0, "ay": -28, "font": {"size": 12}}


def _dressed(figure: go.Figure, x: str | None, y: str | None, height: int = 460) -> go.Figure:
    figure.update_layout(
        template=go.layout.Template(),  # the default is larger than the figure
        height=height,
        margin={"t": 70, "b": 50, "l": 60, "r": 20},
        font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
        plot_bgcolor="white",
        # Above, in pixels from the top: below, it would hide the axis' title on a narrow screen.
        legend={"orientation": "h", "yref": "container", "y": 0.995, "yanchor": "top", "x": 0},
        hoverlabel={"bgcolor": "white"},
        barmode="group",
    )
    common = {"gridcolor": "#e6e6e6", "zeroline": False, "linecolor": "#999999", "showline": True, "ticks": "outside"}
    figure.update_xaxes(**common, automargin=True)
    figure.update_yaxes(**common, automargin=True)
    if x is not None:
        figure.update_xaxes(title=x)
    if y is not None:
        figure.update_layout(yaxis_title=y)
    return figure


def _kinds(trials: Sequence[TrialRecord]) -> list[tuple[str, dict[str, Any], list[TrialRecord]]]:
    """Trials that have scores, by what became of them."""
    scored = [t for t in trials if t.recall is not None and t.accuracy is not None]
    complete = [t for t in scored if t.state == "complete"]
    kinds: list[tuple[str, dict[str, Any], list[TrialRecord]]] = [
        ("trials below the floor", INFEASIBLE, [t for t in complete if not t.feasible]),
        ("stopped early", PRUNED, [t for t in scored if t.state == "pruned"]),
        ("trials above the floor", FEASIBLE, [t for t in complete if t.feasible]),
    ]
    return [kind for kind in kinds if kind[2]]


def _trials(
    figure: go.Figure,
    trials: Sequence[TrialRecord],
    name: str,
    marker: dict[str, Any],
    *,
    x: Callable[[TrialRecord], float],
    **where: Any,
) -> None:
    texts = [
        f"#{t.number}: recall {100 * _known(t.recall):.2f} %, accuracy {100 * _known(t.accuracy):.2f} %<br>"
        + ", ".join(f"{key} {value:.3g}" for key, value in sorted(t.params.items()))
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
        textposition="top right",
        name=name,
        hovertemplate="%{text} recall %{y:.2f} %, accuracy %{x:.2f} %<extra>" + name + "</extra>",
    )


def _focus(figure: go.Figure, overview: Overview, floor: float) -> None:
    """Show what is near the floor: a trial that went to pieces must not squeeze all others into a corner."""
    values = sorted(100 * t.accuracy for t in overview.search if t.accuracy is not None and t.state == "complete")
    if not values:
        return
    lowest = min(values[len(values) // 4], floor)
    highest = max(values[-1], floor)
    room = max(highest - lowest, 0.2)
    figure.update_xaxes(range=[lowest - 0.4 * room, min(highest + 0.25 * room, 100.2)])


def _parameter(name: str, trial: TrialRecord) -> float:
    return trial.params[name]


def _columns(records: Sequence[TrialRecord]) -> tuple[list[float | None], list[float | None]]:
    return [r.accuracy for r in records], [r.recall for r in records]


def _named(c: int, classes: Sequence[str]) -> str:
    name = classes[c]
    return name if name == str(c) else f"{c} {name if len(name) <= 26 else name[:25] + '…'}"


def _seeds(figure: Figure) -> str:
    return f"mean of {len(figure.values)} seeds" if len(figure.values) > 1 else "one seed"


def _known(value: float | None) -> float:
    assert value is not None, "a finished training has its scores"
    return value
