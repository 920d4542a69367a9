"""The CAMRI paper's Figures 2 and 3 (Nishiyama et al., IJCNN 2022), drawn from this package's own losses and trainings.

Figure 2 maps what each loss charges for one sample, wherever its 2-D feature lies. Read the solid line, where the loss
is at a tie of the label and a rival, against the dashed ones, where inference decides. Cross-entropy and its weighted
forms have both in one place: a weight changes the price, not the line. ArcFace draws the solid line inside the label's
own sector for every label, CAMRI for the important class alone.

Figure 3 shows MNIST's test images through networks with a 2-D embedding: directions around a circle, each class weight
an arrow. Read how widely the important class scatters about its arrow, without a margin and with one.
"""

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from camri_tune.config import StudyConfig, shown
from camri_tune.datasets import open_dataset
from camri_tune.errors import InputError
from camri_tune.files import is_writable_folder, write_text
from camri_tune.losses import NormFaceLoss
from camri_tune.plane import (
    HALF_WIDTH,
    IMPORTANT,
    LEARNING_RATE,
    OTHER,
    PLANE_SCALE,
    WEIGHT_ANGLES,
    FloatArray,
    Panel,
    decision_angles,
    directions,
    half_angle_below_tie,
    loss_at,
    plane_head,
    plane_specs,
    see,
    tie_loss,
    train_plane,
)
from camri_tune.training import HeadSpec, pick_device

Where = Mapping[str, int]  # a subplot: row and column, from 1

MOST_SCALE = 1_000  # far above any that trains; exp of much more is no number
CAP = 5.0  # figure 2's colours end here
DIGIT = 3  # the important class of figure 3
DRAWN = 3000  # test images that figure 3 draws; it measures all 10,000

VERMILION, INK, GREY = "#d55e00", "#1a1a1a", "#8a8a8a"
BLUES = ("#ffffff", "#e1edf8", "#c2dbef", "#9cc6e3", "#74afd6", "#4f97c8")  # light enough for lines on top
BEFORE_3, AFTER_3 = (
    ("#332288", "#66bbdd", "#44aa99"),
    ("#117733", "#999933", "#ccaa33", "#882255", "#aa4499", "#777777"),
)
DIGIT_COLOURS = (*BEFORE_3, VERMILION, *AFTER_3)
DASHED = {"color": INK, "width": 2, "dash": "4px,3px"}


