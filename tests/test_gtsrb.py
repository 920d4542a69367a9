"""German traffic signs: the real ones, small ones in the real layout, and a download of them."""

import csv
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets.gtsrb as torchvision_gtsrb
from PIL import Image

from camri_tune.config import StudyConfig
from camri_tune.datasets import Dataset, open_dataset, open_test_images
from camri_tune.errors import DataError
from camri_tune.sources import GTSRB_CLASSES
from camri_tune.training import HeadSpec, Recipe, train
from tests.loopback import Server, refusing_url, serving
from tests.opening import build_config, message_of, open_data, read_rgb, same

# --- real traffic signs -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def signs(gtsrb_dir: Path) -> Dataset:
    return open_dataset(StudyConfig.build({"dataset": "gtsrb", "data_dir": gtsrb_dir}))


def test_gtsrb_has_all_its_images_classes_and_tracks(signs: Dataset, gtsrb_dir: Path) -> None:
    listed = list((gtsrb_dir / "gtsrb" / "GTSRB" / "Training").glob("*/*.ppm"))
    assert len(signs.train) + len(signs.validation) == len(listed) == 39_209
    assert len(signs.test()) == 12_630
    assert signs.classes == GTSRB_CLASSES
    assert len(set(GTSRB_CLASSES)) == 43
    assert (signs.channels, signs.image_size, signs.grouped) == (3, 32, True)
    assert signs.hidden_group_size == 30
    assert not (torch.bincount(signs.test().labels) % 30).any(), (
        "each class a number of whole tracks, which nobody names"
    )
    assert len(torch.unique(signs.test().groups)) == 12_630

    groups = torch.cat([signs.train.groups, signs.validation.groups])
    labels = torch.cat([signs.train.labels, signs.validation.labels])
    tracks = {(path.parent.name, path.name.split("_")[0]) for path in listed}
    assert len(torch.unique(groups)) == len(tracks) == 1_307
    pairs = set(zip(groups.tolist(), labels.tolist(), strict=True))
    assert len(pairs) == 1_307, "one class in a track"
    assert set(torch.bincount(groups).tolist()) == {29, 30}
    assert torch.bincount(labels).tolist() == [sum(int(p.parent.name) == c for p in listed) for c in range(43)]
    assert not set(signs.train.groups.tolist()) & set(signs.validation.groups.tolist())


@pytest.mark.parametrize("name", ["00000/00000_00000", "00014/00003_00012", "00025/00010_00029", "00042/00001_00005"])
def test_gtsrb_training_labels_are_those_of_the_folders(name: str, signs: Dataset, gtsrb_dir: Path) -> None:
    wanted = read_rgb(gtsrb_dir / "gtsrb" / "GTSRB" / "Training" / f"{name}.ppm").transpose(2, 0, 1).copy()
    found = []
    for images in (signs.train, signs.validation):
        rows = (images.pixels == torch.from_numpy(wanted)).flatten(1).all(dim=1)
        found += images.labels[rows].tolist()
    assert found == [int(name.split("/", maxsplit=1)[0])]


