"""What may be said of a result, in words that a user can repeat: the sentence of verdict, and who chose and judged."""

import math
from collections.abc import Sequence

from scipy import special

from camri_tune.constraint_claims import asked_as_well, obstacle, said_of_constraint
from camri_tune.constraints import RecallConstraint
from camri_tune.differences import PairedDifference, grouped, points, tracks
from camri_tune.ranges import Searchable, is_searched, text_of
from camri_tune.records import TrialRecord, named
from camri_tune.result import Best, Finalist, Result, Threshold, Verdict
from camri_tune.stats import binomial_interval

FEW_IMAGES = 100  # below, one image moves a recall by more than a point
POWER = 0.8  # the chance of a certificate that a test set is planned for


def sentence_of(
    verdict: Verdict,
    best: Best | None,
    *,
    classes: Sequence[str],
    epsilon: float,
    tolerance: float,
    finalists: Sequence[Finalist] = (),
    reads: int = 1,
    constraints: Sequence[RecallConstraint] = (),
    trials: Sequence[TrialRecord] = (),
) -> str:
    """One sentence of verdict: what the exported model gained and kept on test, and what is not shown.

    `epsilon` and `tolerance` are in points. Without a model the `finalists` say why, or where there are none the
    `trials` of the search. `reads` is how often test was looked at.
    """
    if best is None:
        looks = f" (after {reads} looks at this test set)" if reads > 1 else ""
        asked = tolerance, constraints, classes
        why = _why_none(finalists, *asked) if finalists else _no_trial(trials, *asked)
        return f"No model: {why}; nothing is exported{looks}."
    after = f"; this is said after {reads} looks at this test set, and so with less than that confidence"
    after = after if reads > 1 else ""
    accuracy = best.accuracy_difference
    bound = f"difference {points(accuracy.estimate)}, {_bound(accuracy)}, n = {accuracy.n:,}{grouped(accuracy)}"
    gain = "; ".join(_gain(classes[c], difference) for c, difference in best.recall_difference.items())
    gain = f"{gain[0].upper()}{gain[1:]}"
    kept = "".join(f"; {said_of_constraint(found, classes)}" for found in best.constraints)
    if verdict == "certified":
        certified = f"accuracy is certified to be not more than {epsilon:g} points below the baseline model's"
        return f"{gain}; {certified} ({bound}){kept}{after}."
    if accuracy.lower_bound >= -epsilon / 100 and any(found.status == "broken" for found in best.constraints):
        return (
            f"{gain}; accuracy is shown to be not more than {epsilon:g} points below the baseline model's ({bound}), "
            f"but it gets no certificate, for recall is not as asked{kept}{after}."
        )
    needed = images_needed(accuracy, epsilon / 100)
    if needed is not None:
        way_out = f"about {needed:,} test images would be needed to certify such a difference in 4 of 5 cases"
    elif accuracy.estimate < -epsilon / 100:
        way_out = f"accuracy on test itself fell by more than {epsilon:g} points"
    else:
        way_out = "the difference is at the limit itself, which no number of images certifies; raise --epsilon"
    was = f"was within {tolerance:g} points of the baseline's" if tolerance else "was kept"
    return (
        f"{gain}; accuracy {was} on validation, but is not certified on test to be within {epsilon:g} points of the "
        f"baseline model's ({bound}; {way_out}){kept}{after}."
    )


def _gain(name: str, recall: PairedDifference) -> str:
    """What happened to one class's recall."""
    counts = f"{recall.gained} gained, {recall.lost} lost of {recall.n:,} images{grouped(recall, '')}"
    if recall.lower_bound > 0:
        return f"recall of {name} on test rose by {points(recall.estimate)} ({counts}; {_bound(recall)})"
    if recall.estimate > 0:
        return f"recall of {name} on test rose by {points(recall.estimate)} ({counts}: too few to tell from no gain)"
    if recall.estimate == 0:
        return f"recall of {name} on test did not change ({counts})"
    return f"recall of {name} on test FELL by {points(-recall.estimate, sign=False)} ({counts})"


