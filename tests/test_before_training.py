"""What a run tells of a data set before it spends hours on it: copies on both sides, small classes, imbalance."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from camri_tune import duplicates
from camri_tune.config import StudyConfig
from camri_tune.counts import tell_few, tell_imbalance
from camri_tune.datasets import Dataset, open_dataset
from camri_tune.duplicates import Looks, exact_hashes, near_hashes
from camri_tune.errors import DataError
from camri_tune.folders import Part
from camri_tune.grouping import Item
from camri_tune.images import Images
from camri_tune.pipeline import run
from camri_tune.sources import find_source
from camri_tune.stats import binomial_interval
from tests.opening import forbid_decoding

Pixels = NDArray[np.uint8]
MakePhotos = Callable[[Mapping[str, int]], Path]


def _photo(seed: int, side: int = 32) -> Pixels:
    """(side, side, 3): soft shapes that no other seed has."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


@pytest.fixture
def photos(tmp_path: Path, own_cache: Path) -> MakePhotos:
    """Make class folders of 32x32 photographs, all of them different."""

    def make(counts: Mapping[str, int]) -> Path:
        seed = 0
        for name, count in counts.items():
            (tmp_path / "photos" / name).mkdir(parents=True)
            for index in range(count):
                seed += 1
                Image.fromarray(_photo(seed)).save(tmp_path / "photos" / name / f"{index:03}.png")
        return tmp_path / "photos"

    return make


def _told(root: Path, part: str, **values: object) -> list[str]:
    """Lines of which `part` is a part."""
    data = open_dataset(StudyConfig.build({"dataset": str(root), **values}))
    data.examine()
    return [line for line in data.notices() if part in line]


SPLIT = {"train/a": 20, "train/b": 20, "val/a": 20, "val/b": 20, "test/a": 20, "test/b": 20}


def test_of_different_images_nothing_is_told(photos: MakePhotos) -> None:
    assert _told(photos(SPLIT), "") == []


@pytest.mark.parametrize(
    ("copy", "of", "line"),
    [
        ("val/a/new.png", "train/a/003.png", "1 of 41 validation images are training images, too, pixel for pixel: "),
        ("test/b/new.png", "train/b/003.png", "1 of 41 test images are training images, too, pixel for pixel: "),
        ("test/b/new.png", "val/b/003.png", "1 of 41 test images are validation images, too, pixel for pixel: "),
        ("test/a/new.png", "train/b/003.png", "too, pixel for pixel, 1 of them under another class: "),
    ],
)
def test_a_copy_in_another_part_is_told_with_both_paths(copy: str, of: str, line: str, photos: MakePhotos) -> None:
    root = photos(SPLIT)
    with Image.open(root / of) as image:
        image.save(root / copy, compress_level=0)  # another file of the same pixels
    (told,) = _told(root, "")
    assert line in told
    assert f"'{copy}' is '{of}'" in told
    assert "remove one of each" in told


def test_copies_within_a_part_are_nobodys_advantage(photos: MakePhotos) -> None:
    root = photos(SPLIT)
    shutil.copy(root / "train" / "a" / "000.png", root / "train" / "a" / "copy.png")
    assert _told(root, "") == []


def test_a_jpeg_of_a_training_image_is_nearly_that(photos: MakePhotos) -> None:
    root = photos(SPLIT)
    pairs = [(f"val/a/{n}.jpg", f"train/a/00{n}.png") for n in range(5)]
    for copy, of in pairs:
        with Image.open(root / of) as image:
            image.save(root / copy, quality=95, subsampling=0)
    (told,) = _told(root, "")
    assert "At least 5 of 45 validation images are training images, too, nearly (8x8 difference hashes" in told
    assert "'val/a/0.jpg' is 'train/a/000.png'" in told
    assert "remove one of each" in told
    assert "--group-by" not in told, "which moves no file from one folder to the other"


def test_of_many_copies_some_are_named_and_all_are_counted(photos: MakePhotos) -> None:
    root = photos(SPLIT)
    for n in range(7):
        shutil.copy(root / "train" / "a" / f"00{n}.png", root / "test" / "a" / f"copy{n}.png")
    (told,) = _told(root, "")
    assert told.startswith("7 of 47 test images are training images, too, pixel for pixel: 'test/a/copy0.png' is")
    assert "'test/a/copy4.png' is 'train/a/004.png', and 2 more. What was" in told
    assert "copy5" not in told


def test_a_class_that_test_cannot_judge_is_told_at_the_start(photos: MakePhotos) -> None:
    root = photos(SPLIT)
    for path in (root / "test" / "b").iterdir():
        path.write_text("no image")
    data = open_dataset(StudyConfig.build({"dataset": str(root), "skip_corrupt": True}))
    data.require_test_images([0])
    with pytest.raises(DataError, match="class 'b' has no test images to be judged on"):
        data.require_test_images([0, 1])
    with pytest.raises(DataError, match="class 'b' has no test images to be judged on"):
        run(StudyConfig.build({"dataset": str(root), "skip_corrupt": True, "important": "b", "out": root.parent}))
    assert not list(root.parent.rglob("model.safetensors")), "before anything is trained"


