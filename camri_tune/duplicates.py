"""Images that stand on both sides of a split: what a model learned by heart would look like skill there.

Two hashes of each image are kept with the decoded images. Of duplicates it is only told; nothing is left out.
"""

import hashlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from camri_tune.images import Images

LEAST_SIDE = 16  # pixels: smaller images are alike too often to say that two are nearly the same
LEAST_CONTRAST = 4.0  # levels of 255, standard deviation: what is flatter has no shape to compare
MOST_BITS = 3  # of 64 between two difference hashes; of 100 photographs saved again as JPEG none had more
MOST_APART = 0.1  # of the image's own standard deviation; two of MNIST's ones are 0.2 apart
MOST_NAMED = 5  # pairs in a sentence
MOST_PAIRS, PIECE = 2**28, 2**20  # of hashes that are compared, a second or two; and at a time

Hashes = NDArray[np.int64]


class Looks(NamedTuple):
    """A part of a data set, what users call it, both hashes (N,) of its images, and what a message calls each.

    `comes_with`: the part that the user's own files make of it; others are drawn from that one.
    """

    part: str
    images: Images
    exact: Hashes
    near: Hashes
    name_of: Callable[[int], str]
    comes_with: str = ""


class Duplicates(NamedTuple):
    """Images of a later part that an earlier part has, too: `pairs` of their places, later first, one for each."""

    later: Looks
    earlier: Looks
    exact: list[tuple[int, int]]
    near: list[tuple[int, int]]


def exact_hashes(pixels: NDArray[np.uint8]) -> Hashes:
    """(n,): 64 bits of BLAKE2b of each image (n, C, S, S); two that differ in a pixel never share it, so to speak."""
    digests = b"".join(hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in pixels)
    return np.frombuffer(digests, "<i8").astype(np.int64)


def near_hashes(pixels: NDArray[np.uint8]) -> Hashes:
    """(n,): the difference hash of each image (n, C, S, S); 0 where it is too small or too flat to have one.

    Brightness, averaged to 8 rows of 9 fields; a bit says whether a field is brighter than the one on its right.
    """
    if pixels.shape[-1] < LEAST_SIDE:
        return np.zeros(len(pixels), np.int64)
    grey = torch.from_numpy(pixels).float().mean(dim=1, keepdim=True)
    fields = torch.nn.functional.adaptive_avg_pool2d(grey, (8, 9)).squeeze(1)
    bits = (fields[:, :, :-1] > fields[:, :, 1:]).flatten(1).numpy()
    hashes = np.packbits(bits, axis=1).view(">i8").reshape(-1).astype(np.int64)
    hashes[(fields.flatten(1).std(dim=1) < LEAST_CONTRAST).numpy()] = 0
    return hashes


def duplicates(later: Looks, earlier: Looks) -> Duplicates:
    """Images of `later` that are in `earlier` pixel for pixel, and others that are there nearly.

    These have a difference hash that is at most `MOST_BITS` from the nearest, and the root mean square of what the two
    images differ by is at most `MOST_APART` of the standard deviation. Of many images, some are looked for.
    """
    place = dict(zip(earlier.exact[::-1].tolist(), range(len(earlier.exact) - 1, -1, -1), strict=True))
    exact = [(row, place[value]) for row, value in enumerate(later.exact.tolist()) if value in place]
    hashed = later.near != 0
    hashed[[row for row, _ in exact]] = False
    rows, others = np.flatnonzero(hashed), np.flatnonzero(earlier.near)
    most = MOST_PAIRS // max(1, len(others))
    if len(rows) > most:
        rows = rows[np.linspace(0, len(rows) - 1, most).astype(np.int64)]
    near: list[tuple[int, int]] = []
    hashes = earlier.near[others].view(np.uint64)
    at_a_time = max(1, PIECE // max(1, len(others)))
    for start in range(0, len(rows) if len(others) else 0, at_a_time):
        some = rows[start : start + at_a_time]
        bits = np.bitwise_count(later.near[some].view(np.uint64)[:, None] ^ hashes)
        nearest = bits.argmin(axis=1)
        for index in np.flatnonzero(bits[np.arange(len(some)), nearest] <= MOST_BITS):
            row, other = int(some[index]), int(others[nearest[index]])
            if _apart(later.images, row, earlier.images, other) <= MOST_APART:
                near.append((row, other))
    return Duplicates(later, earlier, exact, near)


def _apart(images: Images, row: int, others: Images, other: int) -> float:
    mine, theirs = _one(images, row), _one(others, other)
    return float(np.sqrt(np.square(mine - theirs).mean()) / mine.std())  # which is not flat, for it has a hash


def _one(images: Images, place: int) -> NDArray[np.float32]:
    # By a plain number: to gather by a tensor wakes all of PyTorch's threads, which takes longer than the work.
    row = place if images.rows is None else int(images.rows[place])
    return images.store[row].numpy().astype(np.float32)


def tell_duplicates(found: Duplicates, groups_by: str) -> list[str]:
    """In plain words, with the first pairs of each kind, and what is to be done; `groups_by` is how groups are named.

    Groups keep images on one side of a split that is drawn, not of one that the user's files make.
    """
    later, earlier = found.later, found.earlier
    kinds = (
        ("", found.exact, "number for number" if later.images.are_embeddings else "pixel for pixel"),
        (
            "At least ",
            found.near,
            f"nearly (8x8 difference hashes at most {MOST_BITS} bits apart, pixels {MOST_APART:g} standard deviations)",
        ),
    )
    lines = []
    for least, pairs, how in kinds:
        if not pairs:
            continue
        named = [f"{later.name_of(row)} is {earlier.name_of(other)}" for row, other in pairs[:MOST_NAMED]]
        named += [f"and {len(pairs) - MOST_NAMED:,} more"] if len(pairs) > MOST_NAMED else []
        way_out = "remove one of each"
        if later.comes_with == earlier.comes_with:
            way_out += f", or name what they show ({groups_by}), and they stay on one side"
        relabelled = sum(int(later.images.labels[a]) != int(earlier.images.labels[b]) for a, b in pairs)
        classes = f", {relabelled:,} of them under another class" if relabelled else ""
        lines.append(
            f"{least}{len(pairs):,} of {len(later.images):,} {later.part} images are {earlier.part} images, too, {how}"
            f"{classes}: {', '.join(named)}. What was learned by heart looks like skill there: {way_out}."
        )
    return lines


def tell_all(parts: Iterable[Looks], groups_by: str) -> list[str]:
    """What each part has of those before it."""
    lines: list[str] = []
    before: list[Looks] = []
    for part in parts:
        for other in before:
            lines += tell_duplicates(duplicates(part, other), groups_by)
        before.append(part)
    return lines
