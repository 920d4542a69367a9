"""Images in memory, and one image file decoded.

Image files come from anybody. What one may take of memory and time is bounded here, whatever Pillow's own limits are
set to: its size in bytes and in pixels, and both for all threads together.
"""

import errno
import math
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from camri_tune.config import printable
from camri_tune.errors import DataError, FileNotReadError

_SUFFIXES_OF_FORMATS = Image.registered_extensions()  # loads every plug-in
# The formats in which people keep photographs and drawings. Pillow knows thirty more: some start another program on the
# user's file (PostScript), hold an image of any other size inside (icons), or turn a hundred bytes into minutes of
# Python (DDS).
_FORMATS = sorted(
    {"AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "SGI", "TGA", "TIFF", "WEBP"} & {*Image.OPEN}
)
_SUFFIXES = frozenset(suffix for suffix, name in _SUFFIXES_OF_FORMATS.items() if name in _FORMATS)

# Measured on hostile files, a pixel takes up to 25 bytes while it is decoded and a byte of a file up to 25 while its
# head is read: 5.6 GB in all, however many threads decode.
MOST_PIXELS = 2**28 // 3  # 89 million, in one image and in all that are being decoded
MOST_BYTES = 2**27  # 134 million, likewise
MOST_SCANS = 200  # passes over a JPEG; a progressive one has about ten, and a tiny file could ask for millions

# A JPEG's markers but for those that have no length, and none in its coded data, where 0 or a restart comes after 0xFF.
_SEGMENT, _SCAN, _END = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]"), b"\xff\xda", b"\xff\xd9"


