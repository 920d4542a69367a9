"""Folders of images: what is listed, how it is decoded and split, what is kept in the cache, and what is refused."""

import contextlib
import errno
import io
import math
import os
import shutil
import struct
import tempfile
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw, features
from safetensors.torch import save_file

from camri_tune import datasets
from camri_tune import images as images_module
from camri_tune.augmentation import Augmentation
from camri_tune.config import BUILT_IN_DATASETS, StudyConfig
from camri_tune.datasets import Dataset, Unseen, open_dataset, open_test_images
from camri_tune.errors import DataError
from camri_tune.folders import Packed, Source
from camri_tune.images import Images, read_image
from camri_tune.sources import find_source
from tests.conftest import MakeFolder
from tests.opening import SIDE, Pixels, build_config, forbid_decoding, message_of, open_data, read_rgb, same


def _count(data: Dataset) -> int:
    return len(data.train) + len(data.validation) + len(data.test())


def _shown(images: Images) -> set[tuple[int, ...]]:
    """The colours of images of one colour each, which tell them apart."""
    assert bool((images.pixels == images.pixels[:, :, :1, :1]).all()), "of one colour"
    colours = [tuple(row) for row in images.pixels[:, :, 0, 0].tolist()]
    assert len(set(colours)) == len(colours), "no image twice"
    return set(colours)


def _colours(folder: Path) -> set[tuple[int, ...]]:
    return {tuple(read_rgb(path)[0, 0].tolist()) for path in folder.rglob("*.png")}


# --- folders of class folders -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        (".", None, None),
        ("train", None, None),
        ("train", "val", None),
        ("train", None, "test"),
        ("train", "val", "test"),
        ("training", "valid", "testing"),
        ("Train", "VALIDATION", "Test"),
    ],
)
def test_folders_in_every_layout(
    train: str, validation: str | None, test: str | None, image_folder: MakeFolder
) -> None:
    counts = {f"{train}/cat": 12, f"{train}/dog": 10}
    for name in (validation, test):
        if name:
            counts |= {f"{name}/cat": 3, f"{name}/dog": 4}
    root = image_folder(counts)
    data = open_data(root)
    parts = {"train": _shown(data.train), "validation": _shown(data.validation), "test": _shown(data.test())}
    assert data.classes == ("cat", "dog")
    assert data.channels == 3

    assert parts["train"] | parts["validation"] | parts["test"] == _colours(root)
    assert sum(map(len, parts.values())) == sum(counts.values())
    for part, name in (("validation", validation), ("test", test)):
        if name:
            assert parts[part] == _colours(root / name)
        else:
            assert parts[part] < _colours(root / train)
    of_class = {colour: name for name in ("cat", "dog") for path in root.rglob(name) for colour in _colours(path)}
    for images in (data.train, data.validation, data.test()):
        colours = [tuple(row) for row in images.pixels[:, :, 0, 0].tolist()]
        assert [data.classes[label] for label in images.labels] == [of_class[colour] for colour in colours]
        assert set(images.labels.tolist()) == {0, 1}


def test_folders_that_are_no_classes_are_told(image_folder: MakeFolder) -> None:
    """A class called train, with folders in it as other classes have, makes a training part of that one."""
    root = image_folder({"train/day": 5, "train/night": 5, "bus/day": 2, "bus/night": 3, "car/day": 1})
    (root / "notes").mkdir()
    (root / "notes" / "a.txt").touch()
    data = open_data(root)
    data.examine()
    (told,) = [line for line in data.notices() if "Folders beside" in line]
    assert told == "Folders beside train/ are no classes: 'bus' (5 images), 'car' (1 images) left out."


def test_a_class_may_begin_with_underscores_and_what_zip_files_hold_is_none(image_folder: MakeFolder) -> None:
    root = image_folder({"__background__": 5, "cat": 5, "__MACOSX": 5, ".hidden": 5})
    assert open_data(root).classes == ("__background__", "cat")


def test_a_part_under_two_names_is_refused(image_folder: MakeFolder) -> None:
    root = image_folder({f"{part}/{name}": 4 for part in ("train", "val", "validation") for name in "ab"})
    with pytest.raises(DataError, match="has the part validation under two names, 'val' and 'validation'"):
        open_data(root)


def test_class_names_are_sorted_and_label_their_own_images(image_folder: MakeFolder) -> None:
    names = ["b", "a", "10", "9", "Ümlaut", "C"]
    root = image_folder(dict.fromkeys(names, 5))
    data = open_data(root)
    assert data.classes == tuple(sorted(names))
    for label, name in enumerate(data.classes):
        shown = [_shown(i[np.flatnonzero(i.labels.numpy() == label)]) for i in (data.train, data.validation)]
        assert set.union(*shown) < _colours(root / name)


def test_images_deeper_inside_a_class_folder_belong_to_the_class(image_folder: MakeFolder) -> None:
    root = image_folder({"a/2019/may": 4, "a/2020": 4, "b": 5})
    data = open_data(root)
    assert data.classes == ("a", "b")
    assert _shown(data.train) | _shown(data.validation) | _shown(data.test()) == _colours(root)


def test_a_test_folder_beside_the_class_folders_is_no_class(image_folder: MakeFolder) -> None:
    """PATH/CLASS/* for training with PATH/test/CLASS/* beside it: understood or refused, but never a class 'test'."""
    root = image_folder({"cat": 6, "dog": 6, "test/cat": 2, "test/dog": 2})
    refusal = ""
    try:
        data = open_data(root)
    except DataError as error:
        refusal = str(error)
    if refusal:
        assert "test" in refusal
    else:
        assert data.classes == ("cat", "dog")
        assert _shown(data.test()) == _colours(root / "test")


def test_other_files_and_hidden_ones_are_passed_over(image_folder: MakeFolder) -> None:
    root = image_folder({"a": 6, "b": 6})
    expected = _colours(root)
    (root / "README.txt").write_text("not in a class folder")
    (root / "a" / "notes.txt").write_text("no image")
    (root / "a" / "labels.csv").write_text("file,label\n")
    (root / "b" / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0" * 10)
    for name in (".DS_Store", "._000.png"):
        (root / "a" / name).write_bytes(b"\0\0\0\1Bud1")
    shutil.copy(root / "a" / "000.png", root / "a" / ".000.png")
    (root / ".git").mkdir()
    (root / "__MACOSX").mkdir()
    data = open_data(root)
    assert _shown(data.train) | _shown(data.validation) | _shown(data.test()) == expected
    assert data.ignored_files == 3
    assert data.notices() == ["3 file(s) that are no images were passed over."]


def test_hidden_folders_inside_a_class_folder_are_passed_over(image_folder: MakeFolder) -> None:
    """Notebooks leave copies in `.ipynb_checkpoints`, viewers in `.thumbnails`: a copy would stand on both sides."""
    root = image_folder({"a": 6, "b": 6})
    hidden = root / "a" / ".ipynb_checkpoints"
    hidden.mkdir()
    shutil.copy(root / "a" / "000.png", hidden / "000-checkpoint.png")
    data = open_data(root)
    assert _count(data) == 12


def test_a_document_that_pillow_can_only_write_is_no_corrupt_image(image_folder: MakeFolder) -> None:
    root = image_folder({"a": 6, "b": 6})
    Image.new("RGB", (8, 8)).save(root / "a" / "licence.pdf")
    data = open_data(root)
    assert _count(data) == 12
    assert data.ignored_files == 1


# --- decoding ---------------------------------------------------------------------------------------------------------


def _pattern() -> Pixels:
    """(8, 8, 3), unlike any turned or mirrored copy of itself."""
    y, x = np.indices((SIDE, SIDE))
    return np.stack([x * 36, y * 30, (x + 2 * y) * 10], axis=-1).astype(np.uint8)


def _grey() -> Pixels:
    y, x = np.indices((SIDE, SIDE))
    return (x * 28 + y * 3).astype(np.uint8)


def _as_rgb(grey: NDArray[Any]) -> Pixels:
    return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)


