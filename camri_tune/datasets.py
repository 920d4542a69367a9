"""A data set opened for a study: uint8 tensors in memory, split by group, decoded once and cached.

The cache, keyed by the source's files, holds one file per part, so that a second start is instant, workers share the
pages, and workers never open the test part.
"""

import hashlib
import json
import math
import mmap
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray

from camri_tune.config import BUILT_IN_DATASETS, StudyConfig
from camri_tune.counts import tell_few, tell_imbalance, tell_uneven
from camri_tune.duplicates import Looks, exact_hashes, near_hashes, tell_all
from camri_tune.errors import DataError, FileNotReadError
from camri_tune.folders import PIECE, Part, Source
from camri_tune.grouping import Item, NotGroupedError
from camri_tune.images import Images, Pieces, describe_counts, read_image, squeezed
from camri_tune.memory import free_memory
from camri_tune.sources import Relation, find_source, is_data_dir_of, relation_of
from camri_tune.splits import Split, folds, hold_out_groups, limit_groups, thin_groups

Progress = Callable[[int, int], None]
HELD_OUT_FRACTION = 0.2
MANY = 100_000  # images that lie together: fewer are copied in a moment, of which nothing need be told
MOST_OF_A_HEADER = 2**16  # bytes; ours has a few hundred


