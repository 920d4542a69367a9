"""How the baseline's learning rate is tuned, and how important classes are resolved from what it recalls."""

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from camri_tune.baseline import (
    MAX_LEARNING_RATES,
    START_FACTORS,
    best_learning_rate,
    check_important,
    class_index,
    next_learning_rates,
    rank_of,
    resolve_important,
)
from camri_tune.errors import InputError
from camri_tune.records import Baseline, TrialRecord, TrialState

DEFAULT = 4e-3


def _tried(rate: float, accuracy: float | None) -> TrialRecord:
    """A training with this learning rate; one without accuracy failed."""
    state: TrialState = "failed" if accuracy is None else "complete"
    return TrialRecord(0, state, {"learning_rate": rate}, seed=0, accuracy=accuracy)


def _around(accuracies: Sequence[float | None]) -> list[TrialRecord]:
    """The first learning rates with these accuracies, lowest rate first."""
    return [_tried(DEFAULT * f, a) for f, a in zip(sorted(START_FACTORS), accuracies, strict=True)]


def _tune(accuracy_of: Callable[[float], float | None]) -> tuple[list[TrialRecord], list[int]]:
    """Tune to the end, as the pipeline does; also how many rates each round asked for."""
    tried: list[TrialRecord] = []
    rounds = []
    while rates := next_learning_rates(tried, DEFAULT):
        rounds.append(len(rates))
        assert len(rounds) <= 20, "tuning must come to an end"
        tried += [_tried(rate, accuracy_of(rate)) for rate in rates]
    return tried, rounds


# Learning rates


def test_the_first_rates_stand_around_the_default_on_an_even_grid() -> None:
    rates = next_learning_rates([], DEFAULT)
    assert DEFAULT in rates
    assert len(rates) >= 3
    assert min(rates) < DEFAULT < max(rates)
    assert rates == sorted(rates)
    steps = [b / a for a, b in itertools.pairwise(rates)]
    assert steps == pytest.approx([2.0] * len(steps))
    assert len(rates) < MAX_LEARNING_RATES, "there must be room to go outward"


def test_a_best_rate_inside_ends_the_tuning() -> None:
    for inside in range(1, len(START_FACTORS) - 1):
        accuracies = [0.9] * len(START_FACTORS)
        accuracies[inside] = 0.95
        assert next_learning_rates(_around(accuracies), DEFAULT) == []


def test_a_best_rate_at_an_edge_is_followed_outward_by_one_step() -> None:
    rising = [0.9 + 0.01 * i for i in range(len(START_FACTORS))]
    assert next_learning_rates(_around(rising), DEFAULT) == [2 * max(START_FACTORS) * DEFAULT]
    assert next_learning_rates(_around(rising[::-1]), DEFAULT) == [min(START_FACTORS) * DEFAULT / 2]


def test_the_order_in_which_rates_were_tried_does_not_matter() -> None:
    rising = _around([0.9 + 0.01 * i for i in range(len(START_FACTORS))])
    assert next_learning_rates(rising[::-1], DEFAULT) == next_learning_rates(rising, DEFAULT)


@pytest.mark.parametrize("direction", [1, -1])
def test_tuning_stops_at_the_most_rates_though_the_edge_is_best(direction: int) -> None:
    tried, rounds = _tune(lambda rate: 0.5 + direction * 1e-3 * math.log(rate))
    rates = sorted(r.params["learning_rate"] for r in tried)
    assert len(rates) == len(set(rates)) == MAX_LEARNING_RATES
    assert rounds == [len(START_FACTORS)] + [1] * (MAX_LEARNING_RATES - len(START_FACTORS))
    assert best_learning_rate(tried, DEFAULT) == (rates[-1] if direction == 1 else rates[0])


@given(peak=st.floats(1e-4, 1e-1))
def test_a_peak_within_reach_is_found_to_within_half_a_step(peak: float) -> None:
    tried, _ = _tune(lambda rate: 0.9 - abs(math.log(rate / peak)) / 100)
    rates = sorted(r.params["learning_rate"] for r in tried)
    best = best_learning_rate(tried, DEFAULT)
    assert best is not None
    if rates[0] < peak < rates[-1]:
        assert abs(math.log(best / peak)) <= math.log(2) / 2 + 1e-9
    else:
        assert len(rates) == MAX_LEARNING_RATES, "only the limit stops short of the peak"
        assert best in (rates[0], rates[-1])


def test_where_all_trainings_fail_lower_rates_are_tried_until_the_most() -> None:
    tried, _ = _tune(lambda rate: None)
    rates = [r.params["learning_rate"] for r in tried]
    assert len(rates) == MAX_LEARNING_RATES
    further = rates[len(START_FACTORS) :]
    assert further == sorted(further, reverse=True)
    assert max(further) < DEFAULT * min(START_FACTORS)
    assert best_learning_rate(tried, DEFAULT) is None


