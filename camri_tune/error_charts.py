"""Plotly figures of what test says of two models: the baseline's and the exported one, errors and embeddings."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from camri_tune.chart_style import BLUE, FLOOR, GREEN, GREY, INFEASIBLE, INK, VERMILION, dressed, tick
from camri_tune.evidence import AFTER, BEFORE, Evidence
from camri_tune.records import Figure

WHITE_TO_BLUE = [(0, "#ffffff"), (0.02, "#d3e5f2"), (0.2, "#6aaed6"), (1, "#08306b")]
MOST_RIVALS = 8  # bars of each kind of error
DRAWN = 1_500  # points of a scatter of images


def confusions(evidence: Evidence, classes: Sequence[str], important: Sequence[int]) -> go.Figure:
    """Where each class's errors go on test, before and after: shares of its images, the right answers left out."""
    count = len(classes)
    figure = make_subplots(cols=2, subplot_titles=("baseline model", "exported model"), horizontal_spacing=0.06)
    names = [tick(c, classes) for c in range(count)]
    for column, side in enumerate((BEFORE, AFTER), start=1):
        matrix = evidence.confusion(side, count)
        totals = np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        shares = 100 * matrix / totals
        np.fill_diagonal(shares, np.nan)
        figure.add_heatmap(
            z=shares.round(3),
            customdata=[
                [[int(n), names[true], names[said]] for said, n in enumerate(row)] for true, row in enumerate(matrix)
            ],
            x=list(range(count)),
            y=list(range(count)),
            coloraxis="coloraxis",
            hovertemplate="true %{customdata[1]}, taken for %{customdata[2]}:<br>"
            "%{customdata[0]} images, %{z:.1f} % of that class<extra></extra>",
            row=1,
            col=column,
        )
    step = max(1, math.ceil(count / 15))
    ticks = {"tickvals": list(range(0, count, step)), "ticktext": names[::step] if count <= 15 else None}
    figure.update_xaxes(title="taken for", tickangle=-45 if count <= 15 else 0, showgrid=False, **ticks)
    figure.update_yaxes(autorange="reversed", showgrid=False, **ticks)
    figure.update_yaxes(title="true class", col=1)
    for c in important:
        for column in (1, 2):
            figure.add_shape(
                type="rect", x0=-0.5, x1=count - 0.5, y0=c - 0.5, y1=c + 0.5, row=1, col=column,
                line={"color": VERMILION, "width": 1.5},
            )  # fmt: skip
    shades = list(range(0, 30, 5))
    bar = {"title": "%", "tickvals": shades, "ticktext": [*map(str, shades[:-1]), f"{shades[-1]} or more"]}
    figure.update_layout(coloraxis={"colorscale": WHITE_TO_BLUE, "cmin": 0, "cmax": shades[-1], "colorbar": bar})
    return dressed(figure, None, None, height=520)


def errors_of(evidence: Evidence, classes: Sequence[str], important: Sequence[int]) -> go.Figure:
    """What the important class's images were taken for, and what was taken for it: images of test, before and after."""
    own = list(important)
    matrices = [evidence.confusion(side, len(classes)) for side in (BEFORE, AFTER)]
    for matrix in matrices:
        np.fill_diagonal(matrix, 0)  # errors alone
    missed = [matrix[own].sum(axis=0) for matrix in matrices]
    alarms = [np.where(np.isin(np.arange(len(classes)), own), 0, matrix[:, own].sum(axis=1)) for matrix in matrices]
    places, titles = [], []
    for (before, after), title in (missed, "missed, and taken for …"), (alarms, "false alarms: images of …"):
        both = before + after
        order = np.argsort(both, kind="stable")[-MOST_RIVALS:]
        places.append(order[both[order] > 0])
        cut = np.count_nonzero(both) > MOST_RIVALS
        titles.append(f"{title} (the {MOST_RIVALS} most frequent)" if cut else title)
    heights = [max(len(rows), 1) for rows in places]
    figure = make_subplots(
        rows=2,
        subplot_titles=titles,
        row_heights=heights,
        vertical_spacing=90 / (195 + 34 * sum(heights)),
    )
    for row, (counts, rows) in enumerate(zip((missed, alarms), places, strict=True), start=1):
        sides = ((AFTER, "exported model", GREEN, ""), (BEFORE, "baseline model", INK, "/"))
        for side, name, colour, pattern in sides:
            figure.add_bar(
                y=[tick(int(c), classes) for c in rows],
                x=counts[side][rows],
                orientation="h",
                name=name,
                legendgroup=name,
                showlegend=row == 1,
                marker={"color": colour, "pattern": {"shape": pattern, "fgcolor": "white", "fillmode": "overlay"}},
                hovertemplate=f"{name}: %{{x}} images, %{{y}}<extra></extra>",
                row=row,
                col=1,
            )
        most = max(int(count.max(initial=0)) for count in counts)
        figure.update_xaxes(dtick=max(1, math.ceil(most / 6)), row=row, col=1)
    figure.update_xaxes(rangemode="tozero")
    figure.update_xaxes(title="images of test", row=2)
    figure.update_yaxes(type="category")
    figure.update_annotations(font={"size": 13})
    return dressed(figure, None, None, height=195 + 34 * sum(heights), top=95)


