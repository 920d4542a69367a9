"""Models measured on the test part: the final judgement of a study, and of an exported model from its files alone."""

import math
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from camri_tune.bundle import Bundle, load_classifier, read_bundle
from camri_tune.calibration import Calibration, fit_temperature
from camri_tune.config import HEAD, Loss, Model, StudyConfig
from camri_tune.constraints import ROUNDING, ClassOnTest, OnTest, RecallConstraint, shortfalls
from camri_tune.datasets import Dataset, Unseen, open_test_images, require_images
from camri_tune.differences import Known, PairedDifference, SeedDifference, Share
from camri_tune.errors import BundleError, CamriTuneError, InputError
from camri_tune.evidence import SHOWN, SIDE, Evidence, angles, kinds_of_images
from camri_tune.images import Images, resized, with_channels
from camri_tune.metrics import Precision, accuracy, confusion_matrix, pack, recall_per_class, unpack
from camri_tune.models import Classifier
from camri_tune.posthoc import tune_bias
from camri_tune.records import BIAS, Measured, TrialRecord, biases_of, measured_on_validation, without_nan
from camri_tune.result import Best, Side, Threshold
from camri_tune.search import model_spec
from camri_tune.selection import rank_models
from camri_tune.stats import Hidden
from camri_tune.storage import StudyStore
from camri_tune.training import cpu_count, predict, predict_logits

Answers = NDArray[np.int64]  # predicted class of each test image


class Shown(NamedTuple):
    """What a model shows on test: predicted classes (N,), and angles (N,) in degrees as in `Evidence`.

    And what it would answer with another bias: the first important class's logit (N,), that of its strongest `rival`
    and who that is.
    """

    answers: Answers
    to_important: NDArray[np.float32]
    to_other: NDArray[np.float32]
    logit: NDArray[np.float32]
    rivals_logit: NDArray[np.float32]
    rival: Answers

    def biased(self, c: int, bias: float) -> "Shown":
        """The same with a bias on the logit of class `c`, the first important one, as `Classifier` adds it."""
        logit = self.logit + np.float32(bias)
        wins = (logit > self.rivals_logit) | ((logit == self.rivals_logit) & (c < self.rival))
        return self._replace(answers=np.where(wins, c, self.rival), logit=logit)


@dataclass(frozen=True)
class Entrant:
    """One setting's R models, and the place of the one that validation chose."""

    records: Sequence[TrialRecord]
    loss: Loss
    place: int

    @property
    def chosen(self) -> TrialRecord:
        return self.records[self.place]


