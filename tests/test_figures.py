"""Figures 2 and 3: what they must show, in numbers, and files that open without a network."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from camri_tune.config import Loss
from camri_tune.errors import InputError
from camri_tune.figures import figure2, write_figures
from camri_tune.images import Images
from camri_tune.plane import (
    HALF_WIDTH,
    IMPORTANT,
    OTHER,
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
from camri_tune.training import HeadSpec
from tests.command import assert_one_line_error, camri_tune

MARGIN = 0.5
HEADS = {spec.loss: plane_head(spec) for spec in plane_specs(MARGIN).values()}
WEIGHTED: list[Loss] = ["ce", "wce", "crwwce"]
LOSSES: list[Loss] = [*WEIGHTED, "l2", "arcface", "camri"]


def some_points(n: int = 400) -> torch.Tensor:
    return (torch.rand(n, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1) * HALF_WIDTH


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("label", [IMPORTANT, OTHER])
def test_the_surface_is_the_loss_that_trains(loss: Loss, label: int) -> None:
    points = some_points(25)
    one_by_one = [HEADS[loss](point[None], torch.tensor([label])) for point in points]
    assert loss_at(HEADS[loss], points, label) == pytest.approx(torch.stack(one_by_one), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_inference_decides_halfway_between_the_weights_whatever_the_loss(loss: Loss) -> None:
    assert np.degrees(decision_angles(HEADS[loss])) == pytest.approx([30, 150, 270], abs=0.11)


@pytest.mark.parametrize("loss", ["ce", "wce", "l2"])
@pytest.mark.parametrize("label", [IMPORTANT, OTHER])
def test_below_the_tie_inference_agrees_and_where_it_agrees_the_loss_is_never_far_above(loss: Loss, label: int) -> None:
    head, points = HEADS[loss], some_points()
    surface, tie = loss_at(head, points, label), tie_loss(head, label)
    own = head.get_logits(points).argmax(dim=1) == label
    assert own[surface < tie].all()
    # Of three classes the one with the largest probability has at least a third.
    assert (surface[own] <= tie * math.log(3) / math.log(2) + 1e-5).all()


@pytest.mark.parametrize("loss", WEIGHTED)
def test_a_weight_changes_the_price_and_not_the_line(loss: Loss) -> None:
    for label in (IMPORTANT, OTHER):
        assert half_angle_below_tie(HEADS[loss], label) == pytest.approx(60, abs=0.15)
    # Far out, on the line between two classes, the loss is exactly at what figure 2 calls its tie.
    line = 1e3 * directions(np.radians([30.0]))
    assert float(loss_at(HEADS[loss], line, IMPORTANT)) == pytest.approx(tie_loss(HEADS[loss], IMPORTANT), rel=1e-3)


def test_wce_is_cross_entropy_at_three_times_the_price() -> None:
    points = some_points()
    plain = loss_at(HEADS["ce"], points, IMPORTANT)
    assert loss_at(HEADS["wce"], points, IMPORTANT) == pytest.approx(3 * plain, rel=1e-5)
    assert torch.equal(loss_at(HEADS["wce"], points, OTHER), loss_at(HEADS["ce"], points, OTHER))
    assert (loss_at(HEADS["crwwce"], points, IMPORTANT) >= 3 * plain).all()


@pytest.mark.parametrize("loss", ["arcface", "camri"])
def test_a_margin_draws_the_tie_of_the_important_class_inwards_by_half_of_it(loss: Loss) -> None:
    assert half_angle_below_tie(HEADS["l2"], IMPORTANT) == pytest.approx(60, abs=0.15)
    expected = 60 - math.degrees(MARGIN) / 2
    assert half_angle_below_tie(HEADS[loss], IMPORTANT) == pytest.approx(expected, abs=0.15)
    points = some_points()
    assert (loss_at(HEADS[loss], points, IMPORTANT) > loss_at(HEADS["l2"], points, IMPORTANT)).all()


def test_for_another_class_camri_is_l2_and_arcface_is_not() -> None:
    points = some_points()
    l2 = loss_at(HEADS["l2"], points, OTHER)
    assert torch.equal(loss_at(HEADS["camri"], points, OTHER), l2)
    assert (loss_at(HEADS["arcface"], points, OTHER) > l2).all()
    assert half_angle_below_tie(HEADS["arcface"], OTHER) < half_angle_below_tie(HEADS["camri"], OTHER) - 10


def test_figure_2_has_a_panel_for_each_loss_and_label_and_draws_its_numbers() -> None:
    figure = figure2(MARGIN)
    surfaces = [trace for trace in figure.data if isinstance(trace, go.Contour) and trace.coloraxis]
    assert len(surfaces) == 12
    texts = [annotation.text for annotation in figure.layout.annotations]
    for title in plane_specs(MARGIN):
        assert f"<b>{title}</b>" in texts
    camri = next(t for t in surfaces if (t.xaxis, "CAMRI" in t.hovertemplate) == ("x6", True))
    rows, columns = np.array([5, 60, 118]), np.array([7, 90, 33])
    points = torch.tensor(np.stack([camri.x[columns], camri.y[rows]], axis=1), dtype=torch.float32)
    assert camri.z[rows, columns] == pytest.approx(loss_at(HEADS["camri"], points, IMPORTANT), rel=1e-5)


def test_spread_is_measured_against_the_own_weight() -> None:
    angles = np.radians([0.0, 10.0, -20.0, 90.0, 95.0, 60.0])
    labels, called = np.array([0, 0, 0, 1, 1, 0]), np.array([0, 0, 0, 1, 1, 1])
    weights = directions(np.radians([0.0, 90.0])).double().numpy()
    panel = Panel(plane_head(HeadSpec("l2")), directions(angles).double().numpy(), weights, labels, called)
    spread = panel.spread(0)
    assert (spread.accuracy, spread.recall, spread.precision) == pytest.approx((5 / 6, 3 / 4, 1))
    assert (spread.images, spread.important_images) == (6, 4)
    assert (spread.angle_mean, spread.angle_median) == pytest.approx((22.5, 15), abs=1e-3)
    assert (spread.others_angle_mean, spread.nearest_weight) == pytest.approx((2.5, 90), abs=1e-3)


def test_the_same_seed_gives_the_same_network() -> None:
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, 1, 28, 28), dtype=torch.uint8, generator=rng)
    images, cpu = Images(pixels, torch.arange(40) % 4, torch.arange(40)), torch.device("cpu")

    def features(seed: int) -> FloatArray:
        trained = train_plane(HeadSpec("l2"), images, num_classes=4, epochs=1, seed=seed, device=cpu)
        return see(*trained, images, cpu).features

    first = features(1)
    assert np.linalg.norm(first, axis=1) == pytest.approx(1)
    assert np.array_equal(features(1), first)
    assert not np.array_equal(features(2), first)


@pytest.mark.parametrize("epochs", [1, 4, 5, 6, 10])
def test_any_number_of_steps_trains(epochs: int) -> None:
    """One step an epoch: PyTorch's own schedule divides by none of them in its first part, of five."""
    pixels = torch.randint(0, 256, (8, 1, 28, 28), dtype=torch.uint8)
    images = Images(pixels, torch.arange(8) % 4, torch.arange(8))
    body, _ = train_plane(HeadSpec("l2"), images, num_classes=4, epochs=epochs, seed=0, device=torch.device("cpu"))
    assert all(parameter.isfinite().all() for parameter in body.parameters())