def _no_trial(
    trials: Sequence[TrialRecord], tolerance: float, constraints: Sequence[RecallConstraint], classes: Sequence[str]
) -> str:
    """Why no trial of the search went to the final."""
    folds = range(len(constraints[0].images[0])) if constraints else ()
    scored = {
        f"trial #{t.number}": {c.name: c.misses(t.recall_per_class, folds) for c in constraints}
        for t in trials
        if t.state == "complete" and t.constraint is not None and t.constraint <= 0 and not t.feasible
    }
    if scored and constraints:
        return f"no trial of the search {obstacle(scored, constraints, classes)}"
    return (
        f"no trial of the search was eligible, none having validation accuracy {floor_in_words(tolerance)}, nor "
        f"nearly, and its checkpoint"
    )


def _why_none(
    finalists: Sequence[Finalist],
    tolerance: float,
    constraints: Sequence[RecallConstraint],
    classes: Sequence[str],
) -> str:
    at = floor_in_words(tolerance)
    kept, failed = sum(f.is_candidate for f in finalists), sum(f.validation is None for f in finalists)
    accurate = {f"trial #{f.trial}": f.misses for f in finalists if f.kept_accuracy}
    if accurate and not kept:
        if not any(f.split and f.kept_recall for f in finalists if f.kept_accuracy):
            return f"no finalist {obstacle(accurate, constraints, classes)}"
        return (
            "of each finalist whose means over seeds kept accuracy and recall as asked, no one model kept both (ways "
            "out: more --seeds, a lower --floor or a larger --max-drop, under another --name)"
        )
    if kept:
        return (
            f"of each of the {kept} finalist(s) with mean validation accuracy over seeds {at} a checkpoint is missing "
            f"or altered"
        )
    if failed == len(finalists):
        return f"of each of the {failed} finalist(s) a training failed"
    also = f" (and of {failed} of {len(finalists)} a training failed)" if failed else ""
    return f"no finalist had its mean validation accuracy over seeds {at}{also}"


def floor_in_words(tolerance: float) -> str:
    """Where a setting's mean validation accuracy must be; `tolerance` is in points."""
    return f"within {tolerance:g} points of the baseline's" if tolerance else "at the baseline's"


def images_needed(difference: PairedDifference, epsilon: float) -> int | None:
    """About how many test images would certify such a difference in 80 % of draws; None where it is at `-epsilon`.

    Or below: no number does then. Images like those at hand, in groups where these are.
    """
    room = difference.estimate + epsilon
    if room <= 0:
        return None
    # The variance of an image under the limit (Tango's restricted estimate, whose statistic must pass z) and as it is.
    gained, lost, delta = difference.gained / difference.n, difference.lost / difference.n, -epsilon
    b = -gained - lost + (2 - gained + lost) * delta
    q = (math.sqrt(max(b * b + 8 * lost * delta * (1 - delta), 0.0)) - b) / 4
    at_limit, as_it_is = 2 * q + delta * (1 - delta), gained + lost - (gained - lost) ** 2
    z, more = float(special.ndtri(difference.confidence)), float(special.ndtri(POWER))
    effective = (z * math.sqrt(at_limit) + more * math.sqrt(as_it_is)) ** 2 / room**2
    return math.ceil(effective * difference.n / difference.effective_n)


def smoothed_labels(share: Searchable) -> str | None:
    """What label smoothing does to what a study is about; None where there is none."""
    if share == 0:
        return None
    whose = "the baseline's not" if is_searched(share) else "the baseline's as well"
    return (
        f"Labels are smoothed by {text_of(share)}, {whose}: that draws the logits of all classes together, so that a "
        f"margin means another thing than without, and probabilities are calibrated less."
    )


