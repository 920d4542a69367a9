"""What may be said of a result, in words that a user can repeat: the sentence of verdict, and who chose and judged."""

import math
from collections.abc import Sequence

from scipy import stats

from camri_tune.records import Best, PairedDifference, Result, Verdict
from camri_tune.stats import binomial_interval

FEW_IMAGES = 100  # below, one image moves a recall by more than a point


def sentence_of(verdict: Verdict, best: Best | None, *, names: str, epsilon: float, tolerance: float) -> str:
    """One sentence of verdict: what the exported model gained and kept on test, and what is not shown.

    `epsilon` and `tolerance` are in points.
    """
    if best is None:
        return (
            f"No model: no setting kept its mean validation accuracy over seeds at the baseline's"
            f"{f' less {tolerance:g} points' if tolerance else ''}; nothing is exported."
        )
    accuracy, recall = best.accuracy_difference, best.recall_difference
    bound = f"difference {_points(accuracy.estimate)}, {_bound(accuracy)}, n = {accuracy.n:,}{_grouped(accuracy)}"
    counts = f"{recall.gained} gained, {recall.lost} lost of {recall.n:,} images"
    if recall.lower_bound > 0:
        gain = f"Recall of {names} on test rose by {_points(recall.estimate)} ({counts}; {_bound(recall)})"
    elif recall.estimate > 0:
        gain = f"Recall of {names} on test rose by {_points(recall.estimate)} ({counts}: too few to tell from no gain)"
    elif recall.estimate == 0:
        gain = f"Recall of {names} on test did not change ({counts})"
    else:
        gain = f"Recall of {names} on test FELL by {_points(-recall.estimate, sign=False)} ({counts})"
    if verdict == "certified":
        kept = f"accuracy is certified to be not more than {epsilon:g} points below the baseline model's"
        return f"{gain}; {kept} ({bound})."
    needed = images_needed(accuracy, epsilon / 100)
    if needed is not None:
        way_out = f"about {needed:,} test images would be needed to tell"
    elif accuracy.estimate < -epsilon / 100:
        way_out = f"accuracy on test itself fell by more than {epsilon:g} points"
    else:
        way_out = "the difference is at the limit itself, which no number of images certifies; raise --epsilon"
    return (
        f"{gain}; accuracy was kept on validation, but is not certified on test to be within {epsilon:g} points of the "
        f"baseline model's ({bound}; {way_out})."
    )


def images_needed(difference: PairedDifference, epsilon: float) -> int | None:
    """About how many test images would certify this difference; None where it is itself at or below `-epsilon`."""
    room = difference.estimate + epsilon
    if room <= 0:
        return None
    # Tango's statistic at -epsilon grows with the square root of n where the shares stay as they are: solved for n.
    gained, lost, delta = difference.gained / difference.n, difference.lost / difference.n, -epsilon
    b = -gained - lost + (2 - gained + lost) * delta
    q = (math.sqrt(max(b * b + 8 * lost * delta * (1 - delta), 0.0)) - b) / 4
    z = float(stats.norm.ppf(difference.confidence))
    effective = z**2 * (2 * q + delta * (1 - delta)) / room**2
    return math.ceil(effective * difference.n / difference.effective_n)


def nothing_to_gain(recalls: Sequence[float], important: Sequence[int], classes: Sequence[str]) -> str | None:
    """A plain warning where the important class already has nearly perfect recall, naming the classes that do not."""
    lowest = min(recalls[c] for c in important)
    if lowest < 0.99:
        return None
    ranked = [c for c in sorted(range(len(classes)), key=lambda c: recalls[c]) if recalls[c] < 0.99][:3]
    names = ", ".join(f"{c} ({classes[c]}, {recalls[c]:.3f})" for c in ranked)
    mine = ", ".join(f"{c} ({classes[c]})" for c in important)
    return f"Class {mine} has almost nothing to gain: the baseline's validation recall is {lowest:.3f} already. " + (
        f"The classes with most to gain are {names}." if names else "No other class has more to gain."
    )


def few_test_images(best: Best, classes: Sequence[str]) -> list[str]:
    """A plain warning for each important class with too few test images to show a high recall."""
    lines = []
    for c, share in best.exported_recall.items():
        if share.n < FEW_IMAGES or share.effective_n < FEW_IMAGES:
            most = binomial_interval(share.effective_n, share.effective_n).low
            few = f"{share.n} test images"
            if share.effective_n < share.n:
                few += f", which count as {share.effective_n:.0f} independent ones"
            lines.append(
                f"Class {c} ({classes[c]}) has only {few}: one image is {100 / share.n:.1f} points of recall, and even "
                f"with all of them right no more is shown (95 %) than a recall of {most:.3f}."
            )
    return lines


def provenance(result: Result) -> list[str]:
    """Which data chose, which judged, over how many seeds, what is claimed at what confidence, and what is not."""
    images, seeds = result.images, result.seeds
    on = f"in {result.folds} folds, each scored by models not trained on it" if result.folds > 1 else "held out"
    lines = [
        f"Chose: validation, {images['validation']:,} images {on}. They ranked the baseline's learning rates, "
        f"{sum(result.trials.values())} trial(s), {len(result.finalists)} finalist(s) over {seeds} fresh seed(s) each, "
        f"and the seed that is exported.",
        f"Judged: test, {images['test']:,} images ({images['test_important']:,} of the important class), which chose "
        f"nothing but to stop at the first finalist that is certified.",
    ]
    best = result.best
    if best is not None:
        difference = best.accuracy_difference
        count = result.candidates
        shared = (
            f"each bound holds at {100 * difference.confidence:.4g} %, those of all {count} finalists that kept "
            f"accuracy on validation together at 95 %"
            if count > 1
            else "each bound holds at 95 %"
        )
        lines.append(
            f"Claimed: what the exported model (seed {best.exported_seed}) does beside the baseline model of seed "
            f"{best.baseline_seed}, which the same rule chose, on images like the test set's; {shared}, one-sided."
        )
    lines.append(
        "Not claimed: anything about images unlike the test set's, about another seed (the intervals over seeds and "
        "images speak of that), or about training on more data."
    )
    if result.test_reads > 1:
        lines.append(
            f"Test has been read for {result.test_reads} different selections of this study: whoever saw an earlier "
            f"result and tried again has less than the stated confidence. Only a new test set restores it."
        )
    return lines


def _bound(difference: PairedDifference) -> str:
    return f"{100 * difference.confidence:.4g} % lower bound {_points(difference.lower_bound)}"


def _grouped(difference: PairedDifference) -> str:
    if difference.effective_n >= difference.n:
        return ""
    return f" images in groups, which count as {difference.effective_n:,.0f}"


def _points(fraction: float, sign: bool = True) -> str:
    return f"{100 * fraction:{'+' if sign else ''}.2f} points"
