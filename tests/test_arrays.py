"""Data sets that are arrays: every layout, what is refused, and files that lie about what they hold."""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from camri_tune import arrays
from camri_tune.arrays import array_source
from camri_tune.config import Model, StudyConfig, is_printable
from camri_tune.datasets import Dataset, open_dataset, open_test_images
from camri_tune.errors import DataError, InputError
from camri_tune.images import Images, resized
from camri_tune.sources import find_source, side_of
from tests.opening import message_of
from tests.patience import ending_within

Array = NDArray[Any]
Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path, own_cache: Path) -> Save:
    """Write arrays as `scans.npz`, or under another name; `packed` as numpy.savez_compressed does."""

    def write(*, packed: bool = False, name: str = "scans.npz", **values: Array) -> Path:
        write_file: Any = np.savez_compressed if packed else np.savez
        write_file(tmp_path / name, **values)
        return tmp_path / name

    return write


def _images(count: int = 24, side: int = 8, channels: int = 1, width: int = 0, seed: int = 0) -> Array:
    """(N, C, H, W) of noise, the number of each in its first pixel."""
    shape = (count, channels, side, width or side)
    images = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    images[:, :, 0, 0] = np.arange(count)[:, None]
    return images


def _labels(count: int = 24) -> Array:
    return np.arange(count) % 3


def _open(path: Path, **values: object) -> Dataset:
    return open_dataset(StudyConfig.build({"dataset": str(path), **values}))


def _parts(data: Dataset) -> list[Images]:
    return [data.train, data.validation, data.test()]


def _numbers(images: Images) -> list[int]:
    return images.pixels[:, 0, 0, 0].tolist()


def _assert_all_there(data: Dataset, expected: Array, labels: Array) -> None:
    """Each image once, with its own pixels and label."""
    numbers = [number for part in _parts(data) for number in _numbers(part)]
    assert sorted(numbers) == list(range(len(expected)))
    for part in _parts(data):
        places = _numbers(part)
        assert torch.equal(part.pixels, torch.from_numpy(expected[places]))
        assert [data.classes[label] for label in part.labels] == [str(label) for label in labels[places]]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("channels", "order"),
    [(1, None), (1, (0, 1, 2, 3)), (3, (0, 1, 2, 3)), (1, (0, 2, 3, 1)), (3, (0, 2, 3, 1))],
    ids=["NHW", "N1HW", "N3HW", "NHW1", "NHW3"],
)
def test_images_in_every_layout(
    channels: int, order: tuple[int, ...] | None, packed: bool, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "PIECE_BYTES", 1_000)  # in several pieces
    images = _images(channels=channels)
    stored = images[:, 0] if order is None else np.ascontiguousarray(images.transpose(order))
    data = _open(save(images=stored, labels=_labels(), packed=packed))
    assert (data.name, data.classes, data.channels, data.image_size) == ("scans", ("0", "1", "2"), channels, 8)
    _assert_all_there(data, images, _labels())


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (_labels().astype(np.uint8), ("0", "1", "2")),
        (_labels().astype(">i8")[:, None] * 5 - 1, ("-1", "4", "9")),
        (np.array(["b", "a", "ü"])[_labels()], ("a", "b", "ü")),
        (np.array([b"b", b"a", b"c"])[_labels()], ("a", "b", "c")),
        (_labels() % 2 == 1, ("False", "True")),
    ],
)
def test_labels_are_numbers_or_text(labels: Array, classes: tuple[str, ...], save: Save) -> None:
    data = _open(save(images=_images(), labels=labels))
    assert data.classes == classes
    named = labels.reshape(-1)
    _assert_all_there(data, _images(), np.char.decode(named) if named.dtype.kind == "S" else named)