def recall_of_classes(
    before: Sequence[Figure], after: Sequence[Figure] | None, classes: Sequence[str], important: Sequence[int]
) -> go.Figure:
    """Mean recall of each class on test, before and after, the worst losers first; without `after` the worst first."""
    old, new = ([100 * figure.mean for figure in side] for side in (before, after or before))
    # The last is drawn on top. One without images, whose recall is no number, comes last.
    changes = np.nan_to_num(old if after is None else np.subtract(new, old), nan=np.inf)
    order = sorted(range(len(classes)), key=lambda c: float(changes[c]), reverse=True)
    labels = [f"<b>{tick(c, classes)}</b>" if c in important else tick(c, classes) for c in order]
    figure = go.Figure()
    for lost, colour, name in ((True, VERMILION, "lost recall"), (False, BLUE, "gained recall, or kept it")):
        some = [place for place, c in enumerate(order) if after is not None and (new[c] < old[c]) == lost]
        if not some:
            continue
        xs: list[float | None] = [v for p in some for v in (old[order[p]], new[order[p]], None)]
        ys: list[str | None] = [v for p in some for v in (labels[p], labels[p], None)]
        figure.add_scatter(x=xs, y=ys, mode="lines", line={"color": colour, "width": 3}, name=name, hoverinfo="skip")
    marks = [(old, "baseline", {"color": INK, "symbol": "line-ns", "size": 10, "line": {"color": INK, "width": 2}})]
    if after is not None:
        marks.append((new, "exported setting", {"color": GREEN, "symbol": "circle", "size": 9}))
    for values, name, marker in marks:
        figure.add_scatter(
            x=[values[c] for c in order],
            y=labels,
            mode="markers",
            marker=marker,
            name=f"{name}, mean over {len(before[0].values)} seed(s)",
            hovertemplate="%{y}: %{x:.2f} %<extra>" + name + "</extra>",
        )
    span = [-0.8, len(order) - 0.2]
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=labels, range=span)
    return dressed(figure, "recall on test, %", None, height=150 + 20 * len(order))


def embedding(evidence: Evidence, classes: Sequence[str], important: Sequence[int]) -> go.Figure:
    """Test images by their angle to the important class's weight and to the nearest other one, before and after."""
    figure = make_subplots(
        cols=2,
        subplot_titles=("baseline model", "exported model"),
        shared_yaxes=True,
        shared_xaxes=True,
        horizontal_spacing=0.03,
    )
    names = [tick(c, classes) for c in range(len(classes))]
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
            labels, answers = evidence.labels[rows].tolist(), evidence.answers[side][rows].tolist()
            figure.add_scatter(
                x=evidence.to_important[side][rows].round(2),
                y=evidence.to_other[side][rows].round(2),
                mode="markers",
                marker=marker,
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                customdata=[[names[label], names[answer]] for label, answer in zip(labels, answers, strict=True)],
                hovertemplate="%{customdata[0]}, taken for %{customdata[1]}<br>"
                "%{x:.1f}° from the important class's weight, %{y:.1f}° from the nearest other<extra></extra>",
                row=1,
                col=column,
            )
        figure.add_shape(type="line", x0=0, y0=0, x1=180, y1=180, line=FLOOR, row=1, col=column)
    figure.update_xaxes(title="degrees to the important weight", range=[0, most])
    figure.update_yaxes(range=[0, most])
    figure.update_yaxes(title="degrees to the nearest other weight", col=1)
    return dressed(figure, None, None, height=520, top=100)