def write_figures(
    which: Collection[str],
    *,
    out: Path,
    data_dir: Path,
    margin: float,
    scale: float,
    epochs: int,
    seed: int,
    device: str,
    limit: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[Path]:
    """Write `figure2.html` and `figure3.html`, with `figure3.json`, to `out`; the paths written.

    `which` holds "2", "3" or both. `margin` (radians) is the important class's in both figures; `scale`, `epochs`,
    `seed`, `device` and `limit` (training images) are those of figure 3's networks. `say` hears what is being trained.
    Raises InputError in one line for a value out of range, and DataError where MNIST is missing.
    """
    if not which or not set(which) <= {"2", "3"}:
        raise InputError(f"--which is {shown(','.join(which))}, but must be 2, 3 or 2,3")
    if not 0 < margin < math.pi:
        raise InputError(f"--margin is {margin}, but must be above 0 and below pi, in radians")
    if not 0 < scale <= MOST_SCALE:
        raise InputError(f"--scale is {scale}, but must be above 0 and at most {MOST_SCALE:,}")
    options = {"epochs": epochs, "seed": seed, "device": device, "limit": limit}
    config = StudyConfig.build({"dataset": "mnist", "data_dir": data_dir, "out": out, **options})
    where = pick_device(device)
    if not is_writable_folder(out):
        raise InputError(f"--out {str(out)!r} is not a folder that can be written to; name another with --out")
    paths = []
    if "2" in which:
        paths.append(_write(figure2(margin), out / "figure2.html"))
    if "3" in which:
        specs = {
            "cross-entropy": HeadSpec("ce"),
            "L2 (NormFace)": HeadSpec("l2", scale),
            f"CAMRI, margin {margin:g} for {DIGIT}": HeadSpec("camri", scale, {DIGIT: margin}),
        }
        data = open_dataset(config)
        test, panels = data.test(), {}
        for title, spec in specs.items():
            say(f"figure 3: training {title} on {len(data.train):,} images for {epochs} epochs")
            trained = train_plane(spec, data.train, num_classes=10, epochs=epochs, seed=seed, device=where)
            panels[title] = see(*trained, test, where)
        recipe = f"{len(data.train):,} training images, {epochs} epochs, scale {scale:g}, seed {seed}"
        record = {
            "dataset": "mnist",
            "important": DIGIT,
            "train_images": len(data.train),
            "epochs": epochs,
            "learning_rate": LEARNING_RATE,
            "seed": seed,
            "panels": [
                {
                    "loss": spec.loss,
                    "scale": None if spec.loss == "ce" else spec.scale,
                    "margin": spec.margins.get(DIGIT),
                }
                | asdict(panels[title].spread(DIGIT))
                for title, spec in specs.items()
            ],
        }
        paths += [_write(figure3(panels, recipe), out / "figure3.html"), out / "figure3.json"]
        write_text(paths[-1], json.dumps(record, indent=2) + "\n")
    return paths


def figure2(margin: float) -> go.Figure:
    """Each loss over the plane: for a sample of the important class above, of another class below."""
    specs = plane_specs(margin)
    axis = np.linspace(-HALF_WIDTH, HALF_WIDTH, 121)
    points = torch.tensor(np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2), dtype=torch.float32)
    titles = [f"<b>{title}</b>" for title in specs]
    figure = make_subplots(2, len(specs), horizontal_spacing=0.014, vertical_spacing=0.11, subplot_titles=titles)
    solid = {"color": VERMILION, "width": 3}
    for column, (title, spec) in enumerate(specs.items(), start=1):
        head = plane_head(spec)
        rays = 2 * HALF_WIDTH * directions(decision_angles(head)).numpy()
        for row, label in enumerate((IMPORTANT, OTHER), start=1):
            where, first = {"row": row, "col": column}, row == column == 1
            name, tie = "ijk"[label], tie_loss(head, label)
            surface = {"x": axis, "y": axis, "z": loss_at(head, points, label).view(len(axis), -1).numpy()}
            text = f"a sample of class {name} with its feature at (%{{x:.1f}}, %{{y:.1f}})<br>costs %{{z:.2f}}"
            figure.add_contour(
                **where,
                **surface,
                coloraxis="coloraxis",
                contours={"start": 0, "end": CAP, "size": 0.25},
                line={"width": 0.5, "color": "#a9c3da"},
                hovertemplate=f"{text}<extra>{title}</extra>",
            )
            figure.add_contour(
                **where,
                **surface,
                contours={"start": tie, "end": tie, "coloring": "lines"},
                colorscale=[(0, VERMILION), (1, VERMILION)],
                line={"width": 3},
                showscale=False,
                hoverinfo="skip",
            )
            if first:  # for the legend: a contour has no entry of its own
                _rays(figure, rays[:1] * 0, where, solid, "the loss is at a tie of the label and a rival")
            _rays(figure, rays, where, DASHED, "inference decides here" if first else None)
            for c, tip in enumerate(0.5 * HALF_WIDTH * directions(WEIGHT_ANGLES).numpy()):
                _arrow(figure, tip, where, INK, "ijk"[c], emphasis=c == label)
            text = f"below the tie: ±{half_angle_below_tie(head, label):.0f}°"
            figure.update_xaxes(**where, title={"text": text, "standoff": 5})
    figure.update_yaxes(title="sample of <b>i</b> (important)", row=1, col=1)
    figure.update_yaxes(title="sample of <b>j</b> (not important)", row=2, col=1)
    _square(figure, 2 * len(specs), HALF_WIDTH)
    bar = {"title": "loss", "tickvals": list(range(6)), "ticktext": ["0", "1", "2", "3", "4", "5 or more"], "len": 0.9}
    figure.update_layout(coloraxis={"colorscale": BLUES, "cmin": 0, "cmax": CAP, "colorbar": bar})
    return _dressed(
        figure,
        "What each loss charges one sample, by where its 2-D feature lies",
        "Arrows: directions of the class weights, which have length 1; the plane spans ±6. WCE and CRWWCE raise the "
        "price of a sample of i, but the tie stays where inference decides.<br>ArcFace draws it inwards for every "
        "class; CAMRI for the important class alone, and is L2 for the others. "
        f"Margin {margin:g} rad; scale {PLANE_SCALE:g} in the three cosine losses.",
        720,
    )