def test_a_rate_at_which_training_failed_is_an_edge_that_needs_no_further_step() -> None:
    """The best complete rate stands inside: beyond it is one that is known to diverge."""
    failing = DEFAULT * max(START_FACTORS) * 0.9
    tried, rounds = _tune(lambda rate: 0.5 + 1e-3 * math.log(rate) if rate < failing else None)
    assert rounds == [len(START_FACTORS)]
    assert best_learning_rate(tried, DEFAULT) == sorted(START_FACTORS)[-2] * DEFAULT


def test_failures_at_high_rates_do_not_end_the_search_below() -> None:
    tried, rounds = _tune(lambda rate: 0.5 if rate <= DEFAULT * min(START_FACTORS) else None)
    assert len(rounds) > 1
    assert min(r.params["learning_rate"] for r in tried) < DEFAULT * min(START_FACTORS)


def test_the_best_rate_has_the_highest_accuracy() -> None:
    assert best_learning_rate([_tried(1e-3, 0.8), _tried(2e-3, 0.9), _tried(4e-3, 0.85)], DEFAULT) == 2e-3


def test_of_equals_the_rate_nearest_the_default_is_best() -> None:
    """Nearest in ratio: 0.4 times the default is further away than 2 times."""
    tried = [_tried(DEFAULT * f, 0.9) for f in (0.4, 8.0, 2.0, 0.25)]
    assert best_learning_rate(tried, DEFAULT) == DEFAULT * 2
    assert best_learning_rate([*tried, _tried(DEFAULT, 0.9)], DEFAULT) == DEFAULT
    assert best_learning_rate([*tried, _tried(DEFAULT * 8, 0.91)], DEFAULT) == DEFAULT * 8


def test_failed_and_pruned_trainings_are_never_best() -> None:
    pruned = TrialRecord(0, "pruned", {"learning_rate": 1e-3}, accuracy=0.99)
    unfinished = TrialRecord(0, "complete", {"learning_rate": 1e-3})
    assert best_learning_rate([pruned, unfinished, _tried(2e-3, None), _tried(8e-3, 0.1)], DEFAULT) == 8e-3
    assert best_learning_rate([pruned, unfinished], DEFAULT) is None
    assert best_learning_rate([], DEFAULT) is None


def test_a_training_that_learned_nothing_is_still_better_than_none() -> None:
    assert best_learning_rate([_tried(2e-3, 0.0), _tried(4e-3, None)], DEFAULT) == 2e-3


# Important classes

NAMES = ("go", "Stop", "turn", "wait", "yield")


def _baseline(*recalls: float) -> Baseline:
    """A baseline of two seeds whose mean recalls are these."""
    records = [
        TrialRecord(
            seed, "complete", {"learning_rate": 1e-3}, accuracy=0.9, recall_per_class=tuple(r + d for r in recalls)
        )
        for seed, d in enumerate((-0.0625, 0.0625))
    ]
    return Baseline(1e-3, tuple(records))


def test_each_fold_has_the_accuracy_of_its_own_models() -> None:
    """Also of those on folds that no seed took, which count in nothing else."""
    first, second, third, other = (
        TrialRecord(n, "complete", {}, accuracy=accuracy, recall_per_class=(accuracy,), fold=fold)
        for n, (fold, accuracy) in enumerate([(0, 0.5), (1, 0.875), (0, 0.75), (2, 0.125)])
    )
    assert Baseline(1e-3, (first, second, third)).accuracy_by_fold == (0.625, 0.875)
    baseline = Baseline(1e-3, (first, second, third), (other,))
    assert baseline.accuracy_by_fold == (0.625, 0.875, 0.125)
    assert baseline.accuracy == pytest.approx((0.5 + 0.875 + 0.75) / 3)
    assert baseline.accuracy_sd == Baseline(1e-3, (first, second, third)).accuracy_sd
    assert baseline.recall_per_class == pytest.approx((baseline.accuracy,))
    assert _baseline(0.5).accuracy_by_fold == (0.9,)


def test_what_seeds_do_is_told_from_what_folds_do() -> None:
    """Folds hold other images: a model's accuracy is 0.4 lower on one of these, whatever its seed."""

    def baseline(*accuracies: float, folds: Sequence[int]) -> Baseline:
        pairs = enumerate(zip(folds, accuracies, strict=True))
        return Baseline(1e-3, tuple(TrialRecord(n, "complete", {}, accuracy=a, fold=fold) for n, (fold, a) in pairs))

    one = baseline(0.85, 0.9, 0.95, folds=(0, 0, 0)).accuracy_sd
    assert one == pytest.approx(0.05)
    two = baseline(0.85, 0.5, 0.95, 0.5, 0.9, 0.5, folds=(0, 1, 0, 1, 0, 1)).accuracy_sd
    assert two == pytest.approx(0.05 / math.sqrt(2)), "the other's do not differ"
    assert baseline(0.85, 0.5, 0.95, folds=(0, 1, 0)).accuracy_sd == pytest.approx(0.1 / math.sqrt(2))
    assert baseline(0.85, 0.5, folds=(0, 1)).accuracy_sd is None, "nothing says what seeds do"
    assert baseline(0.85, folds=(0,)).accuracy_sd is None