def test_a_split_that_was_drawn_image_by_image_is_told_and_how_to_name_groups(photos: MakePhotos) -> None:
    root = photos({"a": 120, "b": 120})
    assert "--group-by" in _told(root, "No groups are named")[0]
    assert _told(root, "", group_by=r"(?P<group>[ab]/\d\d)\d") == []
    # Of each group one image is left in training, which says nothing of what was named.
    assert _told(root, "No groups", group_by=r"(?P<group>[ab]/\d\d)\d", per_group=1) == []
    for name in "ab":
        for index in range(120):
            shutil.copy(root / name / f"{index:03}.png", root / name / f"{index:03}-copy.png")
    assert len(_told(root, "pixel for pixel")) == 3
    assert _told(root, "pixel for pixel", group_by=r"(?P<group>[ab]/\d\d\d)") == []


def test_what_is_told_needs_no_image_twice(photos: MakePhotos, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run decodes the test part when it begins; hashes are kept with the images."""
    root = photos(SPLIT)
    shutil.copy(root / "train" / "a" / "000.png", root / "test" / "a" / "copy.png")
    first = _told(root, "")
    forbid_decoding(monkeypatch)
    assert _told(root, "") == first
    assert len(first) == 1


def test_workers_never_open_the_test_part(photos: MakePhotos, own_cache: Path) -> None:
    root = photos(SPLIT)
    data = open_dataset(StudyConfig(dataset=str(root)))
    assert {path.name for path in own_cache.rglob("*.safetensors")} == {"train.safetensors", "validation.safetensors"}
    data.examine()
    assert {path.name for path in own_cache.rglob("*.safetensors")} >= {"test.safetensors"}


def test_a_broken_test_image_is_told_at_the_start(photos: MakePhotos) -> None:
    root = photos(SPLIT)
    (root / "test" / "b" / "torn.png").write_text("no image")
    with pytest.raises(DataError, match=r"torn\.png"):
        _told(root, "")
    assert _told(root, "corrupt", skip_corrupt=True) == ["1 corrupt image file(s) were left out (--skip-corrupt)."]


def test_files_that_were_left_out_do_not_shift_names(photos: MakePhotos) -> None:
    root = photos(SPLIT)
    (root / "train" / "a" / "0000.png").write_text("no image")
    (root / "test" / "a" / "0000.png").write_text("no image")
    shutil.copy(root / "train" / "a" / "007.png", root / "test" / "a" / "copy.png")
    (told,) = _told(root, "pixel for pixel", skip_corrupt=True)
    assert "'test/a/copy.png' is 'train/a/007.png'" in told


def test_a_name_cannot_act_on_a_terminal(photos: MakePhotos) -> None:
    root = photos(SPLIT)
    shutil.copy(root / "train" / "a" / "007.png", root / "test" / "a" / "\x1b[2J.png")
    (told,) = _told(root, "pixel for pixel")
    assert told.isprintable()
    assert "'test/a/\\x1b[2J.png'" in told


# --- hashes -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.sampled_from([1, 3]), st.sampled_from([8, 16, 33]), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_exact_hashes_are_equal_where_images_are(count: int, channels: int, side: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, channels, side, side), dtype=np.uint8)
    both = np.concatenate([pixels, pixels])
    hashes = exact_hashes(both)
    assert hashes[:count].tolist() == hashes[count:].tolist()
    assert len(set(hashes.tolist())) == count
    both[0, 0, 0, 0] ^= 1
    assert exact_hashes(both)[0] != hashes[0]


def test_the_difference_hash_is_that_of_its_definition() -> None:
    photo = _photo(1, side=72)
    fields = photo.astype(float).mean(axis=2).reshape(8, 9, 9, 8).mean(axis=(1, 3))
    bits = "".join(str(int(fields[y, x] > fields[y, x + 1])) for y in range(8) for x in range(8))
    (found,) = near_hashes(photo.transpose(2, 0, 1)[None].copy())
    assert int(found) % 2**64 == int(bits, 2)


@pytest.mark.parametrize("pixels", [np.full((1, 3, 32, 32), 99), np.arange(64).reshape(1, 1, 8, 8) * 3])
def test_what_is_flat_or_tiny_has_no_shape_to_compare(pixels: NDArray[np.int64]) -> None:
    assert near_hashes(pixels.astype(np.uint8)).tolist() == [0]


def _looks(pixels: Pixels) -> Looks:
    images = Images(torch.from_numpy(pixels), torch.zeros(len(pixels), dtype=torch.int64), torch.arange(len(pixels)))
    return Looks("some", images, exact_hashes(pixels), near_hashes(pixels), str)


def test_near_is_what_the_rule_says_and_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "PIECE", 80)  # few at a time
    originals = np.stack([_photo(seed).transpose(2, 0, 1) for seed in range(40)])
    noise = np.random.default_rng(0).normal(size=originals.shape)
    spread = originals.reshape(40, -1).std(axis=1)[:, None, None, None]
    expected = set()
    later = originals.copy()
    for row in range(40):
        strength = (0, 0.02, 0.05, 0.3)[row % 4]
        later[row] = (originals[row] + noise[row] * strength * spread[row]).round().clip(0, 255)
        apart = np.sqrt(((later[row].astype(float) - originals[row]) ** 2).mean()) / later[row].std()
        pair = [int(near_hashes(some[row : row + 1])[0]) % 2**64 for some in (later, originals)]
        if strength and apart <= 0.1 and (pair[0] ^ pair[1]).bit_count() <= 3:
            expected.add((row, row))
    found = duplicates.duplicates(_looks(later), _looks(originals))
    assert {(row, other) for row, other in found.exact} == {(row, row) for row in range(0, 40, 4)}
    assert set(found.near) == expected
    assert 10 <= len(expected) <= 20
    monkeypatch.setattr(duplicates, "MOST_PAIRS", 400)
    assert set(duplicates.duplicates(_looks(later), _looks(originals)).near) < expected, "of many, some are looked for"


def test_the_handwritten_ones_of_many_people_are_not_one(mnist_dir: Path) -> None:
    config = StudyConfig(dataset="mnist", data_dir=mnist_dir)
    data = Dataset(replace(find_source(config), groups_by="as a user's own"), config)  # built-in sets are not looked at
    data.examine()
    assert not [line for line in data.notices() if "images are" in line]


def test_frames_without_their_tracks_stand_on_both_sides(gtsrb_dir: Path) -> None:
    """Real near duplicates; and eight test images that are training images, as published at this size."""
    config = StudyConfig(dataset="gtsrb", data_dir=gtsrb_dir)
    source, chosen = find_source(config), (9, 14)
    tracks: dict[Part, list[Item]] = {
        part: [item._replace(label=chosen.index(item.label)) for item in items if item.label in chosen]
        for part, items in source.parts.items()
    }
    frames = {part: [item._replace(group=n) for n, item in enumerate(items)] for part, items in tracks.items()}
    told = []
    for parts in (tracks, frames):
        own = replace(source, classes=("no passing", "stop"), parts=parts, groups_by="as a user's own")
        data = Dataset(own, config)
        data.examine()
        told.append(data.notices())
    assert len(told[0]) == 1
    assert "8 of 750 test images are training images, too, pixel for pixel: " in told[0][0]
    assert any("validation images are training images, too, nearly" in line for line in told[1])


# --- counts -----------------------------------------------------------------------------------------------------------


def _labelled(counts: list[int], group: int = 1) -> Images:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return Images(torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8), labels, torch.arange(len(labels)) // group)


def test_parts_that_groups_of_uneven_sizes_make_are_told(photos: MakePhotos) -> None:
    """One patient's film of 60 frames among six of 5: where that is dealt to test, little is left to learn from."""
    root = photos({"a": 90, "b": 90})
    pattern = r"(?P<group>a/0[6-8]|b/\d\d\d|a/0)"
    told = {seed: _told(root, "differ much in size", group_by=pattern, seed=seed) for seed in range(6)}
    assert all("Another --seed deals" in line for lines in told.values() for line in lines)
    for seed, lines in told.items():
        data = open_dataset(StudyConfig.build({"dataset": str(root), "group_by": pattern, "seed": seed}))
        count = int((data.test().labels == 0).sum())
        assert any(f"test has {count / 90:.0%} of 0 (a)" in line for line in lines) == (not 9 <= count <= 36)
        assert not any("of 1 (b)" in line for line in lines), "of single images a fifth is a fifth"
    assert any(told.values())
    assert _told(root, "differ much in size") == []


@pytest.mark.parametrize(("counts", "told"), [([100, 11], False), ([100, 10], True), ([40, 400, 39], True)])
def test_imbalance_is_told_from_ten_times_on(counts: list[int], told: bool) -> None:
    lines = tell_imbalance(_labelled(counts), ["x", "y", "z"][: len(counts)])
    assert bool(lines) == told
    if told:
        assert f"{max(counts)} training images, 10 times the {min(counts)}" in lines[0]


def test_few_images_are_told_with_what_they_are_worth() -> None:
    parts = {"training": _labelled([19, 50]), "validation": _labelled([30, 12], 4), "test": _labelled([20, 20])}
    training, validation = tell_few(parts, ["x", "y"])
    assert training == "Few training images: 0 (x) 19."
    low, high = binomial_interval(11, 12)
    assert validation == (
        f"Few validation images: 1 (y) 12 of 4 group(s). Of 12, one image is 8.3 points of recall, and 11 right show "
        f"(95 %) no more than that the recall lies between {low:.2f} and {high:.2f}."
    )


def test_many_small_classes_are_counted() -> None:
    (line,) = tell_few({"test": _labelled([9, 8, 7, 6, 5, 4, 3, 100])}, [str(c) for c in range(8)])
    assert line.startswith(
        "Few test images: 6 3, 5 4, 4 5, 3 6, 2 7 and 2 more classes. Of 3, one image is 33.3 points"
    )
