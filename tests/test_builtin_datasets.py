"""The built-in data sets but the traffic signs: the published files, small ones written here, and downloads."""

import gzip
import hashlib
import json
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets.mnist as torchvision_mnist
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10, MNIST

from camri_tune import sources
from camri_tune.config import StudyConfig
from camri_tune.datasets import Dataset, open_dataset, open_test_images
from camri_tune.errors import DataError
from camri_tune.images import Images
from camri_tune.sources import CIFAR10_CLASSES
from tests.command import assert_one_line_error, camri_tune, result_of
from tests.conftest import MakeFolder
from tests.loopback import refusing_url, serving
from tests.opening import Pixels, forbid_decoding, message_of, same

Labels = NDArray[np.int64]


def _config(dataset: str, data_dir: Path, **values: object) -> StudyConfig:
    return StudyConfig.build({"dataset": dataset, "data_dir": data_dir, **values})


def _open(dataset: str, data_dir: Path, **values: object) -> Dataset:
    return open_dataset(_config(dataset, data_dir, **values))


def _assert_these(images: Images, pixels: Pixels, labels: Labels) -> None:
    """`images` are rows of (N, C, H, W) and (N,), each named by its group."""
    rows = images.groups.numpy()
    assert images.pixels.dtype == torch.uint8
    assert np.array_equal(images.pixels.numpy(), pixels[rows])
    assert np.array_equal(images.labels.numpy(), labels[rows])


def _assert_split_by_class(data: Dataset, labels: Labels) -> None:
    """Training and validation share nothing, are all that `labels` names, and validation is a fifth of every class."""
    groups = [*data.train.groups.tolist(), *data.validation.groups.tolist()]
    assert sorted(groups) == list(range(len(labels)))
    counts = np.bincount(data.validation.labels.numpy(), minlength=len(data.classes))
    assert (np.abs(counts - np.bincount(labels) / 5) <= 0.5).all()


def _judged(where: Path, config: StudyConfig, data: Dataset) -> tuple[Images, str]:
    """What a model that was trained on `data` is judged on, and which images these are."""
    return open_test_images(str(where), trained_on=config, fingerprint=data.fingerprint, classes=data.classes)[:2]


@pytest.fixture(autouse=True)
def _direct_to_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may reach a real server: every address is one that refuses, unless the test names its own."""
    url = refusing_url()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(CIFAR10, "url", f"{url}/cifar-10-python.tar.gz")
    monkeypatch.setattr(MNIST, "mirrors", [f"{url}/"])
    monkeypatch.setattr(sources, "AWA2_URL", f"{url}/AwA2-data.zip")


# --- digits -----------------------------------------------------------------------------------------------------------


def test_digits_are_split_into_three_parts_that_share_nothing() -> None:
    data = open_dataset(StudyConfig())
    test = data.test()
    parts = (data.train, data.validation, test)
    assert (data.channels, data.image_size, data.classes) == (1, 8, tuple("0123456789"))
    assert [images.pixels.dtype for images in parts] == [torch.uint8] * 3
    groups = [set(images.groups.tolist()) for images in parts]
    assert len(set.union(*groups)) == sum(len(images) for images in parts) == 1797
    assert abs(len(test) / 1797 - 0.2) < 0.01
    assert abs(len(data.validation) / (1797 - len(test)) - 0.2) < 0.01
    for images in parts:
        shares = torch.bincount(images.labels, minlength=10) / len(images)
        assert bool(((shares - 0.1).abs() < 0.015).all())


def test_digits_have_their_own_pixels_and_labels() -> None:
    data = open_dataset(StudyConfig())
    bunch = load_digits()
    for images in (data.train, data.validation, data.test()):
        rows = images.groups.numpy()
        expected = (bunch.images[rows] * 255 / 16).round().astype(np.uint8)
        assert np.array_equal(images.pixels[:, 0].numpy(), expected)
        assert images.labels.tolist() == bunch.target[rows].tolist()


def test_digits_are_the_same_by_their_library_where_its_file_lies_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """And by the file alone the library, which takes a second or two, is not imported."""
    program = (
        "import sys; from camri_tune.config import StudyConfig; from camri_tune.datasets import open_dataset; "
        "print(open_dataset(StudyConfig()).fingerprint, 'sklearn' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    fingerprint = open_dataset(StudyConfig()).fingerprint
    assert done.stdout.split() == [fingerprint, "False"]
    monkeypatch.setattr(sources, "find_spec", lambda _: None)
    assert open_dataset(StudyConfig()).fingerprint == fingerprint


def test_another_seed_draws_another_test_part() -> None:
    first, second = (set(open_dataset(StudyConfig(seed=seed)).test().groups.tolist()) for seed in (0, 1))
    assert first != second


def test_digits_give_their_test_part() -> None:
    config = StudyConfig(seed=5)
    data = open_dataset(config)
    for where in (None, "digits"):
        images, *_ = open_test_images(where, trained_on=config, fingerprint=data.fingerprint, classes=data.classes)
        assert same(images, data.test())


# --- MNIST ------------------------------------------------------------------------------------------------------------


def _idx(path: Path) -> Pixels:
    """The bytes of an IDX file, by the format's description: 0, 0, type 8, dimensions, each dimension, bytes."""
    content = path.read_bytes()
    shape = struct.unpack_from(f">{content[3]}I", content, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def _write_idx(path: Path, values: Pixels) -> None:
    path.write_bytes(bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes())


@pytest.fixture
def small_mnist(tmp_path: Path) -> Path:
    """A folder that holds a small `MNIST/`: 300 images to train on, 100 to test."""
    raw = tmp_path / "small" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 300), ("t10k", 100)):
        _write_idx(raw / f"{prefix}-images-idx3-ubyte", rng.integers(0, 256, (count, 28, 28), np.uint8))
        _write_idx(raw / f"{prefix}-labels-idx1-ubyte", rng.permutation(count).astype(np.uint8) % 10)
    return tmp_path / "small"