def figure3(panels: Mapping[str, Panel], recipe: str) -> go.Figure:
    """The panels by title, each turned so that the important class's weight points up; then its angles as shares."""
    rng = np.random.default_rng(0)
    drawn = rng.permutation(len(next(iter(panels.values())).labels))[:DRAWN]
    last = {"row": 1, "col": len(panels) + 1}
    titles = [f"<b>{title}</b>" for title in panels] + [f"<b>How near the {DIGIT}s are to their weight</b>"]
    figure = make_subplots(1, len(panels) + 1, horizontal_spacing=0.03, subplot_titles=titles)
    for column, (title, panel) in enumerate(panels.items(), start=1):
        where, first = {"row": 1, "col": column}, column == 1
        spread = panel.spread(DIGIT)
        up = panel.weights[DIGIT]
        turn = np.array([[up[1], up[0]], [-up[0], up[1]]])  # rows (x, y) @ turn: `up` to (0, 1)
        weights, labels = panel.weights @ turn, panel.labels[drawn]
        if isinstance(panel.head, NormFaceLoss):  # with a bias, inference depends on more than the direction
            rays = 1.25 * directions(decision_angles(panel.head)).numpy() @ turn
            _rays(figure, rays, where, DASHED | {"width": 1, "color": GREY}, None)
        wedge = np.radians(90 + spread.angle_95 * np.linspace(-1, 1, 61))
        _wedge(figure, wedge, where, f"95 % of all {DIGIT}s lie in here" if first else None)
        ring = np.where(labels == DIGIT, 1.28, 1.05) + 0.17 * rng.random(len(labels))
        points = panel.features[drawn] @ turn * ring[:, None]
        for own in (False, True):
            some = (labels == DIGIT) == own
            figure.add_scatter(
                **where,
                x=points[some, 0],
                y=points[some, 1],
                mode="markers",
                marker={"size": 4, "opacity": 0.75, "color": [DIGIT_COLOURS[y] for y in labels[some]]},
                customdata=np.stack([labels, panel.called[drawn], panel.angles()[drawn]], axis=1)[some],
                hovertemplate="a %{customdata[0]}, called %{customdata[1]}<br>%{customdata[2]:.1f}° from its weight"
                f"<extra>{title}</extra>",
                showlegend=False,
            )
        for c, tip in enumerate(weights):
            _arrow(figure, tip, where, DIGIT_COLOURS[c], str(c), emphasis=c == DIGIT, label_at=1.62)
        text = (
            f"{DIGIT}s to their weight: mean {spread.angle_mean:.1f}°, 95 % within {spread.angle_95:.1f}°<br>"
            f"recall of {DIGIT} {spread.recall:.3f}, accuracy {spread.accuracy:.3f}"
        )
        figure.update_xaxes(**where, title={"text": text, "standoff": 5})
        angles = np.sort(panel.angles()[panel.labels == DIGIT])
        colour, dash = ((GREY, "dot"), (INK, "dash"), (VERMILION, "solid"))[column - 1 - len(panels)]
        figure.add_scatter(
            **last,
            x=angles,
            y=np.arange(1, len(angles) + 1) / len(angles),
            mode="lines",
            line={"color": colour, "dash": dash, "width": 2.5},
            name=title,
            hovertemplate=f"%{{y:.1%}} of the {DIGIT}s within %{{x:.1f}}°<extra>{title}</extra>",
        )
    _square(figure, len(panels), 1.8)
    figure.update_xaxes(**last, title=f"angle to the weight of {DIGIT}, degrees", range=[0, 30])
    figure.update_yaxes(**last, title=f"share of the {DIGIT}s", range=[0, 1.01], tickformat=".0%", side="right")
    spread = panel.spread(DIGIT)
    return _dressed(
        figure,
        f"MNIST's test images in two dimensions: digit {DIGIT} without and with a margin of its own",
        f"Each dot: the direction of a test image's feature, {len(drawn):,} of {spread.images:,} drawn ({DIGIT}s on "
        "the outer ring; the place across a ring is random). Arrows: directions of the class weights, each panel "
        f"turned so that {DIGIT}'s points up.<br>Thin dashes: where inference decides. Measured on all "
        f"{spread.images:,} test images ({spread.important_images:,} of class {DIGIT}), which chose nothing. "
        f"Same recipe for each: {recipe}.",
        580,
    )