def written(out: Path, which: str, data_dir: Path, **values: Any) -> list[Path]:
    common: dict[str, Any] = {"margin": 0.4, "scale": 16.0, "epochs": 1, "seed": 0, "device": "cpu", "limit": 600}
    return write_figures(which.split(","), out=out, data_dir=data_dir, **{**common, **values})


def assert_self_contained(page: Path) -> None:
    text = page.read_text()
    assert "<script src" not in text
    assert 'src="http' not in text
    assert "Plotly.newPlot" in text
    assert len(text) > 3_000_000, "plotly.js is in it"


def test_figure_3_from_real_trainings_on_mnist(mnist_dir: Path, tmp_path: Path) -> None:
    page, record = written(tmp_path, "3", mnist_dir)
    assert_self_contained(page)
    text = page.read_text()
    for title in ("cross-entropy", "L2 (NormFace)", "CAMRI, margin 0.4 for 3"):
        assert f"\\u003cb\\u003e{title}\\u003c\\u002fb\\u003e" in text or f"<b>{title}</b>" in text
    measured = json.loads(record.read_text())
    assert (measured["train_images"], measured["epochs"], measured["seed"]) == (600, 1, 0)
    assert [panel["loss"] for panel in measured["panels"]] == ["ce", "l2", "camri"]
    assert [panel["margin"] for panel in measured["panels"]] == [None, None, 0.4]
    for panel in measured["panels"]:
        assert (panel["images"], panel["important_images"]) == (10_000, 1010)
        assert 0 < panel["angle_median"] < panel["angle_95"] <= 180


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"which": "4"}, "--which"),
        ({"which": ""}, "--which"),
        ({"margin": 4.0}, "--margin"),
        ({"scale": 0.0}, "--scale"),
    ],
)
def test_values_out_of_range_are_named(values: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=named):
        written(tmp_path, values.pop("which", "2"), tmp_path, **values)


def test_the_command_writes_figure_2_without_any_data(tmp_path: Path) -> None:
    done = camri_tune("figures", "--which", "2", "--out", tmp_path / "new", "--data-dir", tmp_path / "none")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "new" / "figure2.html")]
    assert_self_contained(tmp_path / "new" / "figure2.html")
    assert_one_line_error(camri_tune("figures", "--which", "2;3", "--out", tmp_path), "--which", "2;3")