class Judge:
    """Measures a study's models on the test part, which is read when it is first asked for and not before."""

    def __init__(
        self,
        data: Dataset,
        store: StudyStore,
        important: Sequence[int],
        model: Model,
        device: torch.device,
        constraints: Sequence[RecallConstraint] = (),
    ) -> None:
        self._data = data
        self._store = store
        self._important = important
        self._model = model
        self._device = device
        self._constraints = constraints
        self._shown: dict[str | None, Shown] = {}  # by checkpoint

    @cached_property
    def test(self) -> Images:
        """The test part. Raises DataError where it has no image of an important class."""
        images = self._data.test()
        require_images(images, self._important, self._data.classes)
        return images

    def calibrated(
        self, record: TrialRecord, loss: Loss, floor: float | None, tolerance: float = 0.0
    ) -> TrialRecord | None:
        """The model with a bias on the important class's logit, tuned on validation, and what validation says of it.

        The bias has the highest recall of those whose accuracy keeps `floor` (None: the model's own accuracy less
        `tolerance`, both shares), and is a parameter of the record. None where the checkpoint is missing or altered, or
        logits are not finite.
        """
        (important,), (_, validation) = self._important, self._data.fold(record.fold)
        logits, labels = self.logits(record, loss, validation), validation.labels.numpy()
        if logits is None or not bool(logits.isfinite().all()):
            return None
        if floor is None:  # as these logits have it: the device that trained it may have rounded otherwise
            floor = float((logits.argmax(dim=1).numpy() == labels).mean()) - tolerance - ROUNDING
        bias = tune_bias(logits.numpy(), labels, important=important, floor=floor).bias
        logits[:, important] += bias  # as the exported model does, to the last bit
        answers = logits.argmax(dim=1).numpy()
        confusion = confusion_matrix(labels, answers, len(self._data.classes))
        recalls = recall_per_class(confusion)
        return replace(
            record,
            params={**record.params, f"{BIAS}{important}": bias},
            accuracy=accuracy(confusion),
            recall=float(recalls[important]),
            recall_per_class=tuple(recalls.tolist()),
            constraint=floor - accuracy(confusion),
            shortfalls=shortfalls(self._constraints, recalls.tolist(), [record.fold]),
            right=pack(labels == answers),
        )

    def entrant(self, records: Sequence[TrialRecord], loss: Loss) -> Entrant | None:
        """A setting's models; None where a checkpoint of them is missing or altered."""
        if any(self._classifier(record, loss) is None for record in records):
            return None
        return Entrant(records, loss, list(records).index(rank_models(records)[0]))

    def shown(self, record: TrialRecord, loss: Loss) -> Shown:
        """What a model shows on test. Each is asked once, whatever biases it may have.

        Raises CamriTuneError where its checkpoint has just gone.
        """
        if record.sha256 not in self._shown:
            classifier, important = self._required(_without_bias(record), loss), list(self._important)
            weights = F.normalize(classifier.head.class_weights.detach().float().cpu())
            parts, first = [], 0
            for embeddings, logits in predict(classifier, self.test, self._device):
                labels = self.test.labels[first : first + len(logits)].numpy()
                # Not by NumPy, whose threads and PyTorch's would wait for each other: a pass took 1.4 times as long.
                found = angles((F.normalize(embeddings) @ weights.T).numpy(), labels, important)
                others = logits.clone()
                others[:, important[0]] = -math.inf
                rivals = others.max(dim=1)
                parts.append(
                    (
                        logits.argmax(dim=1).numpy(),
                        *found,
                        logits[:, important[0]].numpy(),
                        rivals.values.numpy(),
                        rivals.indices.numpy(),
                    )
                )
                first += len(logits)
            self._shown[record.sha256] = Shown(*map(np.concatenate, zip(*parts, strict=True)))
        shown = self._shown[record.sha256]
        for c, bias in biases_of(record.params).items():
            shown = shown.biased(c, bias)
        return shown

    def logits(self, record: TrialRecord, loss: Loss, images: Images) -> torch.Tensor | None:
        """Logits (N, C) of a trial's model; None where its checkpoint is missing or altered."""
        classifier = self._classifier(record, loss)
        return None if classifier is None else predict_logits(classifier, images, self._device)

    def _required(self, record: TrialRecord, loss: Loss) -> Classifier:
        classifier = self._classifier(record, loss)
        if classifier is None:
            raise CamriTuneError(
                f"the checkpoint of trial {record.number} ({loss}) was removed or altered just now; put it back under "
                f"{self._store.artifacts_url} and run again"
            )
        return classifier

    def _classifier(self, record: TrialRecord, loss: Loss) -> Classifier | None:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "model.safetensors"
            if not self._store.fetch_checkpoint(record, path):
                return None
            try:
                spec = model_spec(self._data, self._model, loss, record.params)
                return load_classifier(path, spec).to(self._device)
            except BundleError:
                return None

    def evidence(self, new: Entrant, old: Entrant) -> Evidence:
        """What test shows of the exported model beside the baseline's, image by image, for a report."""
        labels = self.test.labels.numpy()
        both = [self.shown(entrant.chosen, entrant.loss) for entrant in (old, new)]
        answers = np.stack([shown.answers for shown in both])
        to_important = np.stack([shown.to_important for shown in both])
        to_other = np.stack([shown.to_other for shown in both])
        kinds = kinds_of_images(labels, answers, list(self._important))
        rows = np.unique(np.concatenate([rows[:SHOWN] for rows in kinds.values()]))
        if self.test.are_embeddings:  # of which there is nothing to look at
            return Evidence(labels, answers, to_important, to_other, rows[:0], np.zeros((0, 1, 1, 1), np.uint8))
        shown = resized(self.test[rows], min(SIDE, self._data.image_size)).pixels.numpy()
        return Evidence(labels, answers, to_important, to_other, rows, shown)

    def calibration(self, record: TrialRecord, loss: Loss) -> Calibration | None:
        """A temperature fitted on validation images that the model was not trained on, and what test says of it.

        A bias on the important class's logit belongs to the decision alone. None where the checkpoint went missing just
        now, or logits are not finite.
        """
        validation, plain = self._data.fold(record.fold)[1], _without_bias(record)
        found = [self.logits(plain, loss, images) for images in (validation, self.test)]
        held_out, unseen = (None if logits is None else logits.numpy() for logits in found)
        if held_out is None or unseen is None or not (np.isfinite(held_out).all() and np.isfinite(unseen).all()):
            return None
        return Calibration.of(
            unseen,
            self.test.labels.numpy(),
            temperature=fit_temperature(held_out, validation.labels.numpy()),
            bias=biases_of(record.params),
            important=self._important,
            fitted_on=len(validation),
        )

    def measured(self, entrant: Entrant) -> Measured:
        """Figures on test over the seeds of one setting."""
        labels = self.test.labels.numpy()
        answers = [self.shown(record, entrant.loss).answers for record in entrant.records]
        recalls = [recall_per_class(confusion_matrix(labels, a, len(self._data.classes))).tolist() for a in answers]
        return Measured.over_seeds([float((a == labels).mean()) for a in answers], recalls, self._important)

    def accuracy_difference(self, new: Entrant, old: Entrant, confidence: float) -> PairedDifference:
        """Of a setting's chosen model to the baseline's on test, with bounds that hold at `confidence`, one-sided.

        No other model is asked for it.
        """
        return self._difference(new, old, None, confidence, self._tracks(new, old))

    def best(self, trial: int, new: Entrant, old: Entrant, confidence: float) -> Best:
        """What test says of a setting beside the baseline, with bounds that hold at `confidence`, one-sided.

        The important classes share the doubt of what is said of recall.
        """
        labels, groups, important = self.test.labels.numpy(), self.test.groups.numpy(), self._important
        chosen = self._right(new.chosen, new.loss)
        answers = (self.shown(entrant.chosen, entrant.loss).answers for entrant in (old, new))
        before, after = (confusion_matrix(labels, a, len(self._data.classes)) for a in answers)
        tracks = self._tracks(new, old)
        of_class = {c: labels == c for c in important}
        shared = 1 - (1 - confidence) / len(important)
        shares = {c: None if tracks is None else tracks.of_exported(c).hidden for c in (None, *important)}
        return Best(
            trial=trial,
            params={k: v if isinstance(v, str) else float(v) for k, v in new.chosen.params.items()},
            side=Side(measured_on_validation(new.records, important), self.measured(new)),
            exported_seed=new.chosen.seed or 0,
            exported_accuracy=Share.of(chosen, groups, shares[None]),
            exported_recall={c: Share.of(chosen[own], groups[own], shares[c]) for c, own in of_class.items()},
            precision={c: (Precision.of(before, c), Precision.of(after, c)) for c in important},
            baseline_seed=old.chosen.seed or 0,
            accuracy_difference=self._difference(new, old, None, confidence, tracks),
            recall_difference={c: self._difference(new, old, c, shared, tracks) for c in important},
            recall_over_seeds={c: self._over_seeds(new, old, c, tracks) for c in important},
            accuracy_over_seeds=self._over_seeds(new, old, None, tracks),
            constraints=self.constraints(new, old, confidence),
        )

    def threshold(self, old: Entrant, new: Entrant | None, tolerance: float) -> Threshold | None:
        """What a bias alone makes of the baseline's models `old`, beside the chosen setting `new`, if there is one.

        `tolerance` is the share of its validation accuracy that each may give up. None with several important classes,
        whose biases would be at odds, and as in `calibrated`.
        """
        if len(self._important) > 1:
            return None
        tuned = [self.calibrated(r, "ce", None, tolerance) for r in old.records]
        models = [r for r in tuned if r is not None]
        if len(models) < len(tuned):
            return None
        (c,), biased = self._important, Entrant(models, "ce", old.place)
        tracks = None if new is None else self._tracks(new, biased)
        return Threshold(
            biases=tuple(bias for r in models for bias in biases_of(r.params).values()),
            side=Side(measured_on_validation(models, self._important), self.measured(biased)),
            recall_difference=None if new is None else self._over_seeds(new, biased, c, tracks),
            accuracy_difference=None if new is None else self._over_seeds(new, biased, None, tracks),
        )

    def constraints(self, new: Entrant, old: Entrant, confidence: float) -> tuple[OnTest, ...]:
        """What test says of each constraint of recall: of a setting's chosen model, for a drop beside the baseline's.

        All floors share the doubt that `confidence` leaves, and so do all classes of a drop: of each it is said by
        itself whether it is shown.
        """
        tracks = self._tracks(new, old) if self._constraints else None
        return tuple(self._on_test(one, new, old, confidence, tracks) for one in self._constraints)

    def _on_test(
        self, constraint: RecallConstraint, new: Entrant, old: Entrant, confidence: float, tracks: "_Tracks | None"
    ) -> OnTest:
        labels, groups = self.test.labels.numpy(), self.test.groups.numpy()
        alike = sum(len(one.classes) for one in self._constraints if one.kind == constraint.kind)
        shared = 1 - (1 - confidence) / alike
        found = []
        for c in constraint.classes:
            own = labels == c
            if not own.any():
                continue
            measured: Share | PairedDifference
            if constraint.kind == "floor":
                hidden = None if tracks is None else tracks.of_exported(c).hidden
                measured = Share.of(self._right(new.chosen, new.loss)[own], groups[own], hidden, shared)
            else:
                measured = self._difference(new, old, c, shared, tracks)
            found.append(ClassOnTest(c, constraint.limit, measured))
        return OnTest(constraint, tuple(found))

    def _difference(
        self, new: Entrant, old: Entrant, c: int | None, confidence: float, tracks: "_Tracks | None"
    ) -> PairedDifference:
        """Of the two chosen models' right answers to the test images of class `c`, or to all."""
        labels, groups = self.test.labels.numpy(), self.test.groups.numpy()
        own = np.ones(len(labels), bool) if c is None else labels == c
        right, old_right = (self._right(e.chosen, e.loss)[own] for e in (new, old))
        return PairedDifference.of(
            right, old_right, groups[own], confidence, None if tracks is None else tracks.of_one(c)
        )

    def _over_seeds(self, new: Entrant, old: Entrant, c: int | None, tracks: "_Tracks | None") -> SeedDifference:
        """Of all models of both, seed by seed, on the test images of class `c`, or on all."""
        labels, groups = self.test.labels.numpy(), self.test.groups.numpy()
        own = np.ones(len(labels), bool) if c is None else labels == c
        right, old_right = (np.stack([self._right(r, e.loss)[own] for r in e.records]) for e in (new, old))
        return SeedDifference.of(right, old_right, groups[own], None if tracks is None else tracks.of_all(c).hidden)

    def _right(self, record: TrialRecord, loss: Loss) -> NDArray[np.bool_]:
        """Whether a model gets each test image right (N,)."""
        right: NDArray[np.bool_] = self.shown(record, loss).answers == self.test.labels.numpy()
        return right

    def _known(self, record: TrialRecord, loss: Loss, images: Images) -> NDArray[np.bool_]:
        """Whether a model gets each validation image of its fold right, as its training noted."""
        if record.right is not None:
            return unpack(record.right, len(images))
        # A study that an earlier version began.
        logits = predict_logits(self._required(record, loss), images, self._device)
        return (logits.argmax(dim=1) == images.labels).numpy()

    def _tracks(self, new: Entrant, old: Entrant) -> "_Tracks | None":
        """What validation, where groups are known, shows of the same models; None where those of test are, too.

        Each pair of one seed is asked about the fold on which both were scored, and neither was trained.
        """
        if self._data.hidden_group_size <= 1:
            return None
        found: list[tuple[Images, NDArray[np.bool_], NDArray[np.bool_]]] = []
        for ours, theirs in zip(new.records, old.records, strict=True):
            images = self._data.fold(ours.fold)[1]
            right, old_right = self._known(ours, new.loss, images), self._known(theirs, old.loss, images)
            found.append((images, right, old_right))
        return _Tracks(self._data.hidden_group_size, found, [r.fold for r in new.records], new.place, old.place)