def _on_white(colours: NDArray[Any], alpha: NDArray[Any]) -> Pixels:
    share = alpha.astype(np.float64)[:, :, None] / 255
    return (colours * share + 255 * (1 - share)).round().astype(np.uint8)


def _alpha() -> Pixels:
    return np.tile(np.array([0, 255, 128, 1, 254, 64, 200, 0], np.uint8), (SIDE, 1))


def _save_rgb(path: Path, **options: Any) -> Pixels:
    Image.fromarray(_pattern()).save(path, **options)
    return _pattern()


def _greyscale(path: Path) -> Pixels:
    Image.fromarray(_grey()).save(path)
    return _as_rgb(_grey())


def _black_and_white(path: Path) -> Pixels:
    bits = _grey() > 100
    Image.fromarray(bits).save(path)
    return _as_rgb(bits * 255)


def _palette_image() -> tuple[Image.Image, Pixels]:
    """One palette entry for each pixel."""
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(SIDE, SIDE), mode="P")
    image.putpalette(_pattern().reshape(-1).tolist())
    return image, _pattern()


def _palette(path: Path) -> Pixels:
    image, expected = _palette_image()
    image.save(path)
    return expected


def _palette_with_one_transparent_colour(path: Path) -> Pixels:
    image, expected = _palette_image()
    image.save(path, transparency=10)
    expected.reshape(-1, 3)[10] = 255
    return expected


def _palette_with_degrees_of_transparency(path: Path) -> Pixels:
    image, expected = _palette_image()
    alpha = np.arange(0, 256, 4, dtype=np.uint8)
    image.save(path, transparency=alpha.tobytes())
    return _on_white(expected, alpha.reshape(SIDE, SIDE))


def _rgba(path: Path) -> Pixels:
    Image.fromarray(np.dstack([_pattern(), _alpha()])).save(path)
    return _on_white(_pattern(), _alpha())


def _grey_with_alpha(path: Path) -> Pixels:
    Image.fromarray(np.dstack([_grey(), _alpha()])).save(path)
    return _on_white(_as_rgb(_grey()), _alpha())


def _rgb_with_a_transparent_colour(path: Path) -> Pixels:
    expected = _pattern()
    r, g, b = expected[2, 5].tolist()
    Image.fromarray(expected).save(path, transparency=(r, g, b))
    expected[2, 5] = 255
    return expected


def _sixteen_bit(path: Path) -> Pixels:
    Image.fromarray(_grey().astype(np.uint16) * 257).save(path)
    return _as_rgb(_grey())


def _dark_sixteen_bit(path: Path) -> Pixels:
    Image.fromarray(_grey().astype(np.uint16)).save(path)
    return _as_rgb((_grey() / 257).round())


def _sixteen_bit_big_endian(path: Path) -> Pixels:
    Image.fromarray((_grey().astype(np.uint16) * 257).astype(">u2")).save(path)
    return _as_rgb(_grey())


def _pgm(path: Path, values: NDArray[Any]) -> None:
    path.write_bytes(b"P5 8 8 65535\n" + values.astype(">u2").tobytes())


def _sixteen_bit_pgm(path: Path) -> Pixels:
    _pgm(path, _grey().astype(np.int64) * 257)
    return _as_rgb(_grey())


def _dark_sixteen_bit_pgm(path: Path) -> Pixels:
    _pgm(path, _grey())
    return _as_rgb((_grey() / 257).round())


def _cmyk_jpeg(path: Path) -> Pixels:
    Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0)).save(path, quality=100)
    return np.tile(np.array([255, 0, 0], np.uint8), (SIDE, SIDE, 1))


def _animation(path: Path) -> Pixels:
    frames = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("blue", "red", "lime")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    return np.tile(np.array([0, 0, 255], np.uint8), (SIDE, SIDE, 1))


def _lossless(path: Path) -> Pixels:
    return _save_rgb(path, lossless=True)


def _png_named_jpg(path: Path) -> Pixels:
    return _save_rgb(path, format="PNG")


def _grey_jpeg(path: Path) -> Pixels:
    Image.new("L", (SIDE, SIDE), 77).save(path, format="JPEG", quality=100)
    return _as_rgb(np.full((SIDE, SIDE), 77))


ODD_IMAGES: list[tuple[str, Callable[[Path], Pixels], int]] = [
    ("rgb.png", _save_rgb, 0),
    ("greyscale.png", _greyscale, 0),
    ("bits.png", _black_and_white, 0),
    ("palette.png", _palette, 0),
    ("palette.bmp", _palette, 0),
    ("palette.gif", _palette, 0),
    ("one-transparent.png", _palette_with_one_transparent_colour, 0),
    ("degrees.png", _palette_with_degrees_of_transparency, 1),
    ("rgba.png", _rgba, 1),
    ("grey-alpha.png", _grey_with_alpha, 1),
    ("transparent-colour.png", _rgb_with_a_transparent_colour, 0),
    ("sixteen.png", _sixteen_bit, 0),
    ("sixteen-dark.png", _dark_sixteen_bit, 0),
    ("sixteen.tif", _sixteen_bit, 0),
    ("sixteen-big-endian.tif", _sixteen_bit_big_endian, 0),
    ("sixteen.pgm", _sixteen_bit_pgm, 0),
    ("sixteen-dark.pgm", _dark_sixteen_bit_pgm, 0),
    ("cmyk.jpg", _cmyk_jpeg, 3),
    ("animation.gif", _animation, 0),
    ("animation.png", _animation, 0),
    ("plain.bmp", _save_rgb, 0),
    ("plain.ppm", _save_rgb, 0),
    ("plain.tif", _save_rgb, 0),
    ("plain.webp", _lossless, 0),
    ("png-really.jpg", _png_named_jpg, 0),
    ("jpeg-really.txt", _grey_jpeg, 1),
    ("jpeg-really", _grey_jpeg, 1),
]


@pytest.mark.parametrize(("name", "write", "tolerance"), ODD_IMAGES, ids=[name for name, _, _ in ODD_IMAGES])
def test_odd_images_have_the_right_pixels(
    name: str, write: Callable[[Path], Pixels], tolerance: int, tmp_path: Path
) -> None:
    expected = write(tmp_path / name)
    pixels = read_image(tmp_path / name, SIDE)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (3, SIDE, SIDE)
    difference = np.abs(pixels.transpose(1, 2, 0).astype(int) - expected.astype(int))
    assert difference.max() <= tolerance, difference.max(axis=2)


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda stored: stored),
        (2, np.fliplr),
        (3, lambda stored: np.rot90(stored, 2)),
        (6, lambda stored: np.rot90(stored, -1)),
        (8, np.rot90),
    ],
)
def test_a_camera_held_sideways_is_turned_upright(
    orientation: int, upright: Callable[[Pixels], Pixels], tmp_path: Path
) -> None:
    """Four blocks of one colour each: a JPEG of quality 100 keeps them nearly exactly."""
    stored = np.array([[20, 90], [160, 230]], np.uint8).repeat(SIDE, axis=0).repeat(SIDE, axis=1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "photo.jpg", quality=100, exif=exif)
    pixels = read_image(tmp_path / "photo.jpg", 2 * SIDE)
    assert np.abs(pixels[0].astype(int) - upright(stored).astype(int)).max() <= 3


