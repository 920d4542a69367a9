"""Who goes to the final, who wins it, and what may be said of the winner. Pure arithmetic on records."""

import math
from collections.abc import Mapping, Sequence

from camri_tune.records import Best, Figure, PairedDifference, TrialRecord, Verdict
from camri_tune.stats import tango_interval


def finalists(trials: Sequence[TrialRecord], count: int, slack: float = 0.0) -> list[TrialRecord]:
    """The `count` best feasible trials that have a checkpoint: by recall, then accuracy, then the earlier one.

    After them, in the same order, those that miss the accuracy floor by at most `slack`, a fraction: one trial says
    that little about the mean over seeds, which decides.
    """
    kept = [t for t in trials if t.state == "complete" and t.checkpoint is not None and t.sha256 is not None]
    eligible = [t for t in kept if t.constraint is not None and t.constraint <= slack]
    return sorted(eligible, key=lambda t: (not t.feasible, -_of(t.recall), -_of(t.accuracy), t.number))[:count]


def rank_settings(retrained: Mapping[int, Sequence[TrialRecord]], floor: float) -> list[int]:
    """Source trials whose mean accuracy over seeds keeps the floor, best mean recall first (then mean accuracy).

    `retrained` maps a finalist's trial number to its retrained models on validation. A setting with a failed seed has
    not shown that it trains reliably, and is left out.
    """
    held = []
    for number, records in retrained.items():
        if not records or any(r.state != "complete" for r in records):
            continue
        accuracy = Figure(tuple(_of(r.accuracy) for r in records)).mean
        recall = Figure(tuple(_of(r.recall) for r in records)).mean
        if accuracy >= floor:
            held.append((-recall, -accuracy, number))
    return [number for _, _, number in sorted(held)]


def rank_models(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Models of one setting that meet the constraint themselves: by recall, then accuracy, then seed."""
    return sorted((r for r in records if r.feasible), key=lambda r: (-_of(r.recall), -_of(r.accuracy), r.seed or 0))


def paired_difference(new_right: Sequence[bool], old_right: Sequence[bool]) -> PairedDifference:
    """Compare two models image by image: whether each was right, in the same order."""
    pairs = list(zip(new_right, old_right, strict=True))
    gained = sum(1 for new, old in pairs if new and not old)
    lost = sum(1 for new, old in pairs if old and not new)
    return PairedDifference(gained, lost, len(pairs), tango_interval(gained, lost, len(pairs), confidence=0.90))


def verdict_of(difference: PairedDifference, epsilon: float) -> Verdict:
    """`certified` where the 95 % lower bound of the accuracy difference on test is at least `-epsilon` (a fraction)."""
    return "certified" if difference.lower_bound >= -epsilon else "feasible"


def images_needed(difference: PairedDifference, epsilon: float) -> int | None:
    """About how many test images would certify this difference; None where it is itself at or below `-epsilon`."""
    room = difference.estimate + epsilon
    if room <= 0:
        return None
    # Tango's statistic at -epsilon grows with the square root of n where the shares stay as they are: solved for n.
    gained, lost, delta = difference.gained / difference.n, difference.lost / difference.n, -epsilon
    b = -gained - lost + (2 - gained + lost) * delta
    q = (math.sqrt(max(b * b + 8 * lost * delta * (1 - delta), 0.0)) - b) / 4
    return math.ceil(1.645**2 * (2 * q + delta * (1 - delta)) / room**2)


def sentence_of(verdict: Verdict, best: Best | None, *, names: str, epsilon: float, tolerance: float) -> str:
    """One sentence of verdict: what the exported model gained and kept on test, and what is not shown."""
    if best is None:
        return (
            f"No model: no setting kept its mean validation accuracy over seeds at the baseline's"
            f"{f' less {tolerance:g} points' if tolerance else ''}; nothing is exported."
        )
    accuracy, recall = best.accuracy_difference, best.recall_difference
    bound = (
        f"difference {_points(accuracy.estimate)}, 95 % lower bound {_points(accuracy.lower_bound)}, n = {accuracy.n:,}"
    )
    counts = f"{recall.gained} gained, {recall.lost} lost of {recall.n:,} images"
    if recall.lower_bound > 0:
        gain = f"Recall of {names} on test rose by {_points(recall.estimate)} ({counts})"
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


def _points(fraction: float, sign: bool = True) -> str:
    return f"{100 * fraction:{'+' if sign else ''}.2f} points"


def _of(value: float | None) -> float:
    return -math.inf if value is None else value