class Dataset:
    """A data set opened for a study: `train` and `validation` in memory; `test()` reads the test part when asked.

    `hidden_group_size` is the source's: test images come in groups of about so many that nobody names.
    """

    def __init__(self, source: Source, config: StudyConfig, on_progress: Progress | None = None) -> None:
        self.name = source.name
        self.classes = source.classes
        self.image_size = source.image_size
        self.epochs = source.epochs
        self.augmentation = source.augmentation
        self.ignored_files = source.ignored
        # A test part that is drawn from the training part has its groups, which are known.
        self.hidden_group_size = source.hidden_group_size if source.has("test") else 1
        self._cache = _Cache(source, config.skip_corrupt, on_progress)
        self._seed = config.seed
        self._has_test = source.has("test")

        self._config = config
        self._source = source
        self._concerns: list[str] = []
        self._pool = self._read_pool()
        self._own_validation = self._cache.read("validation") if source.has("validation") else None
        self.fingerprint = source.fingerprint() + self._cache.left_out()
        if config.folds not in ("auto", 1) and not self.has_folds:
            raise DataError(
                f"--folds {config.folds} needs a validation part that can change, but data set {self.name!r} brings "
                f"its own: leave --folds out, or give it no folder for validation"
            )
        self._folds: dict[int, tuple[Images, Images]] = {}
        self.train, self.validation = self.fold(0)
        self.grouped = len(torch.unique(self._pool.groups)) < len(self._pool)  # of which training may be a thin part
        for name, images in (("train", self.train), ("validation", self.validation)):
            self._require_every_class(images, name)

    @property
    def has_folds(self) -> bool:
        """Whether validation can be another part of the images: not where the data set brings its own."""
        return self._own_validation is None

    def fold(self, index: int) -> tuple[Images, Images]:
        """Training and validation images of one of the ways to split them; fold 0 is `train` and `validation`.

        The validation parts of folds 0 to 4 share no image as far as each class has groups to give. A data set that
        brings a validation part has that one alone, whatever the index.
        """
        if index not in self._folds:
            self._folds[index] = self._split(index)
        return self._folds[index]

    def validation_of(self, count: int) -> Images:
        """The images that the first `count` folds validate on, each once."""
        if count == 1 or self._own_validation is not None:
            return self.validation
        rows = np.unique(np.concatenate([split.held_out for split in self._splits(count)]))
        return self._pool[rows]

    def _splits(self, count: int) -> list[Split]:
        return folds(
            self._pool.labels.numpy(),
            self._pool.groups.numpy(),
            count=count,
            fraction=HELD_OUT_FRACTION,
            seed=self._seed,
            classes=self.classes,
            purpose="validation",
        )

    def _split(self, index: int) -> tuple[Images, Images]:
        seed, config = self._seed, self._config
        if self._own_validation is not None:
            train, validation = self._pool, self._own_validation
        else:
            split = self._splits(index + 1)[index]
            train, validation = self._pool[split.kept], self._pool[split.held_out]
        # After the split: fewer images to judge on would save little and decide badly.
        if config.per_group is not None:
            labels, groups = train.labels.numpy(), train.groups.numpy()
            train = train[thin_groups(labels, groups, most=config.per_group, seed=seed)]
        if config.limit is not None:
            labels, groups = train.labels.numpy(), train.groups.numpy()
            train = train[limit_groups(labels, groups, limit=config.limit, seed=seed, classes=self.classes)]
        return train, validation

    @property
    def left_out_of_test(self) -> str:
        """What a sentence on the test part adds where files of it, or that it is drawn from, are corrupt."""
        return self._cache.told(["test" if self._has_test else "train"])

    def require_test_images(self, important: Sequence[int]) -> None:
        """Raise DataError where test cannot judge an important class; of a user's own data, which was examined."""
        if self._source.groups_by:
            require_images(self.test(), important, self.classes)

    @property
    def channels(self) -> int:
        return self.train.channels

    def examine(self) -> None:
        """Have `notices` tell also of what makes hours of training worth less; for a run that is about to begin.

        The test part is decoded for that: raises DataError where an image of it cannot be. Of a user's own data its
        images are counted by class and compared with the others; the built-in sets are known. No model answers them,
        and nothing is chosen by them.
        """
        test = self.test()
        if not self._source.groups_by:
            return
        parts = {"training": self.train, "validation": self.validation, "test": test}
        own: dict[str, Part] = {"training": "train", "validation": "train", "test": "train"}
        if self._own_validation is not None:
            own["validation"] = "validation"
        if self._has_test:
            own["test"] = "test"
        self._concerns = [
            *self._source.notices,
            *self._ungrouped(),
            *tell_imbalance(self.train, self.classes),
            *tell_few(parts, self.classes),
            *tell_uneven(parts, self._shares_meant(), self.classes),
            *tell_all([self._looks(name, own[name], images) for name, images in parts.items()], self._source.groups_by),
        ]

    def _shares_meant(self) -> dict[str, float]:
        """What each part that is drawn in groups should have of a class; nothing of images that are fewer by choice."""
        if not self.grouped or self._config.per_group is not None or self._config.limit is not None:
            return {}
        shares, left = {}, 1.0
        if not self._has_test:
            shares["test"] = left * HELD_OUT_FRACTION
            left -= shares["test"]
        if self.has_folds:
            shares["validation"] = left * HELD_OUT_FRACTION
        return shares

    def _ungrouped(self) -> list[str]:
        """A split that was drawn image by image is right only where no two show one object, which nobody has said."""
        if self.grouped or not (self.has_folds or not self._has_test):
            return []
        return [
            f"No groups are named, so images were split one by one. If several show one object (frames, a patient, a "
            f"place), name it ({self._source.groups_by}): else near duplicates stand on both sides, and figures are "
            f"too good."
        ]

    def _looks(self, name: str, part: Part, images: Images) -> Looks:
        rows = np.arange(len(images)) if images.rows is None else images.rows.numpy()
        decoded = self._cache.decoded(part)
        return Looks(
            name,
            images,
            decoded.exact[rows],
            decoded.near[rows],
            lambda row: self._source.name_of(part, int(rows[row])),
            part,
        )

    def notices(self) -> list[str]:
        """What a user should know of the files that were read, and of what `examine` found."""
        lines = [*self._concerns]
        if self._cache.skipped:
            lines.append(f"{self._cache.skipped} corrupt image file(s) were left out (--skip-corrupt).")
        if self.ignored_files:
            lines.append(f"{self.ignored_files} file(s) that are no images were passed over.")
        # Pages of a mapped file come and go as they are needed: nothing has to be chosen, but it should be known.
        held, free = sum({id(i.store): i.store.nbytes for i in (self._pool, self.validation)}.values()), free_memory()
        if free is not None and held > free / 2:
            lines.append(
                f"The images take {held / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB of memory are free: what does not fit "
                f"is read from the disk again and again, which is slower (--image-size makes them smaller)."
            )
        return lines

    def __str__(self) -> str:
        parts = f"train {describe_counts(self.train)}, validation {describe_counts(self.validation)}"
        return f"{self.name}, {len(self.classes)} classes, {parts}"

    def test(self) -> Images:
        """The test part. Only the final judgement may have a model answer it."""
        if self._has_test:
            return self._cache.read("test")
        images = self._cache.read("train")
        return images[self._test_split(images).held_out]

    def _read_pool(self) -> Images:
        """What training and validation are drawn from: everything that is not test."""
        images = self._cache.read("train")
        return images if self._has_test else images[self._test_split(images).kept]

    def _test_split(self, images: Images) -> Split:
        return hold_out_groups(
            images.labels.numpy(),
            images.groups.numpy(),
            fraction=HELD_OUT_FRACTION,
            seed=self._seed,
            classes=self.classes,
            purpose="test",
        )

    def _require_every_class(self, images: Images, name: str) -> None:
        counts = torch.bincount(images.labels, minlength=len(self.classes))
        missing = [self.classes[c] for c in range(len(self.classes)) if counts[c] == 0]
        if missing:
            raise DataError(
                f"class {missing[0]!r} has no {name} images ({len(missing)} such class(es)): every class needs some; "
                f"add images or leave the class out"
            )