@dataclass(frozen=True)
class Images:
    """One part of a data set: rows of a store of pixels that parts share, so that no part is a copy.

    `store` uint8 (M, C, S, S), which may be a file that all processes on a machine map into memory; `labels` and
    `groups` int64 (N,); `rows` int64 (N,) says where in the store each image lies, None: all of it in order. Embeddings
    are images of D channels and a single pixel, in float32.
    """

    store: torch.Tensor
    labels: torch.Tensor
    groups: torch.Tensor
    rows: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: NDArray[np.int64]) -> "Images":
        places = torch.from_numpy(index)
        rows = places if self.rows is None else self.rows[places]
        return Images(self.store, self.labels[places], self.groups[places], rows)

    @property
    def pixels(self) -> torch.Tensor:
        """All images, (N, C, S, S): a copy, unless they are the whole store."""
        return self.store if self.rows is None else self.store[self.rows]

    @property
    def channels(self) -> int:
        return int(self.store.shape[1])

    @property
    def side(self) -> int:
        """Height and width in pixels."""
        return int(self.store.shape[2])

    @property
    def are_embeddings(self) -> bool:
        """Whether somebody's network has made numbers of them already."""
        return self.store.is_floating_point()

    @property
    def bytes(self) -> int:
        """What the pixels take."""
        return len(self) * math.prod(self.store.shape[1:]) * self.store.element_size()

    def batch(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels (B, C, S, S) and labels (B,) of the images in these places, int64 (B,)."""
        return self.store[places if self.rows is None else self.rows[places]], self.labels[places]

    def split(self, size: int) -> Iterator[torch.Tensor]:
        """Pixels in order, so many at a time, as `Tensor.split` gives them."""
        for start in range(0, len(self), size):
            some = slice(start, start + size)
            yield self.store[some if self.rows is None else self.rows[some]]

    def on(self, device: torch.device) -> "Images":
        """The same images in a device's memory, without the rest of their store."""
        if self.store.device.type == device.type == "cpu":
            return self
        return Images(self.pixels.to(device), self.labels.to(device), self.groups.to(device))


class Pieces(NamedTuple):
    """Images that are read piece by piece, for they may be larger than memory.

    `labels` and `groups` int64 (N,); `pixels` gives uint8 (n, C, H, W) of any H and W, or embeddings as float32
    (n, C, 1, 1), N in all, once.
    """

    labels: torch.Tensor
    groups: torch.Tensor
    channels: int
    pixels: Iterator[torch.Tensor]


def describe_counts(images: Images) -> str:
    """'31,380 images in 1,046 groups', or without groups where every image is its own."""
    groups = len(torch.unique(images.groups))
    text = f"{len(images):,} {'embeddings' if images.are_embeddings else 'images'}"
    return text if groups == len(images) else f"{text} in {groups:,} groups"


def resized(images: Images, size: int) -> Images:
    """The same images at `size` x `size`."""
    if images.side == size:
        return images
    # In pieces: as floats, all of them together would be large.
    pieces = [squeezed(some, size) for some in images.split(1024)]
    return Images(torch.cat(pieces), images.labels, images.groups)


def with_channels(images: Images, channels: int) -> Images:
    """The same images in grey (1) or RGB (3), as one takes the place of the other; what is neither is as it was."""
    if images.are_embeddings or {images.channels, channels} != {1, 3}:
        return images
    if channels == 3:
        return replace(images, store=images.store.expand(-1, 3, -1, -1))  # a view
    grey, done = torch.empty((len(images), 1, images.side, images.side), dtype=torch.uint8), 0
    for some in images.split(64):  # in pieces: the store may be larger than memory
        grey[done : done + len(some)] = torch.from_numpy(to_grey(some.numpy()))
        done += len(some)
    return Images(grey, images.labels, images.groups)


def to_grey(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGB (n, 3, H, W) as Pillow's grey (n, 1, H, W)."""
    count, _, height, width = pixels.shape
    below_each_other = pixels.transpose(0, 2, 3, 1).reshape(count * height, width, 3)
    return np.array(Image.fromarray(below_each_other).convert("L")).reshape(count, 1, height, width)


def squeezed(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 (n, C, H, W) as (n, C, `size`, `size`): whole images, bilinear with antialiasing."""
    if pixels.shape[2:] == (size, size):
        return pixels
    floats = torch.nn.functional.interpolate(pixels.float(), (size, size), mode="bilinear", antialias=True)
    return floats.round().clamp(0, 255).to(torch.uint8)


class _Budget:
    """So much of something for all threads together: who wants more than is left waits for the others."""

    def __init__(self, amount: int) -> None:
        self._left = amount
        self._changed = threading.Condition()

    @contextmanager
    def of(self, amount: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: amount <= self._left)
            self._left -= amount
        try:
            yield
        finally:
            with self._changed:
                self._left += amount
                self._changed.notify_all()


_BYTES, _PIXELS = _Budget(MOST_BYTES), _Budget(MOST_PIXELS)


def read_image(path: Path, size: int) -> NDArray[np.uint8]:
    """Decode one image file to uint8 RGB (3, size, size); the whole image is kept, squeezed to a square.

    The content decides, not the file name's ending. Greyscale and palette images become RGB, transparency is shown on
    white, 16-bit is scaled to 8, EXIF rotation is applied, of an animation the first frame is taken. Raises DataError,
    naming the file, where that is not possible or would take more than `MOST_BYTES` or `MOST_PIXELS`; FileNotReadError
    where that says nothing of what is in the file.
    """
    try:
        length = path.stat().st_size
        if length > MOST_BYTES:
            raise ValueError(f"{length:,} bytes, but at most {MOST_BYTES:,} are read; save it smaller")
        # Always in this order, so that no two threads wait for each other. Pillow, of a path, leaves what it
        # cannot read open.
        with (
            _BYTES.of(length),
            path.open("rb") as file,
            Image.open(file, formats=_FORMATS) as opened,
            _PIXELS.of(_pixels_of(opened, path)),
        ):
            image = to_rgb(ImageOps.exif_transpose(opened), opened.format)
            if image.size != (size, size):
                image = image.resize((size, size), Image.Resampling.BILINEAR)
            return np.asarray(image).transpose(2, 0, 1)
    except UnidentifiedImageError:
        empty = path.stat().st_size == 0
        raise DataError(f"image file {str(path)!r} is {'empty' if empty else 'not an image'}") from None
    except MemoryError:
        raise FileNotReadError(f"image file {str(path)!r} cannot be decoded for want of memory") from None
    except Exception as error:  # a dozen decoders on any bytes at all: what they raise is not to be listed
        # The system's has a number, Pillow's has none; but a head can name a place to seek that there is not.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL, errno.EOVERFLOW):
            raise FileNotReadError(f"image file {str(path)!r} cannot be read ({error.strerror})") from None
        raise DataError(f"image file {str(path)!r} cannot be decoded ({printable(str(error))})") from None


def _pixels_of(opened: Image.Image, path: Path) -> int:
    """How many pixels an image will take to decode, from its head. Raises ValueError where that is too much."""
    pixels = opened.width * opened.height
    if opened.format == "TIFF":  # a tile is decoded whole, and may be larger than the image
        tags = opened.tag_v2  # type: ignore[attr-defined]
        pixels = max(pixels, tags.get(322, 1) * tags.get(323, 1))
    if pixels > MOST_PIXELS:
        raise ValueError(
            f"{opened.width}x{opened.height} takes {pixels:,} pixels, but at most {MOST_PIXELS:,} are read, since more "
            f"may be a decompression bomb; save it smaller"
        )
    if opened.format in ("JPEG", "MPO") and _has_many_scans(path.read_bytes()):
        raise ValueError(f"more than the {MOST_SCANS} scans that are read; save it as an ordinary JPEG")
    return pixels


def _has_many_scans(jpeg: bytes) -> bool:
    """Whether the file's first image has, up to its own end: what lies behind it, such as a film, is not decoded.

    Segments are skipped by their length, as decoders do, for thumbnails in them have an end of their own.
    """
    place = scans = 0
    while scans <= MOST_SCANS and (found := _SEGMENT.search(jpeg, place)) and found[0] != _END:
        scans += found[0] == _SCAN
        place = found.end() + max(2, int.from_bytes(jpeg[found.end() : found.end() + 2]))
    return scans > MOST_SCANS


def to_rgb(image: Image.Image, name: str | None) -> Image.Image:
    """To RGB; `name` is the file's format, which `image`, a copy, no longer knows, None where it is of no file."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range; save it as 8 or 16 bit")
    if image.mode.startswith("I"):  # 16-bit greyscale (and 32-bit containers of it)
        values = np.asarray(image).astype(np.float32)
        deep = image.mode != "I" or name == "PPM" or values.max(initial=0) > 255
        scale = 257.0 if deep else 1.0
        return Image.fromarray((values / scale).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def is_image_file(path: str | Path) -> bool:
    """Whether a file claims to be an image by its name's ending, or is one by its content."""
    if os.path.splitext(path)[1].lower() in _SUFFIXES:
        return True
    try:
        if os.path.getsize(path) > MOST_BYTES:
            return False
        with Image.open(path, formats=_FORMATS):
            return True
    except Exception:  # as above
        return False