def test_the_whole_image_is_squeezed_to_a_square(tmp_path: Path) -> None:
    """A wide image with a coloured band at either end: both ends are still there, and nothing is distorted in tone."""
    image = Image.new("RGB", (64, 16), (100, 100, 100))
    ImageDraw.Draw(image).rectangle((0, 0, 7, 15), fill="red")
    ImageDraw.Draw(image).rectangle((56, 0, 63, 15), fill="blue")
    image.save(tmp_path / "wide.png")
    pixels = read_image(tmp_path / "wide.png", SIDE).transpose(1, 2, 0)
    assert pixels.shape == (SIDE, SIDE, 3)
    assert (pixels[:, 0, 0] > pixels[:, 0, 2] + 100).all()
    assert (pixels[:, -1, 2] > pixels[:, -1, 0] + 100).all()
    assert (pixels[:, 3:5] == 100).all()


def test_odd_names_are_found_in_a_folder(image_folder: MakeFolder) -> None:
    """Content decides: images with a wrong ending, an odd one or none count like the others."""
    root = image_folder({"a": 3, "b": 3})
    for index, name in enumerate(["photo.txt", "photo", "photo.PNG", "photo.jpg", "photo.v2.final"]):
        Image.new("RGB", (SIDE, SIDE), (200, 200, index)).save(root / "a" / name, format="PNG")
    data = open_data(root)
    shown = _shown(data.train) | _shown(data.validation) | _shown(data.test())
    assert {(200, 200, index) for index in range(5)} < shown
    assert data.ignored_files == 0


# --- images that cannot be read ---------------------------------------------------------------------------------------


def _photo(format: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format)
    return buffer.getvalue()


def _png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100))


def _float_tiff() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(buffer, "TIFF")
    return buffer.getvalue()


def _damaged_avif() -> bytes:
    """Whole in size, but the last bytes of the picture itself were lost."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "AVIF")
    return buffer.getvalue()[:-8] + bytes(8)


BAD_IMAGES: dict[str, Callable[[], bytes]] = {
    "truncated.jpg": lambda: _photo("JPEG")[:1500],
    "header-only.jpg": lambda: _photo("JPEG")[:20],
    "truncated.png": lambda: _photo("PNG")[:3000],
    "truncated.gif": lambda: _photo("GIF")[:1500],
    "truncated.bmp": lambda: _photo("BMP")[:3000],
    "truncated.webp": lambda: _photo("WEBP")[:1000],
    "truncated.tif": lambda: _photo("TIFF")[:3000],
    "truncated.ppm": lambda: _photo("PPM")[:3000],
    "empty.png": lambda: b"",
    "text.png": lambda: b"this is no image\n",
    "page.jpg": lambda: b"<!DOCTYPE html><html><body>404</body></html>",
    "bomb.png": lambda: _png_header(100_000, 100_000),
    "large-bomb.png": lambda: _png_header(11_000, 11_000),  # above Pillow's limit, below twice the limit
    "float.tif": _float_tiff,
}
if features.check("avif"):
    BAD_IMAGES["truncated.avif"] = lambda: _photo("AVIF")[:-50]
    BAD_IMAGES["damaged.avif"] = _damaged_avif


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_an_image_that_cannot_be_read_is_named_or_left_out(name: str, image_folder: MakeFolder) -> None:
    root = image_folder({"a": 6, "b": 6})
    path = root / "a" / name
    path.write_bytes(BAD_IMAGES[name]())
    with pytest.raises(DataError) as raised:
        read_image(path, SIDE)
    assert repr(str(path)) in message_of(raised)
    with pytest.raises(DataError) as raised:
        open_data(root)
    assert repr(str(path)) in message_of(raised)
    assert "--skip-corrupt" in message_of(raised)

    for _ in range(2):  # decoded, then from the cache
        data = open_data(root, skip_corrupt=True)
        assert data.notices() == ["1 corrupt image file(s) were left out (--skip-corrupt)."]
        assert _count(data) == 12
    with pytest.raises(DataError):  # what was left out once is not left out for good
        open_data(root)


def test_a_file_that_cannot_be_read_for_now_is_not_taken_for_corrupt(image_folder: MakeFolder) -> None:
    """A network's drive that goes away for a minute would leave its images out of the data set for good."""
    root = image_folder({"a": 6, "b": 6})
    path = root / "a" / "away.png"
    path.symlink_to("/proc/self/mem")  # a file, but to read it is an error of the system
    if not path.is_file():
        pytest.skip("no /proc on this system")
    for _ in range(2):
        with pytest.raises(DataError) as raised:
            open_data(root, skip_corrupt=True)
        assert f"{str(path)!r} cannot be read (Input/output error): let it be read" in message_of(raised)
    path.unlink()
    assert _count(open_data(root, skip_corrupt=True)) == 12


def test_want_of_memory_is_nothing_that_a_file_has(image_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    root = image_folder({"a": 6, "b": 6})

    def lacking(*_: object) -> Image.Image:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(images_module, "to_rgb", lacking)
        with pytest.raises(DataError, match=r"cannot be decoded for want of memory: .* run again") as raised:
            open_data(root, skip_corrupt=True)
        assert message_of(raised)
    assert _count(open_data(root, skip_corrupt=True)) == 12


def test_images_that_neither_disk_nor_memory_can_hold_are_refused_with_a_way_out(tmp_path: Path) -> None:
    blocked = tmp_path / "a-file"
    blocked.touch()
    way_out = r"could not be written .* take 3,105,000\.0 GB: .*CAMRI_CACHE, or .*--image-size"
    with (
        pytest.raises(DataError, match=way_out) as raised,
        datasets._written_whole(blocked / "train.safetensors", (10**12, 3, 32, 32)),
    ):
        pytest.fail("where there is no room, nothing is filled")
    assert message_of(raised)


def test_where_other_images_can_be_read_than_before_it_is_another_data_set(image_folder: MakeFolder) -> None:
    """It has other parts, for they are drawn from what can be: what was learned from would come to be test.

    Nothing else tells, for the file is of the same size. A copy elsewhere is no better.
    """
    root = image_folder({"a": 40, "b": 40})
    config = build_config(root).model_copy(update={"skip_corrupt": True})
    whole = open_data(root, skip_corrupt=True)
    assert whole.fingerprint == open_data(root).fingerprint == open_data(root).fingerprint.partition("-")[0]
    copy = shutil.copytree(root, root.parent / f"{root.name}-copy")
    seen = {whole.fingerprint}
    for place in (3, 30, 55):
        for folder in (root, copy):
            path = sorted(folder.rglob("*.png"))[place]
            path.write_bytes(bytes(path.stat().st_size))
        found = open_data(root, skip_corrupt=True)
        assert found.fingerprint == open_data(copy, skip_corrupt=True).fingerprint
        seen.add(found.fingerprint)
        for where in (None, str(root), str(copy)):
            unseen = open_test_images(where, trained_on=config, fingerprint=found.fingerprint, classes=whole.classes)
            assert unseen.own
            assert _shown(unseen.images) == _shown(found.test())
            with pytest.raises(DataError, match="has changed since the model was trained, so what it learned"):
                open_test_images(where, trained_on=config, fingerprint=whole.fingerprint, classes=whole.classes)
    assert len(seen) == 4


def test_a_test_part_of_its_own_depends_on_no_image_of_training(image_folder: MakeFolder) -> None:
    root = image_folder({"train/a": 10, "train/b": 10, "test/a": 2, "test/b": 2})
    config = build_config(root).model_copy(update={"skip_corrupt": True})
    before = open_data(root, skip_corrupt=True)
    shown = _shown(before.test())
    path = sorted((root / "train").rglob("*.png"))[3]
    path.write_bytes(bytes(path.stat().st_size))
    for where in (None, str(root)):
        unseen = open_test_images(where, trained_on=config, fingerprint=before.fingerprint, classes=before.classes)
        assert unseen.own
        assert _shown(unseen.images) == shown
    for path in (root / "test").rglob("*.png"):
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DataError, match=r"no image of .* can be read"):
        open_test_images(None, trained_on=config, fingerprint=before.fingerprint, classes=before.classes)