def _dressed(figure: go.Figure, title: str, caption: str, height: int) -> go.Figure:
    """`figure` with title, legend and caption, in a fixed size: equal axes and long captions need one."""
    below = {"xref": "paper", "yref": "paper", "x": 0, "y": 0, "yshift": -50, "xanchor": "left", "yanchor": "top"}
    figure.add_annotation(**below, text=caption, showarrow=False, align="left", font={"size": 13})
    return figure.update_layout(
        title={"text": f"<b>{title}</b>", "x": 0.02, "y": 0.97, "font": {"size": 20}},
        legend={"orientation": "h", "x": 0, "y": 1.13, "yanchor": "bottom", "font": {"size": 14}},
        margin={"l": 40, "r": 40, "t": 140, "b": 110},
        width=1500,
        height=height,
        plot_bgcolor="white",
        font={"family": "system-ui, sans-serif", "color": INK},
    )


def _square(figure: go.Figure, panels: int, half_width: float) -> None:
    """The first `panels` subplots: as high as wide, framed, without ticks."""
    for number in range(1, panels + 1):
        axis = {"range": [-half_width, half_width], "showticklabels": False, "showgrid": False, "zeroline": False}
        axis |= {"constrain": "domain", "showline": True, "mirror": True, "linecolor": GREY}
        figure.update_layout({f"xaxis{number}": axis, f"yaxis{number}": {**axis, "scaleanchor": f"x{number}"}})


def _rays(figure: go.Figure, ends: FloatArray, where: Where, line: Mapping[str, Any], name: str | None) -> None:
    """Lines from the origin to `ends` (N, 2) as one trace, in the legend where it has a name."""
    gaps = np.full(len(ends), np.nan)
    x, y = (np.stack([0 * ends[:, d], ends[:, d], gaps], axis=1).ravel() for d in (0, 1))
    legend = {"name": name, "showlegend": name is not None}
    figure.add_scatter(**where, **legend, x=x, y=y, mode="lines", line=dict(line), hoverinfo="skip")


def _wedge(figure: go.Figure, angles: FloatArray, where: Where, name: str | None) -> None:
    rim = 1.5 * directions(angles).numpy()
    style = {"mode": "lines", "line": {"width": 0}, "fill": "toself", "fillcolor": "rgba(213,94,0,0.15)"}
    legend = {"name": name, "showlegend": name is not None}
    figure.add_scatter(**where, **style, **legend, x=[0, *rim[:, 0], 0], y=[0, *rim[:, 1], 0], hoverinfo="skip")


def _arrow(
    figure: go.Figure, tip: FloatArray, where: Where, colour: str, text: str, *, emphasis: bool, label_at: float = 1.3
) -> None:
    """An arrow from the origin to `tip` (2,), with its text further out."""
    number = figure.get_subplot(**where).xaxis.plotly_name.removeprefix("xaxis")
    start = {"ax": 0, "ay": 0, "axref": f"x{number}", "ayref": f"y{number}"}
    arrow = {"arrowhead": 2, "arrowsize": 0.8, "arrowwidth": 3 if emphasis else 1.5, "arrowcolor": colour}
    figure.add_annotation(**where, **start, **arrow, x=tip[0], y=tip[1], showarrow=True, text="")
    size = {"size": 19 if emphasis else 14, "color": colour}
    text = f"<b>{text}</b>" if emphasis else text
    figure.add_annotation(**where, x=label_at * tip[0], y=label_at * tip[1], showarrow=False, text=text, font=size)


def _write(figure: go.Figure, path: Path) -> Path:
    """One HTML file that needs no network: plotly.js is part of it."""
    write_text(path, figure.to_html(include_plotlyjs=True))
    return path
