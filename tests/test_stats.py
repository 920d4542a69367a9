"""Intervals against published figures, independent derivations and simulated coverage."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from camri_tune.stats import (
    Hidden,
    binomial_interval,
    crossed_interval,
    design_effect,
    effective_size,
    hidden_size,
    mean_interval,
    seed_interval,
    tango_interval,
)


@st.composite
def _paired_counts(draw: st.DrawFn, most: int = 2000) -> tuple[int, int, int]:
    """Gained, lost and n, discordant pairs seldom being many, as with two good models."""
    n = draw(st.integers(1, most))
    discordant = draw(st.integers(0, n))
    gained = draw(st.integers(0, discordant))
    return gained, discordant - gained, n


def test_tango_reproduces_a_published_interval() -> None:
    low, high = tango_interval(40, 20, 160, confidence=0.95)
    assert (round(low, 3), round(high, 3)) == (0.031, 0.218)


@pytest.mark.parametrize("n", [1, 20, 360, 12_630])
def test_tango_without_any_discordant_pair_has_a_closed_form(n: int) -> None:
    """There the score equation gives z^2 / (n + z^2), on both sides of zero."""
    z2 = stats.norm.ppf(0.975) ** 2
    low, high = tango_interval(0, 0, n)
    assert low == pytest.approx(-z2 / (n + z2), abs=1e-8)
    assert high == pytest.approx(z2 / (n + z2), abs=1e-8)


def _naive_score(gained: int, lost: int, n: int, delta: float) -> float:
    """Tango's statistic, with the restricted likelihood maximised by search instead of by formula."""

    def unlikeliness(p_lost: float) -> float:
        parts = ((gained, p_lost + delta), (lost, p_lost), (n - gained - lost, 1 - 2 * p_lost - delta))
        return -math.fsum(count * math.log(max(p, 1e-300)) for count, p in parts if count)

    least, most = max(0.0, -delta), (1 - delta) / 2
    found = optimize.minimize_scalar(
        unlikeliness, bounds=(least, most), method="bounded", options={"xatol": 1e-12, "maxiter": 1000}
    )
    variance = n * (2 * found.x + delta - delta**2)
    return (gained - lost - n * delta) / math.sqrt(variance)


@pytest.mark.parametrize("confidence", [0.8, 0.9, 0.95])
@pytest.mark.parametrize(
    ("gained", "lost", "n"), [(40, 20, 160), (3, 9, 360), (1, 0, 50), (0, 7, 60), (120, 90, 12_630), (5, 5, 11)]
)
def test_both_ends_are_where_the_score_of_the_likelihood_is_z(
    gained: int, lost: int, n: int, confidence: float
) -> None:
    z = float(stats.norm.ppf((1 + confidence) / 2))
    low, high = tango_interval(gained, lost, n, confidence)
    assert _naive_score(gained, lost, n, low) == pytest.approx(z, abs=2e-3)
    assert _naive_score(gained, lost, n, high) == pytest.approx(-z, abs=2e-3)


@given(counts=_paired_counts(), confidence=st.floats(0.5, 0.999))
@settings(deadline=None)
def test_tango_mirrors_when_the_models_change_places(counts: tuple[int, int, int], confidence: float) -> None:
    gained, lost, n = counts
    low, high = tango_interval(gained, lost, n, confidence)
    mirrored = tango_interval(lost, gained, n, confidence)
    assert low == pytest.approx(-mirrored.high, abs=1e-8)
    assert high == pytest.approx(-mirrored.low, abs=1e-8)


@given(counts=_paired_counts(), confidence=st.floats(0.5, 0.999))
@settings(deadline=None)
def test_tango_contains_the_estimate_and_is_never_a_point(counts: tuple[int, int, int], confidence: float) -> None:
    gained, lost, n = counts
    low, high = tango_interval(gained, lost, n, confidence)
    assert -1 <= low <= (gained - lost) / n <= high <= 1
    assert high - low > 0.1 / n