@pytest.fixture(scope="module")
def handwritten(mnist_dir: Path) -> Dataset:
    return _open("mnist", mnist_dir)


def test_mnist_has_its_official_images_and_labels(handwritten: Dataset, mnist_dir: Path) -> None:
    test = handwritten.test()
    assert [len(images) for images in (handwritten.train, handwritten.validation, test)] == [48_000, 12_000, 10_000]
    assert handwritten.classes == tuple("0123456789")
    assert (handwritten.channels, handwritten.image_size, handwritten.grouped) == (1, 28, False)

    raw = mnist_dir / "MNIST" / "raw"
    pixels, labels = _idx(raw / "train-images-idx3-ubyte")[:, None], _idx(raw / "train-labels-idx1-ubyte")
    assert labels[:5].tolist() == [5, 0, 4, 1, 9], "as everybody's first plot of MNIST shows"
    _assert_split_by_class(handwritten, labels.astype(np.int64))
    for images in (handwritten.train, handwritten.validation):
        _assert_these(images, pixels, labels.astype(np.int64))
    assert test.groups.tolist() == list(range(10_000))
    _assert_these(test, _idx(raw / "t10k-images-idx3-ubyte")[:, None], _idx(raw / "t10k-labels-idx1-ubyte").astype(int))


def test_mnist_is_what_torchvision_shows(handwritten: Dataset, mnist_dir: Path) -> None:
    official = MNIST(str(mnist_dir))
    for place in (0, 1_000, 47_999):
        picture, label = official[int(handwritten.train.groups[place])]
        assert np.array_equal(handwritten.train.pixels[place, 0].numpy(), np.asarray(picture))
        assert int(handwritten.train.labels[place]) == label


def test_mnist_at_another_size_is_resized_as_pillow_does(handwritten: Dataset, mnist_dir: Path) -> None:
    large = _open("mnist", mnist_dir, image_size=32)
    assert large.train.pixels.shape == (48_000, 1, 32, 32)
    assert large.test().pixels.shape == (10_000, 1, 32, 32)
    assert torch.equal(large.train.labels, handwritten.train.labels)
    assert large.fingerprint != handwritten.fingerprint
    for place in (0, 1_023, 1_024, 47_999):
        picture = Image.fromarray(handwritten.train.pixels[place, 0].numpy())
        expected = np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(large.train.pixels[place, 0].numpy().astype(int) - expected).max() <= 1


