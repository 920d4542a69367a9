"""Images in: every data set becomes uint8 tensors in memory, with labels, class names and groups.

A source lists image files (or holds arrays). A cache keyed by that list keeps the decoded tensors, one file per part,
so that a second start is instant, workers share the pages, and nobody opens the test part before it is asked for.
"""

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from camri_tune.config import BUILT_IN_DATASETS, StudyConfig
from camri_tune.errors import DataError
from camri_tune.splits import hold_out_groups, limit_groups

Part = Literal["train", "validation", "test"]
Progress = Callable[[int, int], None]
IMAGE_SUFFIXES = frozenset(Image.registered_extensions())
HELD_OUT_FRACTION = 0.2
CACHE_FORMAT = 1  # raise when decoding changes, so that old caches are not read
GTSRB_CLASSES = tuple(
    """Speed limit 20|Speed limit 30|Speed limit 50|Speed limit 60|Speed limit 70|Speed limit 80|
    End of speed limit 80|Speed limit 100|Speed limit 120|No passing|No passing for trucks|Right of way|Priority road|
    Yield|Stop|No vehicles|No trucks|No entry|General caution|Dangerous curve left|Dangerous curve right|Double curve|
    Bumpy road|Slippery road|Road narrows on the right|Road work|Traffic signals|Pedestrians|Children crossing|
    Bicycles crossing|Beware of ice or snow|Wild animals crossing|End of all limits|Turn right ahead|Turn left ahead|
    Ahead only|Go straight or right|Go straight or left|Keep right|Keep left|Roundabout|End of no passing|
    End of no passing for trucks""".replace("\n    ", "").split("|")
)


@dataclass(frozen=True)
class Augmentation:
    """Random changes that keep an image's class: which ones do belongs to the data set, not to the method.

    Angles in degrees; `shift` is a fraction of the side; `zoom`, `shear` and `light` are relative amplitudes; `blur` is
    the share of images that are blurred, by up to a 3x3 box.
    Mirroring is off unless a data set asks for it: a mirrored "keep left" is a "keep right".
    """

    rotate: float = 0.0
    shift: float = 0.0
    zoom: float = 0.0
    shear: float = 0.0
    light: float = 0.0
    blur: float = 0.0
    mirror: bool = False


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


class _Item(NamedTuple):
    path: Path
    label: int
    group: int


@dataclass(frozen=True)
class _Source:
    """Where a data set's images come from. `parts` holds files; `arrays` holds what needs no decoding."""

    name: str
    root: Path | None
    classes: tuple[str, ...]
    image_size: int
    epochs: int
    augmentation: Augmentation
    parts: dict[Part, list[_Item]] = field(default_factory=dict)
    arrays: Images | None = None
    ignored: int = 0

    def fingerprint(self) -> str:
        """What a study is on: names and sizes of files, or the bytes of arrays; moving the folder keeps it."""
        digest = hashlib.sha256(json.dumps([self.classes, self.image_size]).encode())
        for part, items in sorted(self.parts.items()):
            for item in items:
                path = item.path.relative_to(self.root) if self.root else item.path
                digest.update(f"{part}\0{path}\0{item.path.stat().st_size}\0{item.label}\0{item.group}\n".encode())
        if self.arrays is not None:
            digest.update(self.arrays.pixels.numpy().tobytes() + self.arrays.labels.numpy().tobytes())
        return digest.hexdigest()[:20]

    def cache_key(self) -> str:
        """What a decoded copy is of: also where the files are and when they changed, for sizes can stay the same."""
        digest = hashlib.sha256(f"{CACHE_FORMAT}\0{self.fingerprint()}".encode())
        for _, items in sorted(self.parts.items()):
            for item in items:
                digest.update(f"{item.path}\0{item.path.stat().st_mtime_ns}\n".encode())
        return digest.hexdigest()[:20]