def require_images(images: Images, important: Sequence[int], classes: Sequence[str]) -> None:
    """Raise DataError where an important class has no image to be judged on."""
    for c in important:
        if not (images.labels == c).any():
            raise DataError(f"class {classes[c]!r} has no test images to be judged on: add some, or mend them")


def open_dataset(config: StudyConfig, on_progress: Progress | None = None) -> Dataset:
    """Open the data set that `config` names, decoding it on first use. Raises DataError in one clear line.

    `on_progress(done, total)` hears of decoded images.
    """
    return Dataset(find_source(config), config, on_progress)


class Unseen(NamedTuple):
    """Images to judge a finished model on, and what is to be known of them.

    `text` says which they are; they come in groups of about `hidden_group_size` that nobody names. `own`: they are of
    the very data set of training.
    """

    images: Images
    text: str
    hidden_group_size: int
    own: bool


def open_test_images(
    where: str | None,
    *,
    trained_on: StudyConfig,
    fingerprint: str,
    classes: Sequence[str],
    skip_corrupt: bool = False,
) -> Unseen:
    """Images to judge a finished model on, less corrupt files where `skip_corrupt`, or where training left them out.

    `where` is None (the data set the model was trained on), the folder that holds it, or any folder of class folders.
    The very data set of training gives its test part, never images that the model has learned from; another folder
    gives its `test` part where it has one, else all of it, with labels by class name. Raises DataError where its
    place says that the model may have learned from it.
    """
    config = trained_on.model_copy(update={"skip_corrupt": trained_on.skip_corrupt or skip_corrupt})
    relation = relation_of(where, trained_on)
    if relation == "test":
        where, relation = None, "itself"
    if where is not None and config.dataset in BUILT_IN_DATASETS and where != config.dataset:
        if is_data_dir_of(config.dataset, Path(where)):
            config, relation = config.model_copy(update={"data_dir": Path(where)}), "itself"
        else:
            config = config.model_copy(update={"dataset": where})
    elif where is not None:
        config = config.model_copy(update={"dataset": where})
    try:
        source = find_source(config, to_judge=True)
    except NotGroupedError:  # the groups of training are named in other images' paths
        source = find_source(config.model_copy(update={"group_by": None}), to_judge=True)
    name = str(source.root or source.name) if config.dataset in BUILT_IN_DATASETS else config.dataset
    others = f"; {source.ignored:,} file(s) in its folder that are no images were passed over" if source.ignored else ""
    if source.fingerprint() == fingerprint.partition("-")[0]:
        data = Dataset(source, config)
        if data.fingerprint != fingerprint and not source.has("test"):  # other files than then could be decoded
            raise _untold(name, "itself")
        images = _some_of(data.test(), name)
        text = (
            f"the test part of {source.name}, which neither trained nor chose the model{data.left_out_of_test}{others}"
        )
        return Unseen(images, text, data.hidden_group_size, own=True)
    foreign = sorted(set(source.classes) - set(classes))
    if foreign:
        known = ", ".join(map(repr, classes[:5])) + (", …" if len(classes) > 5 else "")
        raise DataError(f"class {foreign[0]!r} of {name!r} is unknown to the model, which has {known}")
    parts: list[Part] = ["test"] if source.has("test") else sorted({*source.parts, *source.packed})
    if parts != ["test"] and relation is not None:
        raise _untold(name, relation)
    cache = _Cache(source, skip_corrupt, None)
    read = [cache.read(part) for part in parts]
    first = 0
    for place, part in enumerate(read):  # each numbers its groups from the start, and none stands in two
        read[place] = replace(part, groups=part.groups + first)
        first += int(part.groups.max()) + 1 if len(part) else 0
    images = Images(*(torch.cat([getattr(r, name) for r in read]) for name in ("pixels", "labels", "groups")))
    images = _some_of(images, name)
    labels = torch.tensor([list(classes).index(name) for name in source.classes])[images.labels]
    which = "the test part" if parts == ["test"] else "all images"
    said = "is not, as it is, the data set of training"  # as far as places tell: images are not compared one by one
    if relation is not None:
        said = f"{_LIES[relation]}, and it may have learned from some of them"
    text = f"{which} of {name}, which {said}{cache.told(parts)}{others}"
    size = source.hidden_group_size if parts == ["test"] else 1
    return Unseen(replace(images, labels=labels), text, size, own=False)