BASELINE = _baseline(0.75, 0.5, 0.875, 0.25, 0.625)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["worst1"], (3,)),
        (["worst2"], (1,)),
        (["worst5"], (2,)),
        (["median"], (4,)),
        (["worst1", "worst2"], (3, 1)),
        (["worst2", "worst1"], (1, 3)),
        (["Stop"], (1,)),
        (["stop"], (1,)),
        (["STOP"], (1,)),
        (["1"], (1,)),
        (["0", "YIELD", "median"], (0, 4)),
        (["worst1", "wait", "3", "WAIT"], (3,)),
    ],
)
def test_names_numbers_and_ranks_become_classes(tokens: Sequence[str], expected: tuple[int, ...]) -> None:
    assert resolve_important(tokens, NAMES, BASELINE) == expected
    check_important(tokens, NAMES)


def test_equal_recalls_rank_by_number() -> None:
    assert resolve_important(["worst1", "worst2", "worst3"], NAMES, _baseline(0.5, 0.25, 0.5, 0.25, 0.5)) == (1, 3, 0)


def test_equal_means_of_several_seeds_rank_by_number() -> None:
    rows = zip((0.8, 0.7, 0.6), (0.7, 0.7, 0.7), (0.6, 0.7, 0.8), strict=True)
    records = [TrialRecord(n, "complete", {}, seed=n, recall_per_class=row) for n, row in enumerate(rows)]
    ranked = resolve_important(["worst1", "worst2", "worst3"], ["a", "b", "c"], Baseline(1e-3, tuple(records)))
    assert ranked == (0, 1, 2)


def test_the_mean_over_seeds_ranks_the_classes() -> None:
    """Class 0 is the worse one in the first seed, class 1 in the second and on average."""
    records = [
        TrialRecord(seed, "complete", {}, accuracy=0.9, recall_per_class=recalls)
        for seed, recalls in enumerate([(0.5, 0.625), (1.0, 0.5)])
    ]
    assert resolve_important(["worst1"], ["a", "b"], Baseline(1e-3, tuple(records))) == (1,)


def test_a_name_goes_before_a_number() -> None:
    """Folders are often called by numbers, and seldom by their place in the alphabet."""
    names = ("1", "10", "2")
    baseline = _baseline(0.5, 0.25, 0.75)
    assert resolve_important(["1"], names, baseline) == (0,)
    assert resolve_important(["2"], names, baseline) == (2,)
    assert resolve_important(["10"], names, baseline) == (1,)
    assert resolve_important(["0"], names, baseline) == (0,)


def test_an_exact_name_goes_before_one_in_another_case() -> None:
    assert class_index("Stop", ["stop", "Stop", "STOP"]) == 1
    assert class_index("STOP", ["stop", "Stop", "STOP"]) == 2
    assert class_index("stop", ["STOP", "Stop", "stop"]) == 2


@pytest.mark.parametrize("num_classes", [2, 3, 10, 43])
def test_ranks_reach_from_the_worst_to_the_best(num_classes: int) -> None:
    assert [rank_of(f"worst{k + 1}", num_classes) for k in range(num_classes)] == list(range(num_classes))
    for token in ("worst0", f"worst{num_classes + 1}", "worst", "worst-1", "worst1.0", "best1", "0", "Median"):
        assert rank_of(token, num_classes) is None


def test_the_median_has_as_many_classes_below_it_as_above() -> None:
    assert rank_of("median", 43) == 21
    assert rank_of("median", 5) == 2
    assert rank_of("median", 10) in (4, 5)


@pytest.mark.parametrize(
    "token",
    ["5", "-1", "99", "worst0", "worst6", "worst", "sto", "Stop sign", "", " ", "1.0", "worst1,worst2", "²", "worst²"],
)
def test_what_no_baseline_could_resolve_is_refused_with_what_there_is(token: str) -> None:
    with pytest.raises(InputError) as raised:
        check_important(["worst1", token], NAMES)
    message = str(raised.value)
    assert repr(token) in message
    for part in ("--important", "index from 0 to 4", "'go'", "worst1 to worst5", "median"):
        assert part in message
    assert "\n" not in message


TOKENS = st.one_of(
    st.sampled_from(["worst1", "worst5", "worst6", "median", "GO", "yield", "0", "4", "5"]), st.text(max_size=6)
)


@given(tokens=st.lists(TOKENS, min_size=1, max_size=5))
def test_what_passes_the_check_is_resolved_without_loss(tokens: list[str]) -> None:
    try:
        check_important(tokens, NAMES)
    except InputError:
        return
    found = resolve_important(tokens, NAMES, BASELINE)
    assert found
    assert len(found) == len(set(found))
    assert set(found) == {c for token in tokens for c in resolve_important([token], NAMES, BASELINE)}
    assert all(0 <= c < len(NAMES) for c in found)