def test_classes_may_have_names(save: Save) -> None:
    data = _open(save(images=_images(), labels=_labels(), classes=np.array(["go", "stop", "yield"])))
    assert data.classes == ("go", "stop", "yield")
    _assert_all_there(data, _images(), np.array(data.classes)[_labels()])
    names = np.array(["yield", "go", "stop"])
    data = _open(save(images=_images(), labels=names[_labels()], classes=np.sort(names)[::-1]))
    assert data.classes == ("yield", "stop", "go")
    _assert_all_there(data, _images(), names[_labels()])


@pytest.mark.parametrize(("side", "width", "own"), [(8, 8, 8), (28, 28, 28), (64, 64, 64), (65, 65, 32), (16, 24, 32)])
def test_small_squares_keep_their_side_and_others_are_resized_as_everything(
    side: int, width: int, own: int, save: Save
) -> None:
    images = _images(12, side, 3, width)
    path = save(images=images, labels=_labels(12))
    data = _open(path)
    assert data.image_size == own
    whole = torch.cat([part.pixels for part in _parts(data)])
    assert whole.shape == (12, 3, own, own)
    if side == width:
        expected = resized(Images(torch.from_numpy(images), torch.zeros(12), torch.zeros(12)), own).pixels
        assert sorted(map(bytes, whole.numpy())) == sorted(map(bytes, expected.numpy()))
    assert _open(path, image_size=10).train.side == 10