@dataclass(frozen=True)
class _Tracks:
    """What each seed's pair of models gets right on its fold's validation images, whose groups are known.

    `pairs` holds the images, and (N,) of the new model and of the baseline's, for each seed. `place` is the exported
    one's, `old_place` that of the baseline's model it is compared with.
    """

    size: int
    pairs: Sequence[tuple[Images, NDArray[np.bool_], NDArray[np.bool_]]]
    folds: Sequence[int]
    place: int
    old_place: int

    def of_exported(self, c: int | None) -> Known:
        """The exported model's right answers, of class `c` or of all."""
        images, right, _ = self.pairs[self.place]
        return self._known([(images, right.astype(np.float64))], c)

    def of_one(self, c: int | None) -> Known:
        """The exported model less the baseline's that it is compared with; on another fold, the one of its own seed."""
        images, right, old_right = self.pairs[self.place]
        if self.folds[self.old_place] == self.folds[self.place]:
            old_right = self.pairs[self.old_place][2]
        return self._known([(images, right.astype(np.float64) - old_right)], c)

    def of_all(self, c: int | None) -> Known:
        """Each fold's mean over seeds, new less old: what the mean over all seeds is made of."""
        parts = []
        for fold in sorted(set(self.folds)):
            here = [pair for pair, of_pair in zip(self.pairs, self.folds, strict=True) if of_pair == fold]
            differences = [right.astype(np.float64) - old_right for _, right, old_right in here]
            parts.append((here[0][0], np.mean(differences, axis=0)))
        return self._known(parts, c)

    def _known(self, parts: Sequence[tuple[Images, NDArray[np.float64]]], c: int | None) -> Known:
        values, groups = [], []
        for images, found in parts:
            chosen = slice(None) if c is None else images.labels.numpy() == c
            values.append(found[chosen])
            groups.append(images.groups.numpy()[chosen])
        return Known(self.size, np.concatenate(values), np.concatenate(groups))