class Dataset:
    """A data set opened for a study: `train` and `validation` in memory; `test()` reads the test part when asked."""

    def __init__(self, source: _Source, config: StudyConfig, on_progress: Progress | None = None) -> None:
        self.name = source.name
        self.classes = source.classes
        self.image_size = source.image_size
        self.epochs = source.epochs
        self.augmentation = source.augmentation
        self.fingerprint = source.fingerprint()
        self.ignored_files = source.ignored
        self._cache = _Cache(source, config.skip_corrupt, on_progress)
        self._seed = config.seed

        pool = self._pool()
        if config.limit is not None:
            index = limit_groups(
                pool.labels.numpy(), pool.groups.numpy(), limit=config.limit, seed=config.seed, classes=self.classes
            )
            pool = pool[index]
        if "validation" in source.parts:
            self.train, self.validation = pool, self._cache.read("validation")
        else:
            self.train, self.validation = self._hold_out(pool, "validation")
        self.grouped = len(torch.unique(self.train.groups)) < len(self.train)
        for name, images in (("train", self.train), ("validation", self.validation)):
            self._require_every_class(images, name)

    @property
    def channels(self) -> int:
        return int(self.train.pixels.shape[1])

    @property
    def skipped_files(self) -> int:
        """Corrupt files left out so far (`--skip-corrupt`)."""
        return self._cache.skipped

    def test(self) -> Images:
        """The test part. Only the final judgement may call this."""
        if self._cache.has("test"):
            return self._cache.read("test")
        return self._hold_out(self._cache.read("train"), "test")[1]

    def _pool(self) -> Images:
        """What training and validation are drawn from: everything that is not test."""
        images = self._cache.read("train")
        return images if self._cache.has("test") else self._hold_out(images, "test")[0]

    def _hold_out(self, images: Images, purpose: str) -> tuple[Images, Images]:
        kept, held_out = hold_out_groups(
            images.labels.numpy(),
            images.groups.numpy(),
            fraction=HELD_OUT_FRACTION,
            seed=self._seed,
            classes=self.classes,
            purpose=purpose,
        )
        return images[kept], images[held_out]

    def _require_every_class(self, images: Images, name: str) -> None:
        counts = torch.bincount(images.labels, minlength=len(self.classes))
        missing = [self.classes[c] for c in range(len(self.classes)) if counts[c] == 0]
        if missing:
            raise DataError(
                f"class {missing[0]!r} has no {name} images ({len(missing)} such class(es)): every class needs some; "
                f"add images or leave the class out"
            )


class _Cache:
    """The decoded parts of one source on disk, each a safetensors file written whole or not at all."""

    def __init__(self, source: _Source, skip_corrupt: bool, on_progress: Progress | None) -> None:
        self._source = source
        self._skip_corrupt = skip_corrupt
        self._on_progress = on_progress
        self._folder = _cache_folder() / f"{source.cache_key()}{'-skip' if skip_corrupt else ''}"
        self._skipped: dict[str, int] = {}

    @property
    def skipped(self) -> int:
        return sum(self._skipped.values())

    def has(self, part: Part) -> bool:
        return part in self._source.parts

    def read(self, part: Part) -> Images:
        if self._source.arrays is not None:
            return self._source.arrays
        path = self._folder / f"{part}.safetensors"
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError):  # not there yet, or cut short: decode (again)
            tensors = self._decode(part)
            _write_whole(path, tensors)
        self._skipped[part] = int(tensors["skipped"])
        return Images(tensors["pixels"], tensors["labels"], tensors["groups"])

    def _decode(self, part: Part) -> dict[str, torch.Tensor]:
        items, size = self._source.parts[part], self._source.image_size
        pixels = np.empty((len(items), 3, size, size), np.uint8)
        good = np.ones(len(items), bool)

        def decode(index: int) -> str | None:
            try:
                pixels[index] = read_image(items[index].path, size)
            except DataError as error:
                good[index] = False
                return str(error)
            return None

        problems: list[str] = []
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            for done, problem in enumerate(pool.map(decode, range(len(items))), start=1):
                if problem is not None:
                    problems.append(problem)
                if self._on_progress is not None and (done % 500 == 0 or done == len(items)):
                    self._on_progress(done, len(items))
        if problems and not self._skip_corrupt:
            more = f" (and {len(problems) - 1} more such files)" if len(problems) > 1 else ""
            raise DataError(f"{problems[0]}{more}: mend or remove it, or pass --skip-corrupt to leave such files out")
        return {
            "pixels": torch.from_numpy(pixels[good]),
            "labels": torch.tensor([item.label for item in items], dtype=torch.int64)[good],
            "groups": torch.tensor([item.group for item in items], dtype=torch.int64)[good],
            "skipped": torch.tensor(len(problems)),
        }


def open_dataset(config: StudyConfig, on_progress: Progress | None = None) -> Dataset:
    """Open the data set that `config` names, decoding it on first use. Raises DataError in one clear line.

    `on_progress(done, total)` hears of decoded images.
    """
    return Dataset(_source(config), config, on_progress)


def _source(config: StudyConfig) -> _Source:
    if config.dataset == "digits":
        source = _digits()
    elif config.dataset == "gtsrb":
        source = _gtsrb(config.data_dir)
    else:
        source = _folder(config.dataset)
    if config.image_size is not None and config.image_size != source.image_size:
        source = _resized(source, config.image_size)
    return source


