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
MOST_APART = 0.1  # of the image's own standard deviation; two of MNIST's ones are 0.2 apart
MOST_COMPARED, MOST_ALIKE = 5_000, 4  # images compared by pixels, and with how many of one hash each
PIECE_BYTES = 2**22  # of images that are compared at a time

Hashes = NDArray[np.int64]


class Looks(NamedTuple):
    """A part of a data set, what users call it, both hashes (N,) of its images, and what a message calls each."""

    part: str
    images: Images
    exact: Hashes
    near: Hashes
    name_of: Callable[[int], str]


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

    These have the same difference hash, and the root mean square of what their pixels differ by is at most `MOST_APART`
    of the image's standard deviation. `MOST_COMPARED` at most are compared, each with `MOST_ALIKE` of its hash.
    """
    place = dict(zip(earlier.exact[::-1].tolist(), range(len(earlier.exact) - 1, -1, -1), strict=True))
    exact = [(row, place[value]) for row, value in enumerate(later.exact.tolist()) if value in place]
    order = np.argsort(earlier.near, kind="stable")
    starts = np.searchsorted(earlier.near[order], later.near)
    ends = np.searchsorted(earlier.near[order], later.near, side="right")
    candidates = (later.near != 0) & (ends > starts)
    candidates[[row for row, _ in exact]] = False
    rows = np.flatnonzero(candidates)[:MOST_COMPARED]
    at_a_time = max(1, PIECE_BYTES // (later.images.store[0].numel() * MOST_ALIKE))
    near = []
    for start in range(0, len(rows), at_a_time):
        some = rows[start : start + at_a_time]
        # Those of fewer than MOST_ALIKE are compared with their last one more than once.
        places = np.minimum(starts[some, None] + np.arange(MOST_ALIKE), ends[some, None] - 1)
        others = order[places]  # (n, MOST_ALIKE)
        mine = _flat(later.images, some)[:, None]
        theirs = _flat(earlier.images, others.reshape(-1)).view(len(some), MOST_ALIKE, -1)
        apart = ((mine - theirs).square().mean(dim=2).sqrt() / mine.std(dim=2)).numpy()  # not flat, by its hash
        best = apart.argmin(axis=1)
        near += [
            (int(row), int(others[index, best[index]]))
            for index, row in enumerate(some)
            if apart[index, best[index]] <= MOST_APART
        ]
    return Duplicates(later, earlier, exact, near)


def _flat(images: Images, places: Hashes) -> torch.Tensor:
    return images.batch(torch.from_numpy(places))[0].float().flatten(1)


def tell_duplicates(found: Duplicates, way_out: str) -> list[str]:
    """In plain words, with the first pair of each kind; `way_out` goes on with what is to be done."""
    later, earlier = found.later, found.earlier
    kinds = (
        ("", found.exact, "pixel for pixel"),
        (
            "At least ",
            found.near,
            f"nearly (one 8x8 difference hash, at most {MOST_APART:g} standard deviations apart)",
        ),
    )
    lines = []
    for least, pairs, how in kinds:
        if not pairs:
            continue
        row, other = pairs[0]
        relabelled = sum(int(later.images.labels[a]) != int(earlier.images.labels[b]) for a, b in pairs)
        classes = f", {relabelled:,} of them under another class" if relabelled else ""
        lines.append(
            f"{least}{len(pairs):,} of {len(later.images):,} {later.part} images are {earlier.part} images, too, {how}"
            f"{classes}: {later.name_of(row)} is {earlier.name_of(other)}. What was learned by heart looks like skill "
            f"there{way_out}."
        )
    return lines


def tell_all(parts: Iterable[Looks], way_out: str) -> list[str]:
    """What each part has of those before it."""
    lines: list[str] = []
    before: list[Looks] = []
    for part in parts:
        for other in before:
            lines += tell_duplicates(duplicates(part, other), way_out)
        before.append(part)
    return lines