# By how images lie to the data set of training, why it is not known which of them trained a model.
_LIES: dict[Relation, str] = {
    "itself": "has changed since the model was trained",
    "in": "lies in what the model was trained on",
    "around": "holds what the model was trained on",
}


def _untold(name: str, relation: Relation) -> DataError:
    mend = "restore the folder" if relation == "itself" else "leave --data out for the test part"
    return DataError(
        f"data set {name!r} {_LIES[relation]}, so what it learned from cannot be told from the rest: {mend}, or name "
        f"other images with --data"
    )


def _some_of(images: Images, name: str) -> Images:
    """The same. Raises DataError where there are none."""
    if not len(images):
        raise DataError(f"no image of {name!r} can be read; name other images with --data")
    return images


# What a cache file holds: of each image, but for the pixels, its class, its group, its hashes and whether it could be
# decoded. By name, the type as safetensors, NumPy and PyTorch call it; embeddings lie where pixels do.
_TENSORS: dict[str, tuple[str, type, torch.dtype]] = {
    "labels": ("I64", np.int64, torch.int64),
    "groups": ("I64", np.int64, torch.int64),
    "exact": ("I64", np.int64, torch.int64),
    "near": ("I64", np.int64, torch.int64),
    "pixels": ("U8", np.uint8, torch.uint8),
    "good": ("BOOL", np.bool_, torch.bool),
}
_OF_EMBEDDINGS = {**_TENSORS, "pixels": ("F32", np.float32, torch.float32)}
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0  # MAP_NORESERVE, which the mmap module does not name everywhere


class _Decoded(NamedTuple):
    """All listed images of a part, and of every row of its store (M,) whether it could be decoded, and both hashes."""

    listed: Images
    good: NDArray[np.bool_]
    exact: NDArray[np.int64]
    near: NDArray[np.int64]