@given(counts=_paired_counts(most=200), factor=st.integers(2, 20))
@settings(deadline=None)
def test_tango_narrows_with_more_images_and_widens_with_confidence(counts: tuple[int, int, int], factor: int) -> None:
    gained, lost, n = counts
    low, high = tango_interval(gained, lost, n)
    more = tango_interval(gained * factor, lost * factor, n * factor)
    assert more.high - more.low < high - low
    surer = tango_interval(gained, lost, n, confidence=0.99)
    assert surer.low <= low
    assert surer.high >= high
    assert surer.high - surer.low > high - low


@given(counts=_paired_counts(most=300))
@settings(deadline=None)
def test_one_image_more_in_favour_raises_both_ends(counts: tuple[int, int, int]) -> None:
    gained, lost, n = counts
    if gained + lost < n:
        before, after = tango_interval(gained, lost, n), tango_interval(gained + 1, lost, n)
        assert after.low > before.low
        assert after.high > before.high


@pytest.mark.parametrize(("gained", "lost", "n"), [(1, 0, 1), (50, 0, 50), (0, 50, 50), (25, 25, 50)])
def test_tango_stands_where_every_pair_is_discordant(gained: int, lost: int, n: int) -> None:
    low, high = tango_interval(gained, lost, n)
    assert -1 <= low <= (gained - lost) / n <= high <= 1
    assert low < high


@pytest.mark.parametrize(("gained", "lost", "n"), [(-1, 0, 10), (0, -1, 10), (6, 5, 10), (0, 0, 0), (0, 0, -3)])
def test_impossible_counts_are_named(gained: int, lost: int, n: int) -> None:
    with pytest.raises(ValueError, match=rf"^gained {gained}, lost {lost} of {n}: "):
        tango_interval(gained, lost, n)


@pytest.mark.parametrize(
    ("n", "p_gained", "p_lost"),
    [(160, 0.25, 0.125), (500, 0.05, 0.05), (2000, 0.02, 0.03)],
    ids=["as published", "no difference", "a little worse"],
)
def test_the_one_sided_lower_bound_holds_in_95_of_100_draws(n: int, p_gained: float, p_lost: float) -> None:
    rng = np.random.default_rng(20_000)
    draws = rng.multinomial(n, [p_gained, p_lost, 1 - p_gained - p_lost], size=20_000)[:, :2]
    distinct, counts = np.unique(draws, axis=0, return_counts=True)
    holds = [tango_interval(int(g), int(b), n, confidence=0.90).low <= p_gained - p_lost for g, b in distinct]
    coverage = float(np.sum(counts[np.array(holds)]) / np.sum(counts))
    assert 0.94 <= coverage <= 0.96


@given(n=st.integers(1, 15_000), share=st.floats(0, 1), confidence=st.floats(0.5, 0.999))
@settings(deadline=None)
def test_the_binomial_interval_is_scipys_exact_one(n: int, share: float, confidence: float) -> None:
    successes = round(share * n)
    theirs = stats.binomtest(successes, n).proportion_ci(confidence, method="exact")
    ours = binomial_interval(successes, n, confidence)
    assert ours == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    assert ours.low <= successes / n <= ours.high


def test_a_perfect_recall_of_few_images_is_no_certainty() -> None:
    """60 of 60: the lower end is (alpha / 2) ** (1 / 60)."""
    assert binomial_interval(60, 60) == pytest.approx((0.025 ** (1 / 60), 1.0))
    assert binomial_interval(0, 60) == pytest.approx((0.0, 1 - 0.025 ** (1 / 60)))
    assert binomial_interval(60, 60).high == 1.0
    assert binomial_interval(0, 60).low == 0.0


@pytest.mark.parametrize(("successes", "n"), [(-1, 10), (11, 10), (0, 0), (1, -1)])
def test_an_impossible_share_is_named(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match=rf"^{successes} successes of {n} is not a share"):
        binomial_interval(successes, n)


def test_the_interval_over_seeds_by_hand() -> None:
    """Mean 0.53, sd sqrt(0.002 / 3), t of 3 degrees of freedom 3.182446."""
    half = 3.182446305 * math.sqrt(0.002 / 3) / 2
    assert seed_interval([0.50, 0.52, 0.54, 0.56]) == pytest.approx((0.53 - half, 0.53 + half), abs=1e-9)


