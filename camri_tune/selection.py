"""Who goes to the final, in which order they are judged, and who is exported. Pure arithmetic on records."""

import math
from collections.abc import Callable, Mapping, Sequence

from scipy import special

from camri_tune.constraints import RecallConstraint
from camri_tune.differences import CONFIDENCE, PairedDifference
from camri_tune.records import Figure, TrialRecord
from camri_tune.result import Verdict

# Three seeds say little of how much one setting scatters: what all finalists show counts as so many degrees of freedom.
SHARED_FREEDOM = 4


def finalists(
    trials: Sequence[TrialRecord], count: int, slack: float = 0.0, slacks: Mapping[str, float] | None = None
) -> list[TrialRecord]:
    """The `count` best feasible trials that have a checkpoint: by recall, then accuracy, then the earlier one.

    After them, in the same order, those that miss the accuracy floor by at most `slack`, a fraction, and the other
    constraints by what `slacks` says of each: one trial says that little about the mean over seeds, which decides.
    """
    allowed = slacks or {}
    kept = [t for t in trials if t.state == "complete" and t.checkpoint is not None and t.sha256 is not None]
    eligible = [
        t
        for t in kept
        if _above(t.constraint) <= slack
        and all(value <= allowed.get(name, 0.0) for name, value in t.shortfalls.items())
    ]
    return sorted(eligible, key=lambda t: (not t.feasible, -_of(t.recall), -_of(t.accuracy), t.number))[:count]


def rank_settings(
    retrained: Mapping[int, Sequence[TrialRecord]], constraints: Sequence[RecallConstraint] = ()
) -> list[int]:
    """Source trials whose means over seeds keep the accuracy floor and all `constraints`, and one model of whose does.

    Those of the highest lower bound of recall come first; of the highest mean where no variance gives a bound. Where
    accuracy alone is to be kept there always is such a model; with several constraints each could be kept by another
    one, and none could be exported. `retrained` maps a finalist's trial number to its retrained models on validation.
    Of equal bounds the higher mean accuracy goes first, then the earlier trial. A setting with a failed seed has not
    shown that it trains reliably, and is left out.
    """
    bounds = recall_bounds(retrained)

    def keeps(number: int) -> bool:
        models = retrained[number]
        return (
            mean_shortfall(models) <= 0
            and all(max(c.misses_over_seeds(models).values()) <= 0 for c in constraints)
            and bool(rank_models(models))
        )

    def key(number: int) -> tuple[float, float, int]:
        bound, models = bounds[number], retrained[number]
        recall = _mean_recall(models).mean if bound is None else round(bound, 12)
        return -recall, -Figure(tuple(_of(r.accuracy) for r in models)).mean, number

    return sorted((number for number in bounds if keeps(number)), key=key)


def mean_shortfall(models: Sequence[TrialRecord]) -> float:
    """By how much a setting's mean accuracy over seeds is below its floor; infinite where a model's is not known."""
    return Figure(tuple(_above(r.constraint) for r in models)).mean


def recall_bounds(retrained: Mapping[int, Sequence[TrialRecord]]) -> dict[int, float | None]:
    """One-sided 95 % lower bound of the mean recall over seeds, of each setting whose seeds all trained.

    Student's t, where a setting's variance over seeds is drawn towards what all settings show together: with few seeds
    its own is mostly chance, and to order by it picks worse settings (`benchmarks/certificate.py`). None where no
    variance is known: with one seed, or where the seeds of every setting agree.
    """
    figures = {
        number: _mean_recall(records)
        for number, records in retrained.items()
        if records and all(r.state == "complete" for r in records)
    }
    variances = {number: figure.sd**2 for number, figure in figures.items() if figure.sd is not None}
    shared = sum(variances.values()) / max(len(variances), 1)
    if shared < 1e-24:  # none but rounding's
        return dict.fromkeys(figures)
    bounds: dict[int, float | None] = {}
    for number, figure in figures.items():
        own = len(figure.values) - 1
        freedom = own + SHARED_FREEDOM
        variance = (own * variances.get(number, 0.0) + SHARED_FREEDOM * shared) / freedom
        bounds[number] = figure.mean - float(special.stdtrit(freedom, CONFIDENCE)) * math.sqrt(variance / (own + 1))
    return bounds


def _mean_recall(models: Sequence[TrialRecord]) -> Figure:
    return Figure(tuple(_of(r.recall) for r in models))


def rank_models(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Models of one setting that meet every constraint themselves: by recall, then accuracy, then seed.

    By seed alone where they were scored on different folds: their recalls are of different images.
    """
    feasible = [r for r in records if r.feasible]
    if len({r.fold for r in records}) > 1:
        return sorted(feasible, key=lambda r: r.seed or 0)
    return sorted(feasible, key=lambda r: (-_of(r.recall), -_of(r.accuracy), r.seed or 0))


def certify(
    order: Sequence[int],
    judge: Callable[[int, float], PairedDifference | None],
    epsilon: float,
    breaks: Callable[[int, float], bool] = lambda _number, _confidence: False,
    sharing: int = 0,
) -> tuple[Verdict, int | None, dict[int, PairedDifference]]:
    """Judge settings in a fixed order until one is certified: its accuracy is shown to be within `epsilon`, a fraction.

    One that `breaks` a constraint of recall is passed over all the same: there test shows, at that confidence, that a
    promise is not kept, and what is called certified gets used. That can only take certificates away, and so what they
    say of accuracy errs no more often; chance alone takes them from settings that keep all floors in about 5 % of
    studies at most, and as often for the largest drop.
    A promise that is not shown takes none away. With 36 images of a class even all of them right show no recall above
    0.92, and a few errors of one class among many are chance: to decide by them would be to let chance on test choose
    what is exported. A certificate thus says nothing of such a promise, and the sentence of verdict says so.

    `judge(number, confidence)` compares the accuracy of one setting's model on test with the baseline's, its bounds
    holding at that confidence; None where its files are damaged, and it is passed over. Returns the verdict, which
    setting is exported (where nothing was certified, the first in the order) and everything that was judged. All
    settings share the 5 % of doubt evenly (Bonferroni), so that a certificate is wrong in about 5 % of studies at most,
    however many settings were judged. Where more were `sharing` it at an earlier look at test, so many still do: to ask
    for fewer afterwards makes nothing surer. About: Tango's bound is approximate (6.7 % with one setting, 540 images
    and none gained), and a rare loss of whole groups that the test set happens not to hold cannot be seen in it
    (`benchmarks/certificate.py`).
    """
    confidence = shared_confidence(max(len(order), sharing))
    judged: dict[int, PairedDifference] = {}
    for number in order:
        found = judge(number, confidence)
        if found is None:
            continue
        judged[number] = found
        if found.lower_bound >= -epsilon and not breaks(number, confidence):
            return "certified", number, judged
    return ("feasible", next(iter(judged)), judged) if judged else ("none", None, judged)


def shared_confidence(count: int) -> float:
    """The one-sided confidence of each of `count` bounds that hold together at 95 %."""
    return 1 - (1 - CONFIDENCE) / max(count, 1)


def _of(value: float | None) -> float:
    return -math.inf if value is None else value


def _above(value: float | None) -> float:
    return math.inf if value is None else value