def test_the_test_part_of_mnist_is_not_decoded_before_it_is_asked_for(
    small_mnist: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    for name in ("read_image_file", "read_label_file"):
        real: Callable[[str], torch.Tensor] = getattr(torchvision_mnist, name)

        def recorded(path: str, real: Callable[[str], torch.Tensor] = real) -> torch.Tensor:
            decoded.append(Path(path).name)
            return real(path)

        monkeypatch.setattr(torchvision_mnist, name, recorded)
    data = _open("mnist", small_mnist)
    assert set(decoded) == {"train-images-idx3-ubyte", "train-labels-idx1-ubyte"}
    decoded.clear()
    assert len(data.test()) == 100
    assert set(decoded) == {"t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"}


def test_a_changed_byte_is_another_data_set_and_another_folder_is_not(small_mnist: Path, tmp_path: Path) -> None:
    """Packed files of one length all have the same size: their bytes tell them apart, those of the test part too."""
    first = _open("mnist", small_mnist).fingerprint
    moved = small_mnist.rename(tmp_path / "moved")
    assert _open("mnist", moved).fingerprint == first
    for name in ("train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        path = moved / "MNIST" / "raw" / name
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        changed = _open("mnist", moved).fingerprint
        assert changed != first
        first = changed


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize("damage", ["cut short", "empty", "a page", "3 bytes", "compressed"])
def test_a_damaged_file_of_mnist_is_named_before_anything_is_trained(name: str, damage: str, small_mnist: Path) -> None:
    """Torchvision checks no file that is there: without a check, a torn test part would end a study at its end."""
    path = small_mnist / "MNIST" / "raw" / name
    whole = path.read_bytes()
    path.write_bytes(
        {
            "cut short": whole[:-50],
            "empty": b"",
            "a page": b"<!DOCTYPE html><html><body>404</body></html>",
            "3 bytes": whole[:3],
            "compressed": gzip.compress(whole),
        }[damage]
    )
    with pytest.raises(DataError, match="is damaged: remove it") as raised:
        _open("mnist", small_mnist)
    assert str(path) in message_of(raised)


def test_a_second_start_reads_packed_images_from_the_cache(
    small_mnist: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All workers map one file, instead of each having a copy."""
    first = _open("mnist", small_mnist)
    parts = [first.train, first.validation, first.test()]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(MNIST, "__init__", refuse)
    again = _open("mnist", small_mnist)
    assert all(map(same, parts, [again.train, again.validation, again.test()]))
    assert {path.name for path in own_cache.rglob("*.safetensors")} == {"train.safetensors", "test.safetensors"}


def test_a_test_part_that_is_gone_by_the_end_is_named(small_mnist: Path, own_cache: Path) -> None:
    data = _open("mnist", small_mnist)
    (small_mnist / "MNIST" / "raw" / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(DataError, match="the test part of mnist can no longer be read") as raised:
        data.test()
    assert str(small_mnist / "MNIST") in message_of(raised)


@pytest.mark.parametrize("missing", ["all", "t10k-labels-idx1-ubyte"])
def test_without_mnist_and_network_the_folder_to_fill_is_named(missing: str, small_mnist: Path) -> None:
    raw = small_mnist / "MNIST" / "raw"
    if missing == "all":
        shutil.rmtree(small_mnist)
    else:
        (raw / missing).unlink()
    with pytest.raises(DataError, match="could not be downloaded") as raised:
        _open("mnist", small_mnist)
    for part in (repr(str(small_mnist)), f"{raw}/", "four IDX files", "--data-dir"):
        assert part in message_of(raised)


def test_mnist_is_downloaded_once(small_mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archives = tmp_path / "archives"
    archives.mkdir()
    sums = []
    for path in sorted((small_mnist / "MNIST" / "raw").iterdir()):
        archive = archives / f"{path.name}.gz"
        archive.write_bytes(gzip.compress(path.read_bytes()))
        sums.append((archive.name, _md5(archive)))
    monkeypatch.setattr(MNIST, "resources", sums)
    with serving(archives) as server:
        monkeypatch.setattr(MNIST, "mirrors", [f"{server.url}/"])
        data = _open("mnist", tmp_path / "data")
        assert server.files_asked == {name for name, _ in sums}
        original = _open("mnist", small_mnist)
        assert same(data.train, original.train)
        assert same(data.test(), original.test())
        server.asked.clear()
        assert _open("mnist", tmp_path / "data").fingerprint == data.fingerprint == original.fingerprint
        assert server.asked == []

        # What comes with another sum is refused.
        (archives / sums[0][0]).write_bytes(gzip.compress(b"something else"))
        with pytest.raises(DataError, match="could not be downloaded") as raised:
            _open("mnist", tmp_path / "other")
        assert message_of(raised)


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


# --- CIFAR-10 ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def objects(cifar10_dir: Path) -> Dataset:
    return _open("cifar10", cifar10_dir)


def test_cifar10_from_image_folders_has_all_its_images_and_classes(objects: Dataset, cifar10_dir: Path) -> None:
    parts = (objects.train, objects.validation, objects.test())
    assert [len(images) for images in parts] == [40_000, 10_000, 10_000]
    assert [images.pixels.shape[1:] for images in parts] == [(3, 32, 32)] * 3
    for images, count in zip(parts, (4_000, 1_000, 1_000), strict=True):
        assert torch.bincount(images.labels).tolist() == [count] * 10
    assert objects.name == "cifar10"
    # The order of the original's batches.meta.
    assert " ".join(objects.classes) == "airplane automobile bird cat deer dog frog horse ship truck"
    assert objects.augmentation.mirror, "a mirrored photograph is a photograph"

    listed = [path for name in objects.classes for path in sorted((cifar10_dir / "cifar10" / "train" / name).iterdir())]
    for place in (0, 1, 20_000, 39_999):
        path = listed[int(objects.train.groups[place])]
        with Image.open(path) as picture:
            expected = np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
        assert np.array_equal(objects.train.pixels[place].numpy(), expected)
        assert objects.classes[int(objects.train.labels[place])] == path.parent.name


@pytest.mark.parametrize(("odd", "reason"), [("aardvark", "one too many"), ("truck", "missing")])
def test_cifar10_with_other_class_folders_names_one(odd: str, reason: str, image_folder: MakeFolder) -> None:
    names = {*CIFAR10_CLASSES} ^ {odd}
    root = image_folder({f"cifar10/{part}/{name}": 1 for part in ("train", "test") for name in names})
    with pytest.raises(DataError, match=f"'{odd}' is {reason}") as raised:
        _open("cifar10", root)
    for part in (str(root / "cifar10" / "train"), "airplane", "truck", "again"):
        assert part in message_of(raised)


def test_cifar10_with_an_empty_class_folder_names_it(image_folder: MakeFolder) -> None:
    counts = {f"cifar10/{part}/{name}": 2 for part in ("train", "test") for name in CIFAR10_CLASSES}
    root = image_folder(counts | {"cifar10/test/ship": 0})
    with pytest.raises(DataError, match="no images") as raised:
        _open("cifar10", root)
    assert str(root / "cifar10" / "test" / "ship") in message_of(raised)


class SmallCifar:
    """CIFAR-10's Python version in small, in the published layout, with the sums torchvision checks set to its own."""

    def __init__(self, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.data_dir = data_dir
        self.batches = data_dir / "cifar-10-batches-py"
        self.batches.mkdir(parents=True)
        rng = np.random.default_rng(0)
        self.pixels = rng.integers(0, 256, (300, 3, 32, 32), np.uint8)
        self.labels = rng.permutation(300) % 10
        names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
        for place, name in enumerate(names):
            rows = slice(50 * place, 50 * (place + 1))
            self._write(
                name,
                {
                    "batch_label": f"{name} of 5",
                    "labels": self.labels[rows].tolist(),
                    "data": self.pixels[rows].reshape(50, 3072),
                    "filenames": [f"{index}.png" for index in range(50)],
                },
            )
        self._write("batches.meta", {"num_cases_per_batch": 50, "label_names": [*CIFAR10_CLASSES], "num_vis": 3072})
        sums = [[name, _md5(self.batches / name)] for name in names]
        monkeypatch.setattr(CIFAR10, "train_list", sums[:5])
        monkeypatch.setattr(CIFAR10, "test_list", sums[5:])
        monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": _md5(self.batches / "batches.meta")})

    def _write(self, name: str, content: dict[str, Any]) -> None:
        # As NumPy 1 wrote it: dtype("u1", 0, 1), where now False and True are written.
        new, old = b"\x89\x88\x87", b"K\x00K\x01\x87"
        pickled = pickle.dumps(content, protocol=2)
        assert pickled.count(new) == ("data" in content)
        (self.batches / name).write_bytes(pickled.replace(new, old))

    def assert_these(self, data: Dataset) -> None:
        _assert_split_by_class(data, self.labels[:250])
        for images in (data.train, data.validation):
            _assert_these(images, self.pixels[:250], self.labels[:250])
        _assert_these(data.test(), self.pixels[250:], self.labels[250:])


@pytest.fixture
def small_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SmallCifar:
    return SmallCifar(tmp_path / "small", monkeypatch)


def test_cifar10_from_the_published_files_has_their_pixels_and_labels(small_cifar: SmallCifar) -> None:
    data = _open("cifar10", small_cifar.data_dir)
    small_cifar.assert_these(data)
    assert data.classes == CIFAR10_CLASSES
    assert (data.channels, data.image_size, data.grouped) == (3, 32, False)
    assert _open("cifar10", small_cifar.data_dir, image_size=16).train.pixels.shape[1:] == (3, 16, 16)


def test_cifar10_in_image_folders_wins_over_the_published_files(
    small_cifar: SmallCifar, image_folder: MakeFolder
) -> None:
    counts = {f"cifar10/{part}/{name}": 3 for part in ("train", "test") for name in CIFAR10_CLASSES}
    root = image_folder(counts)
    small_cifar.batches.rename(root / small_cifar.batches.name)
    assert len(_open("cifar10", root).test()) == 30
    shutil.rmtree(root / "cifar10" / "test")
    assert len(_open("cifar10", root).test()) == 50


def test_the_test_part_of_cifar10_is_not_decoded_before_it_is_asked_for(
    small_cifar: SmallCifar, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    real = pickle.load

    def recorded(file: Any, **options: Any) -> Any:
        decoded.append(Path(file.name).name)
        return real(file, **options)

    monkeypatch.setattr(pickle, "load", recorded)
    data = _open("cifar10", small_cifar.data_dir)
    assert "data_batch_5" in decoded
    assert "test_batch" not in decoded
    data.test()
    assert "test_batch" in decoded


def test_a_broken_test_image_of_cifar10_is_named_before_anything_is_trained(image_folder: MakeFolder) -> None:
    """Afterwards every way out would be another study: one file less, one mended, or corrupt ones left out."""
    counts = {f"cifar10/{part}/{name}": 3 for part in ("train", "test") for name in CIFAR10_CLASSES}
    root = image_folder(counts)
    broken = next((root / "cifar10" / "test" / "cat").iterdir())
    broken.write_bytes(broken.read_bytes()[:40])
    data = _open("cifar10", root)
    with pytest.raises(DataError, match="mend or remove it") as raised:
        data.examine()
    assert str(broken) in message_of(raised)


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_file_of_cifar10_is_not_read(name: str, damage: str, small_cifar: SmallCifar) -> None:
    """Nothing is unpickled whose sum is another: a pickle can run code."""
    path = small_cifar.batches / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(DataError, match="could not be downloaded") as raised:
        _open("cifar10", small_cifar.data_dir)
    folder = small_cifar.data_dir / "cifar10"
    for part in (
        repr(str(small_cifar.data_dir)),
        f"{small_cifar.batches}/",
        f"{folder}/train/CLASS/",
        f"{folder}/test/CLASS/",
        "--data-dir",
    ):
        assert part in message_of(raised)


# Of torchvision's unpacking, on Python 3.12 and 3.13.
@pytest.mark.filterwarnings("ignore:Python 3.14 will:DeprecationWarning")
def test_cifar10_is_downloaded_once(small_cifar: SmallCifar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archives = tmp_path / "archives"
    archives.mkdir()
    archive = archives / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(small_cifar.batches, small_cifar.batches.name)
    monkeypatch.setattr(CIFAR10, "tgz_md5", _md5(archive))
    with serving(archives) as server:
        monkeypatch.setattr(CIFAR10, "url", f"{server.url}/{archive.name}")
        data = _open("cifar10", tmp_path / "data")
        small_cifar.assert_these(data)
        assert server.files_asked == {archive.name}
        server.asked.clear()
        assert _open("cifar10", tmp_path / "data").fingerprint == data.fingerprint
        assert server.asked == []
        monkeypatch.setattr(CIFAR10, "tgz_md5", "0" * 32)
        with pytest.raises(DataError, match="could not be downloaded"):
            _open("cifar10", tmp_path / "other")


# --- Animals with Attributes 2 ----------------------------------------------------------------------------------------

ANIMALS = ("zebra", "blue+whale", "antelope", "dalmatian")  # as in the real list, not in the order of the alphabet


def _write_awa2(folder: Path, count: int = 12) -> Path:
    """The real layout in small under `folder`: photographs of many sizes in class folders, and the published lists."""
    root = folder / "Animals_with_Attributes2"
    rng = np.random.default_rng(0)
    for label, name in enumerate(ANIMALS):
        (root / "JPEGImages" / name).mkdir(parents=True)
        for index in range(count):
            height, width = rng.integers(40, 160, 2)
            shade = rng.integers(0, 60, (height, width, 3)) + np.array([label * 60, 180 - label * 60, index * 10])
            picture = Image.fromarray(shade.clip(0, 255).astype(np.uint8))
            picture.save(root / "JPEGImages" / name / f"{name}_{10001 + index}.jpg")
    (root / "classes.txt").write_text("".join(f"{label:6}\t{name}\n" for label, name in enumerate(ANIMALS, start=1)))
    (root / "predicates.txt").write_text("     1\tblack\n     2\twhite\n")
    (root / "trainclasses.txt").write_text("antelope\ndalmatian\n")
    return root


@pytest.fixture
def animals(tmp_path: Path, own_cache: Path) -> Path:
    """A folder that holds a small `awa2/`."""
    _write_awa2(tmp_path / "small" / "awa2")
    return tmp_path / "small"


def _photographs(data_dir: Path) -> list[Path]:
    folder = data_dir / "awa2" / "Animals_with_Attributes2" / "JPEGImages"
    return [path for name in ANIMALS for path in sorted((folder / name).glob("*.jpg"))]


def test_awa2_is_split_by_class_with_its_own_order_of_classes(animals: Path) -> None:
    data = _open("awa2", animals)
    assert data.classes == ANIMALS
    assert (data.name, data.channels, data.image_size, data.grouped) == ("awa2", 3, 64, False)
    photographs = _photographs(animals)
    seen: list[int] = []
    for images, of_each in ((data.train, 8), (data.validation, 2), (data.test(), 2)):
        assert torch.bincount(images.labels).tolist() == [of_each] * 4
        for place, index in enumerate(images.groups.tolist()):
            path = photographs[index]
            assert data.classes[int(images.labels[place])] == path.parent.name
            with Image.open(path) as picture:
                expected = np.asarray(picture.resize((64, 64), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
            assert np.array_equal(images.pixels[place].numpy(), expected)
            seen.append(index)
    assert sorted(seen) == list(range(48)), "nothing twice, nothing left out"


def test_the_seed_decides_the_split_of_awa2(animals: Path) -> None:
    first, again, other = (_open("awa2", animals, seed=seed) for seed in (0, 0, 1))
    parts = ([data.train, data.validation, data.test()] for data in (first, again, other))
    for of_first, of_again, of_other in zip(*parts, strict=True):
        assert same(of_first, of_again)
        assert set(of_first.groups.tolist()) != set(of_other.groups.tolist())


def test_awa2_is_decoded_once(animals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _open("awa2", animals)
    forbid_decoding(monkeypatch)
    second = _open("awa2", animals, seed=1)
    assert len(second.train) == len(first.train)
    assert len(second.test()) == 8
    with pytest.raises(AssertionError, match="decoded again"):  # the check itself works
        _open("awa2", animals, image_size=32)


def test_awa2_may_lie_in_the_data_folder_itself(tmp_path: Path, animals: Path) -> None:
    expected = _open("awa2", animals)
    (animals / "awa2" / "Animals_with_Attributes2").rename(tmp_path / "Animals_with_Attributes2")
    assert same(_open("awa2", tmp_path).train, expected.train)


def test_other_files_of_awa2_are_counted(animals: Path) -> None:
    folder = animals / "awa2" / "Animals_with_Attributes2" / "JPEGImages"
    (folder / "zebra" / "licence.txt").write_text("none")
    (folder / "dalmatian" / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (folder / "dalmatian" / ".hidden.jpg").write_bytes(b"")
    data = _open("awa2", animals)
    assert len(data.train) + len(data.validation) + len(data.test()) == 48
    assert data.notices() == ["2 file(s) that are no images were passed over."]


@pytest.mark.parametrize("what", ["no folder", "an empty folder"])
def test_a_listed_animal_without_images_is_named(what: str, animals: Path) -> None:
    folder = animals / "awa2" / "Animals_with_Attributes2" / "JPEGImages" / "blue+whale"
    shutil.rmtree(folder)
    if what == "an empty folder":
        folder.mkdir()
    with pytest.raises(DataError, match=re.escape("lists 'blue+whale', but")) as raised:
        _open("awa2", animals)
    for part in (str(folder), "classes.txt", "no images", "again"):
        assert part in message_of(raised)


@pytest.mark.parametrize(("lines", "counts"), [("", "0, 0"), ("1\tzebra\n", "1, 1"), ("1 zebra\n2 zebra\n", "2, 1")])
def test_a_list_of_fewer_than_two_animals_is_refused(lines: str, counts: str, animals: Path) -> None:
    path = animals / "awa2" / "Animals_with_Attributes2" / "classes.txt"
    path.write_text(lines)
    with pytest.raises(DataError, match=f"at least 2 classes.* {counts} of them different") as raised:
        _open("awa2", animals)
    assert str(path) in message_of(raised)


def test_without_awa2_and_network_the_folder_to_fill_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="could not be downloaded") as raised:
        _open("awa2", tmp_path / "data")
    for part in (
        repr(str(tmp_path / "data")),
        "13 GB",
        f"{tmp_path}/data/awa2/Animals_with_Attributes2/",
        "JPEGImages/CLASS/*.jpg",
        "--data-dir",
    ):
        assert part in message_of(raised)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.fixture
def awa2_archive(tmp_path: Path) -> Path:
    """The only file in its folder: what is on the university's server, in small."""
    root = _write_awa2(tmp_path / "published")
    archive = tmp_path / "archives" / "AwA2-data.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as zipped:
        for path in sorted(root.rglob("*")):
            zipped.write(path, path.relative_to(root.parent))
    return archive


@pytest.mark.usefixtures("own_cache")
def test_awa2_is_downloaded_once(awa2_archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(awa2_archive.parent) as server:
        monkeypatch.setattr(sources, "AWA2_URL", f"{server.url}/{awa2_archive.name}")
        data = _open("awa2", tmp_path / "data")
        assert server.files_asked == {awa2_archive.name}
        assert [path.name for path in (tmp_path / "data" / "awa2").iterdir()] == ["Animals_with_Attributes2"]
        assert (len(data.train), len(data.validation), len(data.test())) == (32, 8, 8)
        server.asked.clear()
        assert _open("awa2", tmp_path / "data").fingerprint == data.fingerprint
        assert server.asked == []


@pytest.mark.usefixtures("own_cache")
def test_what_a_failed_download_of_awa2_left_is_not_taken_for_the_whole(
    awa2_archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no published sum to check: a part of the archive, or a page in its place, must not stay."""
    whole = awa2_archive.read_bytes()
    with serving(awa2_archive.parent) as server:
        monkeypatch.setattr(sources, "AWA2_URL", f"{server.url}/{awa2_archive.name}")
        for part in (whole[: len(whole) // 2], b"<!DOCTYPE html><html></html>", b""):
            awa2_archive.write_bytes(part)
            with pytest.raises(DataError, match="could not be downloaded") as raised:
                _open("awa2", tmp_path / "data")
            assert "zip" in message_of(raised)
        assert list((tmp_path / "data" / "awa2").iterdir()) == []
        awa2_archive.write_bytes(whole)
        assert _open("awa2", tmp_path / "data").classes == ANIMALS


def test_nothing_is_downloaded_over_an_incomplete_awa2(
    animals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = animals / "awa2" / "Animals_with_Attributes2"
    (root / "classes.txt").unlink()
    with serving(tmp_path) as server:
        monkeypatch.setattr(sources, "AWA2_URL", f"{server.url}/AwA2-data.zip")
        with pytest.raises(DataError, match=r"has no classes\.txt") as raised:
            _open("awa2", animals)
        assert server.asked == []
    assert str(root) in message_of(raised)


def test_awa2_from_photographs_to_a_model(animals: Path, tmp_path: Path) -> None:
    options = ["--epochs", "1", "--trials", "1", "--seeds", "1", "--finalists", "1", "--tolerance", "100"]
    where = ["--dataset", "awa2", "--data-dir", animals, "--out", tmp_path / "runs", "--image-size", "16"]
    done = camri_tune("run", *where, *options, "--important", "blue+whale", "--json")
    assert done.returncode == 0, done.stderr
    result = result_of(done)
    assert result["classes"] == list(ANIMALS)
    assert result["important"] == [1]
    assert result["folds"] == 5, "a class of so few images is ranked on folds"
    assert [result["images"][part] for part in ("train", "validation", "test")] == [32, 40, 8]
    (bundle,) = (tmp_path / "runs").glob("*/best")
    figures = json.loads(camri_tune("evaluate", bundle, "--data", animals, "--json").stdout)
    assert figures["matches_stored"]
    assert figures["images"] == 8
    _photographs(animals)[0].unlink()
    assert_one_line_error(camri_tune("evaluate", bundle, "--data-dir", animals), "has changed", "restore")


# --- a finished model judged on them ----------------------------------------------------------------------------------


def test_mnist_is_found_in_another_folder(small_mnist: Path, tmp_path: Path) -> None:
    config = _config("mnist", small_mnist)
    data = open_dataset(config)
    expected = data.test()
    images, text = _judged(small_mnist.rename(tmp_path / "moved"), config, data)
    assert same(images, expected)
    assert "test part" in text


def test_cifar10_is_found_in_another_folder(small_cifar: SmallCifar, tmp_path: Path) -> None:
    config = _config("cifar10", small_cifar.data_dir)
    data = open_dataset(config)
    expected = data.test()
    images, text = _judged(small_cifar.data_dir.rename(tmp_path / "moved"), config, data)
    assert same(images, expected)
    assert "neither trained nor chose" in text


def test_the_parts_of_cifar10_in_folders_are_no_other_images(image_folder: MakeFolder) -> None:
    root = image_folder({f"cifar10/{part}/{name}": 3 for part in ("train", "test") for name in CIFAR10_CLASSES})
    config = _config("cifar10", root)
    data = open_dataset(config)
    assert same(_judged(root / "cifar10" / "test", config, data)[0], data.test())
    with pytest.raises(DataError, match="lies in what the model was trained on"):
        _judged(root / "cifar10" / "train", config, data)


def test_awa2_is_found_in_another_folder_and_refused_where_it_has_changed(animals: Path, tmp_path: Path) -> None:
    """Test is drawn from all images: with one fewer, what trained the model cannot be told from the others."""
    config = _config("awa2", animals)
    data = open_dataset(config)
    moved = shutil.copytree(animals, tmp_path / "moved")
    assert same(_judged(moved, config, data)[0], data.test())
    _photographs(moved)[5].unlink()
    with pytest.raises(DataError, match="has changed since the model was trained, so what it learned") as raised:
        _judged(moved, config, data)
    assert str(moved / "awa2") in message_of(raised)


def test_a_model_of_digits_is_judged_on_mnist_by_its_test_part(small_mnist: Path) -> None:
    config = StudyConfig(data_dir=small_mnist, image_size=8)
    images, text, *_ = open_test_images(
        "mnist", trained_on=config, fingerprint="of digits", classes=tuple("0123456789")
    )
    assert images.pixels.shape == (100, 1, 8, 8)
    assert "which is not, as it is, the data set of training" in text