def test_the_interval_over_two_seeds_is_wide() -> None:
    """t of 1 degree of freedom is 12.706: two seeds say little, and the interval must say so."""
    half = 12.7062047 * math.sqrt(2 * 0.01**2) / math.sqrt(2)
    assert seed_interval([0.49, 0.51]) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-6)


def test_what_is_no_number_has_no_interval() -> None:
    """As the recall of a class without images."""
    assert seed_interval([math.nan, math.nan]) is seed_interval([0.5, math.nan, 0.6]) is None


@given(values=st.lists(st.floats(0.2, 0.8), min_size=2, max_size=12), confidence=st.floats(0.5, 0.99))
def test_the_interval_over_seeds_is_scipys(values: list[float], confidence: float) -> None:
    sd = float(np.std(values, ddof=1))
    interval = seed_interval(values, confidence)
    if min(values) == max(values):
        assert interval is None
        return
    assert interval is not None
    if sd > 1e-9:
        expected = stats.t.interval(confidence, len(values) - 1, loc=np.mean(values), scale=sd / math.sqrt(len(values)))
        assert interval == pytest.approx(np.clip(expected, 0, 1).tolist(), abs=1e-9)


def test_the_interval_over_seeds_stays_between_0_and_1() -> None:
    assert seed_interval([0.0, 1.0]) == (0.0, 1.0)
    assert seed_interval([0.99, 1.0, 1.0]) == pytest.approx((0.982324, 1.0), abs=1e-6)


def test_the_interval_of_a_mean_is_not_cut() -> None:
    """Of a difference, say, which may lie below 0."""
    half = 12.7062047 * 0.5
    assert mean_interval([0.0, 1.0]) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-6)
    assert mean_interval([0.5, 0.52, 0.54, 0.56], 0.9) == pytest.approx(seed_interval([0.5, 0.52, 0.54, 0.56], 0.9))


@pytest.mark.parametrize("values", [[], [0.9]])
def test_one_seed_has_no_interval(values: list[float]) -> None:
    assert seed_interval(values) is None
    assert mean_interval(values) is None


@pytest.mark.parametrize("n", [2, 3, 7])
@pytest.mark.parametrize("value", [-0.3, 0.1, 0.95, 1.0])
def test_equal_seeds_are_no_certainty(n: int, value: float) -> None:
    """Also where rounding makes their mean another number than they are."""
    assert mean_interval([value] * n) is None
    assert seed_interval([value] * n) is None
    assert mean_interval([value] * n + [value + 1e-6]) is not None


def test_the_usual_confidence_is_95_percent() -> None:
    assert tango_interval(5, 3, 100) == tango_interval(5, 3, 100, 0.95) != tango_interval(5, 3, 100, 0.9)
    assert binomial_interval(9, 10) == binomial_interval(9, 10, 0.95) != binomial_interval(9, 10, 0.9)
    assert seed_interval([0.5, 0.6, 0.7]) == seed_interval([0.5, 0.6, 0.7], 0.95) != seed_interval([0.5, 0.6, 0.7], 0.9)


# Images that belong together


def _naive_variance(values: list[float], groups: list[int]) -> float:
    """Of the mean, over many resamples of whole groups."""
    rng = np.random.default_rng(0)
    members = {g: [v for v, h in zip(values, groups, strict=True) if h == g] for g in dict.fromkeys(groups)}
    names = list(members)
    sums, sizes = np.array([sum(members[g]) for g in names]), np.array([len(members[g]) for g in names])
    drawn = rng.integers(len(names), size=(20_000, len(names)))
    return float(np.var(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)))


def test_as_many_images_as_the_variance_over_resampled_groups_is_worth() -> None:
    rng = np.random.default_rng(1)
    sizes = rng.integers(10, 30, size=60)
    groups = np.repeat(np.arange(60), sizes)
    values = (rng.random(len(groups)) < np.repeat(rng.beta(9, 1, size=60), sizes)).astype(float)
    expected = values.var() / _naive_variance(values.tolist(), groups.tolist())
    few = (stats.norm.ppf(0.95) / stats.t.ppf(0.95, 59)) ** 2
    assert effective_size(values, groups) == pytest.approx(expected * few, rel=0.05)
    assert effective_size(values, groups) < len(groups) / 1.5


