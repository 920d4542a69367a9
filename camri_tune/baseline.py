"""The cross-entropy baseline: its learning rate is tuned too, so that CAMRI is not the only one that was tuned."""

import math
from collections.abc import Sequence

from camri_tune.config import floor_of
from camri_tune.errors import InputError
from camri_tune.records import Baseline, TrialRecord

START_FACTORS = (0.5, 1.0, 2.0, 4.0)
MAX_LEARNING_RATES = 6


def next_learning_rates(tried: Sequence[TrialRecord], default: float) -> list[float]:
    """Learning rates to try next: first around `default`; then outward while the best is at an edge."""
    if not tried:
        return [default * factor for factor in START_FACTORS]
    rates = sorted(record.params["learning_rate"] for record in tried)
    if len(rates) >= MAX_LEARNING_RATES:
        return []
    best = best_learning_rate(tried, default)
    if best is None or best == rates[0]:
        return [rates[0] / 2]
    return [rates[-1] * 2] if best == rates[-1] else []


def best_learning_rate(tried: Sequence[TrialRecord], default: float) -> float | None:
    """The rate of highest validation accuracy, of equals the one nearest `default`; None where all trainings failed."""
    complete = [r for r in tried if r.state == "complete" and r.accuracy is not None]
    if not complete:
        return None
    rate = "learning_rate"
    nearest = max(complete, key=lambda r: (r.accuracy or 0.0, -abs(math.log(r.params[rate] / default))))
    return float(nearest.params[rate])


def resolve_important(tokens: Sequence[str], classes: Sequence[str], baseline: Baseline) -> tuple[int, ...]:
    """Class indices of the important classes: names, indices, and ranks by the baseline's validation recall.

    `worst1` is the class with the lowest recall, `median` the middle one; ties go to the lower index.
    """
    recalls = baseline.recall_per_class
    ranked = sorted(range(len(classes)), key=lambda c: (recalls[c], c))
    found = []
    for token in tokens:
        rank = rank_of(token, len(classes))
        found.append(class_index(token, classes) if rank is None else ranked[rank])
    return tuple(dict.fromkeys(c for c in found if c is not None))


def named_classes(tokens: Sequence[str], classes: Sequence[str]) -> tuple[int, ...]:
    """Class indices of important classes that are all named; none where a baseline has to say who one of them is."""
    if any(rank_of(token, len(classes)) is not None for token in tokens):
        return ()
    found = [class_index(token, classes) for token in tokens]
    return tuple(dict.fromkeys(c for c in found if c is not None))


def resolve_floors(floors: Sequence[str], classes: Sequence[str], baseline: Baseline) -> dict[int, float]:
    """The least recall of some classes, by index, from 'CLASS>=SHARE'. Of two for one class the higher keeps both."""
    found: dict[int, float] = {}
    for token, share in map(floor_of, floors):
        (c,) = resolve_important([token], classes, baseline)
        found[c] = max(share, found.get(c, 0.0))
    return found


def check_important(tokens: Sequence[str], classes: Sequence[str], option: str = "--important") -> None:
    """Raise InputError for a token that no baseline could resolve: before hours are spent, not after."""
    for token in tokens:
        if rank_of(token, len(classes)) is None and class_index(token, classes) is None:
            raise InputError(
                f"{option} {token!r} is no class here: give an index from 0 to {len(classes) - 1}, a class name "
                f"(such as {classes[0]!r}), worst1 to worst{len(classes)}, or median"
            )


def rank_of(token: str, num_classes: int) -> int | None:
    """The place that `worstK` or `median` means in an ascending ranking; None for other tokens."""
    if token == "median":
        return num_classes // 2
    if token.startswith("worst") and _is_number(token.removeprefix("worst")):
        place = int(token.removeprefix("worst")) - 1
        return place if 0 <= place < num_classes else None
    return None


def class_index(token: str, classes: Sequence[str]) -> int | None:
    """The index of a class given by its name (any case) or its index; None where there is no such class."""
    for names in (list(classes), [name.lower() for name in classes]):
        for text in (token, token.lower()):
            if text in names:
                return names.index(text)
    return int(token) if _is_number(token) and int(token) < len(classes) else None


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()  # other scripts have digits that int() does not read