def open_test_images(
    where: str | None, *, trained_on: StudyConfig, fingerprint: str, classes: Sequence[str]
) -> tuple[Images, str]:
    """Images to judge a finished model on, and a sentence saying which they are.

    `where` is None (the data set the model was trained on), the folder that holds it, or any folder of class folders.
    The very data set of training gives its test part, never images that the model has learned from; another folder
    gives its `test` part where it has one, else all of it, with labels by class name.
    """
    config = trained_on
    if where is not None and config.dataset in BUILT_IN_DATASETS and where != config.dataset:
        if (Path(where) / config.dataset).is_dir():
            config = config.model_copy(update={"data_dir": Path(where)})
        else:
            config = config.model_copy(update={"dataset": where})
    elif where is not None:
        config = config.model_copy(update={"dataset": where})
    source = _source(config)
    if source.fingerprint() == fingerprint:
        return Dataset(
            source, config
        ).test(), f"the test part of {source.name}, which neither trained nor chose the model"
    foreign = sorted(set(source.classes) - set(classes))
    if foreign:
        raise DataError(
            f"class {foreign[0]!r} of {where!r} is unknown to the model, which has {', '.join(map(repr, classes[:5]))}"
            f"{', …' if len(classes) > 5 else ''}"
        )
    part: Part = "test" if "test" in source.parts else "train"
    images = _Cache(source, config.skip_corrupt, None).read(part)
    labels = torch.tensor([list(classes).index(name) for name in source.classes])[images.labels]
    text = f"{'the test part' if part == 'test' else 'all images'} of {where}, which is not the data set of training"
    return replace(images, labels=labels), text