@given(
    sizes=st.lists(st.integers(1, 8), min_size=1, max_size=15),
    seed=st.integers(0, 1000),
    confidence=st.sampled_from([0.95, 0.975, 0.99]),
)
def test_images_in_groups_count_as_one_at_least_and_as_themselves_at_most(
    sizes: list[int], seed: int, confidence: float
) -> None:
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(len(sizes)) * 7, sizes)[rng.permutation(sum(sizes))]
    values = rng.choice([-1.0, 0.0, 1.0], size=len(groups))
    size = effective_size(values, groups, confidence)
    assert 1 <= size <= len(groups)
    assert effective_size(values + 3, groups, confidence) == pytest.approx(size), "where they lie says nothing"


def test_images_of_their_own_count_each() -> None:
    assert effective_size(np.array([1.0, 0.0, 0.0]), np.array([5, 3, 9])) == 3.0
    assert effective_size(np.zeros(3), np.array([5, 3, 9])) == 3.0
    assert effective_size(np.array([1.0, 0.0, 0.0]), np.zeros(3, int)) == 1.0, "one group tells of no other"


def test_where_nothing_varies_a_group_is_one_image() -> None:
    """All right, or no image changed sides: that frames agree is no news."""
    few = (stats.norm.ppf(0.95) / stats.t.ppf(0.95, 39)) ** 2
    assert effective_size(np.ones(400), np.arange(400) // 10) == pytest.approx(40 * few)


@pytest.mark.parametrize(("groups", "together"), [(30, 0.3), (100, 0.0), (100, 0.8), (400, 0.3)])
def test_the_bound_with_groups_holds_where_one_that_ignores_them_does_not(groups: int, together: float) -> None:
    """Tracks of 20 to 30 frames that agree more or less; 3 % gained and 3 % lost."""
    rng = np.random.default_rng(groups)
    p, held, naive, draws = np.array([0.03, 0.03, 0.94]), 0, 0, 500
    for _ in range(draws):
        sizes = rng.integers(20, 31, size=groups)
        shares = rng.dirichlet(p * (1 - together) / together, size=groups) if together else np.tile(p, (groups, 1))
        counts = np.stack([rng.multinomial(n, share) for n, share in zip(sizes, shares, strict=True)])
        values = np.concatenate([np.repeat([1.0, -1.0, 0.0], row) for row in counts])
        gained, lost, _ = counts.sum(axis=0).tolist()
        n = len(values)
        share = effective_size(values, np.repeat(np.arange(groups), sizes)) / n
        held += tango_interval(gained * share, lost * share, n * share, confidence=0.90).low <= 0
        naive += tango_interval(gained, lost, n, confidence=0.90).low <= 0
    assert held / draws >= 0.92
    if together:
        assert naive / draws < 0.8


# Groups that nobody names


def _tracks(rng: np.random.Generator, count: int, size: int, together: float) -> np.ndarray:
    """Values of `count` tracks of `size` frames: 4 % gained, 4 % lost, frames of a track agreeing more or less."""
    p = np.array([0.04, 0.04, 0.92])
    shares = rng.dirichlet(p * (1 - together) / together, size=count) if together else np.tile(p, (count, 1))
    drawn = [rng.choice([1.0, -1.0, 0.0], size=size, p=share) for share in shares]
    return np.concatenate(drawn)


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=20),
    n=st.integers(1, 15_000),
    size=st.integers(2, 40),
    seed=st.integers(0, 1000),
    varied=st.sampled_from([0.0, 0.02, 0.5]),
    confidence=st.sampled_from([0.95, 0.975, 0.995]),
)
@settings(deadline=None)
def test_unnamed_groups_count_as_one_at_least_and_as_their_images_at_most(
    sizes: list[int], n: int, size: int, seed: int, varied: float, confidence: float
) -> None:
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(len(sizes)), sizes)
    drawn = rng.choice([-1, 0, 1], size=len(groups), p=[varied / 2, 1 - varied, varied / 2])
    values = np.asarray(drawn, np.float64)
    effect = design_effect(values, groups, size)
    assert 1 <= effect <= size
    found = hidden_size(n, Hidden(size, effect), confidence)
    assert 1 <= found <= n
    assert found <= max(1, n / effect)
    assert hidden_size(n, Hidden(size, size), confidence) <= found, "no design effect is worse"
    assert hidden_size(n, Hidden(size, effect), 0.9999) <= found, "few groups cost more where more is claimed"