def _without_bias(record: TrialRecord) -> TrialRecord:
    """The model as trained, without what calibration has added."""
    return replace(record, params={name: v for name, v in record.params.items() if not name.startswith(BIAS)})


def images_for(bundle: Bundle, where: str | None, *, data_dir: Path, skip_corrupt: bool = False) -> Unseen:
    """Images to judge an exported model on (see `open_test_images`), as large and of as many channels as it takes."""
    if where == "":  # as of a variable that is not set; a path would take it for the current folder
        raise InputError("--data is '', but must be a folder or a data set's name; leave it out for the study's own")
    config = bundle.config
    trained_on = StudyConfig(
        dataset=config.dataset,
        data_dir=data_dir,
        seed=config.seed,
        group_by=config.group_by,
        skip_corrupt=config.skip_corrupt,
        model=config.spec.model,
        image_size=None if config.spec.model == HEAD else config.spec.image_size,
    )
    unseen = open_test_images(
        where,
        trained_on=trained_on,
        fingerprint=config.dataset_fingerprint,
        classes=bundle.classes,
        skip_corrupt=skip_corrupt,
    )
    images = with_channels(unseen.images, config.spec.channels)
    if images.channels != config.spec.channels:
        what = "embeddings of {} numbers" if images.are_embeddings else "images of {} channel(s)"
        raise InputError(
            f"data set {where or config.dataset!r} has {what.format(images.channels)}, but the model takes "
            f"{config.spec.channels}: name such with --data"
        )
    return unseen._replace(images=images)


