"""Splits move whole groups: properties over arbitrary groups, and the leak that a naive split of real tracks has."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from camri_tune.config import StudyConfig
from camri_tune.datasets import open_dataset
from camri_tune.errors import DataError
from camri_tune.splits import IntArray, Split, folds, hold_out_groups, limit_groups, thin_groups

SEEDS = st.integers(0, 2**31 - 1)
# Each class is a list of its groups' sizes: groups of one class, as tracks of one sign are.
GROUP_SIZES = st.lists(st.lists(st.integers(1, 6), min_size=2, max_size=12), min_size=2, max_size=6)


def _arrays(sizes: Sequence[Sequence[int]], seed: int) -> tuple[IntArray, IntArray, list[str]]:
    """Labels and groups of classes with groups of these sizes, in random order, with group numbers far apart."""
    rows: list[tuple[int, int]] = []
    for label, groups in enumerate(sizes):
        for size in groups:
            rows += [(label, len(set(rows)) * 7 + 3)] * size
    table = np.array(rows, dtype=np.int64)[np.random.default_rng(seed).permutation(len(rows))]
    return table[:, 0].copy(), table[:, 1].copy(), [f"class {c}" for c in range(len(sizes))]


def _hold_out(labels: IntArray, groups: IntArray, classes: Sequence[str], *, fraction: float, seed: int) -> Split:
    return hold_out_groups(labels, groups, fraction=fraction, seed=seed, classes=classes, purpose="validation")


def _assert_a_good_split(split: Split, labels: IntArray, groups: IntArray, classes: Sequence[str]) -> None:
    assert sorted([*split.kept.tolist(), *split.held_out.tolist()]) == list(range(len(labels)))
    assert split.kept.tolist() == sorted(split.kept.tolist())
    assert split.held_out.tolist() == sorted(split.held_out.tolist())
    assert not set(groups[split.kept].tolist()) & set(groups[split.held_out].tolist())
    every = set(range(len(classes)))
    assert set(labels[split.kept].tolist()) == every
    assert set(labels[split.held_out].tolist()) == every


@given(sizes=GROUP_SIZES, fraction=st.floats(0.05, 0.9), seed=SEEDS)
@settings(deadline=None)
def test_no_group_stands_on_both_sides_and_every_class_on_each(
    sizes: list[list[int]], fraction: float, seed: int
) -> None:
    labels, groups, classes = _arrays(sizes, seed)
    split = _hold_out(labels, groups, classes, fraction=fraction, seed=seed)
    _assert_a_good_split(split, labels, groups, classes)


@given(
    counts=st.lists(st.integers(10, 40), min_size=1, max_size=4),
    size=st.integers(1, 5),
    fraction=st.floats(0.1, 0.5),
    seed=SEEDS,
)
@settings(deadline=None)
def test_every_class_gives_about_the_fraction(counts: list[int], size: int, fraction: float, seed: int) -> None:
    labels, groups, classes = _arrays([[size] * count for count in counts], seed)
    split = _hold_out(labels, groups, classes, fraction=fraction, seed=seed)
    for label, count in enumerate(counts):
        held = int(np.sum(labels[split.held_out] == label)) / size
        assert abs(held - fraction * count) <= 0.5 + 1e-9, "the nearest whole number of groups"


@given(sizes=GROUP_SIZES, fraction=st.floats(0.05, 0.9), seed=SEEDS)
@settings(deadline=None)
def test_a_seed_always_means_the_same_split(sizes: list[list[int]], fraction: float, seed: int) -> None:
    labels, groups, classes = _arrays(sizes, seed)
    first = _hold_out(labels, groups, classes, fraction=fraction, seed=seed)
    again = _hold_out(labels, groups, classes, fraction=fraction, seed=seed)
    assert first.kept.tolist() == again.kept.tolist()
    assert first.held_out.tolist() == again.held_out.tolist()


def test_another_seed_means_another_split() -> None:
    labels, groups, classes = _arrays([[1] * 50, [1] * 50], 0)
    splits = {tuple(_hold_out(labels, groups, classes, fraction=0.2, seed=s).held_out.tolist()) for s in range(5)}
    assert len(splits) == 5


@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=60),
    fraction=st.floats(0.05, 0.9),
    seed=SEEDS,
)
@settings(deadline=None, max_examples=300)
def test_groups_that_span_classes_work_or_name_a_class(rows: list[tuple[int, int]], fraction: float, seed: int) -> None:
    labels, groups = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    classes = ["anna", "bert", "carl", "dora"]
    refusal = ""
    try:
        split = _hold_out(labels, groups, classes, fraction=fraction, seed=seed)
    except DataError as error:
        refusal = str(error)
    if refusal:
        assert "\n" not in refusal
        assert any(repr(name) in refusal for name in classes)
        assert "validation" in refusal
    else:
        _assert_a_good_split(split, labels, groups, classes)


@given(
    members=st.lists(st.sets(st.integers(0, 3), min_size=1, max_size=3), min_size=4, max_size=8),
    sizes=st.lists(st.integers(1, 4), min_size=8, max_size=8),
    seed=SEEDS,
)
@settings(deadline=None, max_examples=300)
def test_patients_with_several_findings_are_split_wherever_that_is_possible(
    members: list[set[int]], sizes: list[int], seed: int
) -> None:
    """`members`: the classes that each group has images of. Whether any split will do is tried by all subsets."""
    rows = [(c, g) for g, of_group in enumerate(members) for c in sorted(of_group) for _ in range(sizes[g])]
    present = sorted({c for c, _ in rows})
    groups_of = [{g for g, of_group in enumerate(members) if c in of_group} for c in present]
    subsets = (set(np.flatnonzero([mask >> g & 1 for g in range(len(members))])) for mask in range(2 ** len(members)))
    assume(any(all(own & held and own - held for own in groups_of) for held in subsets))
    labels, groups = np.array([present.index(c) for c, _ in rows]), np.array([g for _, g in rows])
    classes = [f"class {c}" for c in present]
    split = _hold_out(labels, groups, classes, fraction=0.2, seed=seed)
    _assert_a_good_split(split, labels, groups, classes)


def test_a_class_of_one_group_is_named() -> None:
    labels, groups = np.array([0, 0, 1, 1, 1]), np.array([1, 2, 3, 3, 3])
    with pytest.raises(
        DataError, match=r"^class 'stop' has 3 image\(s\) in 1 group\(s\) to draw from, .* 2 groups .*test.*$"
    ):
        hold_out_groups(labels, groups, fraction=0.2, seed=0, classes=["go", "stop"], purpose="test")


def test_groups_shared_by_all_classes_can_be_impossible_and_a_class_is_named() -> None:
    """Two groups; class b is in both, a and c each in one: no side has all three."""
    labels, groups = np.array([0, 0, 1, 1, 2, 2]), np.array([1, 1, 1, 2, 2, 2])
    with pytest.raises(DataError, match=r"class '[abc]' .*validation"):
        _hold_out(labels, groups, ["a", "b", "c"], fraction=0.5, seed=0)


def test_groups_that_span_all_classes_are_split_as_a_whole() -> None:
    """Ten patients with images of both classes each."""
    labels, groups = np.tile([0, 1], 50), np.repeat(np.arange(10), 10)
    split = _hold_out(labels, groups, ["healthy", "ill"], fraction=0.2, seed=0)
    _assert_a_good_split(split, labels, groups, ["healthy", "ill"])
    assert len(np.unique(groups[split.held_out])) == 2


# --- folds ------------------------------------------------------------------------------------------------------------


def _folds(
    labels: IntArray, groups: IntArray, classes: Sequence[str], *, count: int, fraction: float, seed: int
) -> list[Split]:
    options: dict[str, Any] = {"fraction": fraction, "seed": seed, "classes": classes, "purpose": "validation"}
    return folds(labels, groups, count=count, **options)


def _same(first: Split, second: Split) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@given(sizes=GROUP_SIZES, count=st.integers(1, 6), fraction=st.floats(0.05, 0.9), seed=SEEDS)
@settings(deadline=None)
def test_every_fold_is_a_good_split_and_the_first_is_that_of_one_alone(
    sizes: list[list[int]], count: int, fraction: float, seed: int
) -> None:
    labels, groups, classes = _arrays(sizes, seed)
    splits = _folds(labels, groups, classes, count=count, fraction=fraction, seed=seed)
    assert len(splits) == count
    for split in splits:
        _assert_a_good_split(split, labels, groups, classes)
    assert _same(splits[0], _hold_out(labels, groups, classes, fraction=fraction, seed=seed))


@given(sizes=GROUP_SIZES, count=st.integers(2, 6), fraction=st.floats(0.05, 0.9), seed=SEEDS)
@settings(deadline=None)
def test_a_fold_holds_out_again_only_where_a_class_has_nothing_new_left(
    sizes: list[list[int]], count: int, fraction: float, seed: int
) -> None:
    labels, groups, classes = _arrays(sizes, seed)
    used: set[int] = set()
    for split in _folds(labels, groups, classes, count=count, fraction=fraction, seed=seed):
        for label in range(len(classes)):
            of_class = set(groups[labels == label].tolist())
            held = set(groups[split.held_out].tolist()) & of_class
            assert not held & used or of_class - used < held
        used |= set(groups[split.held_out].tolist())


@given(
    counts=st.lists(st.integers(2, 40), min_size=1, max_size=4),
    size=st.integers(1, 5),
    count=st.integers(2, 6),
    fraction=st.floats(0.05, 0.5),
    seed=SEEDS,
)
@settings(deadline=None, max_examples=200)
def test_folds_share_no_image_of_a_class_with_enough_groups(
    counts: list[int], size: int, count: int, fraction: float, seed: int
) -> None:
    """With groups of one size each fold takes as many; a class with fewer than all folds need gives all it has."""
    labels, groups, classes = _arrays([[size] * number for number in counts], seed)
    splits = _folds(labels, groups, classes, count=count, fraction=fraction, seed=seed)
    for label, number in enumerate(counts):
        held = [set(groups[split.held_out][labels[split.held_out] == label].tolist()) for split in splits]
        (taken,) = {len(of_fold) for of_fold in held}
        assert abs(taken - fraction * number) <= 0.5 + 1e-9 or taken == 1
        assert len(set.union(*held)) == min(number, count * taken)


@given(sizes=GROUP_SIZES, fraction=st.floats(0.05, 0.9), seed=SEEDS)
@settings(deadline=None)
def test_a_fold_is_the_same_however_many_are_asked_for(sizes: list[list[int]], fraction: float, seed: int) -> None:
    """A worker that needs the third alone gets the third of five."""
    labels, groups, classes = _arrays(sizes, seed)
    five, again, three = (
        _folds(labels, groups, classes, count=count, fraction=fraction, seed=seed) for count in (5, 5, 3)
    )
    assert all(map(_same, five, again))
    assert all(map(_same, three, five[:3]))


def test_another_seed_means_other_folds() -> None:
    labels, groups, classes = _arrays([[1] * 50, [1] * 50], 0)
    lasts = {tuple(_folds(labels, groups, classes, count=3, fraction=0.2, seed=s)[2].held_out) for s in range(5)}
    assert len(lasts) == 5


@pytest.mark.parametrize("number", [2, 3, 4])
def test_a_class_with_few_groups_repeats_them(number: int) -> None:
    """Five folds take two, three or four groups in turn, and the class with enough is not held back by it."""
    labels, groups, classes = _arrays([[3] * number, [3] * 25], 0)
    splits = _folds(labels, groups, classes, count=5, fraction=0.2, seed=0)
    few, enough = ([groups[s.held_out][labels[s.held_out] == c] for s in splits] for c in (0, 1))
    assert [len(np.unique(of_fold)) for of_fold in few] == [1] * 5
    assert len(np.unique(few[:number])) == number, "each once before one comes again"
    assert [len(np.unique(of_fold)) for of_fold in enough] == [5] * 5
    assert len(np.unique(enough)) == 25


def test_folds_of_groups_that_span_classes_hold_out_others_each() -> None:
    """Ten patients with images of both classes each: five folds of two."""
    labels, groups = np.tile([0, 1], 50), np.repeat(np.arange(10), 10)
    splits = _folds(labels, groups, ["healthy", "ill"], count=5, fraction=0.2, seed=0)
    for split in splits:
        _assert_a_good_split(split, labels, groups, ["healthy", "ill"])
    assert sorted(np.concatenate([np.unique(groups[s.held_out]) for s in splits])) == list(range(10))


def test_what_is_to_come_last_is_held_out_only_at_need() -> None:
    labels, groups, classes = _arrays([[1] * 10, [1] * 10], 0)
    ours = np.unique(groups[labels == 0])
    options: dict[str, Any] = {"fraction": 0.2, "seed": 0, "classes": classes, "purpose": "validation"}
    for last, unwanted in ((ours[:8], ours[:8]), (ours[:9], ours[:0]), (ours, ours[:0])):
        held = groups[hold_out_groups(labels, groups, **options, last=last).held_out]
        assert len(np.intersect1d(held, ours)) == 2
        assert len(np.intersect1d(held, unwanted)) == 0
    assert (
        len(np.intersect1d(groups[hold_out_groups(labels, groups, **options, last=ours[:9]).held_out], ours[9:])) == 1
    )
    nothing = hold_out_groups(labels, groups, **options, last=np.empty(0, np.int64))
    assert _same(nothing, hold_out_groups(labels, groups, **options))


def test_a_class_of_one_group_is_named_whatever_the_fold() -> None:
    labels, groups = np.array([0, 0, 1, 1, 1]), np.array([1, 2, 3, 3, 3])
    with pytest.raises(DataError, match=r"^class 'stop' has 3 image\(s\) in 1 group\(s\)"):
        _folds(labels, groups, ["go", "stop"], count=2, fraction=0.2, seed=0)


# --- limits -----------------------------------------------------------------------------------------------------------


@given(sizes=GROUP_SIZES, share=st.floats(0, 1.2), seed=SEEDS)
@settings(deadline=None, max_examples=200)
def test_a_limit_keeps_whole_groups_and_one_of_each_class(sizes: list[list[int]], share: float, seed: int) -> None:
    labels, groups, classes = _arrays(sizes, seed)
    limit = max(1, int(share * len(labels)))
    try:
        index = limit_groups(labels, groups, limit=limit, seed=seed, classes=classes)
    except DataError:
        assume(False)
    assert len(index) <= limit
    assert index.tolist() == sorted(set(index.tolist()))
    kept = set(groups[index].tolist())
    assert index.tolist() == np.flatnonzero(np.isin(groups, list(kept))).tolist(), "whole groups"
    assert set(labels[index].tolist()) == set(range(len(classes)))
    again = limit_groups(labels, groups, limit=limit, seed=seed, classes=classes)
    assert again.tolist() == index.tolist()


@given(counts=st.lists(st.integers(2, 12), min_size=2, max_size=6), size=st.integers(1, 5), seed=SEEDS)
@settings(deadline=None)
def test_too_low_a_limit_names_the_lowest_one_that_works(counts: list[int], size: int, seed: int) -> None:
    labels, groups, classes = _arrays([[size] * count for count in counts], seed)
    smallest = size * len(counts)  # every class has a second group, so this is fewer than all images
    with pytest.raises(DataError, match=rf"--limit {smallest - 1} is too few: .*give at least {smallest}$"):
        limit_groups(labels, groups, limit=smallest - 1, seed=seed, classes=classes)
    assert len(limit_groups(labels, groups, limit=smallest, seed=seed, classes=classes)) == smallest


@given(sizes=GROUP_SIZES, seed=SEEDS)
@settings(deadline=None)
def test_the_limit_that_an_error_names_is_the_smallest_possible_one(sizes: list[list[int]], seed: int) -> None:
    """A group of every class fits as soon as the smallest ones do."""
    labels, groups, classes = _arrays(sizes, seed)
    smallest = sum(min(of_class) for of_class in sizes)
    assert smallest > 1
    with pytest.raises(DataError) as raised:
        limit_groups(labels, groups, limit=1, seed=seed, classes=classes)
    named = re.search(r"give at least (\d+)", str(raised.value))
    assert named
    assert int(named[1]) == smallest
    assert len(limit_groups(labels, groups, limit=smallest, seed=seed, classes=classes)) == smallest


def test_a_limit_keeps_the_proportions_of_the_classes() -> None:
    labels, groups, classes = _arrays([[1] * 900, [1] * 100], 0)
    index = limit_groups(labels, groups, limit=200, seed=0, classes=classes)
    assert len(index) == 200
    assert 15 <= int(np.sum(labels[index] == 1)) <= 25


def test_another_seed_keeps_other_images() -> None:
    labels, groups, classes = _arrays([[2] * 50, [3] * 50], 0)
    kept = {tuple(limit_groups(labels, groups, limit=60, seed=s, classes=classes).tolist()) for s in range(5)}
    assert len(kept) == 5


@given(sizes=GROUP_SIZES, most=st.integers(1, 7), seed=SEEDS)
@settings(deadline=None)
def test_thinning_keeps_so_many_of_each_group(sizes: list[list[int]], most: int, seed: int) -> None:
    labels, groups, _ = _arrays(sizes, seed)
    index = thin_groups(labels, groups, most=most, seed=seed)
    assert index.tolist() == sorted(set(index.tolist()))
    for group, size in zip(*np.unique(groups, return_counts=True), strict=True):
        assert np.sum(groups[index] == group) == min(size, most)
    assert index.tolist() == thin_groups(labels, groups, most=most, seed=seed).tolist()


def test_thinning_draws_at_random_and_loses_no_class_of_a_group_that_spans_some() -> None:
    labels, groups = np.tile([0, 1, 1], 20), np.repeat(np.arange(6), 10)
    drawn = {tuple(thin_groups(labels, groups, most=1, seed=seed).tolist()) for seed in range(5)}
    assert len(drawn) == 5
    for index in map(list, drawn):
        pairs = list(zip(groups[index].tolist(), labels[index].tolist(), strict=True))
        assert sorted(pairs) == [(group, label) for group in range(6) for label in (0, 1)]


def test_a_limit_above_the_number_of_images_keeps_all() -> None:
    labels, groups, classes = _arrays([[3, 2], [1, 4]], 0)
    assert limit_groups(labels, groups, limit=10, seed=0, classes=classes).tolist() == list(range(10))


def test_no_track_of_real_signs_straddles_where_a_naive_split_of_frames_has_most_on_both_sides(
    gtsrb_dir: Path,
) -> None:
    """Frames of one track show one physical sign: split by frame, validation measures memory."""
    data = open_dataset(StudyConfig.build({"dataset": "gtsrb", "data_dir": gtsrb_dir}))
    train, validation = data.train.groups.numpy(), data.validation.groups.numpy()
    assert not set(train.tolist()) & set(validation.tolist())
    for images in (data.train, data.validation):
        assert set(images.labels.tolist()) == set(range(43))

    frames = np.concatenate([train, validation])
    tracks = np.unique(frames)
    shuffled = frames[np.random.default_rng(0).permutation(len(frames))]
    naive_train, naive_validation = shuffled[len(validation) :], shuffled[: len(validation)]
    straddling = np.intersect1d(naive_train, naive_validation)
    assert len(straddling) > 0.9 * len(tracks), f"{len(straddling)} of {len(tracks)} tracks"