def test_where_nothing_varies_or_there_is_one_group_unnamed_groups_are_one_image_each() -> None:
    """What shows nothing cannot show that frames of a track differ."""
    groups = np.arange(600) // 30
    assert design_effect(np.ones(600), groups, 30) == 30
    assert design_effect(np.tile([0.0, 1.0], 15), np.zeros(30, int), 30) == 30
    assert design_effect(np.zeros(0), np.zeros(0, int), 30) == 30
    assert design_effect(np.tile([0.0, 1.0], 15), np.arange(30), 30) == 30, "no track of two frames"
    few = (stats.norm.ppf(0.95) / stats.t.ppf(0.95, 19)) ** 2
    assert hidden_size(600, Hidden(30, 30)) == pytest.approx(20 * few)
    assert hidden_size(600, Hidden(30, 30)) == pytest.approx(effective_size(np.ones(600), groups))


def test_two_unnamed_tracks_are_less_than_two_images() -> None:
    """Sixty frames of class 27 of GTSRB: Student's t of one degree of freedom is 6.31 at 95 %, one-sided."""
    assert hidden_size(60, Hidden(30, 1.0)) == pytest.approx(60 * (1.644854 / 6.313752) ** 2, rel=1e-5)
    assert hidden_size(60, Hidden(30, 30.0)) == 1.0
    assert hidden_size(30, Hidden(30, 1.0)) == 1.0, "one track tells of no other"
    assert hidden_size(60, Hidden(1, 1.0)) == 60.0