def evaluate_bundle(folder: Path, where: str | None, *, data_dir: Path, skip_corrupt: bool = False) -> dict[str, Any]:
    """Measure an exported model on a data set, from its files alone. Figures as JSON values; see `open_test_images`."""
    bundle = read_bundle(folder)
    config, unseen = bundle.config, images_for(bundle, where, data_dir=data_dir, skip_corrupt=skip_corrupt)
    images = unseen.images
    logits = predict_logits(bundle.classifier, images, torch.device("cpu"))
    answers = logits.argmax(dim=1).numpy()
    labels, groups = images.labels.numpy(), images.groups.numpy()
    confusion = confusion_matrix(labels, answers, len(bundle.classes))
    recalls = recall_per_class(confusion)
    present = [c for c in config.important if not math.isnan(recalls[c])]
    figures = {
        "accuracy": float((answers == labels).mean()),
        "recall": float(min(recalls[c] for c in present)) if present else None,
        "recall_per_class": recalls.tolist(),
        "images": len(labels),
    }
    stored = bundle.metrics.get("test", {})
    clean = without_nan(figures)
    right = answers == labels
    overall = Share.of(right, groups, _hidden(unseen, bundle.metrics, None))
    shares = {c: Share.of(right[labels == c], groups[labels == c], _hidden(unseen, bundle.metrics, c)) for c in present}
    return {
        "data": unseen.text,
        **clean,
        "accuracy_interval": list(overall.interval),
        "shares": {
            "accuracy": overall.as_json(),
            "recall": {str(c): shares[c].as_json() if c in shares else None for c in config.important},
            "precision": {str(c): Precision.of(confusion, c).as_json() for c in config.important},
        },
        "calibration": _calibration(bundle, logits, labels),
        "important": list(config.important),
        "classes": list(bundle.classes),
        "matches_stored": all(clean[key] == stored.get(key) for key in ("accuracy", "recall", "recall_per_class"))
        if unseen.own
        else None,  # which are of other images
    }


