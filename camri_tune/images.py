"""Images in memory, and one image file decoded."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from camri_tune.errors import DataError

_SUFFIXES_OF_FORMATS = Image.registered_extensions()  # loads every plug-in
# What Pillow itself decodes: PostScript and the like would start another program on the user's file.
_FORMATS = sorted(set(Image.OPEN) - {"EPS", "WMF", "GRIB", "BUFR", "HDF5"})
_SUFFIXES = frozenset(suffix for suffix, name in _SUFFIXES_OF_FORMATS.items() if name in _FORMATS)
_DECODING_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    RuntimeError,  # AVIF
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,  # where warnings are errors
)


@dataclass(frozen=True)
class Images:
    """One part of a data set: `pixels` uint8 (N, C, S, S), `labels` and `groups` int64 (N,)."""

    pixels: torch.Tensor
    labels: torch.Tensor
    groups: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: NDArray[np.int64]) -> "Images":
        rows = torch.from_numpy(index)
        return Images(self.pixels[rows], self.labels[rows], self.groups[rows])


def describe_counts(images: Images) -> str:
    """'31,380 images in 1,046 groups', or without groups where every image is its own."""
    groups = len(torch.unique(images.groups))
    text = f"{len(images):,} images"
    return text if groups == len(images) else f"{text} in {groups:,} groups"


def resized(images: Images, size: int) -> Images:
    """The same images at `size` x `size`."""
    if images.pixels.shape[-1] == size:
        return images
    resized = [  # in pieces: as floats, all of them together would be large
        torch.nn.functional.interpolate(some.float(), (size, size), mode="bilinear", antialias=True)
        .round()
        .clamp(0, 255)
        .to(torch.uint8)
        for some in torch.split(images.pixels, 1024)
    ]
    return replace(images, pixels=torch.cat(resized))


def read_image(path: Path, size: int) -> NDArray[np.uint8]:
    """Decode one image file to uint8 RGB (3, size, size); the whole image is kept, squeezed to a square.

    The content decides, not the file name's ending. Greyscale and palette images become RGB, transparency is shown on
    white, 16-bit is scaled to 8, EXIF rotation is applied, of an animation the first frame is taken. Raises DataError,
    naming the file, where that is not possible.
    """
    try:
        with Image.open(path, formats=_FORMATS) as opened:
            most = Image.MAX_IMAGE_PIXELS
            if most is not None and opened.width * opened.height > most:
                raise ValueError(f"{opened.width}x{opened.height} pixels; at most {most:,} are read")
            image = _to_rgb(ImageOps.exif_transpose(opened), opened.format)
    except UnidentifiedImageError:
        empty = path.stat().st_size == 0
        raise DataError(f"image file {str(path)!r} is {'empty' if empty else 'not an image'}") from None
    except _DECODING_ERRORS as error:
        raise DataError(f"image file {str(path)!r} cannot be decoded ({error})") from None
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)


def _to_rgb(image: Image.Image, name: str | None) -> Image.Image:
    """To RGB; `name` is the file's format, which `image`, a copy, no longer knows."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range; save it as 8 or 16 bit")
    if image.mode.startswith("I"):  # 16-bit greyscale (and 32-bit containers of it)
        values = np.asarray(image).astype(np.float64)
        deep = image.mode != "I" or name == "PPM" or values.max(initial=0) > 255
        scale = 257.0 if deep else 1.0
        return Image.fromarray((values / scale).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def is_image_file(path: Path) -> bool:
    """Whether a file claims to be an image by its name's ending, or is one by its content."""
    if path.suffix.lower() in _SUFFIXES:
        return True
    try:
        with Image.open(path, formats=_FORMATS):
            return True
    except _DECODING_ERRORS:
        return False
