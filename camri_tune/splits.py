"""Splits that keep the frames of one object together.

Images of one group (a GTSRB track, a patient) are near duplicates: a random split puts the same sign on both sides and
measures memory instead of recognition. Every function here moves whole groups.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from camri_tune.errors import DataError

IntArray = NDArray[np.int64]
DRAWS = 30  # tries where groups span classes; of 600 small random cases that could be split one try missed one in 15


class Split(NamedTuple):
    """Indices into the arrays that were split, ascending."""

    kept: IntArray
    held_out: IntArray


def folds(
    labels: IntArray,
    groups: IntArray,
    *,
    count: int,
    fraction: float,
    seed: int,
    classes: Sequence[str],
    purpose: str,
) -> list[Split]:
    """`count` ways to hold out about `fraction` of every class, as `hold_out_groups` does; the first is its very split.

    What one fold holds out the later ones keep as long as a class has other groups: with enough of them the held-out
    parts share no image, and a class with few repeats some.
    """
    splits: list[Split] = []
    used = np.empty(0, np.int64)
    for _ in range(count):
        split = hold_out_groups(
            labels, groups, fraction=fraction, seed=seed, classes=classes, purpose=purpose, last=used
        )
        splits.append(split)
        used = np.union1d(used, groups[split.held_out])
    return splits


def hold_out_groups(
    labels: IntArray,
    groups: IntArray,
    *,
    fraction: float,
    seed: int,
    classes: Sequence[str],
    purpose: str,
    last: IntArray | None = None,
) -> Split:
    """Hold out about `fraction` of every class, in whole groups, chosen by `seed`, those in `last` only at need.

    `labels` and `groups` are (N,). Each class gives at least one group and keeps at least one. Raises DataError, naming
    the class, where a class has fewer than two groups or where groups that span classes seem to make that impossible;
    `purpose` says in the message what the held-out part is for.
    """
    late = set() if last is None else set(last.tolist())
    rng = np.random.default_rng(seed)
    one_sided = ""
    for _ in range(DRAWS):  # the first succeeds, unless groups span classes
        mask = np.isin(groups, list(_draw_groups(labels, groups, fraction, rng, classes, purpose, late)))
        lacking = [name for c, name in enumerate(classes) if len(np.unique(mask[labels == c])) < 2]
        if not lacking:
            return Split(np.flatnonzero(~mask), np.flatnonzero(mask))
        one_sided = one_sided or lacking[0]
    raise DataError(
        f"class {one_sided!r} cannot have images both for training and for {purpose}, because its groups are shared "
        f"with other classes: provide a folder for {purpose}"
    )


def _draw_groups(
    labels: IntArray,
    groups: IntArray,
    fraction: float,
    rng: np.random.Generator,
    classes: Sequence[str],
    purpose: str,
    late: set[int],
) -> set[int]:
    """Groups to hold out, as good as they can be had class by class."""
    held: set[int] = set()
    kept: set[int] = set()
    # Classes with the fewest groups choose first: with groups that span classes, they have the least choice.
    members = {c: _group_sizes(groups[labels == c], rng) for c in range(len(classes))}
    for c in sorted(members, key=lambda c: len(members[c])):
        sizes = members[c]
        if len(sizes) < 2:
            what = f"{sum(sizes.values())} image(s) in {len(sizes)} group(s)"
            raise DataError(
                f"class {classes[c]!r} has {what} to draw from, but needs at least 2 groups (or ungrouped images) to "
                f"set some aside for {purpose}, and 3 in all where both test and validation are drawn: add images, "
                f"provide a folder for {purpose}, or leave the class out"
            )
        wanted = fraction * sum(sizes.values())
        have = sum(size for g, size in sizes.items() if g in held)
        free = sorted((g for g in sizes if g not in held and g not in kept), key=late.__contains__)
        spare = len([g for g in sizes if g not in held]) - 1  # one group stays
        for g in free:
            # Stop where one more group would overshoot by more than stopping falls short.
            if spare == 0 or (have > 0 and have + sizes[g] / 2 > wanted):
                break
            held.add(g)
            have += sizes[g]
            spare -= 1
        kept.update(g for g in sizes if g not in held)
    return held


def limit_groups(labels: IntArray, groups: IntArray, *, limit: int, seed: int, classes: Sequence[str]) -> IntArray:
    """Indices of at most `limit` images: whole groups, one of each class and more, in about the classes' proportions.

    Raises DataError with the smallest possible limit where `limit` cannot keep a group of every class.
    """
    if limit >= len(labels):
        return np.arange(len(labels))
    rng = np.random.default_rng(seed)
    rank: dict[int, float] = {}
    sizes = dict(zip(*(part.tolist() for part in np.unique(groups, return_counts=True)), strict=True))
    for c in range(len(classes)):
        in_class = list(_group_sizes(groups[labels == c], rng))
        first = min(in_class, key=lambda g: sizes[g])  # the smallest, so that small limits can be met
        for place, g in enumerate(in_class):
            key = -1.0 if g == first else place / len(in_class)
            rank[g] = min(key, rank.get(g, 1.0))
    smallest = sum(sizes[g] for g, key in rank.items() if key < 0)
    if limit < smallest:
        raise DataError(
            f"--limit {limit} is too few: one group of each of {len(classes)} classes is {smallest} images; "
            f"give at least {smallest}"
        )
    chosen: list[int] = []
    total = 0
    for g in sorted(rank, key=lambda g: rank[g]):
        if total + sizes[g] <= limit:
            chosen.append(g)
            total += sizes[g]
    return np.flatnonzero(np.isin(groups, chosen))


def thin_groups(labels: IntArray, groups: IntArray, *, most: int, seed: int) -> IntArray:
    """Indices of at most `most` images of each group, drawn by `seed`, ascending: near duplicates teach little anew.

    A group that spans classes gives as many of each, so that no class is lost.
    """
    order = np.random.default_rng(seed).permutation(len(groups))
    order = order[np.lexsort((labels[order], groups[order]))]  # stable: group by group, in random order within each
    pairs = np.stack([groups[order], labels[order]])
    _, starts, sizes = np.unique(pairs, axis=1, return_index=True, return_counts=True)
    place_in_group = np.arange(len(groups)) - np.repeat(starts, sizes)
    return np.sort(order[place_in_group < most])


def _group_sizes(groups: IntArray, rng: np.random.Generator) -> dict[int, int]:
    """Images of each group, the groups in random order."""
    names, counts = np.unique(groups, return_counts=True)
    return {int(names[place]): int(counts[place]) for place in rng.permutation(len(names))}