def nothing_to_gain(recalls: Sequence[float], important: Sequence[int], classes: Sequence[str]) -> str | None:
    """A plain warning where the important class already has nearly perfect recall, naming the classes that do not."""
    lowest = min(recalls[c] for c in important)
    if lowest < 0.99:
        return None
    ranked = [c for c in sorted(range(len(classes)), key=lambda c: recalls[c]) if recalls[c] < 0.99][:3]
    names = ", ".join(f"{named(c, classes)} at {recalls[c]:.3f}" for c in ranked)
    mine = ", ".join(named(c, classes) for c in important)
    return f"Class {mine} has almost nothing to gain: the baseline's validation recall is {lowest:.3f} already. " + (
        f"The classes with most to gain are {names}." if names else "No other class has more to gain."
    )


def bias_alone(threshold: Threshold, best: Best | None, name: str) -> str | None:
    """Where the chosen setting is not shown to recall more than the baseline with a bias on the logit of class `name`.

    Or where nothing was chosen, and such a bias has something to give. None where no bias has, or the gain is shown.
    """
    gain, found = threshold.recall_difference, threshold.side.test
    if max(threshold.biases) <= 0 or (gain is not None and gain.holds_up):
        return None
    models = f"the baseline's own models, with one on the logit of {name} that is tuned on validation, have a recall of"
    figures = f"{found.recall.mean:.4f} and an accuracy of {found.accuracy.mean:.4f} on test"
    way = "--loss ce --calibrate under another --name would judge such models, by a second look at this test set"
    if best is None or gain is None:
        return f"A bias alone, which trains nothing, may do: {models} {figures}. {way}."
    chosen, more = best.side.test, " ".join(gain.in_points()).rstrip()
    return (
        f"Not shown to recall more than a bias alone, which trains nothing: {models} {figures}, those of the chosen "
        f"setting {chosen.recall.mean:.4f} and {chosen.accuracy.mean:.4f} (recall {more} points). {way}."
    )


def no_better_than_guessing(accuracy: float, counts: Sequence[int], classes: Sequence[str]) -> str | None:
    """A plain warning where the baseline is not shown to beat always naming the largest class; None where it is.

    `counts` (C,) are the validation images of each class, and `accuracy` the baseline's share of them: their sampling
    error is allowed for.
    """
    n, largest = sum(counts), max(range(len(counts)), key=lambda c: counts[c])
    if binomial_interval(accuracy * n, n).low > counts[largest] / n:
        return None
    return (
        f"The baseline is right on {accuracy:.3f} of validation, not clearly better than always naming class "
        f"{named(largest, classes)} ({counts[largest] / n:.3f}): the floor of accuracy then asks for little. Train "
        f"longer (--epochs), with another --learning-rate or --model, or look at the labels."
    )


def few_test_images(best: Best, classes: Sequence[str]) -> list[str]:
    """A plain warning for each important class with too few test images to show a high recall."""
    lines = []
    for c, share in best.exported_recall.items():
        if share.n < FEW_IMAGES or share.effective_n < FEW_IMAGES:
            few, if_all = f"{share.n} test images", "with all of them right"
            if share.effective_n < share.n:  # a difference has a count of its own
                count = f"{share.effective_n:.0f} independent ones"
                few += f"{tracks(share)}, which count as {count} for one model's recall"
            if share.all_right_n not in (None, share.effective_n):
                if_all += ", when a group counts as one,"
            lines.append(
                f"Class {named(c, classes)} has only {few}: one image is {100 / share.n:.1f} points of recall, and "
                f"even {if_all} no more is shown (95 %) than a recall of {share.most_shown:.3f}."
            )
    return lines