def test_where_no_image_can_be_read_it_is_said(image_folder: MakeFolder) -> None:
    config = build_config(image_folder({"a": 5, "b": 5}))
    data = open_dataset(config)
    foreign = image_folder({"a": 2, "b": 3})
    for path in foreign.rglob("*.png"):
        path.write_bytes(b"no image")
    options: dict[str, Any] = {"fingerprint": data.fingerprint, "classes": data.classes, "skip_corrupt": True}
    with pytest.raises(DataError, match=r"no image of .* can be read"):
        open_test_images(str(foreign), trained_on=config, **options)


def test_folders_that_change_names_have_their_images_read_again(image_folder: MakeFolder, own_cache: Path) -> None:
    """Whatever time their files have: an archive gives all of them one."""
    root = image_folder({"train/a": 4, "train/b": 4, "test/a": 2, "test/b": 2})
    for path in root.rglob("*.png"):
        path.write_bytes(path.read_bytes().ljust(4_000, b"\0"))
        os.utime(path, (1e9, 1e9))
    before = open_data(root).test()
    for source, target in (("a", "x"), ("b", "a"), ("x", "b")):
        (root / "test" / source).rename(root / "test" / target)
    after = open_data(root).test()
    assert torch.equal(after.pixels, before.pixels[[2, 3, 0, 1]])


