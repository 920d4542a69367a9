"""The comparison's table, like Table 1 of the CAMRI paper: what each cell holds, and who is best. Plain arithmetic."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from camri_tune.config import Loss
from camri_tune.differences import Known, SeedDifference
from camri_tune.errors import InputError
from camri_tune.records import Figure, named

Method = Literal[Loss, "threshold"]
METHODS: tuple[Method, ...] = ("ce", "threshold", "wce", "crwwce", "l2", "arcface", "camri", "cosface-i")
Protocol = Literal["ours", "paper"]
TITLES: dict[Method, str] = {
    "ce": "cross-entropy (CE)",
    "threshold": "CE, threshold tuned",
    "wce": "weighted CE (WCE)",
    "crwwce": "real-world-weight CE (CRWWCE)",
    "l2": "L2-constrained softmax",
    "arcface": "ArcFace",
    "camri": "CAMRI",
    "cosface-i": "CosFace, important class alone",
}
ROUNDING = 1e-12  # far below one image in a share


class Scores(NamedTuple):
    """Recall of the important class and accuracy on one part of the data, over the seeds."""

    recall: Figure
    accuracy: Figure


@dataclass(frozen=True)
class Outcome:
    """One setting's R models, on validation and on test, and less cross-entropy's of the same seeds on test.

    `hits` (R, N) are the important class's test images that each model got right, and `groups` (N,) says which of them
    belong together. Where nobody names those, they are of about `hidden_group_size`, and `known_hits` (R, M) and
    `known_groups` (M,) are the same of validation. `biases` are those that were added to the important class's logit,
    if any.
    """

    validation: Scores
    test: Scores
    recall_difference: SeedDifference
    accuracy_difference: SeedDifference
    hits: NDArray[np.bool_]
    groups: NDArray[np.int64]
    biases: tuple[float, ...] = ()
    hidden_group_size: int = 1
    known_hits: NDArray[np.bool_] | None = None
    known_groups: NDArray[np.int64] | None = None

    def less(self, other: "Outcome") -> SeedDifference:
        """Recall on test, less that of another setting with the same seeds."""
        hidden = None
        if self.known_hits is not None and other.known_hits is not None and self.known_groups is not None:
            hidden = Known.over_seeds(
                self.hidden_group_size, self.known_hits, other.known_hits, self.known_groups
            ).hidden
        return SeedDifference.of(self.hits, other.hits, self.groups, hidden)

    def as_json(self) -> dict[str, Any]:
        return {
            **{
                part: {"recall": scores.recall.as_json(), "accuracy": scores.accuracy.as_json()}
                for part, scores in (("validation", self.validation), ("test", self.test))
            },
            "recall_difference": self.recall_difference.as_json(),
            "accuracy_difference": self.accuracy_difference.as_json(),
            "biases": list(self.biases),
        }


@dataclass(frozen=True)
class Cell:
    """One method for one important class of one data set.

    `trained` is the best of its settings that keep mean accuracy at cross-entropy's, None where none does. `matched` is
    the best with a bias on the important class's logit, tuned on validation so that accuracy there stays at
    cross-entropy's: recall at matched accuracy. `params` are those of `trained`, or else of `matched`, which may be
    another setting, of `matched_params`.
    `paper` is (recall, accuracy) of the paper's Table 1, where it has this cell.
    """

    dataset: str
    token: str
    important: int
    class_name: str
    method: Method
    params: Mapping[str, float]
    trained: Outcome | None
    matched: Outcome | None
    paper: tuple[float, float] | None
    matched_params: Mapping[str, float] = field(default_factory=dict)

    @property
    def heading(self) -> str:
        """The class, and the rank that it was asked for as."""
        text = f"class {named(self.important, {self.important: self.class_name})}"
        return text if self.token in (str(self.important), self.class_name) else f"{self.token}: {text}"

    def as_json(self) -> dict[str, Any]:
        return {
            "dataset": self.dataset,
            "important": self.token,
            "class": self.important,
            "class_name": self.class_name,
            "method": self.method,
            "params": dict(self.params),
            "matched_params": dict(self.matched_params),
            "trained": self.trained.as_json() if self.trained else None,
            "matched": self.matched.as_json() if self.matched else None,
            "paper": dict(zip(("recall", "accuracy"), self.paper, strict=True)) if self.paper else None,
        }


@dataclass(frozen=True)
class Table:
    """All cells of a comparison, and how they came about. `facts` holds what a reader must know, by name."""

    cells: tuple[Cell, ...]
    protocol: Protocol
    facts: Mapping[str, Any]
    folder: Path

    @property
    def stem(self) -> str:
        """The name of its files, without the ending."""
        return "comparison" if self.protocol == "ours" else "comparison-paper"

    @property
    def less(self) -> str:
        """What accuracy may give up, in words, after what it is compared with; empty where it may give up nothing."""
        tolerance = self.facts.get("tolerance", 0.0)
        return f" less {tolerance:g} points" if tolerance else ""

    def columns(self) -> list[tuple[str, str]]:
        """(data set, important class as asked for), in order."""
        return list(dict.fromkeys((cell.dataset, cell.token) for cell in self.cells))

    def column(self, dataset: str, token: str) -> list[Cell]:
        return [cell for cell in self.cells if (cell.dataset, cell.token) == (dataset, token)]

    def as_json(self) -> dict[str, Any]:
        winners = [best_of(self.column(*column)) for column in self.columns()]
        return {
            "schema": 1,
            "protocol": self.protocol,
            **self.facts,
            "cells": [{**cell.as_json(), "best": any(cell is winner for winner in winners)} for cell in self.cells],
        }


def best_of(column: Sequence[Cell]) -> Cell | None:
    """The cell of highest mean test recall among those that kept accuracy, where that holds up over seeds and images.

    It must beat the runner-up, seed by seed, with a 95 % interval above zero; else nobody is called best.
    """
    ranked = sorted(
        ((cell, cell.trained) for cell in column if cell.trained is not None),
        key=lambda pair: -pair[1].test.recall.mean,
    )
    if len(ranked) < 2:
        return None
    (first, ours), (_, theirs) = ranked[:2]
    return first if ours.less(theirs).holds_up else None


def below(difference: SeedDifference) -> bool:
    """Whether the mean difference is below zero, not counting rounding."""
    return difference.mean < -ROUNDING


def legend(table: Table) -> str:
    """How to read the table: what was measured on what, and who chose."""
    chosen = (
        "validation chose every setting and test chose nothing"
        if table.protocol == "ours"
        else "PAPER'S PROTOCOL: every trial was retrained on all seeds and chosen by its means on the test set itself, "
        "which flatters whoever was tried most"
    )
    more = []
    for name, about in table.facts["datasets"].items():
        if about.get("hidden_group_size", 1) > 1:
            tracks = about["test"] / about["hidden_group_size"]
            more.append(
                f" The {about['test']:,} test images of {name} are frames of about {tracks:,.0f} unnamed tracks: "
                f"intervals count them as fewer, by what validation's tracks show."
            )
        more += [f" {name}: {notice}" for notice in about.get("notices", ())]
    if options := table.facts.get("options"):
        more.append(f" All with {', '.join(f'{option} {text}' for option, text in options.items())}.")
    return (
        f"Test set, mean ± sd over {table.facts['seeds']} seeds; {chosen}. {table.facts['trials']} trials for each "
        f"method and class. '-': no setting kept mean accuracy at cross-entropy's{table.less}; with a bias it may be "
        f"another setting that is shown. †: mean accuracy on test came out "
        f"below cross-entropy's. Bold: the highest recall, where it beats the runner-up seed by seed (95 % interval "
        f"over seeds and images above zero).{''.join(more)}"
    )


def read_methods(text: str) -> tuple[Method, ...]:
    """Method names from a comma-separated list, in the table's order. Cross-entropy is always among them."""
    asked = [name for part in text.split(",") if (name := part.strip())]
    if not asked:
        raise InputError(f"--methods is {text!r}, but must name at least 1 method of {', '.join(METHODS)}")
    known: Sequence[str] = METHODS
    for name in asked:
        if name not in known:
            raise InputError(f"--methods {name!r} is no method; the methods are {', '.join(METHODS)}")
    return tuple(m for m in METHODS if m in asked or m == "ce")


def read_datasets(text: str) -> tuple[str, ...]:
    """Data sets from a comma-separated list, each once."""
    names = tuple(dict.fromkeys(name for part in text.split(",") if (name := part.strip())))
    if not names:
        raise InputError(f"--dataset is {text!r}, but must name at least 1 data set")
    return names


def read_protocol(text: str) -> Protocol:
    """A protocol by its name."""
    for protocol in get_args(Protocol):
        if text == protocol:
            return protocol  # type: ignore[no-any-return]
    raise InputError(f"--protocol is {text!r}, but must be one of {', '.join(get_args(Protocol))}")


def paper_figures() -> dict[tuple[str, str, str], tuple[float, float]]:
    """(data set, important class, method) -> (recall, accuracy) of Table 1 of the CAMRI poster (IJCNN 2022).

    Means over ten trials. Where a method has no entry, none of its settings kept accuracy there.
    """
    with (Path(__file__).parent / "paper_table1.csv").open(newline="") as file:
        return {
            (row["dataset"], row["important"], row["method"]): (float(row["recall"]), float(row["accuracy"]))
            for row in csv.DictReader(file)
        }