def test_images_that_are_independent_have_no_design_effect() -> None:
    rng = np.random.default_rng(0)
    effects = [design_effect(_tracks(rng, 200, 30, 0.0), np.arange(6_000) // 30, 30) for _ in range(50)]
    assert np.mean(effects) < 1.1
    assert min(effects) == 1.0, "never below"


@pytest.mark.parametrize("together", [0.05, 0.3, 0.9])
def test_unnamed_groups_count_as_the_same_groups_named_do(together: float) -> None:
    """Validation's 260 tracks tell what test's 420 are worth, which nobody names: in the mean as if named."""
    rng = np.random.default_rng(1)
    found, known = [], []
    for _ in range(60):
        values, test = _tracks(rng, 260, 30, together), _tracks(rng, 420, 30, together)
        effect = design_effect(values, np.arange(len(values)) // 30, 30)
        found.append(hidden_size(len(test), Hidden(30, effect)))
        known.append(effective_size(test, np.arange(len(test)) // 30))
    assert np.mean(found) == pytest.approx(np.mean(known), rel=0.08)
    assert np.mean(known) < 0.75 * 420 * 30, "else there would be nothing to find"


@pytest.mark.parametrize("together", [0.1, 0.5])
def test_the_bound_with_unnamed_groups_holds_where_one_that_ignores_them_does_not(together: float) -> None:
    rng, held, naive, draws = np.random.default_rng(2), 0, 0, 200
    for _ in range(draws):
        values, test = _tracks(rng, 260, 30, together), _tracks(rng, 420, 30, together)
        effect = design_effect(values, np.arange(len(values)) // 30, 30)
        gained, lost, n = int((test > 0).sum()), int((test < 0).sum()), len(test)
        share = hidden_size(n, Hidden(30, effect)) / n
        held += tango_interval(gained * share, lost * share, n * share, confidence=0.90).low <= 0
        naive += tango_interval(gained, lost, n, confidence=0.90).low <= 0
    assert held / draws >= 0.91
    assert naive / draws < 0.85


def test_unnamed_groups_widen_the_interval_over_seeds_and_images() -> None:
    rng = np.random.default_rng(3)
    differences = (rng.random((4, 300)) < 0.3).astype(float) - (rng.random((4, 300)) < 0.2)
    a, b = differences.mean(axis=1).var(ddof=1) / 4, 7 * differences.mean(axis=0).var(ddof=1) / 300
    half = stats.t.ppf(0.975, (a + b) ** 2 / (a**2 / 3 + b**2 / 9)) * math.sqrt(a + b)
    expected = (differences.mean() - half, differences.mean() + half)
    assert crossed_interval(differences, hidden=Hidden(30, 7.0)) == pytest.approx(expected)
    assert crossed_interval(differences[:, :45], hidden=Hidden(30, 7.0)) is None, "a track and a half"


# Seeds and images at once


def test_seeds_and_images_both_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    differences = (rng.random((4, 300)) < 0.3).astype(float) - (rng.random((4, 300)) < 0.2)
    by_seed, by_image = differences.mean(axis=1), differences.mean(axis=0)
    a, b = np.var(by_seed, ddof=1) / 4, np.var(by_image, ddof=1) / 300
    half = stats.t.ppf(0.975, (a + b) ** 2 / (a**2 / 3 + b**2 / 299)) * math.sqrt(a + b)
    expected = (differences.mean() - half, differences.mean() + half)
    assert crossed_interval(differences) == pytest.approx(expected)
    pairs = np.repeat(differences, 2, axis=1)
    assert crossed_interval(pairs, np.repeat(np.arange(300), 2)) == pytest.approx(expected), "a group is one image"


def test_one_seed_or_one_group_has_no_such_interval() -> None:
    assert crossed_interval(np.zeros((1, 50))) is None
    assert crossed_interval(np.zeros((3, 50)), np.zeros(50, int)) is None
    assert crossed_interval(np.zeros((3, 0))) is None
    assert crossed_interval(np.full((3, 50), 0.5)) is None, "nothing varies: that is no certainty"
    assert crossed_interval(np.tile(np.eye(3), 5)) is None, "but for rounding"


@pytest.mark.parametrize("images", [60, 1000])
@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize(("seed_sd", "image_sd"), [(0.3, 0.5), (0.02, 0.8), (0.8, 0.2)])
def test_the_interval_over_seeds_and_images_covers_the_truth(
    seeds: int, images: int, seed_sd: float, image_sd: float
) -> None:
    """Two methods, one a little better: images are easy or hard for both, some for one of them; seeds differ."""
    rng = np.random.default_rng(seeds * images)
    ease, noise, base, gain, draws, held, alone = 1.5, 0.5, 3.0, 0.3, 300, 0, 0
    spread = math.sqrt(ease**2 + image_sd**2 + noise**2 + seed_sd**2)
    truth = stats.norm.cdf((base + gain) / spread) - stats.norm.cdf(base / spread)
    for _ in range(draws):
        common = ease * rng.normal(size=images)
        right = [
            base + extra + seed_sd * rng.normal(size=(seeds, 1)) + common + image_sd * rng.normal(size=images)
            + noise * rng.normal(size=(seeds, images)) > 0
            for extra in (gain, 0.0)
        ]  # fmt: skip
        differences = right[0].astype(float) - right[1]
        interval = crossed_interval(differences)
        over_seeds = mean_interval(differences.mean(axis=1).tolist())
        # Where nothing varies, nothing is claimed.
        held += interval is None or interval.low <= truth <= interval.high
        alone += over_seeds is None or over_seeds.low <= truth <= over_seeds.high
    assert 0.91 <= held / draws <= 0.995
    if seed_sd < 0.1:
        assert alone / draws < 0.9, "seeds alone forget that other images would be others"


def test_with_10_000_images_half_a_point_is_the_limit_of_what_can_be_certified() -> None:
    """As published in this project's notes: 8 % discordant pairs leave a one-sided half-width of 0.47 points."""
    low = tango_interval(400, 400, 10_000, confidence=0.90).low
    assert -100 * low == pytest.approx(0.47, abs=0.005)
