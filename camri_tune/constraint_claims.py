"""What may be said of constraints on recall: before the search, on test, and of the one that nothing met."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from camri_tune.constraints import ClassOnTest, OnTest, RecallConstraint, Status
from camri_tune.differences import CONFIDENCE, Share, grouped, points
from camri_tune.records import named
from camri_tune.stats import binomial_interval, tango_interval

MOST_NAMED = 5  # classes in a sentence


def doubtful_constraints(
    constraints: Sequence[RecallConstraint],
    baseline: Sequence[float],
    images: Sequence[int],
    units: Sequence[int],
    classes: Sequence[str],
) -> list[str]:
    """What to know before a search is paid for: floors that the baseline does not meet, and classes that are too small.

    `baseline` (C,) are its mean validation recalls; `images` (C,) are each class's validation images, those of several
    folds counted once; `units` (C,) how many groups they form.
    A class is too small where not even a model with all of its images right, or for a drop with none changed, would
    show at 95 % what is asked: whether a trial meets it is partly chance then.
    """
    lines = []
    for constraint in constraints:
        asked, c = f"{constraint.asked:g}", constraint.classes[0]
        if constraint.kind == "floor" and baseline[c] < constraint.asked:
            lines.append(
                f"The baseline itself does not meet the floor of class {named(c, classes)}: its validation recall is "
                f"{baseline[c]:.4f}, and {asked} is what the study has to reach."
            )
        small = [c for c in constraint.classes if _most_shown(constraint, units[c]) < constraint.limit]
        if not small:
            continue
        c = min(small, key=lambda c: units[c])
        in_groups = units[c] < images[c]
        has = f"{images[c]:,} validation images" + (f" of {units[c]} groups" if in_groups else "")
        has += f", and one {'group' if in_groups else 'image'} is {100 / units[c]:.1f} points"
        if constraint.kind == "floor":
            lines.append(
                f"The floor of class {named(c, classes)}, {asked}, cannot be told from noise on validation: it has "
                f"{has}. Even with all of them right no recall above {_most_shown(constraint, units[c]):.3f} is shown "
                f"(95 %)."
            )
        else:
            lines.append(
                f"A drop of {asked} points cannot be told from noise on validation for {len(small)} of "
                f"{len(constraint.classes)} classes: the smallest, {named(c, classes)}, has {has}."
            )
    return lines


def _most_shown(constraint: RecallConstraint, units: int) -> float:
    """The highest lower bound that so many independent images can show: all right, or none changed."""
    if constraint.kind == "floor":
        return binomial_interval(units, units, 2 * CONFIDENCE - 1).low
    return tango_interval(0, 0, units, 2 * CONFIDENCE - 1).low


def obstacle(
    scored: Mapping[str, Mapping[str, Mapping[int, float]]],
    constraints: Sequence[RecallConstraint],
    classes: Sequence[str],
) -> str:
    """What stopped those that kept accuracy, how near the nearest came (its worst class decides), and the way out.

    `scored` has of each of them, by what it is called, the misses of each class by constraint.
    """

    def worst(misses: Mapping[str, Mapping[int, float]]) -> tuple[float, str, int]:
        return max((miss, name, c) for name, of_class in misses.items() for c, miss in of_class.items())

    who, (miss, name, c) = min(((who, worst(misses)) for who, misses in scored.items()), key=lambda found: found[1][0])
    constraint = next(one for one in constraints if one.name == name)
    easier = "a lower --floor" if constraint.kind == "floor" else "a larger --max-drop"
    return (
        f"that kept accuracy on validation kept recall as asked: of the nearest, {who}, "
        f"{constraint.missed_in_words(c, miss, classes)} (ways out: more --trials; {easier} or a larger --tolerance, "
        f"under another --name)"
    )


def said_of_constraint(found: OnTest, classes: Sequence[str]) -> str:
    """What test shows of a constraint, or only suggests, or contradicts: a clause."""
    asked, status = f"{found.constraint.asked:g}", found.status
    if found.constraint.kind == "floor":
        name = named(found.constraint.classes[0], classes)
        if not found.classes:
            return f"that recall of {name} is at least {asked} is NOT shown, for test has no images of it"
        figures = _figures(found.worst)
        return {
            "shown": f"recall of {name} is shown to be at least {asked} ({figures})",
            "held": f"recall of {name} was not below its floor of {asked} on test, which is NOT shown ({figures})",
            "missed": f"recall of {name} was BELOW its floor of {asked} on test, as chance may have it ({figures})",
            "broken": f"recall of {name} is BELOW its floor of {asked}, beyond chance ({figures})",
        }[status]
    what = f"more than {asked} points below the baseline model's"
    if not found.classes:
        return f"that no class's recall is {what} is NOT shown, for test has no images"
    count, shown = len(found.constraint.classes), len(found.of_status("shown"))
    worst = f"the worst, {named(found.worst.c, classes)}: {_figures(found.worst)}"
    if status == "shown":
        return f"of each of {count} classes recall is shown to be not {what} ({worst})"
    below = sorted(found.of_status("broken", "missed"), key=lambda one: one.value)
    if not below:
        unseen = f"; {count - len(found.classes)} have no test images" if status == "unseen" else ""
        return (
            f"no class's recall was {what} on test, which is NOT shown for {count - shown} of {count} classes "
            f"({worst}{unseen})"
        )
    broken = [one for one in below if one.status == "broken"]
    how = f"beyond chance for {_names(broken, classes)}" if broken else "as chance may have it"
    return (
        f"recall of {len(below)} of {count} classes ({_names(below, classes)}) WAS {what} on test, {how} ({worst}); "
        f"that it is not is shown for {shown}"
    )


def asked_as_well(found: OnTest, classes: Sequence[str]) -> str:
    """A constraint, what became of it on test, and at which confidence it was judged."""
    alike, of_what = "floors", "of the exported model"
    if found.constraint.kind == "max_drop":
        alike, of_what = "classes of the drop", "of the exported model beside the same baseline model"
    at = f"{100 * min((one.measured.confidence for one in found.classes), default=CONFIDENCE):.4g} %"
    return (
        f"{found.constraint.in_words(classes)} ({found.status} on test, {of_what}; each bound at {at}, one-sided, "
        f"those of all {alike} together at about 95 %)."
    )


TABLE_HEAD = (
    "asked",
    "class",
    "recall on validation: baseline, best",
    "recall on test: baseline, best",
    "exported model on test, bounds",
    "on test",
)


def constraint_table(constraints: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> list[tuple[str, ...]]:
    """Rows under `TABLE_HEAD` of what `result.json` has of constraints: of a drop the `MOST_NAMED` worst classes.

    Means over seeds with their standard deviations; bounds one-sided.
    """
    rows = []
    for constraint in constraints:
        found = sorted(constraint["classes"], key=_test_value)
        asked = f"{constraint['in_words']} (met on validation: {_YES_NO[constraint['met_on_validation']]})"
        for place, one in enumerate(found[:MOST_NAMED]):
            sides = [one["baseline"], *([one["best"]] if one["best"] else [])]
            means = [", ".join(_mean(side[part]) for side in sides) for part in ("validation", "test")]
            rows.append(
                (asked if place == 0 else "", named(one["class"], classes), *means, *_what_test_says(one["test"]))
            )
        if len(found) > MOST_NAMED:
            rows.append(("", f"and {len(found) - MOST_NAMED} more, less near their limit", "", "", "", ""))
    return rows


_YES_NO = {True: "yes", False: "no", None: "no model"}


def _test_value(one: Mapping[str, Any]) -> float:
    return -math.inf if one["test"] is None else float(one["test"]["value"])


def _mean(figure: Mapping[str, Any]) -> str:
    """A figure of `result.json`, in per cent; it has no mean where there are no images."""
    if figure["mean"] is None or math.isnan(figure["mean"]):
        return "-"
    return f"{100 * figure['mean']:.2f} %" + ("" if figure["sd"] is None else f" ± {100 * figure['sd']:.2f}")


def _what_test_says(test: Mapping[str, Any] | None) -> tuple[str, str]:
    if test is None:
        return "", "not measured"
    unit = "%" if test["of"] == "recall" else "points to the baseline model"
    value, low, high = (100 * number for number in (test["value"], *test["interval"]))
    sign = "" if test["of"] == "recall" else "+"
    fewer = f", which count as {test['effective_n']:,.0f}" if test["effective_n"] < test["n"] else ""
    text = f"{value:{sign}.2f} {unit} [{low:{sign}.2f}, {high:{sign}.2f}], each end at {100 * test['confidence']:.4g} %"
    return f"{text}; {test['n']:,} images{fewer}", _SAID[test["status"]]


_SAID: dict[Status, str] = {
    "shown": "kept, and shown",
    "held": "kept, not shown",
    "missed": "NOT kept, as chance may have it",
    "broken": "BROKEN, beyond chance",
    "unseen": "not measured",
}


def _names(some: Sequence[ClassOnTest], classes: Sequence[str]) -> str:
    more = f" and {len(some) - MOST_NAMED} more" if len(some) > MOST_NAMED else ""
    return ", ".join(named(one.c, classes) for one in some[:MOST_NAMED]) + more


def _figures(one: ClassOnTest) -> str:
    """What was seen of a class, and the bound that decides."""
    measured, (low, high) = one.measured, one.measured.interval
    which, end = ("upper", high) if one.status == "broken" else ("lower", low)
    at, images = f"{100 * measured.confidence:.4g} % {which} bound", f"images{grouped(measured, '')}"
    if isinstance(measured, Share):
        return f"{measured.value:.4f}, {measured.right:,} of {measured.n:,} {images}; {at} {end:.4f}"
    return f"{points(one.value)}, {measured.n:,} {images}; {at} {points(end)}"