def test_one_name_seen_from_two_folders_is_two_data_sets(
    image_folder: MakeFolder, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for place, root in enumerate((image_folder({"a": 6, "b": 6}), image_folder({"a": 6, "b": 6}))):
        home = tmp_path / f"home{place}"
        home.mkdir()
        shutil.copytree(root, home / "images")
        for path in home.rglob("*.png"):
            path.write_bytes(path.read_bytes().ljust(4_000, b"\0"))
            os.utime(path, (1e9, 1e9))
        monkeypatch.chdir(home)
        found.append(open_data(Path("images")))
    assert found[0].fingerprint == found[1].fingerprint
    assert not torch.equal(found[0].train.pixels, found[1].train.pixels)


def test_the_reason_says_what_is_wrong(tmp_path: Path) -> None:
    for name, reason in {
        "empty.png": "is empty",
        "text.png": "not an image",
        "bomb.png": "decompression bomb",
        "large-bomb.png": "decompression bomb",
        "float.tif": "floating-point",
        "truncated.jpg": "truncated",
    }.items():
        (tmp_path / name).write_bytes(BAD_IMAGES[name]())
        with pytest.raises(DataError, match=reason):
            read_image(tmp_path / name, SIDE)


def test_several_bad_images_are_counted(image_folder: MakeFolder) -> None:
    root = image_folder({"a": 6, "b": 6})
    for name in ("x.png", "y.png", "z.png"):
        (root / "b" / name).write_text("no")
    with pytest.raises(DataError) as raised:
        open_data(root)
    assert "x.png" in message_of(raised)
    assert "2 more" in message_of(raised)
    assert open_data(root, skip_corrupt=True).notices() == ["3 corrupt image file(s) were left out (--skip-corrupt)."]


def test_a_class_of_bad_images_alone_is_named(image_folder: MakeFolder) -> None:
    root = image_folder({"a": 6, "b": 6, "c": 6})
    for path in (root / "b").iterdir():
        path.write_text("no")
    with pytest.raises(DataError, match="'b'") as raised:
        open_data(root, skip_corrupt=True)
    assert message_of(raised)


FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")


@given(
    format=st.sampled_from(FORMATS),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    keep=st.floats(0, 1),
)
@settings(deadline=None, max_examples=150)
def test_a_damaged_file_is_an_image_or_a_data_error(format: str, changes: list[tuple[float, int]], keep: float) -> None:
    """Any bytes at all: never another exception, which would end a run without naming the file."""
    content = bytearray(_photo(format))
    for place, value in changes:
        content[int(place**3 * len(content))] = value  # mostly near the beginning, where the structure is
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on odd tags
        path = Path(folder) / "image"
        path.write_bytes(content[: math.ceil(keep * len(content))])
        refusal = ""
        try:
            pixels = read_image(path, SIDE)
        except DataError as error:
            refusal = str(error)
        if refusal:
            assert "\n" not in refusal
            assert repr(str(path)) in refusal
        else:
            assert pixels.shape == (3, SIDE, SIDE)
            assert pixels.dtype == np.uint8


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_reading_in_threads_leaves_the_warning_filters_alone(tmp_path: Path) -> None:
    """Two threads that decode at the same time, the first to begin being the first to end: pipes hold them back."""
    before = list(warnings.filters)
    held = []
    for name in ("first", "second"):
        path = tmp_path / name
        os.mkfifo(path)
        thread = threading.Thread(target=partial(_ignore_data_error, read_image, path, SIDE))
        thread.start()
        held.append((thread, _open_for_writing(path)))
    for thread, writer in held:
        os.close(writer)  # an empty image
        thread.join()
    after = list(warnings.filters)
    warnings.filters[:] = before  # type: ignore[index]
    assert after == before


def _ignore_data_error(function: Callable[..., object], *arguments: object) -> None:
    with contextlib.suppress(DataError):
        function(*arguments)


def _open_for_writing(pipe: Path) -> int:
    """Wait until somebody reads the pipe; only then can it be opened without waiting."""
    while True:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            time.sleep(0.001)


# --- data sets that are refused ---------------------------------------------------------------------------------------


def test_an_unknown_data_set_is_named(tmp_path: Path) -> None:
    for name in ("foo", str(tmp_path / "nowhere")):
        with pytest.raises(DataError, match="unknown data set") as raised:
            open_data(name)
        for part in (repr(name), *BUILT_IN_DATASETS, "folder"):
            assert part in message_of(raised)


def test_a_file_is_no_data_set(tmp_path: Path) -> None:
    path = tmp_path / "images.zip"
    path.touch()
    with pytest.raises(DataError, match="is a file") as raised:
        open_data(path)
    assert repr(str(path)) in message_of(raised)


@pytest.mark.parametrize(
    ("counts", "parts"),
    [
        ({}, ["0 class folder", "at least 2"]),
        ({"cat": 5}, ["1 class folder", "at least 2"]),
        ({"train/cat": 5, "test/cat": 5}, ["train", "1 class folder"]),
        ({"cat": 5, "dog": 0}, ["'{root}/dog'", "no images"]),
        ({"train/cat": 5, "train/dog": 5, "val/cat": 2}, ["'{root}/val/dog' is missing", "'{root}/train/dog'"]),
        ({"train/cat": 5, "train/dog": 5, "test/dog": 2}, ["'{root}/test/cat' is missing"]),
        ({"train/cat": 5, "train/dog": 5, "val/cat": 2, "val/dog": 0}, ["'{root}/val/dog'", "no images"]),
        ({"train/cat": 5, "train/dog": 5, "val/cat": 2, "val/dog": 2, "val/emu": 2}, ["'{root}/val/emu'", "train"]),
        ({"train/cat": 5, "train/dog": 5, "test/cat": 2, "test/dog": 2, "test/emu": 2}, ["'{root}/test/emu'"]),
        ({"cat": 5, "dog": 1}, ["'dog'", "1 image(s)", "2 groups"]),
        ({"cat": 5, "dog": 2}, ["'dog'", "1 image(s) in 1 group(s) to draw from", "validation", "3 in all"]),
    ],
)
def test_a_folder_that_cannot_be_trained_on_gets_one_line(
    counts: Mapping[str, int], parts: list[str], image_folder: MakeFolder
) -> None:
    root = image_folder(counts)
    root.mkdir(exist_ok=True)
    with pytest.raises(DataError) as raised:
        open_data(root)
    for part in parts:
        assert part.format(root=root) in message_of(raised)


# --- the cache --------------------------------------------------------------------------------------------------------


def test_a_second_start_decodes_nothing(image_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    root = image_folder({"train/a": 6, "train/b": 6, "test/a": 2, "test/b": 2})
    first = open_data(root)
    first_test = first.test()
    forbid_decoding(monkeypatch)
    second = open_data(root)
    for before, after in (
        (first.train, second.train),
        (first.validation, second.validation),
        (first_test, second.test()),
    ):
        assert same(before, after)
    assert second.fingerprint == first.fingerprint
    with pytest.raises(AssertionError, match="decoded again"):  # the check itself works
        open_data(root, image_size=16)


def test_the_test_part_is_not_opened_before_it_is_asked_for(image_folder: MakeFolder, own_cache: Path) -> None:
    root = image_folder({"train/a": 6, "train/b": 6, "test/a": 2, "test/b": 2})
    (root / "test" / "b" / "torn.png").write_text("no image")
    data = open_data(root)
    assert {path.name for path in own_cache.rglob("*.safetensors")} == {"train.safetensors"}
    with pytest.raises(DataError, match=r"torn\.png"):
        data.test()
    data = open_data(root, skip_corrupt=True)
    assert data.notices() == []
    assert len(data.test()) == 4
    assert data.notices() == ["1 corrupt image file(s) were left out (--skip-corrupt)."]
    assert {path.name for path in own_cache.rglob("*")} >= {"train.safetensors", "test.safetensors"}


def test_of_many_that_start_at_once_one_decodes(image_folder: MakeFolder, own_cache: Path) -> None:
    config = build_config(image_folder({"a": 30, "b": 30}))
    barrier, decoded = threading.Barrier(4), []

    def start(_: int) -> Dataset:
        barrier.wait()
        return open_dataset(config, lambda done, total: decoded.append(done == total))

    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(start, range(4))
    assert all(same(first.train, other.train) for other in others)
    assert decoded == [True]


def test_a_cache_that_cannot_be_locked_is_only_slower(
    image_folder: MakeFolder, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str) -> NoReturn:
        raise NotImplementedError("this file system has no locks")

    monkeypatch.setattr(datasets, "FileLock", refuse)
    assert len(open_data(image_folder({"a": 6, "b": 6})).train) > 0


@pytest.mark.parametrize("damage", ["cut short", "empty", "garbage", "zeros", "other tensors"])
def test_a_damaged_cache_file_is_built_anew(
    damage: str, image_folder: MakeFolder, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = image_folder({"a": 6, "b": 6})
    first = open_data(root)
    (path,) = own_cache.rglob("*.safetensors")
    whole = path.read_bytes()
    path.unlink()  # the first has it mapped
    match damage:
        case "cut short":
            path.write_bytes(whole[: len(whole) // 2])
        case "empty":
            path.write_bytes(b"")
        case "garbage":
            path.write_bytes(np.random.default_rng(0).bytes(len(whole)))
        case "zeros":
            path.write_bytes(bytes(len(whole)))
        case "other tensors":
            save_file({"weights": torch.zeros(3)}, path)
    second = open_data(root)
    assert same(first.train, second.train)
    assert same(first.validation, second.validation)
    assert path.read_bytes() == whole
    files = {p.name for p in own_cache.rglob("*") if p.is_file()}
    assert files == {path.name, f"{path.name}.lock"}, "no partial files"
    forbid_decoding(monkeypatch)
    assert same(open_data(root).train, first.train)


def test_parts_and_folds_are_rows_of_one_mapped_file(image_folder: MakeFolder, own_cache: Path) -> None:
    """However many there are of them, and of workers, a machine's memory has the images once."""
    data = open_data(image_folder({"a": 30, "b": 30}))
    parts = [data.train, data.validation, *data.fold(1), *data.fold(4), data.validation_of(5)]
    assert len({part.store.data_ptr() for part in parts}) == 1
    (path,) = own_cache.rglob("*.safetensors")
    first = data.train.store.data_ptr()
    spans = [
        line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line
    ]
    assert any(int(low, 16) <= first < int(high, 16) for low, high in spans)
    assert data.train.bytes == len(data.train) * 3 * SIDE * SIDE


@given(st.integers(1, 40), st.integers(1, 12), st.data())
def test_rows_of_a_store_are_what_a_copy_would_be(stored: int, size: int, data: st.DataObject) -> None:
    pixels = torch.arange(stored * 12, dtype=torch.uint8).view(stored, 3, 2, 2)
    images, numbers = Images(pixels, torch.arange(stored), torch.arange(stored) // 2), np.arange(stored)
    for _ in range(2):  # rows, and rows of rows
        some = np.array(data.draw(st.lists(st.integers(0, len(images) - 1), min_size=1, max_size=20)))
        images, numbers = images[some], numbers[some]
        copied = pixels[torch.from_numpy(numbers)]
        assert len(images) == len(numbers)
        assert torch.equal(images.pixels, copied)
        assert torch.equal(torch.cat(list(images.split(size))), copied)
        assert [len(part) for part in images.split(size)] == [len(part) for part in torch.split(copied, size)]
        places = torch.tensor(data.draw(st.lists(st.integers(0, len(images) - 1), min_size=1, max_size=9)))
        taken, labels = images.batch(places)
        assert torch.equal(taken, copied[places])
        assert torch.equal(labels, torch.from_numpy(numbers)[places])
        assert torch.equal(images.groups, torch.from_numpy(numbers // 2))
        assert (images.channels, images.side, images.bytes) == (3, 2, len(copied) * 12)


@pytest.mark.parametrize(("free", "said"), [(None, False), (10**9, False), (30_000, False), (20_000, True), (0, True)])
def test_images_that_memory_does_not_hold_are_told(
    free: int | None, said: bool, image_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_data(image_folder({"a": 30, "b": 30}))  # 11,520 bytes
    monkeypatch.setattr(datasets, "free_memory", lambda: free)
    assert [("read from the disk again and again" in notice) for notice in data.notices()] == [True] * said


def test_a_full_disk_makes_the_cache_only_slower(
    image_folder: MakeFolder, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = image_folder({"a": 6, "b": 6})
    whole = open_data(root).train
    for path in own_cache.rglob("*.safetensors"):
        path.unlink()

    def refuse(*_: int) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.warns(UserWarning, match="could not be written .*No space left on device"):
        assert same(open_data(root).train, whole)
    assert not list(own_cache.rglob("*.partial"))


def test_a_changed_folder_is_another_data_set(image_folder: MakeFolder) -> None:
    root = image_folder({"a": 6, "b": 6})
    prints = [open_data(root).fingerprint]
    Image.new("RGB", (8, 8), "white").save(root / "a" / "more.png")
    prints.append(open_data(root).fingerprint)
    (root / "a" / "more.png").unlink()
    assert open_data(root).fingerprint == prints[0]
    Image.new("RGB", (40, 40), "white").save(root / "a" / "000.png")  # a file of another size
    changed = open_data(root)
    prints.append(changed.fingerprint)
    assert (255, 255, 255) in _shown(changed.train) | _shown(changed.validation) | _shown(changed.test())
    (root / "a" / "000.png").rename(root / "a" / "zzz.png")
    prints.append(open_data(root).fingerprint)
    (root / "a" / "zzz.png").rename(root / "b" / "zzz.png")
    prints.append(open_data(root).fingerprint)
    prints.append(open_data(root, image_size=16).fingerprint)
    assert len(set(prints)) == len(prints)


def test_pixels_replaced_by_others_of_the_same_size_are_read_anew(image_folder: MakeFolder) -> None:
    """Every bitmap of one resolution has the same size: an export that is repeated must not show the old pixels."""
    root = image_folder({"a": 0, "b": 0})
    for shade in (10, 200):
        for name in ("a", "b"):
            for index in range(6):
                Image.new("RGB", (8, 8), (shade, index, 0)).save(root / name / f"{index}.bmp")
        data = open_data(root)
        assert set(data.train.pixels[:, 0].flatten().tolist()) == {shade}


def test_moving_a_folder_changes_nothing(
    image_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = image_folder({"a": 6, "b": 6})
    first = open_data(root)
    (tmp_path / "elsewhere").mkdir()
    moved = root.rename(tmp_path / "elsewhere" / root.name)
    second = open_data(moved)
    assert second.fingerprint == first.fingerprint
    assert same(first.train, second.train)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert open_data(root.name).fingerprint == first.fingerprint


def test_renaming_a_folder_keeps_what_it_holds(image_folder: MakeFolder) -> None:
    """`evaluate` must know the training images under any name: else it would judge a model on what it learned from."""
    root = image_folder({"a": 6, "b": 6})
    first = open_data(root).fingerprint
    assert open_data(root.rename(root.with_name("renamed"))).fingerprint == first


def test_a_cache_that_cannot_be_written_only_warns(
    image_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = image_folder({"a": 6, "b": 6})
    blocked = tmp_path / "a-file"
    blocked.touch()
    monkeypatch.setenv("CAMRI_CACHE", str(blocked))  # a folder below a file cannot be made, not even by root
    with pytest.warns(UserWarning, match="could not be written") as warned:
        data = open_data(root)
    assert len(data.train) + len(data.validation) > 0
    assert str(blocked) in str(warned[0].message)
    assert "\n" not in str(warned[0].message)


def test_progress_tells_of_every_image(image_folder: MakeFolder) -> None:
    root = image_folder({"a": 400, "b": 300})
    heard: list[tuple[int, int]] = []
    open_dataset(build_config(root), lambda done, total: heard.append((done, total)))
    assert heard == [(500, 700), (700, 700)]


# --- a limit ----------------------------------------------------------------------------------------------------------


def test_a_limit_bounds_training_and_leaves_validation_and_test_whole(image_folder: MakeFolder) -> None:
    root = image_folder({"a": 40, "b": 40})
    whole, limited = open_data(root), open_data(root, limit=20)
    assert len(limited.train) == 20
    assert _shown(limited.train) < _shown(whole.train)
    assert torch.bincount(limited.train.labels).tolist() == [10, 10]
    assert same(limited.validation, whole.validation)
    assert same(limited.test(), whole.test())
    assert limited.fingerprint == whole.fingerprint
    assert len(open_data(root, limit=2).train) == 2
    with pytest.raises(DataError, match=r"--limit 1 .*at least 2$"):
        open_data(root, limit=1)
    assert same(open_data(root, limit=10_000).train, whole.train)


def test_a_limit_leaves_a_validation_folder_whole(image_folder: MakeFolder) -> None:
    root = image_folder({"train/a": 20, "train/b": 20, "val/a": 9, "val/b": 9, "test/a": 3, "test/b": 3})
    limited = open_data(root, limit=8)
    assert len(limited.train) == 8
    assert _shown(limited.validation) == _colours(root / "val")
    assert _shown(limited.test()) == _colours(root / "test")


# --- folds ------------------------------------------------------------------------------------------------------------

FOLDS = 5


def _rows(images: Images) -> list[int]:
    """Which of the images of `_grouped` these are."""
    high, low = images.pixels[:, 0, 0, :2].long().unbind(dim=1)
    return [int(number) for number in 256 * high + low]


def _grouped(sizes: Sequence[Sequence[int]], **values: Any) -> Dataset:
    """Classes with groups of these sizes. The first two pixels number an image."""
    table = [(label, size) for label, of_class in enumerate(sizes) for size in of_class]
    groups = torch.repeat_interleave(torch.tensor([size for _, size in table]))
    labels = torch.tensor([label for label, _ in table])[groups]
    numbers = torch.arange(len(groups))
    pixels = torch.zeros(len(groups), 1, SIDE, SIDE, dtype=torch.uint8)
    pixels[:, 0, 0, 0], pixels[:, 0, 0, 1] = numbers // 256, numbers % 256
    names = tuple(f"class {label}" for label in range(len(sizes)))
    packed = Packed((), lambda: Images(pixels, labels, groups))
    source = Source("grouped", None, names, SIDE, 1, Augmentation(), packed={"train": packed})
    return Dataset(source, StudyConfig.build(values))


def test_the_first_fold_is_the_split_and_the_others_hold_out_other_images(image_folder: MakeFolder) -> None:
    root = image_folder({"a": 40, "b": 50})
    data = open_data(root)
    assert data.has_folds
    assert data.fold(0)[0] is data.train
    assert data.fold(0)[1] is data.validation
    pool = _shown(data.train) | _shown(data.validation)
    assert pool == _colours(root) - _shown(data.test())
    held: list[tuple[int, ...]] = []
    for fold in range(FOLDS):
        train, validation = data.fold(fold)
        assert not _shown(train) & _shown(validation)
        assert _shown(train) | _shown(validation) == pool, "no test image, and none lost"
        assert torch.bincount(validation.labels).tolist() == [6, 8]
        held += _shown(validation)
    assert len(held) == len(set(held)) == FOLDS * 14


def test_a_class_of_few_images_repeats_some_of_them(image_folder: MakeFolder) -> None:
    data = open_data(image_folder({"a": 4, "b": 50}))
    a, b = ([{*_shown(data.fold(k)[1][_of_class(data.fold(k)[1], c)])} for k in range(FOLDS)] for c in (0, 1))
    assert [len(shown) for shown in a] == [1] * FOLDS
    assert len(set.union(*a)) == 3, "all but the test image"
    assert len(set.union(*b)) == FOLDS * 8
    validation = data.validation_of(FOLDS)
    assert _shown(validation) == set.union(*a, *b), "each once"
    assert torch.bincount(validation.labels).tolist() == [3, FOLDS * 8]


def _of_class(images: Images, label: int) -> NDArray[np.int64]:
    return np.flatnonzero(images.labels.numpy() == label)


def test_folds_are_the_same_for_whoever_opens_the_data_set(image_folder: MakeFolder) -> None:
    """Workers open it for themselves, and ask for folds in any order."""
    root = image_folder({"a": 20, "b": 20})
    first, second = open_data(root), open_data(root, folds=3)
    expected = [first.fold(fold) for fold in range(3)]
    for fold in (2, 0, 1):
        assert all(map(same, second.fold(fold), expected[fold]))
    assert second.fingerprint == first.fingerprint
    assert same(second.train, first.train)
    assert same(second.test(), first.test())
    other = open_data(root, seed=1)
    assert _shown(other.fold(1)[1]) != _shown(first.fold(1)[1])


def test_folds_move_whole_groups() -> None:
    data = _grouped([[3] * 25, [1, 2, 3, 4] * 8])
    assert data.grouped
    for fold in range(FOLDS):
        train, validation = data.fold(fold)
        assert not set(train.groups.tolist()) & set(validation.groups.tolist())
        assert len(train) + len(validation) == len(data.train) + len(data.validation)


def test_the_images_that_folds_validate_on_are_each_told_once() -> None:
    data = _grouped([[3] * 25, [2] * 5, [1] * 50])
    assert data.validation_of(1) is data.validation
    for count in range(1, FOLDS + 1):
        expected = {row for fold in range(count) for row in _rows(data.fold(fold)[1])}
        images = data.validation_of(count)
        assert _rows(images) == sorted(expected)
        assert len(_rows(images)) == len(expected)
    alone = [len(data.fold(fold)[1]) for fold in range(FOLDS)]
    assert len(data.validation_of(2)) == sum(alone[:2])
    assert len(data.validation_of(FOLDS)) < sum(alone), "the class of few groups"


@pytest.mark.parametrize("values", [{"per_group": 2}, {"limit": 30}, {"per_group": 2, "limit": 30}])
def test_every_fold_trains_on_as_few_as_asked_for(values: dict[str, int]) -> None:
    sizes = [[5] * 25, [3] * 30]
    whole, thin = _grouped(sizes), _grouped(sizes, **values)
    parts = set()
    for fold in range(FOLDS):
        train, validation = thin.fold(fold)
        everything, same_validation = whole.fold(fold)
        assert same(validation, same_validation), "fewer images to judge on would decide badly"
        assert set(_rows(train)) < set(_rows(everything))
        assert set(train.labels.tolist()) == {0, 1}
        counts = torch.bincount(train.groups).tolist()
        if "per_group" in values:
            assert set(counts) <= {0, 2}
        if "limit" in values:
            assert 24 < len(train) <= 30
        else:
            assert len(set(train.groups.tolist())) == len(set(everything.groups.tolist()))
        parts.add(tuple(_rows(train)))
    assert len(parts) == FOLDS
    assert same(thin.validation_of(FOLDS), whole.validation_of(FOLDS))


def test_a_data_set_with_a_validation_part_has_that_alone(image_folder: MakeFolder) -> None:
    root = image_folder({"train/a": 20, "train/b": 20, "val/a": 9, "val/b": 9})
    for folds in ("auto", 1, "1"):
        data = open_data(root, folds=folds)
        assert not data.has_folds
        for fold in range(FOLDS):
            train, validation = data.fold(fold)
            assert same(train, data.train)
            assert _shown(validation) == _colours(root / "val")
        assert same(data.validation_of(FOLDS), data.validation)
    limited = open_data(root, limit=8)
    assert [len(limited.fold(fold)[0]) for fold in range(FOLDS)] == [8] * FOLDS


def test_folds_are_not_to_be_had_of_a_data_set_with_a_validation_part(image_folder: MakeFolder) -> None:
    root = image_folder({"train/a": 20, "train/b": 20, "val/a": 9, "val/b": 9})
    for folds in (2, 5):
        with pytest.raises(DataError, match=rf"^--folds {folds} .*brings its own: leave --folds out") as raised:
            open_data(root, folds=folds)
        assert repr(root.name) in message_of(raised)
    with_test = image_folder({"train/a": 20, "train/b": 20, "test/a": 3, "test/b": 3})
    data = open_data(with_test, folds=5)
    assert data.has_folds
    pool = _colours(with_test / "train")
    for fold in range(FOLDS):
        train, validation = data.fold(fold)
        assert _shown(train) | _shown(validation) == pool, "the test part stays what it is"
    assert _shown(data.test()) == _colours(with_test / "test")


# --- images to judge a finished model on ------------------------------------------------------------------------------


def test_the_data_set_of_training_gives_its_test_part_and_nothing_else(
    image_folder: MakeFolder, tmp_path: Path
) -> None:
    root = image_folder({"a": 20, "b": 20})
    config = build_config(root, seed=3)
    data = open_dataset(config)
    expected = data.test()
    (tmp_path / "moved").mkdir()
    moved = Path(shutil.copytree(root, tmp_path / "moved" / root.name))
    for where in (None, str(root), str(moved)):
        unseen = open_test_images(where, trained_on=config, fingerprint=data.fingerprint, classes=data.classes)
        images, text, *_ = unseen
        assert same(images, expected)
        assert (unseen.hidden_group_size, unseen.own) == (1, True), "a folder's images stand each alone"
        assert "test part" in text
        assert "neither trained nor chose" in text


def test_a_training_folder_that_changed_does_not_give_what_was_learned_from(image_folder: MakeFolder) -> None:
    """One file more and the split is another: the images that trained the model cannot be told from the others."""
    root = image_folder({"a": 20, "b": 20})
    config = build_config(root)
    data = open_dataset(config)
    learned = _shown(data.train) | _shown(data.validation)
    Image.new("RGB", (8, 8), "white").save(root / "a" / "more.png")
    refusal = ""
    try:
        images, text, *_ = open_test_images(None, trained_on=config, fingerprint=data.fingerprint, classes=data.classes)
    except DataError as error:
        refusal = str(error)
    if refusal:
        assert str(root) in refusal
    else:
        assert "None" not in text
        assert not _shown(images) & learned


@pytest.mark.parametrize("part", ["", "test/"])
def test_a_foreign_folder_has_its_labels_by_class_name(part: str, image_folder: MakeFolder) -> None:
    config = build_config(image_folder({"ant": 5, "bee": 5, "cat": 5, "dog": 5}))
    data = open_dataset(config)
    counts = {f"{part}dog": 2, f"{part}bee": 3}
    if part:
        counts |= {"train/dog": 4, "train/bee": 4}
    foreign = image_folder(counts)
    images, text, _, own = open_test_images(
        str(foreign), trained_on=config, fingerprint=data.fingerprint, classes=data.classes
    )
    assert not own
    assert sorted(images.labels.tolist()) == [1, 1, 1, 3, 3]
    assert _shown(images) == _colours(foreign / part)
    for label, name in ((1, "bee"), (3, "dog")):
        assert _shown(images[np.flatnonzero(images.labels.numpy() == label)]) == _colours(foreign / part / name)
    assert str(foreign) in text
    assert ("test part" if part else "all images") in text
    assert "which is not, as it is, the data set of training" in text


@pytest.mark.parametrize(("parts", "size"), [(("train", "test"), 30), (("train",), 1)])
def test_unnamed_groups_are_those_of_a_sources_test_part(
    parts: tuple[str, ...], size: int, image_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A foreign source's test part keeps that fact; what comes of its other parts has groups of its own."""
    config = build_config(image_folder({"a": 5, "b": 5}))
    data = open_dataset(config)
    foreign = image_folder({f"{part}/{name}": 4 for part in parts for name in "ab"})
    source = replace(find_source(build_config(foreign)), hidden_group_size=30)
    monkeypatch.setattr(datasets, "find_source", lambda _, **__: source)
    unseen = open_test_images(str(foreign), trained_on=config, fingerprint=data.fingerprint, classes=data.classes)
    assert (unseen.hidden_group_size, unseen.own) == (size, False)
    assert open_dataset(build_config(foreign)).hidden_group_size == size


def test_all_images_of_a_foreign_folder_are_all_of_them(image_folder: MakeFolder) -> None:
    """Without a test part, training and validation folders both count."""
    config = build_config(image_folder({"a": 5, "b": 5}))
    data = open_dataset(config)
    foreign = image_folder({"train/a": 3, "train/b": 3, "val/a": 2, "val/b": 2})
    images, text, *_ = open_test_images(
        str(foreign), trained_on=config, fingerprint=data.fingerprint, classes=data.classes
    )
    assert "all images" in text
    assert _shown(images) == _colours(foreign)
    assert len(torch.unique(images.groups)) == len(images) == 10, "each shows something else"


def test_where_images_were_moved_about_it_is_said_that_some_may_have_been_learned_from(
    image_folder: MakeFolder,
) -> None:
    """Training and test images changed places: the folder has a test part, but not that of then."""
    root = image_folder({"train/a": 6, "train/b": 6, "test/a": 3, "test/b": 3})
    config = build_config(root)
    data = open_dataset(config)
    path = next((root / "train" / "a").iterdir())
    path.rename(root / "test" / "a" / "moved.png")
    for where in (None, str(root)):
        _, text, _, own = open_test_images(where, trained_on=config, fingerprint=data.fingerprint, classes=data.classes)
        assert not own
        assert "has changed since the model was trained, and it may have learned from some of them" in text


def test_a_folder_in_the_data_set_of_training_or_around_it_is_no_foreign_one(
    image_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its test part asked for by itself is its test part; of the rest nobody knows what trained the model."""
    root = image_folder({f"{part}/{name}": 6 for part in ("train", "val", "TEST") for name in "ab"})
    monkeypatch.chdir(root)

    def judged(where: Path, of: Path) -> Unseen:
        config = build_config(of)
        data = open_dataset(config)
        return open_test_images(str(where), trained_on=config, fingerprint=data.fingerprint, classes=data.classes)

    for where in (root / "TEST", Path("TEST"), root.parent / "elsewhere"):
        if not where.exists():
            where.symlink_to(root / "TEST")
        unseen = judged(where, root)
        assert unseen.own
        assert _shown(unseen.images) == _colours(root / "TEST")
    for part in ("train", "val"):
        with pytest.raises(DataError, match="lies in what the model was trained on, so what it learned") as raised:
            judged(root / part, root)
        assert repr(str(root / part)) in message_of(raised)
    shutil.copytree(root / "TEST", root / "new", dirs_exist_ok=True)  # beside the parts, where no training looks
    (root / "new" / "a" / "more.png").write_bytes(next((root / "TEST" / "a").iterdir()).read_bytes())
    assert "which is not, as it is, the data set of training" in judged(root / "new", root).text
    shutil.rmtree(root / "new")
    unseen = judged(root, root / "train")
    assert not unseen.own
    assert "the test part of" in unseen.text
    assert "holds what the model was trained on, and it may have learned from some of them" in unseen.text
    assert "which is not, as it is, the data set of training" in judged(root / "val", root / "train").text
    shutil.rmtree(root / "TEST")
    with pytest.raises(DataError, match="holds what the model was trained on, so what it learned"):
        judged(root, root / "train")


def test_parts_that_are_links_are_what_they_lead_to(image_folder: MakeFolder, tmp_path: Path) -> None:
    big = image_folder({f"{part}/{name}": 6 for part in ("train", "test") for name in "ab"})
    root = tmp_path / "linked"
    root.mkdir()
    for part in ("train", "test"):
        (root / part).symlink_to(big / part)
    config = build_config(root)
    data = open_dataset(config)

    def judged(where: Path) -> Unseen:
        return open_test_images(str(where), trained_on=config, fingerprint=data.fingerprint, classes=data.classes)

    for where in (root / "test", big / "test"):
        assert judged(where).own
    for where in (root / "train", big / "train"):
        with pytest.raises(DataError, match="lies in what the model was trained on"):
            judged(where)


@pytest.mark.parametrize(
    ("counts", "labels"),
    [({"test/a": 2, "test/c": 3}, [0, 0, 2, 2, 2]), ({"b": 4}, [1] * 4), ({"train/a": 2, "test/b": 2}, [1, 1])],
)
def test_images_to_judge_need_neither_training_images_nor_every_class(
    counts: dict[str, int], labels: list[int], image_folder: MakeFolder
) -> None:
    """New cases of the important class alone are what somebody has to judge a model on."""
    config = build_config(image_folder({"a": 5, "b": 5, "c": 5}))
    data = open_dataset(config)
    foreign = image_folder(counts)
    images, *_ = open_test_images(str(foreign), trained_on=config, fingerprint=data.fingerprint, classes=data.classes)
    assert sorted(images.labels.tolist()) == labels
    with pytest.raises(DataError):
        open_data(foreign)


def test_corrupt_images_to_judge_are_named_or_counted(image_folder: MakeFolder) -> None:
    """Whatever was left out of training: that says nothing of other images."""
    config = build_config(image_folder({"a": 5, "b": 5})).model_copy(update={"skip_corrupt": True})
    data = open_dataset(config)
    foreign = image_folder({"a": 3, "b": 3})
    (foreign / "a" / "torn.png").write_bytes(b"no image")
    options: dict[str, Any] = {"trained_on": config, "fingerprint": data.fingerprint, "classes": data.classes}
    with pytest.raises(DataError, match=r"torn\.png.*--skip-corrupt"):
        open_test_images(str(foreign), **options)
    images, text, *_ = open_test_images(str(foreign), **options, skip_corrupt=True)
    assert len(images) == 6
    assert text.endswith("; 1 corrupt image file(s) were left out")


def test_files_that_are_no_images_are_counted_where_a_model_is_judged(image_folder: MakeFolder) -> None:
    root, foreign = image_folder({"a": 9, "b": 9}), image_folder({"a": 3, "b": 3})
    (root / "a" / "photo.heic").write_bytes(b"of a format that is not read")
    for name in ("1.dcm", "2.dcm"):
        (foreign / "b" / name).write_bytes(b"likewise")
    config = build_config(root)
    data = open_dataset(config)
    for where, count in ((None, 1), (str(foreign), 2)):
        unseen = open_test_images(where, trained_on=config, fingerprint=data.fingerprint, classes=data.classes)
        assert unseen.text.endswith(f"; {count} file(s) in its folder that are no images were passed over")


def test_a_class_that_the_model_does_not_know_is_named(image_folder: MakeFolder) -> None:
    config = build_config(image_folder({"a": 5, "b": 5}))
    data = open_dataset(config)
    foreign = image_folder({"a": 2, "zebra": 2})
    with pytest.raises(DataError, match="'zebra'") as raised:
        open_test_images(str(foreign), trained_on=config, fingerprint=data.fingerprint, classes=data.classes)
    assert str(foreign) in message_of(raised)
    with pytest.raises(DataError, match="unknown data set"):
        open_test_images("/nowhere", trained_on=config, fingerprint=data.fingerprint, classes=data.classes)
