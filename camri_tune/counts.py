"""What the numbers of a data set's images say before anything is trained."""

from collections.abc import Mapping, Sequence

import numpy as np

from camri_tune.images import Images
from camri_tune.records import named
from camri_tune.stats import binomial_interval

IMBALANCE = 10  # times as many training images as the smallest class: from there on it is told
FEW_IMAGES = 20  # of a class in a part
MOST_NAMED = 5


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


def _worth(part: str, count: int) -> str:
    if part == "training" or not count:
        return ""
    right = round(0.9 * count)
    low, high = binomial_interval(right, count)
    return (
        f". Of {count}, one image is {100 / count:.1f} points of recall, and {right} right show (95 %) no more than "
        f"that the recall lies between {low:.2f} and {high:.2f}"
    )