class _Cache:
    """The decoded parts of one source on disk, each a safetensors file written whole or not at all."""

    def __init__(self, source: Source, skip_corrupt: bool, on_progress: Progress | None) -> None:
        self._source = source
        self._skip_corrupt = skip_corrupt
        self._on_progress = on_progress
        self._folder = _cache_folder() / f"{source.cache_key()}{'-skip' if skip_corrupt else ''}"
        self._decoded: dict[Part, _Decoded] = {}

    def left_out(self) -> str:
        """What tells the images that could be decoded so far from all that are listed; '' where all could be.

        They are drawn from: where others are left out, all parts are others, too.
        """
        rows = {part: np.flatnonzero(~decoded.good).tolist() for part, decoded in sorted(self._decoded.items())}
        return f"-{hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:8]}" if any(rows.values()) else ""

    @property
    def skipped(self) -> int:
        return sum(int((~decoded.good).sum()) for decoded in self._decoded.values())

    def told(self, parts: Sequence[Part]) -> str:
        """What a sentence on these parts adds where some could not be."""
        count = sum(int((~self.decoded(part).good).sum()) for part in parts)
        return f"; {count:,} corrupt image file(s) were left out" if count else ""

    def read(self, part: Part) -> Images:
        """The images of a part that could be decoded."""
        listed, good, *_ = self.decoded(part)
        return listed if good.all() else listed[np.flatnonzero(good)]

    def decoded(self, part: Part) -> _Decoded:
        if part not in self._decoded:
            self._decoded[part] = self._find(part)
        return self._decoded[part]

    def _find(self, part: Part) -> _Decoded:
        path = self._folder / f"{part}.safetensors"
        found = _stored(path)
        if found is None:
            with ExitStack() as lock:
                with suppress(OSError, NotImplementedError):  # a folder that takes none costs time and no more
                    path.parent.mkdir(parents=True, exist_ok=True)
                    # Many workers start at once: one decodes, and the others wait for it.
                    lock.enter_context(FileLock(f"{path}.lock"))
                found = _stored(path) or self._decode(part, path)
        return found

    def _decode(self, part: Part, path: Path) -> _Decoded:
        """Decode a part into a file at `path`, or into memory where none can be written."""
        pieces = self._pieces(part) if part in self._source.packed else None
        items = self._source.parts.get(part, [])
        side = self._source.image_size
        count, channels = (len(items), 3) if pieces is None else (len(pieces.labels), pieces.channels)
        tensors = _OF_EMBEDDINGS if self._source.are_embeddings else _TENSORS
        with _written_whole(path, (count, channels, side, side), tensors) as arrays:
            if pieces is not None:
                arrays["labels"][:] = pieces.labels.numpy()
                arrays["groups"][:] = pieces.groups.numpy()
                self._unpack_into(arrays["pixels"], pieces)
                arrays["good"][:] = True
            else:
                arrays["labels"][:] = [item.label for item in items]
                arrays["groups"][:] = [item.group for item in items]
                arrays["good"][:] = self._decode_into(arrays["pixels"], items)
            for start in range(0, count, PIECE):
                some = slice(start, start + PIECE)
                arrays["exact"][some] = exact_hashes(arrays["pixels"][some])
                arrays["near"][some] = near_hashes(arrays["pixels"][some])
        return _stored(path) or _unpack({name: torch.from_numpy(array) for name, array in arrays.items()})

    def _pieces(self, part: Part) -> Pieces:
        """A part whose images lie together in a few files."""
        try:
            return self._source.packed[part].pieces()
        except (RuntimeError, OSError) as error:  # the files were whole when the data set was opened
            raise DataError(
                f"the {part} part of {self._source.name} can no longer be read ({error}): "
                f"put the files under {self._source.root} back and run again"
            ) from None

    def _unpack_into(self, pixels: NDArray[Any], pieces: Pieces) -> None:
        done = 0
        for some in pieces.pixels:
            pixels[done : done + len(some)] = squeezed(some, pixels.shape[-1]).numpy()
            done += len(some)
            if self._on_progress is not None and len(pixels) >= MANY:
                self._on_progress(done, len(pixels))

    def _decode_into(self, pixels: NDArray[np.uint8], items: Sequence[Item]) -> NDArray[np.bool_]:
        """Decode files into rows of `pixels`. Returns which of them could be."""
        good = np.ones(len(items), bool)

        def decode(index: int) -> str | None:
            try:
                pixels[index] = read_image(Path(items[index].path), pixels.shape[-1])
            except FileNotReadError as error:  # to take it for corrupt would leave it out for good
                raise DataError(f"{error}: let it be read and run again, or take it out of the data set") from None
            except DataError as error:
                good[index] = False
                return str(error)
            return None

        problems: list[str] = []
        with warnings.catch_warnings(), ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            # Around the threads, not in them: filters belong to the whole process.
            warnings.filterwarnings("ignore", message=".*(EXIF|Palette images|exceeds limit).*")
            for done, problem in enumerate(pool.map(decode, range(len(items))), start=1):
                if problem is not None:
                    problems.append(problem)
                if self._on_progress is not None and (done % 500 == 0 or done == len(items)):
                    self._on_progress(done, len(items))
        if problems and not self._skip_corrupt:
            more = f" (and {len(problems) - 1} more such files)" if len(problems) > 1 else ""
            raise DataError(f"{problems[0]}{more}: mend or remove it, or pass --skip-corrupt to leave such files out")
        return good