def test_splits_and_groups_of_the_file_hold(save: Save) -> None:
    split = np.array(["train", "val", "Training", "test"])[np.arange(24) // 6]
    path = save(images=_images(), labels=_labels(), split=split)
    train, validation, test = map(_numbers, _parts(_open(path)))
    assert (train, validation, test) == ([*range(6), *range(12, 18)], [*range(6, 12)], [*range(18, 24)])
    groups = np.arange(24) // 3  # of three classes each
    for named in (groups, np.array([f"patient {g}" for g in groups])):
        data = _open(save(images=_images(), labels=_labels(), groups=named))
        sides = [set(np.array(_numbers(part)) // 3) for part in _parts(data)]
        assert sum(map(len, sides)) == len(set.union(*sides)) == 8
    with pytest.raises(DataError, match="group '1' stands in two parts, with 'image 4' in train"):
        _open(save(images=_images(), labels=_labels(), split=split, groups=np.arange(24) // 4 % 3))


@pytest.mark.parametrize("parts", [("train",), ("train", "test"), ("train", "val", "test")])
def test_parts_may_lie_apart_in_one_file_or_in_a_folder(parts: tuple[str, ...], save: Save, tmp_path: Path) -> None:
    """As MedMNIST has them, with labels (N, 1)."""
    images, labels = _images(36), _labels(36)
    values: dict[str, Array] = {}
    (tmp_path / "folder").mkdir()
    for place, part in enumerate(parts):
        some = np.arange(36) * len(parts) // 36 == place
        values |= {f"{part}_images": images[some, 0], f"{part}_labels": labels[some, None].astype(np.uint8)}
        save(name=f"folder/{part}.npz", images=images[some, 0], labels=labels[some])
    for path in (save(**values), tmp_path / "folder"):
        data = _open(path)
        assert data.name == path.stem
        _assert_all_there(data, images, labels)
        if len(parts) == 3:
            assert _numbers(data.test()) == list(range(24, 36))


def test_what_is_packed_or_moved_is_the_same_data_set_and_a_changed_byte_another(save: Save, tmp_path: Path) -> None:
    images = _images()
    first = _open(save(images=images, labels=_labels())).fingerprint
    assert _open(save(images=images, labels=_labels(), packed=True, name="elsewhere.npz")).fingerprint == first
    images[5, 0, 3, 3] ^= 1
    assert _open(save(images=images, labels=_labels())).fingerprint != first
    images[5, 0, 3, 3] ^= 1
    assert _open(save(images=images, labels=np.roll(_labels(), 1))).fingerprint != first
    assert _open(save(images=images, labels=_labels(), groups=np.arange(24) // 2)).fingerprint != first


def test_a_message_calls_an_image_by_its_place_in_the_file(save: Save) -> None:
    split = np.array(["test", "train"])[np.arange(24) % 2]
    source = find_source(StudyConfig(dataset=str(save(images=_images(), labels=np.arange(24) // 2 % 3, split=split))))
    assert source.name_of("train", 3) == "image 7 of 'scans.npz'"


GOOD = {"images": _images(), "labels": _labels()}
ODD: list[tuple[dict[str, Array], list[str]]] = [
    ({"images": _images().astype(float) / 255}, ["images is of type float64", "uint8", ".astype('uint8')"]),
    ({"images": _images().astype(np.int64)}, ["images is of type int64"]),
    ({"images": _images().reshape(24, 64)}, ["images has the shape (24, 64)", "(N, H, W)"]),
    ({"images": _images(side=8, width=4)}, ["the shape (24, 1, 8, 4)", "at least 8"]),
    ({"images": _images(channels=4)}, ["the shape (24, 4, 8, 8)", "C of 1 or 3"]),
    ({"images": np.asfortranarray(_images())}, ["Fortran", "ascontiguousarray"]),
    ({"images": _images(0)}, ["without values"]),
    ({"images": np.array([object()] * 24)}, ["Python objects", "not read"]),
    ({"labels": np.array([{}] * 24)}, ["Python objects", "not read"]),
    ({"labels": _labels(20)}, ["24 images, but 20 labels"]),
    ({"labels": _labels() / 2}, ["labels is of type float64", "integers or text"]),
    ({"labels": np.eye(24, dtype=int)}, ["labels has the shape (24, 24)", "(N,)"]),
    ({"labels": np.zeros(24, int)}, ["has 1 class(es)", "at least 2"]),
    ({"labels": np.array(["a/b", "c"])[_labels() % 2]}, ["class 'a/b'", "folder"]),
    ({"labels": np.array(["\x1b[2J", "c"])[_labels() % 2]}, ["class '\\x1b[2J'"]),
    ({"labels": np.array(["", "c"])[_labels() % 2]}, ["class ''"]),
    ({"classes": np.array(["a", "b"])}, ["label 2", "index from 0 to 1"]),
    ({"classes": np.array(["a", "b", "b"])}, ["3 class(es), 2 of them different"]),
    ({"classes": np.array(["a", "b", "c", "d"])}, ["no image of class 'd' in split train"]),
    ({"labels": np.array(["a", "b"])[_labels() % 2], "classes": np.array(["a", "c"])}, ["label 'b'", "'classes'"]),
    ({"split": np.array(["train", "later"])[_labels() % 2]}, ["split 'later'", "validation"]),
    ({"split": np.array(["test"] * 24)}, ["no images to train on"]),
    ({"split": np.array(["train", "val"])[(_labels() == 1) * 1]}, ["no image of class '1' in split train"]),
    ({"groups": np.arange(20)}, ["24 images, but 20 groups"]),
    ({"groups": np.arange(24) / 2}, ["groups is of type float64"]),
]


@pytest.mark.parametrize(("changes", "parts"), ODD, ids=range(len(ODD)))
def test_arrays_that_do_not_fit_get_one_line(changes: dict[str, Array], parts: list[str], save: Save) -> None:
    path = save(**{**GOOD, **changes})
    with pytest.raises(DataError) as raised:
        _open(path)
    for part in (str(path), *parts):
        assert part in message_of(raised)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({}, ["holds nothing", "'images' (or 'embeddings') and 'labels'"]),
        ({"x\x1b": np.zeros(3)}, ["holds 'x\\x1b'"]),
        ({"images": _images()}, ["no array 'labels'"]),
        ({"test_images": _images(), "test_labels": _labels()}, ["no images to train on"]),
        ({"train_images": _images()}, ["no array 'train_labels'"]),
        ({f"{p}_{n}": GOOD[n] for p in ("train", "val", "valid") for n in GOOD}, ["part validation under two names"]),
        ({f"{p}_{n}": GOOD[n] for p in ("train",) for n in GOOD} | {"train_split": _labels()}, ["an array 'split'"]),
        (
            {
                "train_images": _images(),
                "train_labels": _labels(),
                "val_images": _images(),
                "val_labels": _labels() + 1,
            },
            ["no image of class '3' in split train"],
        ),
        (
            {f"train_{n}": GOOD[n] for n in GOOD} | {"test_images": _images(channels=3), "test_labels": _labels()},
            ["1 channel in one part and of 3"],
        ),
        (
            {f"train_{n}": GOOD[n] for n in GOOD} | {"test_images": _images(), "test_labels": _labels().astype(str)},
            ["text"],
        ),
    ],
)
def test_arrays_that_are_not_there_or_not_alike_get_one_line(
    values: dict[str, Array], parts: list[str], save: Save
) -> None:
    path = save(**values)
    with pytest.raises(DataError) as raised:
        _open(path)
    for part in (str(path), *parts):
        assert part in message_of(raised)


def test_a_pattern_has_no_paths_to_search(save: Save) -> None:
    with pytest.raises(DataError, match=r"--group-by is for paths, .* save an array 'groups'"):
        _open(save(**GOOD), group_by="(?P<group>.)")


# --- files that are not what they say ---------------------------------------------------------------------------------


def _npy(array: Array, shape: str | None = None, descr: str | None = None) -> bytes:
    """An array's bytes, under a head that may say something else."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0))
    content = buffer.getvalue()
    head, body = content[:128], content[128:]
    for old, new in ((str(array.shape), shape), (repr(array.dtype.str), descr)):
        if new is not None:
            changed = head.replace(old.encode(), new.encode())
            head = changed.rstrip().ljust(127) + b"\n" if len(changed) > 128 else changed[:-1].ljust(127) + b"\n"
    return head[:128] + body


def _zip(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


HUGE = "(99999999999, 1, 8, 8)"


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"images": _npy(_images(), shape="(25, 1, 8, 8)"), "labels": _npy(np.arange(25) % 2)}, "cut short"),
        ({"images": _npy(_images(), shape="(23, 1, 8, 8)"), "labels": _npy(np.arange(23) % 2)}, "longer than it says"),
        ({"images": _npy(_images(), shape=HUGE), "labels": _npy(_labels())}, "99,999,999,999 images, but 24"),
        ({"images": _npy(_images()), "labels": _npy(_labels(), shape="(99999999999,)")}, "takes 799,999,999,992 bytes"),
        ({"images": _npy(_images()), "labels": _npy(_labels(), descr="'<U99999999'")}, "takes 9,599,999,904 bytes"),
        ({"images": _npy(_images()), "labels": _npy(_labels())[:-9]}, "not as long as it says"),
        ({"images": _npy(_images(), shape="(-4, 1, 8, 8)"), "labels": _npy(_labels())}, "without values"),
        ({"images": b"no array", "labels": _npy(_labels())}, "cannot be read"),
        ({"images": b"", "labels": _npy(_labels())}, "cannot be read"),
        ({"images": b"\x93NUMPY\x02\0\xff\xff\xff\xff{", "labels": _npy(_labels())}, "version"),
        ({"images": b"\x93NUMPY\x01\0\xff\xff" + b"(" * 65_535, "labels": _npy(_labels())}, "cannot be read"),
    ],
)
def test_a_head_that_lies_gets_one_line(
    members: dict[str, bytes], reason: str, own_cache: Path, tmp_path: Path
) -> None:
    path = _zip(tmp_path / "scans.npz", members)
    with ending_within(20), pytest.raises(DataError, match=reason) as raised:
        _open(path)
    assert str(path) in message_of(raised)
    assert not list(own_cache.rglob("*.partial"))
    assert not list(own_cache.rglob("*.safetensors"))


def test_a_bomb_is_not_unpacked(tmp_path: Path, own_cache: Path) -> None:
    """64 MB of zeros, in 64 kB."""
    images = _npy(np.zeros((2**20, 8, 8), np.uint8))
    labels = _npy(np.arange(2**20, dtype=np.uint8) % 2)
    path = _zip(tmp_path / "scans.npz", {"images": images, "labels": labels}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**18
    with pytest.raises(DataError, match=r"may be a decompression bomb; save it with numpy\.savez"):
        _open(path)


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["images", "labels", "groups", "split", "classes"])
def test_nothing_is_unpickled(name: str, save: Save, tmp_path: Path) -> None:
    payload = np.array([_Payload(tmp_path / "owned")] * 24)
    path = save(**{**GOOD, name: payload})
    with pytest.raises(DataError, match="Python objects"):
        _open(path)
    np.load(path, allow_pickle=True)[name]
    assert (tmp_path / "owned").exists(), "it would have worked"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6),
    keep=st.one_of(st.just(1.0), st.floats(0, 1)),
    packed=st.booleans(),
)
def test_a_damaged_file_is_read_as_it_was_or_refused(
    changes: list[tuple[float, int]], keep: float, packed: bool, save: Save
) -> None:
    path = save(**GOOD, packed=packed, groups=np.arange(24))
    content = bytearray(path.read_bytes())
    for place, value in changes:
        content[int(place * (len(content) - 1))] = value
    path.write_bytes(content[: int(keep * len(content))])
    refusal = ""
    try:
        source = array_source(path)
        pixels = torch.cat(list(source.packed["train"].pieces().pixels))
    except InputError as error:
        refusal = str(error)
    if refusal:
        assert is_printable(refusal)
    else:
        assert torch.equal(pixels, torch.from_numpy(_images())), "for its checksum says so"


@pytest.mark.parametrize(
    ("side", "width", "model", "expected"),
    [
        (24, 24, "torchvision:squeezenet1_1", 24),
        (64, 64, "torchvision:squeezenet1_1", 64),
        (65, 65, "torchvision:squeezenet1_1", 224),
        (24, 30, "torchvision:squeezenet1_1", 224),
        (24, 30, "compact", 32),
        (96, 96, "compact", 32),
    ],
)
def test_large_arrays_are_as_photographs_are(side: int, width: int, model: Model, expected: int, save: Save) -> None:
    """Small squares have a size of their own; others that which the network was made for, in a file and from Python."""
    path = save(images=_images(24, side, 3, width), labels=_labels())
    config = StudyConfig(dataset=str(path), model=model)
    assert find_source(config).image_size == side_of(config, side, width) == expected
    assert side_of(config.model_copy(update={"image_size": 40}), side, width) == 40


@pytest.mark.parametrize("model", ["compact", "torchvision:squeezenet1_1"])
@pytest.mark.parametrize("length", [3, 16])
def test_embeddings_are_no_images_to_any_network(model: Model, length: int, save: Save) -> None:
    path = save(embeddings=np.random.default_rng(0).random((24, length), np.float32), labels=_labels())
    with pytest.raises(DataError, match=r"has embeddings, but --model .* takes images"):
        open_dataset(StudyConfig(dataset=str(path), model=model))


def test_a_file_of_a_part_is_that_part_of_what_the_model_was_trained_on(save: Save, tmp_path: Path) -> None:
    for seed, name in enumerate(("train", "val", "test", "new")):
        save(name=f"{name}.npz", images=_images(seed=seed), labels=_labels())
    config = StudyConfig.build({"dataset": str(tmp_path)})
    data = open_dataset(config)
    options: dict[str, Any] = {"trained_on": config, "fingerprint": data.fingerprint, "classes": data.classes}
    unseen = open_test_images(str(tmp_path / "test.npz"), **options)
    assert unseen.own
    assert torch.equal(unseen.images.pixels, data.test().pixels)
    with pytest.raises(DataError, match="lies in what the model was trained on"):
        open_test_images(str(tmp_path / "val.npz"), **options)
    assert "is not, as it is, the data set of training" in open_test_images(str(tmp_path / "new.npz"), **options).text