def test_gtsrb_test_labels_are_those_of_the_official_file(signs: Dataset, gtsrb_dir: Path) -> None:
    with (gtsrb_dir / "gtsrb" / "GT-final_test.csv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter=";"))
    test = signs.test()
    assert test.labels.tolist() == [int(row["ClassId"]) for row in rows]
    for index in (0, 1, 6_000, 12_629):
        path = gtsrb_dir / "gtsrb" / "GTSRB" / "Final_Test" / "Images" / rows[index]["Filename"]
        assert np.array_equal(test.pixels[index].numpy(), read_rgb(path).transpose(2, 0, 1))
    # Two that were looked at: the first is "no trucks", the second "speed limit 30".
    assert [GTSRB_CLASSES[label] for label in test.labels[:2]] == ["No trucks", "Speed limit 30"]


def test_a_limit_takes_whole_tracks_of_training_and_leaves_the_other_parts_whole(
    signs: Dataset, gtsrb_dir: Path
) -> None:
    limited = open_dataset(StudyConfig.build({"dataset": "gtsrb", "data_dir": gtsrb_dir, "limit": 3000}))
    assert 3000 - 30 < len(limited.train) <= 3000
    assert set(limited.train.labels.tolist()) == set(range(43))
    of_all, of_limited = (torch.bincount(images.groups, minlength=1_307) for images in (signs.train, limited.train))
    assert bool((of_limited[of_limited > 0] == of_all[of_limited > 0]).all()), "whole tracks"
    shares = [torch.bincount(i.labels, minlength=43) / len(i) for i in (signs.train, limited.train)]
    assert float((shares[0] - shares[1]).abs().max()) < 0.015, "one track is 1 %"
    assert same(limited.validation, signs.validation)
    assert same(limited.test(), signs.test())
    with pytest.raises(DataError, match=r"--limit 1000 is too few: .* 43 classes .*give at least 1289$") as raised:
        open_dataset(StudyConfig.build({"dataset": "gtsrb", "data_dir": gtsrb_dir, "limit": 1000}))
    assert message_of(raised)


# --- traffic signs that come over the network -------------------------------------------------------------------------


def _write_small_gtsrb(root: Path) -> None:
    """The real layout in small: 43 classes of 3 tracks of 2 frames, of sizes and ratios as photographed, one test
    image of each class in mixed order, and the files that the real archives hold besides."""
    rng = np.random.default_rng(0)

    def sign(path: Path, label: int) -> None:
        pixels = rng.integers(0, 60, (24, 20, 3)) + np.array([label * 4, 190 - label * 4, label % 7 * 27])
        Image.fromarray(pixels.astype(np.uint8)).save(path)

    training, testing = root / "GTSRB" / "Training", root / "GTSRB" / "Final_Test" / "Images"
    testing.mkdir(parents=True)
    for label in range(43):
        folder = training / f"{label:05}"
        folder.mkdir(parents=True)
        (folder / f"GT-{label:05}.csv").write_text("Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n")
        for track in range(3):
            for frame in range(2):
                sign(folder / f"{track:05}_{frame:05}.ppm", label)
    (root / "GTSRB" / "Readme.txt").write_text("German Traffic Sign Recognition Benchmark\n")
    rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for index, label in enumerate(rng.permutation(43).tolist()):
        sign(testing / f"{index:05}.ppm", label)
        rows.append(f"{index:05}.ppm;20;24;5;5;15;19;{label}")
    unlabelled = [row.rpartition(";")[0] for row in rows]
    (testing / "GT-final_test.test.csv").write_text("\n".join(unlabelled) + "\n")
    (root / "GT-final_test.csv").write_text("\n".join(rows) + "\n")


@pytest.fixture(scope="module")
def small_gtsrb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a small `gtsrb/`. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("small")
    _write_small_gtsrb(folder / "gtsrb")
    return folder


@pytest.fixture
def archives(small_gtsrb: Path, tmp_path: Path) -> Iterator[Server]:
    """A web server on the loopback with three archives, as the university has them."""
    folder, source = tmp_path / "archives", small_gtsrb / "gtsrb"
    folder.mkdir()
    for name, beginning in {
        "GTSRB-Training_fixed.zip": "GTSRB/Training",
        "GTSRB_Final_Test_Images.zip": "GTSRB/Final_Test",
        "GTSRB_Final_Test_GT.zip": "GT-final_test.csv",
    }.items():
        with zipfile.ZipFile(folder / name, "w") as archive:
            for path in sorted(source.rglob("*")):
                relative = path.relative_to(source).as_posix()
                if path.is_file() and relative.startswith(beginning):
                    archive.write(path, relative)
    with serving(folder) as server:
        yield server


def _route_downloads(monkeypatch: pytest.MonkeyPatch, base: str) -> None:
    """Torchvision's own download, from another address; our archives have other sums than the real ones."""
    real = torchvision_gtsrb.download_and_extract_archive

    def routed(url: str, download_root: str, md5: str) -> None:
        assert len(md5) == 32, "what comes from outside is checked"
        real(f"{base}/{url.rpartition('/')[2]}", download_root)

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(torchvision_gtsrb, "download_and_extract_archive", routed)


def test_gtsrb_is_downloaded_where_it_is_not_there(
    archives: Server, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _route_downloads(monkeypatch, archives.url)
    values = {"dataset": "gtsrb", "data_dir": tmp_path / "data", "image_size": None}
    data = open_data(**values)
    assert archives.files_asked == {
        "GTSRB-Training_fixed.zip",
        "GTSRB_Final_Test_Images.zip",
        "GTSRB_Final_Test_GT.zip",
    }
    assert len(data.train) + len(data.validation) == 43 * 6
    assert len(torch.unique(torch.cat([data.train.groups, data.validation.groups]))) == 43 * 3
    test = data.test()
    assert sorted(test.labels.tolist()) == list(range(43))
    trained = train(
        "compact",
        HeadSpec("camri", margins={14: 0.2}),
        data.train,
        data.validation,
        num_classes=43,
        recipe=Recipe(epochs=1, learning_rate=1e-3, augmentation=data.augmentation),
        seed=0,
        device=torch.device("cpu"),
    )
    assert trained.confusion.sum() == len(data.validation)

    archives.asked.clear()
    assert open_data(**values).fingerprint == data.fingerprint
    assert archives.asked == [], "downloaded once"


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("interrupted", ["GTSRB-Training_fixed.zip", "GTSRB_Final_Test_Images.zip"])
def test_what_an_interrupted_download_left_is_not_taken_for_the_whole(
    interrupted: str, archives: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the last image is unpacked: all folders are there, and one of them is not complete."""
    _route_downloads(monkeypatch, archives.url)
    whole = torchvision_gtsrb.download_and_extract_archive

    def stopped(url: str, download_root: str, md5: str) -> None:
        whole(url, download_root, md5)
        if url.endswith(interrupted):
            max(Path(download_root).rglob("*.ppm")).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torchvision_gtsrb, "download_and_extract_archive", stopped)
        with pytest.raises(KeyboardInterrupt):
            open_data("gtsrb", data_dir=tmp_path)
    archives.asked.clear()
    data = open_data("gtsrb", data_dir=tmp_path)
    assert len(data.train) + len(data.validation) == 43 * 6
    assert len(data.test()) == 43
    assert ("GTSRB-Training_fixed.zip" in archives.files_asked) == ("Training" in interrupted), "no part comes twice"
    assert sorted(path.name for path in (tmp_path / "gtsrb").iterdir()) == ["GT-final_test.csv", "GTSRB"]


@pytest.mark.usefixtures("own_cache")
def test_test_images_without_their_list_are_completed(
    archives: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an earlier version's download left them that was interrupted between the two."""
    _route_downloads(monkeypatch, archives.url)
    open_data("gtsrb", data_dir=tmp_path)
    images = tmp_path / "gtsrb" / "GTSRB" / "Final_Test" / "Images"
    mine = max(images.iterdir())
    written = mine.stat().st_mtime_ns
    (tmp_path / "gtsrb" / "GT-final_test.csv").unlink()
    assert len(open_data("gtsrb", data_dir=tmp_path).test()) == 43
    assert mine.stat().st_mtime_ns == written, "what is there stays"


def test_without_data_and_network_the_folders_to_fill_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _route_downloads(monkeypatch, refusing_url())
    with pytest.raises(DataError) as raised:
        open_data("gtsrb", data_dir=tmp_path / "data")
    base = tmp_path / "data" / "gtsrb"
    for part in (
        "could not be downloaded",
        f"{base}/GTSRB/Training/",
        f"{base}/GTSRB/Final_Test/Images/",
        f"{base}/GT-final_test.csv",
        "--data-dir",
    ):
        assert part in message_of(raised)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test of incomplete data may reach the real server."""
    _route_downloads(monkeypatch, refusing_url())


def _copy(small_gtsrb: Path, tmp_path: Path) -> Path:
    return shutil.copytree(small_gtsrb, tmp_path / "copy")


@pytest.mark.usefixtures("offline", "own_cache")
def test_gtsrb_without_its_test_labels_names_the_file(small_gtsrb: Path, tmp_path: Path) -> None:
    data_dir = _copy(small_gtsrb, tmp_path)
    (data_dir / "gtsrb" / "GT-final_test.csv").unlink()
    with pytest.raises(DataError, match=r"GT-final_test\.csv") as raised:
        open_data("gtsrb", data_dir=data_dir)
    assert message_of(raised)


@pytest.mark.usefixtures("offline", "own_cache")
def test_gtsrb_with_the_unlabelled_list_in_place_of_the_labels_names_the_file(
    small_gtsrb: Path, tmp_path: Path
) -> None:
    """The image archive holds a list without labels of nearly the same name; it is easily taken for the other."""
    data_dir = _copy(small_gtsrb, tmp_path)
    base = data_dir / "gtsrb"
    shutil.copy(base / "GTSRB" / "Final_Test" / "Images" / "GT-final_test.test.csv", base / "GT-final_test.csv")
    with pytest.raises(DataError, match=r"GT-final_test\.csv") as raised:
        open_data("gtsrb", data_dir=data_dir)
    assert message_of(raised)


@pytest.mark.usefixtures("offline", "own_cache")
def test_gtsrb_with_a_test_image_missing_names_it(small_gtsrb: Path, tmp_path: Path) -> None:
    data_dir = _copy(small_gtsrb, tmp_path)
    (data_dir / "gtsrb" / "GTSRB" / "Final_Test" / "Images" / "00007.ppm").unlink()
    with pytest.raises(DataError, match=r"00007\.ppm") as raised:
        open_data("gtsrb", data_dir=data_dir)
    assert message_of(raised)


@pytest.mark.usefixtures("offline", "own_cache")
def test_gtsrb_with_a_class_folder_missing_names_that_class(small_gtsrb: Path, tmp_path: Path) -> None:
    """Labels counted from the folders that are there would give every later class the label before its own."""
    data_dir = _copy(small_gtsrb, tmp_path)
    shutil.rmtree(data_dir / "gtsrb" / "GTSRB" / "Training" / "00014")
    with pytest.raises(DataError, match=r"Stop|00014") as raised:
        open_data("gtsrb", data_dir=data_dir)
    assert message_of(raised)


@pytest.mark.usefixtures("own_cache")
def test_gtsrb_is_found_in_another_folder(small_gtsrb: Path, tmp_path: Path) -> None:
    config = build_config("gtsrb", data_dir=small_gtsrb)
    data = open_dataset(config)
    moved = _copy(small_gtsrb, tmp_path)
    images, text, hidden_group_size, own = open_test_images(
        str(moved), trained_on=config, fingerprint=data.fingerprint, classes=data.classes
    )
    assert same(images, data.test())
    assert (hidden_group_size, own) == (30, True)
    assert "test part" in text