def read_image(path: Path, size: int) -> NDArray[np.uint8]:
    """Decode one image file to uint8 RGB (3, size, size); the whole image is kept, squeezed to a square.

    The content decides, not the file name's ending. Greyscale and palette images become RGB, transparency is shown on
    white, 16-bit is scaled to 8, EXIF rotation is applied, of an animation the first frame is taken. Raises DataError,
    naming the file, where that is not possible.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", message=".*(EXIF|Palette images).*")
            with Image.open(path) as opened:
                image = _to_rgb(ImageOps.exif_transpose(opened))
    except UnidentifiedImageError:
        empty = path.stat().st_size == 0
        raise DataError(f"image file {str(path)!r} is {'empty' if empty else 'not an image'}") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"image file {str(path)!r} cannot be decoded ({error})") from None
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range; save it as 8 or 16 bit")
    if image.mode.startswith("I"):  # 16-bit greyscale (and 32-bit containers of it)
        values = np.asarray(image).astype(np.float64)
        scale = 257.0 if values.max(initial=0) > 255 or image.mode != "I" else 1.0
        return Image.fromarray((values / scale).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _digits() -> _Source:
    from sklearn.datasets import load_digits  # noqa: PLC0415 - half a second that other data sets need not pay

    bunch = load_digits()
    pixels = torch.from_numpy((bunch.images * (255 / 16)).round().astype(np.uint8))[:, None]
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    return _Source(
        name="digits",
        root=None,
        classes=tuple(str(c) for c in range(10)),
        image_size=8,
        epochs=20,
        augmentation=Augmentation(rotate=8, shift=0.06, zoom=0.08, shear=0.08),
        arrays=Images(pixels, labels, torch.arange(len(labels))),
    )


def _gtsrb(data_dir: Path) -> _Source:
    from torchvision.datasets import GTSRB  # noqa: PLC0415 - two seconds that other data sets need not pay

    def listed(split: str) -> list[tuple[str, int]]:
        try:
            data = GTSRB(str(data_dir), split=split)
        except (RuntimeError, OSError):
            data = GTSRB(str(data_dir), split=split, download=True)
        return list(data._samples)  # the list of (path, label); there is no public name for it

    try:
        train, test = listed("train"), listed("test")
    except (RuntimeError, OSError) as error:  # URLError is an OSError
        base = data_dir / "gtsrb"
        raise DataError(
            f"data set gtsrb is not complete in --data-dir {str(data_dir)!r} and could not be downloaded "
            f"({_first_line(error)}): put the images under {base}/GTSRB/Training/CLASS/*.ppm and "
            f"{base}/GTSRB/Final_Test/Images/*.ppm and the labels in {base}/GT-final_test.csv, or name the folder that "
            f"holds 'gtsrb' with --data-dir"
        ) from None
    tracks: dict[tuple[int, str], int] = {}
    items = []
    for path, label in sorted(train):
        # TRACK_FRAME.ppm: the frames of one track show one physical sign.
        track = tracks.setdefault((label, Path(path).stem.split("_")[0]), len(tracks))
        items.append(_Item(Path(path), label, track))
    missing = [name for path, _ in test if not (name := Path(path)).exists()]
    if missing:
        raise DataError(f"test image {str(missing[0])!r} is listed in GT-final_test.csv but does not exist")
    return _Source(
        name="gtsrb",
        root=data_dir / "gtsrb",
        classes=GTSRB_CLASSES,
        image_size=32,
        epochs=12,
        augmentation=Augmentation(rotate=16, shift=0.09, zoom=0.16, shear=0.13, light=0.55, blur=0.6),
        parts={"train": items, "test": [_Item(Path(p), label, i) for i, (p, label) in enumerate(test)]},
    )


def _folder(dataset: str) -> _Source:
    root = Path(dataset)
    if not root.is_dir():
        known = ", ".join(BUILT_IN_DATASETS)
        if root.exists():
            raise DataError(f"data set {dataset!r} is a file; give a folder of class folders, or one of {known}")
        raise DataError(f"unknown data set {dataset!r}: give one of {known}, or the path of a folder of class folders")
    try:
        return _class_folders(root)
    except OSError as error:
        raise DataError(f"data set folder {dataset!r} cannot be read ({error.strerror}: {error.filename})") from None


def _class_folders(root: Path) -> _Source:
    names: dict[Part, tuple[str, ...]] = {
        "train": ("train", "training"),
        "validation": ("val", "valid", "validation"),
        "test": ("test", "testing"),
    }
    by_lower_name = {entry.name.lower(): entry for entry in root.iterdir() if entry.is_dir()}
    folders: dict[Part, Path] = {}
    for part, choices in names.items():
        for name in choices:
            if name in by_lower_name:
                folders.setdefault(part, by_lower_name[name])
    if "train" not in folders:
        folders = {"train": root}
    classes = tuple(sorted(entry.name for entry in folders["train"].iterdir() if _is_class_folder(entry)))
    if len(classes) < 2:
        raise DataError(
            f"data set folder {str(folders['train'])!r} has {len(classes)} class folder(s), but a classifier needs at "
            f"least 2: lay it out as PATH/CLASS/*.jpg or PATH/train/CLASS/*.jpg"
        )
    parts: dict[Part, list[_Item]] = {}
    ignored = 0
    for part, folder in folders.items():
        unknown = sorted({entry.name for entry in folder.iterdir() if _is_class_folder(entry)} - set(classes))
        if unknown:
            raise DataError(
                f"class folder {str(folder / unknown[0])!r} has no counterpart in {str(folders['train'])!r}"
            )
        items = []
        for label, name in enumerate(classes):
            found, others = _image_files(folder / name)
            ignored += others
            if not found:
                raise DataError(f"class folder {str(folder / name)!r} has no images; add some or remove the folder")
            items += [(path, label) for path in found]
        parts[part] = [_Item(path, label, index) for index, (path, label) in enumerate(items)]
    return _Source(
        name=root.resolve().name,
        root=root,
        classes=classes,
        image_size=32,
        epochs=20,
        augmentation=Augmentation(rotate=8, shift=0.1, zoom=0.1, light=0.1),
        parts=parts,
        ignored=ignored,
    )


def _is_class_folder(entry: Path) -> bool:
    return entry.is_dir() and not entry.name.startswith((".", "__"))


def _image_files(folder: Path) -> tuple[list[Path], int]:
    """Image files under a class folder, sorted, and how many other files were passed over."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(".")]
    found = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES or _looks_like_an_image(p)]
    return found, len(files) - len(found)


def _looks_like_an_image(path: Path) -> bool:
    try:
        with Image.open(path):
            return True
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def _resized(source: _Source, size: int) -> _Source:
    arrays = source.arrays
    if arrays is not None:
        pixels = torch.nn.functional.interpolate(arrays.pixels.float(), (size, size), mode="bilinear", antialias=True)
        arrays = replace(arrays, pixels=pixels.round().clamp(0, 255).to(torch.uint8))
    return replace(source, image_size=size, arrays=arrays)


def _cache_folder() -> Path:
    home = os.environ.get("CAMRI_CACHE")
    if home:
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "camri-tune"


def _write_whole(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a cache file under a temporary name, then rename. A cache that cannot be written is only slower."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".partial")
        os.close(handle)
        try:
            save_file(tensors, name)
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        warnings.warn(
            f"the image cache {str(path)!r} could not be written ({error}); images are decoded again", stacklevel=2
        )


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def describe_counts(images: Images) -> str:
    """'31,380 images in 1,046 groups', or without groups where every image is its own."""
    groups = len(torch.unique(images.groups))
    text = f"{len(images):,} images"
    return text if groups == len(images) else f"{text} in {groups:,} groups"