def _calibration(bundle: Bundle, logits: torch.Tensor, labels: NDArray[np.int64]) -> dict[str, Any] | None:
    """What these images say of the model's probabilities; None where it has but scores."""
    spec = bundle.config.spec
    if spec.temperature is None or not bool(logits.isfinite().all()):
        return None
    plain = logits.numpy().astype(np.float64)
    for c, value in spec.logit_bias.items():
        plain[:, c] -= value
    temperature, important = spec.temperature, bundle.config.important
    return Calibration.of(plain, labels, temperature=temperature, bias=spec.logit_bias, important=important).as_json()


def _hidden(unseen: Unseen, metrics: Mapping[str, Any], c: int | None) -> Hidden | None:
    """What unnamed groups cost: as measured when the model was judged on these images, else as much as they can."""
    size = unseen.hidden_group_size
    if size == 1:
        return None
    effect = float(size)
    if unseen.own:
        try:
            shares = metrics["study"]["best"]["exported"]["test"]
            share = shares["accuracy"] if c is None else shares["recall"][str(c)]
            stored = share["hidden_groups"]["design_effect"]
        except (KeyError, TypeError):  # a model of before this was measured
            stored = None
        if isinstance(stored, int | float) and not isinstance(stored, bool) and math.isfinite(stored):
            effect = min(max(float(stored), 1.0), effect)
    return Hidden(size, effect)


def versions() -> dict[str, str]:
    """What the figures were made with."""
    packages = {name: metadata.version(name) for name in ("camri-tune", "torch", "optuna", "numpy")}
    return {**packages, "python": platform.python_version(), "machine": f"{platform.machine()}, {cpu_count()} cores"}
