"""How far a study is, and the time to go."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from camri_tune.progress import STAGE_TITLES, Schedule, current_stage, done, duration, seconds_left, total
from camri_tune.records import TrialRecord, TrialState

STATES: tuple[TrialState, ...] = ("waiting", "running", "complete", "pruned", "failed")
SCHEDULE = Schedule({"baseline": 7, "search": 20, "finalists": 6}, epochs=10, workers=2)


def _record(state: TrialState, seconds: float | None = None, epoch: int = 0) -> TrialRecord:
    return TrialRecord(0, state, {}, seconds=seconds, epoch=epoch)


def test_workers_that_joined_make_it_shorter() -> None:
    """A run may even have none of its own."""
    records = {"baseline": [_record("complete", seconds=60.0)] + [_record("running", epoch=0) for _ in range(4)]}
    alone = Schedule({"baseline": 9, "search": 0, "finalists": 0}, epochs=10, workers=0)
    assert seconds_left(records, alone) == pytest.approx(8 * 60 / 4)
    assert seconds_left({"baseline": records["baseline"][:1]}, alone) == pytest.approx(8 * 60)


def test_running_trials_count_by_their_epochs() -> None:
    records = [
        _record("complete"),
        _record("failed"),
        _record("pruned"),
        _record("running", epoch=4),
        _record("waiting"),
    ]
    assert done(records, "baseline", SCHEDULE) == pytest.approx(3.4)


def test_a_trial_counts_by_the_epochs_that_it_has_drawn() -> None:
    short = TrialRecord(0, "running", {"epochs": 4.0}, epoch=2)
    assert done([short], "search", SCHEDULE) == pytest.approx(0.5)
    assert SCHEDULE.epochs_of(short, "search") == 4


def test_a_trial_on_folds_is_so_many_trainings() -> None:
    folds = SCHEDULE.on_folds(5, more_baselines=4)
    assert folds.planned == {"baseline": 11, "search": 100, "finalists": 6}
    assert SCHEDULE.planned == {"baseline": 7, "search": 20, "finalists": 6}
    assert folds.on_folds(1, more_baselines=0).planned["search"] == 20
    assert done([_record("running", epoch=25)], "search", folds) == pytest.approx(0.5)
    assert total({}, "search", folds) == 20, "trials, not trainings"


def test_nothing_is_said_before_a_training_has_finished() -> None:
    assert seconds_left({}, SCHEDULE) is None
    assert seconds_left({"baseline": [_record("running", epoch=9)]}, SCHEDULE) is None


def test_time_to_go_is_what_is_left_at_the_pace_so_far_shared_by_the_workers() -> None:
    one = {"baseline": [_record("complete", 60.0), _record("running", epoch=5)]}
    assert seconds_left(one, SCHEDULE) == pytest.approx((33 - 1.5) * 60 / 2)
    # Once the search has begun the baseline owes nothing, even if it took fewer trainings than planned.
    later = {"baseline": [_record("complete", 60.0)], "search": [_record("complete", 30.0)] + [_record("waiting")] * 19}
    assert seconds_left(later, SCHEDULE) == pytest.approx((19 + 6) * 45 / 2)
    # A second round of finalists is more than was planned.
    searched = {**later, "search": [_record("complete", 30.0)] * 20}
    last = {**searched, "finalists": [_record("complete", 30.0)] * 6 + [_record("waiting")] * 6}
    assert seconds_left(last, SCHEDULE) == pytest.approx(6 * (60 + 26 * 30) / 27 / 2)
    # So may they be fewer.
    assert total({**searched, "finalists": [_record("running")] * 3}, "finalists", SCHEDULE) == 3


def test_a_long_search_is_queued_bit_by_bit_and_counted_whole() -> None:
    begun = {"search": [_record("complete", 30.0)] + [_record("waiting")] * 8}
    assert total(begun, "search", SCHEDULE) == 20
    assert seconds_left(begun, SCHEDULE) == pytest.approx((19 + 6) * 30 / 2)


def test_finalists_that_are_begun_while_the_search_lasts_are_not_all_of_them() -> None:
    ahead = {
        "search": [_record("complete", 30.0)] * 19 + [_record("running", epoch=5)],
        "finalists": [_record("complete", 30.0), _record("running", epoch=5)],
    }
    assert current_stage(ahead) == "search"
    assert total(ahead, "finalists", SCHEDULE) == 6
    assert seconds_left(ahead, SCHEDULE) == pytest.approx((0.5 + 4.5) * 30 / 2)


def test_failed_and_stopped_trainings_say_nothing_of_the_pace() -> None:
    records = {"search": [_record("failed", 1.0), _record("pruned", 5.0), _record("complete", 60.0)]}
    assert seconds_left(records, SCHEDULE) == pytest.approx((17 + 6) * 60 / 2)


def test_on_folds_the_pace_is_that_of_one_training() -> None:
    folds = SCHEDULE.on_folds(5, more_baselines=0)
    records = {"search": [_record("complete", 300.0), _record("waiting")]}
    assert seconds_left(records, folds) == pytest.approx((19 * 5 + 6) * 60 / 2)


@given(
    st.dictionaries(
        st.sampled_from(list(STAGE_TITLES)),
        st.lists(
            st.builds(_record, st.sampled_from(STATES), st.floats(0.1, 1e5), st.integers(0, 50)), min_size=1, max_size=9
        ),
    ),
    st.integers(1, 5),
)
def test_progress_is_within_its_bounds_whatever_is_stored(records: dict[str, list[TrialRecord]], folds: int) -> None:
    schedule = SCHEDULE.on_folds(folds, more_baselines=folds - 1)
    for stage, found in records.items():
        ended = sum(r.ended for r in found)
        assert ended <= done(found, stage, schedule) <= len(found) <= total(records, stage, schedule)
    left = seconds_left(records, schedule)
    assert left is None or left >= 0
    assert current_stage(records) in STAGE_TITLES


def test_durations_are_short() -> None:
    assert [duration(s) for s in (0.4, 89, 90, 3600, 5400, 36_000)] == [
        "0 s",
        "89 s",
        "2 min",
        "60 min",
        "1.5 h",
        "10.0 h",
    ]
