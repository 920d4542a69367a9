"""The look of every chart of a study: colours, marks and axes, which differ in shape as well as in colour."""

from collections.abc import Sequence
from html import escape

import plotly.graph_objects as go

# Okabe and Ito's colours, which the colour-blind tell apart, too.
BLUE, VERMILION, GREEN, INK, GREY, PALE = "#0072B2", "#D55E00", "#009E73", "#1a1a1a", "#767676", "#f1efe9"
FEASIBLE = {"color": BLUE, "symbol": "circle", "size": 9}
INFEASIBLE = {"color": VERMILION, "symbol": "x-thin", "size": 9, "line": {"color": VERMILION, "width": 2}}
PRUNED = {"color": GREY, "symbol": "triangle-down-open", "size": 8}
BASELINE = {"color": INK, "symbol": "diamond", "size": 12}
FINALIST = {"color": BLUE, "symbol": "square-open", "size": 13, "line": {"width": 2}}
EXPORTED = {"color": GREEN, "symbol": "star", "size": 18, "line": {"color": "white", "width": 1}}
FLOOR = {"color": INK, "width": 1.5, "dash": "dash"}


def dressed(figure: go.Figure, x: str | None, y: str | None, height: int = 460, top: int = 70) -> go.Figure:
    """`figure` with axes' titles, `height` pixels high, its legend in the `top` pixels."""
    figure.update_layout(
        template=go.layout.Template(),  # the default is larger than the figure
        height=height,
        margin={"t": top, "b": 50, "l": 60, "r": 20},
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


def tick(c: int, classes: Sequence[str]) -> str:
    """A class on an axis: index and name, which is cut where it is long."""
    name = classes[c] if len(classes[c]) <= 26 else classes[c][:25] + "…"
    return name if name == str(c) else f"{c} {escape(name)}"  # Plotly reads tags in a text, as HTML does
