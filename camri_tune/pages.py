"""HTML pages that stand alone: no server, no network, Plotly's code inside."""

from collections.abc import Sequence
from html import escape

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from camri_tune.progress import duration
from camri_tune.records import Figure, parameters
from camri_tune.table1 import METHODS, TITLES, Cell, Method, Outcome, Table, below, best_of, legend

# Okabe and Ito's colours: told apart by the colour-blind, too.
COLOURS: dict[Method, str] = dict(
    zip(
        METHODS,
        ("#000000", "#999999", "#E69F00", "#D55E00", "#56B4E9", "#0072B2", "#009E73", "#CC79A7"),
        strict=True,
    )
)
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; } h3 { font-size: 1rem; margin: 1.5rem 0 .3rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; } tr.best td { font-weight: 700; background: #eef7f2; }
small { color: #555; display: block; font-weight: 400; } .note { color: #444; } .paper { background: #f7f5ee; }
.warning { border-left: .3rem solid #D55E00; padding-left: .8rem; }
.lead { font-size: 1.1rem; } h1 { margin-bottom: .2rem; } code { background: #f3f3f3; padding: .1rem .3rem; }
.verdict { border: 2px solid; border-radius: .6rem; padding: .8rem 1.2rem; margin: 1rem 0; font-size: 1.1rem; }
.verdict p { margin: .4rem 0 0; } .badge { font-weight: 700; font-size: 1.25rem; }
.good { border-color: #009E73; background: #eef8f4; } .fair { border-color: #E69F00; background: #fdf6e6; }
.bad { border-color: #D55E00; background: #fdf0e8; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 1rem; margin: 1.2rem 0; }
.card { border: 1px solid #ddd; border-radius: .6rem; padding: .8rem 1.2rem; } .card h3, .card p { margin: .2rem 0; }
.pair { display: flex; gap: 2rem; font-size: 1.7rem; font-weight: 650; font-variant-numeric: tabular-nums; }
.pair small { font-size: .85rem; } .scroll { overflow-x: auto; } .wide { min-width: 44rem; }
td:first-child { min-width: 7rem; } td:first-child small { max-width: 26rem; }
.figures td:not(:first-child) { white-space: nowrap; }
.gallery { display: flex; flex-wrap: wrap; gap: .7rem; } .gallery figure { margin: 0; width: 6rem; }
.gallery img { width: 6rem; height: 6rem; image-rendering: pixelated; background: #eee; }
.gallery figcaption { font-size: .78rem; line-height: 1.25; overflow-wrap: anywhere; }
details { margin: 2rem 0; } summary { cursor: pointer; font-weight: 600; }
@media (max-width: 40rem) { body { margin: 1rem auto; padding: 0 .7rem; } .pair { font-size: 1.35rem; gap: 1.2rem; }
  table { font-size: .82rem; } th, td { padding: .3rem .35rem; } }
@media print { body { margin: 0; } table { font-size: .8rem; } .wide { min-width: 0; }
  h2, h3, .note { break-after: avoid; } figure, .card, .js-plotly-plot, tr { break-inside: avoid; } }
"""
# A printed page is narrower than most screens, and Plotly's pictures keep the width that they have.
PRINTING = """
const refit = (layout) => document.querySelectorAll(".js-plotly-plot").forEach((plot) => Plotly.relayout(plot, layout));
addEventListener("beforeprint", () => {
  refit({ width: 690 });
  document.querySelectorAll("details").forEach((part) => (part.open = true));
});
addEventListener("afterprint", () => refit({ width: null, autosize: true }));
"""


def page(title: str, body: str) -> str:
    """A whole page with the style, and Plotly's code for its pictures."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style><script>{get_plotlyjs()}</script></head><body>\n{body}\n"
        f"<script>{PRINTING}</script></body></html>\n"
    )


def picture(figure: go.Figure, name: str, *, wide: bool = False) -> str:
    """A figure as part of a page, with `name` as its id. Where the screen is narrow a `wide` one scrolls sideways."""
    html = figure.to_html(
        full_html=False, include_plotlyjs=False, div_id=name, config={"displaylogo": False, "responsive": True}
    )
    return f'<div class="scroll"><div class="wide">{html}</div></div>' if wide else html


def comparison_page(table: Table) -> str:
    """A whole page: for each data set recall over accuracy as a picture, then every figure with its interval."""
    parts = [f"<h1>{escape(table.folder.name)}: {len(table.columns())} important classes, one protocol</h1>"]
    kind = "note" if table.protocol == "ours" else "warning"
    brackets = "In brackets 95 % intervals: over seeds for means (Student's t), over seeds and images for gains."
    parts.append(f'<p class="{kind}">{escape(legend(table))} {escape(brackets)}</p>')
    for number, dataset in enumerate(dict.fromkeys(cell.dataset for cell in table.cells)):
        facts = table.facts["datasets"][dataset]
        columns = [table.column(*column) for column in table.columns() if column[0] == dataset]
        drawn = picture(recall_over_accuracy(columns), f"plane-{number}", wide=True)
        parts.append(f"<h2>{escape(dataset)}</h2>")
        parts.append(
            f'<p class="note">{facts["train"]:,} training, {facts["validation"]:,} validation, {facts["test"]:,} '
            f"test images; {facts['epochs']} epochs; network {escape(str(table.facts['model']))}; "
            f"{duration(facts['wall_seconds'])} of training here. Large marks are means, small ones single seeds; the "
            f"dotted line is cross-entropy's mean accuracy.</p>{drawn}"
        )
        parts += [_column(cells) for cells in columns]
    return page(table.folder.name, "\n".join(parts))


def recall_over_accuracy(columns: Sequence[Sequence[Cell]]) -> go.Figure:
    """One panel for each important class: each method's mean on test, large, and its seeds, small."""
    # Plotly reads tags in a text, as HTML does.
    titles = [escape(cells[0].heading) for cells in columns]
    figure = make_subplots(cols=len(columns), subplot_titles=titles, horizontal_spacing=0.07)
    named: set[Method] = set()
    for place, cells in enumerate(columns, start=1):
        for cell in cells:
            if cell.trained is None:
                continue
            recall, accuracy = cell.trained.test
            colour, title = COLOURS[cell.method], TITLES[cell.method]
            common = {"legendgroup": cell.method, "name": title, "mode": "markers"}
            figure.add_scatter(
                x=[100 * v for v in accuracy.values],
                y=[100 * v for v in recall.values],
                marker={"color": colour, "size": 6, "opacity": 0.45},
                hovertemplate=f"{title}, one seed<br>recall %{{y:.2f}} %<br>accuracy %{{x:.2f}} %<extra></extra>",
                showlegend=False,
                col=place,
                row=1,
                **common,
            )
            figure.add_scatter(
                x=[100 * accuracy.mean],
                y=[100 * recall.mean],
                marker={"color": colour, "size": 14, "line": {"color": "white", "width": 1.5}},
                hovertemplate=f"<b>{title}</b><br>recall %{{y:.2f}} %<br>accuracy %{{x:.2f}} %<extra></extra>",
                showlegend=cell.method not in named,
                col=place,
                row=1,
                **common,
            )
            named.add(cell.method)
            if cell.method == "ce":
                line = {"dash": "dot", "color": "#777", "width": 1}
                figure.add_vline(x=100 * accuracy.mean, line=line, col=place, row=1)
    figure.update_xaxes(title="accuracy on test, %")
    figure.update_yaxes(title="recall of the class on test, %", col=1)
    margin, below_it = {"t": 50, "b": 90, "l": 60, "r": 10}, {"orientation": "h", "y": -0.25}
    figure.update_layout(template="plotly_white", height=430, margin=margin, legend=below_it)
    return figure


def _column(cells: Sequence[Cell]) -> str:
    first, best = cells[0], best_of(cells)
    heads = ("", "recall", "accuracy", "gain in recall, points", "recall, bias", "accuracy, bias", "the paper's")
    rows = []
    for cell in cells:
        texts = [escape(TITLES[cell.method]) + _parameters(cell)]
        texts += [*_scores(cell.trained), _gain(cell.trained), *_scores(cell.matched)]
        texts.append(f"{cell.paper[0]:.4f} / {cell.paper[1]:.4f}" if cell.paper else "-")
        tds = "".join(f"<td>{text}</td>" for text in texts[:-1]) + f'<td class="paper">{texts[-1]}</td>'
        rows.append(f'<tr class="best">{tds}</tr>' if cell is best else f"<tr>{tds}</tr>")
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    title = f"{first.dataset}, {first.heading}"
    table = f'<table class="figures"><tr>{head}</tr>{"".join(rows)}</table>'
    return f'<h3>{escape(title)}</h3><div class="scroll">{table}</div>'


def _parameters(cell: Cell) -> str:
    text = parameters(cell.params)
    if cell.matched_params and cell.matched_params != cell.params:
        text += f"; with a bias {parameters(cell.matched_params)}"
    return f"<small>{escape(text)}</small>"


def _scores(outcome: Outcome | None) -> tuple[str, str]:
    if outcome is None:
        return "-", "-"
    mark = " †" if below(outcome.accuracy_difference) else ""
    return _figure(outcome.test.recall), _figure(outcome.test.accuracy, mark)


def _figure(figure: Figure, mark: str = "") -> str:
    sd, interval = figure.sd, figure.interval
    scatter = "" if sd is None else f" ± {sd:.4f}"
    span = f"<small>[{interval.low:.4f}, {interval.high:.4f}]</small>" if interval else ""
    return f"{figure.mean:.4f}{scatter}{mark}{span}"


def _gain(outcome: Outcome | None) -> str:
    if outcome is None:
        return "-"
    mean, span = outcome.recall_difference.in_points()
    return f"{mean}<small>{span}</small>" if span else mean
