"""What the report is made from: which images changed, where embeddings lie, and the file that keeps both."""

from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from camri_tune import error_charts
from camri_tune.evidence import AFTER, BEFORE, Evidence, angles, kinds_of_images
from camri_tune.records import Figure
from camri_tune.study_page import _before_and_after


def _evidence() -> Evidence:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 50)
    places = rng.uniform(0, 90, (2, 2, 50)).astype(np.float32)
    pixels = rng.integers(0, 256, (3, 3, 8, 8)).astype(np.uint8)
    return Evidence(labels, rng.integers(0, 4, (2, 50)), places[0], places[1], np.array([1, 5, 7]), pixels)


def test_the_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    evidence, path = _evidence(), tmp_path / "evidence.safetensors"
    evidence.save(path)
    loaded = Evidence.load(path, 4)
    assert loaded is not None
    for field in fields(Evidence):
        value = getattr(evidence, field.name)
        assert np.array_equal(getattr(loaded, field.name), value)
        assert getattr(loaded, field.name).dtype == value.dtype
    assert [p.name for p in tmp_path.iterdir()] == ["evidence.safetensors"], "nothing half-written stays"


@pytest.mark.parametrize("content", [None, b"", b"not tensors", b"\x02\0\0\0\0\0\0\0{}"])
def test_no_file_or_another_is_no_evidence(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "evidence.safetensors"
    if content is not None:
        path.write_bytes(content)
    assert Evidence.load(path, 4) is None


def test_confusion_counts_each_sides_answers() -> None:
    evidence = _evidence()
    for side in (BEFORE, AFTER):
        matrix = evidence.confusion(side, 4)
        for true in range(4):
            for answer in range(4):
                same = (evidence.labels == true) & (evidence.answers[side] == answer)
                assert matrix[true, answer] == same.sum()


@given(hnp.arrays(np.int64, (3, 12), elements=st.integers(0, 3)), st.sets(st.integers(0, 3), min_size=1, max_size=3))
def test_every_changed_image_of_the_important_class_is_of_one_kind(rows: np.ndarray, important: set[int]) -> None:
    labels, answers = rows[0], rows[1:]
    kinds = kinds_of_images(labels, answers, sorted(important))
    for n, label in enumerate(labels.tolist()):
        old, new = answers[:, n].tolist()
        mine = [kind for kind, found in kinds.items() if n in found]
        if label in important:
            expected = {
                (False, False): ["still missed"],
                (False, True): ["newly caught"],
                (True, False): ["newly lost"],
                (True, True): [],
            }[old == label, new == label]
        else:
            expected = {
                (False, True): ["new false alarms"],
                (True, False): ["false alarms no more"],
            }.get((old in important, new in important), [])
        assert mine == expected


def test_an_image_is_measured_to_the_important_class_and_to_the_nearest_other() -> None:
    degrees = np.array([[0, 90, 180], [45, 45, 135], [90, 180, 90], [120, 60, 61]], np.float32)
    own, other = angles(np.cos(np.radians(degrees)), np.array([0, 1, 2, 0]), [0])
    assert own == pytest.approx([0, 45, 90, 120], abs=0.05)
    assert other == pytest.approx([90, 45, 90, 60], abs=0.05)
    rounded = np.array([[1.0000001, -1.0000001]], np.float32)
    assert [a.tolist() for a in angles(rounded, np.array([0]), [0])] == [[0.0], [180.0]]


def test_with_several_important_classes_an_image_is_measured_to_its_own() -> None:
    cosines = np.cos(np.radians(np.array([[0, 6, 90]] * 3, np.float32)))
    own, other = angles(cosines, np.array([0, 1, 2]), [0, 1])
    assert own == pytest.approx([0, 6, 0], abs=0.05)
    assert other == pytest.approx([90, 90, 90], abs=0.05)


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": np.full(50, 4)},
        {"answers": np.full((2, 50), -1)},
        {"answers": np.zeros((2, 49), np.int64)},
        {"to_other": np.zeros((1, 50), np.float32)},
        {"rows": np.array([1, 5, 50])},
        {"rows": np.array([1])},
        {"pixels": np.zeros((3, 8, 8), np.uint8)},
    ],
)
def test_what_does_not_fit_the_study_is_no_evidence(changes: dict[str, np.ndarray], tmp_path: Path) -> None:
    path = tmp_path / "evidence.safetensors"
    replace(_evidence(), **changes).save(path)
    assert Evidence.load(path, 4) is None


# What is drawn of it


def test_a_class_whose_seeds_only_changed_places_has_lost_nothing() -> None:
    before, after = [Figure((0.8, 0.7, 0.6)), Figure((0.6, 0.7, 0.8))], [Figure((0.6, 0.7, 0.8)), Figure((0.7,) * 3)]
    lines = [t.name for t in error_charts.recall_of_classes(before, after, ["a", "b"], [0]).data if t.mode == "lines"]
    assert lines == ["gained recall, or kept it"]


def _errors(rivals: int, images: int = 40) -> Evidence:
    """Images of class 0 alone, which both models take for so many other classes in turn."""
    labels, pixels = np.zeros(images, np.int64), np.zeros((0, 1, 1, 1), np.uint8)
    answers, places = np.tile(1 + np.arange(images) % rivals, (2, 1)), np.ones((2, images), np.float32)
    return Evidence(labels, answers, places, places, np.zeros(0, np.int64), pixels)


@pytest.mark.parametrize(("rivals", "end"), [(8, "taken for …"), (9, "taken for … (the 8 most frequent)")])
def test_where_not_all_rivals_are_drawn_it_is_said(rivals: int, end: str) -> None:
    figure = error_charts.errors_of(_errors(rivals), [str(c) for c in range(12)], [0])
    missed, alarms = [annotation.text for annotation in figure.layout.annotations]
    assert (missed, alarms) == (f"missed, and {end}", "false alarms: images of …")
    assert len(figure.data[0].y) == 8


def test_the_darkest_shade_is_a_share_and_all_above() -> None:
    colours = error_charts.confusions(_errors(1), ["a", "b"], [0]).layout.coloraxis
    assert (colours.colorbar.tickvals[-1], colours.colorbar.ticktext[-1]) == (colours.cmax, "25 or more")


@pytest.mark.parametrize("more", [0, 1])
def test_where_not_all_images_of_the_class_are_drawn_it_is_said(more: int) -> None:
    figure = {"values": [0.5]}
    side: dict[str, Any] = {"test": {"recall_per_class": [figure, figure]}, "exported": {"seed": 0}}
    side["exported"]["compared_with_seed"] = 0
    evidence = _errors(1, error_charts.DRAWN + more)
    seen: Any = SimpleNamespace(classes=["a", "b"], important=[0])
    page = "".join(_before_and_after(seen, {"seeds": 1, "baseline": side, "best": side}, evidence))
    assert ("Of its own 1,501 images 1,500 are drawn, at random." in page) == (more == 1)