def provenance(result: Result) -> list[str]:
    """Which data chose, which judged, over how many seeds, what is claimed at what confidence, and what is not."""
    images, best, reads = result.images, result.best, result.test_reads
    lines = [f"Chose: {_who_chose(result)}"]
    of_class = f"{images['test_important']:,} of the important class{'es' if len(result.important) > 1 else ''}"
    if best is None:
        lines.append(
            f"Judged: nothing. No finalist was measured on test ({images['test']:,} images, {of_class}), the baseline "
            f"alone{_with_and_without(result)}."
        )
    else:
        of_tracks = tracks(best.accuracy_difference)
        of_those = ", as far as one keeps what is asked of recall" if result.constraints else ""
        lines += [
            f"Judged: test, {images['test']:,} images{of_tracks} ({of_class}), which chose nothing but to stop at the "
            f"first finalist that is certified. The baseline was measured on it{_with_and_without(result)}.",
            f"Claimed: what the exported model (seed {best.exported_seed}) does beside the baseline model of seed "
            f"{best.baseline_seed}, which the same rule chose{of_those}, on images like the test set's; "
            f"{_confidence(result, best)}",
        ]
        lines += [f"Asked as well: {asked_as_well(found, result.classes)}" for found in best.constraints]
        if best.constraints:
            lines.append(
                "A certificate is of accuracy alone: it is withheld where test shows a constraint on recall to be "
                "broken, and says nothing of one that is not shown."
            )
        if best.accuracy_difference.hidden is not None:
            effect = best.accuracy_difference.hidden.effect
            lines.append(
                f"Estimated: nobody says which test images show one object. On validation, where that is known, the "
                f"exported model's difference in accuracy to the baseline's varies {effect:.1f} times as much as with "
                f"independent images (the design effect); test is taken to be alike, and likewise for each recall. "
                f"It is an estimate, a rough one where few images changed sides."
            )
    lines.append(
        "Not claimed: anything about images unlike the test set's, about another seed (the intervals over seeds and "
        "images speak of that), or about training on more data."
    )
    if reads > 1:
        lines.append(
            f"Test has been read for {reads} different selections of this study: whoever saw an earlier result and "
            f"tried again has less than the stated confidence. Only a new test set restores it."
        )
    lines.append(
        "Not counted: looks at this test set by studies of another --name, --seed or --loss, which cost as much."
    )
    return lines


def _with_and_without(result: Result) -> str:
    return ", without a bias and with one that validation chose" if result.threshold else ""


def _who_chose(result: Result) -> str:
    count, trials = result.images["validation"], sum(result.trials.values())
    retrained = f"{len(result.finalists)} finalist(s) over {result.seeds} fresh seed(s) each"
    if result.folds == 1:
        ranked = ["the baseline's learning rates"] if result.rate_was_tuned else []
        ranked += [f"{trials} trial(s)"]
        ranked += [retrained] if result.finalists else []
        ranked += ["the seed that is exported"] if result.best else []
        before = f"{', '.join(ranked[:-1])}{',' if len(ranked) > 2 else ''} and " if ranked[1:] else ""
        return f"validation, {count:,} images held out. They ranked {before}{ranked[-1]}."
    rates = "The first fold ranked the baseline's learning rates, all folds together"
    text = (
        f"validation, {count:,} images in {result.folds} folds, each scored by models not trained on it. "
        f"{rates if result.rate_was_tuned else 'All folds together ranked'} {trials} trial(s)"
    )
    if result.finalists:
        text += f", and {retrained}, whose seeds take the folds in turn, were ranked by their means"
    if result.best:
        kept = "accuracy and what is asked of recall" if result.constraints else "accuracy"
        text += f". The first seed that keeps {kept} on its own fold is exported: it is not the one that recalls most"
    return f"{text}."


def _confidence(result: Result, best: Best) -> str:
    """At which confidence the bounds hold, each and together."""
    count, classes = max(result.candidates, result.sharing), len(best.recall_difference)
    recall = next(iter(best.recall_difference.values()))
    if count == classes == 1:
        return "accuracy's bound holds at about 95 %, one-sided, recall's likewise."
    at_first = " at an earlier look" if count > result.candidates else ""
    why = f"all {count} finalists that could have been judged{at_first}" if count > 1 else "one finalist"
    return (
        f"accuracy's bounds hold together at about 95 %, one-sided, recall's likewise, for {why}"
        f"{f' and {classes} classes' if classes > 1 else ''}: each of accuracy's at "
        f"{100 * best.accuracy_difference.confidence:.4g} %, of recall's at {100 * recall.confidence:.4g} %."
    )


def _bound(difference: PairedDifference) -> str:
    return f"{100 * difference.confidence:.4g} % lower bound {points(difference.lower_bound)}"
