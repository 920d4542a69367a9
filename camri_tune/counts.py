"""What the numbers of a data set's images say before anything is trained."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from camri_tune.images import Images
from camri_tune.records import named
from camri_tune.stats import binomial_interval

IMBALANCE = 10  # times as many training images as the smallest class: from there on it is told
FEW_IMAGES = 20  # of a class in a part
MOST_NAMED = 5
ODD_SHARE = 2.0  # times what a part should have of a class, or as many times less: from there on it is told


def tell_imbalance(train: Images, classes: Sequence[str]) -> list[str]:
    """Of classes that are much smaller than the largest."""
    counts = np.bincount(train.labels.numpy(), minlength=len(classes))
    largest, smallest = int(counts.argmax()), int(counts.argmin())
    if counts[largest] < IMBALANCE * counts[smallest]:
        return []
    small = int((counts * IMBALANCE <= counts[largest]).sum())
    return [
        f"Classes are imbalanced: {named(largest, classes)} has {counts[largest]:,} training images, "
        f"{counts[largest] / counts[smallest]:.0f} times the {counts[smallest]:,} of {named(smallest, classes)} "
        f"({small} class(es) have a tenth of it or less). Accuracy hardly tells whether small classes are recognised: "
        f"look at the recall of each."
    ]


def tell_few(parts: Mapping[str, Images], classes: Sequence[str]) -> list[str]:
    """Of classes with few images in a part, the fewest first, and what their recall would be worth there."""
    lines = []
    for part, images in parts.items():
        labels, groups = images.labels.numpy(), images.groups.numpy()
        counts = np.bincount(labels, minlength=len(classes))
        few = [c for c in np.argsort(counts, kind="stable").tolist() if counts[c] < FEW_IMAGES]
        if not few:
            continue
        texts = []
        for c in few[:MOST_NAMED]:
            units = len(np.unique(groups[labels == c]))
            of_groups = f" of {units} group(s)" if units < counts[c] else ""
            texts.append(f"{named(c, classes)} {counts[c]}{of_groups}")
        more = f" and {len(few) - MOST_NAMED} more classes" if len(few) > MOST_NAMED else ""
        lines.append(f"Few {part} images: {', '.join(texts)}{more}{_worth(part, int(counts[few[0]]))}.")
    return lines


def tell_uneven(parts: Mapping[str, Images], drawn: Mapping[str, float], classes: Sequence[str]) -> list[str]:
    """Of classes of which a part that was `drawn`, in whole groups, has much more or less than the share meant.

    The share is of the images that were dealt: those of training and of the parts that were drawn from it.
    """
    counts = {part: np.bincount(parts[part].labels.numpy(), minlength=len(classes)) for part in ("training", *drawn)}
    every = np.sum(list(counts.values()), axis=0)
    lines = []
    for part, meant in drawn.items():
        shares = counts[part] / np.maximum(every, 1)
        odd = [
            c
            for c in range(len(classes))
            if every[c] >= FEW_IMAGES and not meant / ODD_SHARE <= shares[c] <= meant * ODD_SHARE
        ]
        if not odd:
            continue
        odd.sort(key=lambda c: -abs(math.log(max(float(shares[c]), 1e-9) / meant)))
        texts = [f"{shares[c]:.0%} of {named(c, classes)}" for c in odd[:MOST_NAMED]]
        more = f" and so on for {len(odd) - MOST_NAMED} more classes" if len(odd) > MOST_NAMED else ""
        lines.append(
            f"Groups differ much in size: {part} has {', '.join(texts)}{more}, where {meant:.0%} were meant. Another "
            f"--seed deals them otherwise; or give the parts yourself."
        )
    return lines


def _worth(part: str, count: int) -> str:
    if part == "training" or not count:
        return ""
    right = round(0.9 * count)
    low, high = binomial_interval(right, count)
    return (
        f". Of {count}, one image is {100 / count:.1f} points of recall, and {right} right show (95 %) no more than "
        f"that the recall lies between {low:.2f} and {high:.2f}"
    )