def _stored(path: Path) -> _Decoded | None:
    """Of a cache, mapped into memory; None where there is none yet, or one that was cut short or is another's."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(min(length, MOST_OF_A_HEADER)))
            # Private, so that nobody's mistake gets into the file; without reserve, for memory may hold less than that.
            # safetensors' own mapping is refused where the file is larger than memory.
            mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | _NO_RESERVE)
        if 8 + length + max(entry["data_offsets"][1] for entry in entries.values()) != len(mapped):
            return None
        tensors = {}
        for name, (_, _, usual) in _TENSORS.items():
            begin, end = entries[name]["data_offsets"]
            dtype = torch.float32 if entries[name]["dtype"] == "F32" else usual
            count = (end - begin) // dtype.itemsize
            tensors[name] = torch.frombuffer(mapped, dtype=dtype, count=count, offset=8 + length + begin)
            tensors[name] = tensors[name].view(entries[name]["shape"])
        return _unpack(tensors)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        return None


def _unpack(tensors: Mapping[str, torch.Tensor]) -> _Decoded:
    listed = Images(tensors["pixels"], tensors["labels"], tensors["groups"])
    return _Decoded(listed, *(tensors[name].numpy() for name in ("good", "exact", "near")))


def _cache_folder() -> Path:
    home = os.environ.get("CAMRI_CACHE")
    if home:
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "camri-tune"


@contextmanager
def _written_whole(
    path: Path, shape: tuple[int, ...], tensors: Mapping[str, tuple[str, type, torch.dtype]] = _TENSORS
) -> Iterator[dict[str, NDArray[Any]]]:
    """These arrays for pixels (N, C, S, S), to be filled, which then are a safetensors file.

    They are mapped into memory, for they may be larger than that. The file gets its name once it is whole. One that
    cannot be written is only slower: then they are in memory alone. Raises DataError where they do not fit there.
    """
    entries: dict[str, Any] = {}
    shapes = {name: shape if name == "pixels" else shape[:1] for name in tensors}
    end = 0
    for name, (dtype, kind, _) in tensors.items():
        begin, end = end, end + math.prod(shapes[name]) * np.dtype(kind).itemsize
        entries[name] = {"dtype": dtype, "shape": shapes[name], "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    start = 8 + len(header)
    scratch: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".partial")
        scratch = Path(name)
        with open(handle, "r+b") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.flush()
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle, 0, start + end)  # a disk that is full says so now, and not by a signal
            else:
                file.truncate(start + end)
    except OSError as error:
        if scratch is not None:
            scratch.unlink(missing_ok=True)
        unwritten = f"the image cache {str(path)!r} could not be written ({error})"
        try:
            in_memory: dict[str, NDArray[Any]] = {
                name: np.empty(shapes[name], kind) for name, (_, kind, _) in tensors.items()
            }
        except MemoryError:
            raise DataError(
                f"{unwritten}, and memory cannot hold the images, which take {end / 1e9:,.1f} GB: name a folder with "
                f"room for them in $CAMRI_CACHE, or make them smaller with --image-size"
            ) from None
        warnings.warn(f"{unwritten}; images are decoded again", stacklevel=2)
        yield in_memory
        return
    try:
        mapped = np.memmap(scratch, np.uint8, "r+", offset=start, shape=(end,))
        arrays: dict[str, NDArray[Any]] = {}
        for name, (_, kind, _) in tensors.items():
            first, last = entries[name]["data_offsets"]
            arrays[name] = mapped[first:last].view(kind).reshape(shapes[name])
        yield arrays
        mapped.flush()
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
