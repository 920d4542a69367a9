"""What an exported model says of image files, and that nothing in their names or bytes does more than be shown."""

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy import special

from camri_tune import predict
from camri_tune.answers import Answering, meaning
from camri_tune.bundle import Bundle, ModelSpec, read_bundle
from camri_tune.config import is_printable
from camri_tune.errors import BundleError, DataError, InputError
from camri_tune.evaluation import evaluate_bundle, images_for
from camri_tune.folders import image_files
from camri_tune.images import Images, read_image, to_grey, with_channels
from camri_tune.predict import BATCH, Predictions, lines_of
from camri_tune.records import csv_cell
from tests.command import assert_one_line_error, camri_tune
from tests.conftest import MakeFolder
from tests.exported import CLASSES, make_bundle

BIAS = {1: 1.4}  # about half of the images then go to class 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("runs") / "best", temperature=1.7, logit_bias=BIAS)


@pytest.fixture
def bundle(folder: Path) -> Bundle:
    return read_bundle(folder)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """More images than a batch holds, in folders of their own, none of the size that the model takes."""
    root = tmp_path / "photos"
    rng = np.random.default_rng(0)
    for index in range(BATCH + 9):
        path = root / ("b" if index % 5 else "a/inner") / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3), np.uint8))  # noise would all look alike
        coarse.resize((14, 11), Image.Resampling.NEAREST).save(path)
    (root / "notes.txt").write_text("no image")
    return root


def _document(bundle: Bundle, *paths: Path, **options: Any) -> dict[str, Any]:
    predictions = Predictions(bundle, paths, **options)
    document: dict[str, Any] = json.loads("\n".join(lines_of(predictions, "json")))
    return document


def _logits(bundle: Bundle, paths: list[str]) -> NDArray[np.float64]:
    """Of all files at once, with the bias."""
    pixels = np.stack([read_image(Path(path), 8) for path in paths])
    with torch.no_grad():
        logits: NDArray[np.float64] = bundle.classifier(torch.from_numpy(pixels)).double().numpy()
    return logits


# --- what is said -----------------------------------------------------------------------------------------------------


def test_every_image_of_a_folder_gets_what_the_model_says_of_it(bundle: Bundle, photos: Path) -> None:
    paths, _ = image_files(photos)
    document = _document(bundle, photos)
    images = document["images"]
    assert [image["path"] for image in images] == paths
    assert len(images) == BATCH + 9
    logits = _logits(bundle, paths)
    decided = logits.argmax(axis=1)
    assert [image["class"] for image in images] == decided.tolist()
    logits[:, 1] -= BIAS[1]
    chances = special.softmax(logits / 1.7, axis=1)
    assert np.array([image["by_class"] for image in images]) == pytest.approx(chances, abs=1e-5)
    changed = decided != chances.argmax(axis=1)
    assert changed.any(), "the bias decides"
    assert not changed.all()
    for image in images:
        assert image["probability"] == image["by_class"][image["class"]]
        assert image["is_important"] == (image["class"] == 1)
        assert image["class_name"] == CLASSES[image["class"]]
    assert (document["left_out"], document["classes"], document["important"]) == (0, list(CLASSES), [1])
    assert document["passed_over"] == 1, "the notes"


def test_paths_are_answered_in_the_order_they_are_given(bundle: Bundle, photos: Path) -> None:
    paths, _ = image_files(photos)
    asked = [Path(paths[5]), photos / "b", Path(paths[0]), Path(paths[5])]
    expected = [paths[5], *image_files(photos / "b")[0], paths[0], paths[5]]
    assert [image["path"] for image in _document(bundle, *asked)["images"]] == expected


def test_table_and_csv_say_the_same_as_json(bundle: Bundle, photos: Path) -> None:
    images = _document(bundle, photos)["images"]
    rows = list(csv.DictReader(io.StringIO("\n".join(lines_of(Predictions(bundle, [photos]), "csv")))))
    lines = list(lines_of(Predictions(bundle, [photos]), "table"))
    assert lines[0].split("  ")[-1] == "image"
    for image, row, line in zip(images, rows, lines[1:], strict=True):
        assert (row["path"], int(row["class"])) == (image["path"], image["class"])
        assert float(row["probability"]) == pytest.approx(image["probability"], abs=1e-5)
        assert float(row["probability_of_1"]) == pytest.approx(image["by_class"][1], abs=1e-5)
        assert int(row["is_important"]) == image["is_important"]
        assert line.endswith(f"  {image['path']}")
        assert f"{image['probability']:.4f}" in line
        assert ("  yes " in line) == image["is_important"]


def test_a_model_of_one_channel_sees_grey(tmp_path: Path) -> None:
    bundle = read_bundle(make_bundle(tmp_path / "best", channels=1))
    path = tmp_path / "colour.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    with Image.open(path) as image:
        grey = torch.from_numpy(np.array(image.convert("L")))[None, None]
    with torch.no_grad():
        expected = bundle.classifier(grey).softmax(dim=1)[0]
    (image,) = _document(bundle, path)["images"]
    assert image["by_class"] == pytest.approx(expected.tolist(), abs=1e-5)


def test_other_images_are_judged_grey_or_in_colour_as_the_model_takes_them(
    image_folder: MakeFolder, tmp_path: Path
) -> None:
    """As `predict` reads their files; grey arrays as it reads grey files."""
    root = image_folder({"go": 40, "stop": 30})
    grey = np.stack([np.asarray(Image.open(path).convert("L")) for path in image_files(root)[0]])
    np.savez(tmp_path / "grey.npz", images=grey, labels=[0] * 40 + [1] * 30, classes=CLASSES[:2])
    of_grey, of_rgb = (read_bundle(make_bundle(tmp_path / str(n) / "best", channels=n)) for n in (1, 3))
    for where in (root, tmp_path / "grey.npz"):
        found = images_for(of_grey, str(where), data_dir=tmp_path).images
        assert np.array_equal(found.pixels[:, 0].numpy(), grey)
        assert found.labels.tolist() == [0] * 40 + [1] * 30
    found = images_for(of_rgb, str(tmp_path / "grey.npz"), data_dir=tmp_path).images
    assert np.array_equal(found.pixels.numpy(), grey[:, None].repeat(3, axis=1))
    decided = [image["class"] for image in _document(of_grey, root)["images"]]
    figures = evaluate_bundle(tmp_path / "1" / "best", str(root), data_dir=tmp_path)
    assert figures["accuracy"] == np.mean(np.array(decided) == [0] * 40 + [1] * 30)
    with pytest.raises(InputError, match=r"has images of 3 channel\(s\), but the model takes 4: name such with --data"):
        images_for(read_bundle(make_bundle(tmp_path / "4" / "best", channels=4)), str(root), data_dir=tmp_path)


def test_grey_is_made_of_the_rows_that_are_asked_for() -> None:
    store = torch.randint(0, 256, (300, 3, 5, 5), dtype=torch.uint8)
    places = np.arange(299, 99, -1)
    some = Images(store, torch.arange(300), torch.arange(300))[places]
    grey = with_channels(some, 1)
    assert torch.equal(grey.labels, some.labels)
    assert np.array_equal(grey.pixels.numpy(), to_grey(store[places].numpy()))
    assert with_channels(grey, 3).store.untyped_storage().nbytes() == 200 * 25, "a view"


def test_numbers_without_a_temperature_are_called_scores(tmp_path: Path, photos: Path) -> None:
    bundle = read_bundle(make_bundle(tmp_path / "best"))
    document = _document(bundle, photos / "a")
    assert "no probabilities" in document["meaning"]
    assert document["temperature"] is None
    assert "probability" not in document["images"][0]
    for form in ("table", "csv"):
        head = next(iter(lines_of(Predictions(bundle, [photos / "a"]), form)))
        assert "score" in head
        assert "probability" not in head


def test_what_is_said_of_a_bias_is_that_it_decides() -> None:
    spec = ModelSpec(model="compact", channels=1, image_size=8, classes=CLASSES, head="dense", temperature=2)
    assert "need not be the likeliest" not in meaning(spec)
    biased = spec.model_copy(update={"logit_bias": BIAS})
    assert "+1.4 to the logit of 1 (stop)" in meaning(biased)
    assert "need not be the likeliest" in meaning(biased)
    assert meaning(spec.model_copy(update={"logit_bias": {1: 0.0}})) == meaning(spec), "it decides nothing"


def test_answers_are_those_of_the_plain_module_to_the_last_bit(folder: Path) -> None:
    bundle = read_bundle(folder)
    bundle.classifier.logit_bias = BIAS
    images = torch.randint(0, 256, (9, 3, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        decided, logits, _ = Answering(bundle)(images)
        assert torch.equal(logits, bundle.classifier(images))
    assert torch.equal(decided, logits.argmax(dim=1))


def test_no_more_than_a_batch_is_decoded_before_it_is_answered(
    bundle: Bundle, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []

    def read(path: Path, size: int) -> NDArray[np.uint8]:
        decoded.append(path)
        return read_image(path, size)

    monkeypatch.setattr(predict, "read_image", read)
    rows = iter(Predictions(bundle, [photos]))
    next(rows)
    assert len(decoded) == BATCH
    assert len(list(rows)) == BATCH + 8
    assert len(decoded) == BATCH + 9


# --- what cannot be read ----------------------------------------------------------------------------------------------


def test_a_corrupt_file_is_named_or_left_out_and_counted(bundle: Bundle, photos: Path) -> None:
    bad = photos / "b" / "002.png"
    bad.write_bytes(bad.read_bytes()[:60])
    (photos / "b" / "003.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"002\.png.*--skip-corrupt"):
        _document(bundle, photos)
    heard: list[DataError] = []
    document = _document(bundle, photos, on_corrupt=heard.append)
    assert document["left_out"] == 2
    assert len(document["images"]) == BATCH + 7
    assert [name in str(error) for name, error in zip(("002.png", "003.png"), heard, strict=True)] == [True, True]
    with pytest.raises(DataError, match="none of the 1 image file"):
        _document(bundle, bad, on_corrupt=heard.append)


@pytest.mark.parametrize("kind", ["missing", "empty", "pipe", "\0", "\x1b[2J"])
def test_a_path_that_is_none_of_an_image_is_refused_before_anything_is_said(
    kind: str, bundle: Bundle, photos: Path, tmp_path: Path
) -> None:
    path = tmp_path / kind
    if kind == "empty":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(InputError) as raised:
        _document(bundle, photos, path, on_corrupt=lambda _: None)
    assert is_printable(str(raised.value))


def test_arrays_are_no_image_to_mend(bundle: Bundle, tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", images=np.zeros((4, 8, 8, 3), np.uint8))
    with pytest.raises(InputError, match=r"images\.npz.* holds arrays.*evaluate takes it as --data"):
        _document(bundle, tmp_path / "images.npz")


def test_weights_that_give_no_numbers_are_refused(bundle: Bundle, photos: Path) -> None:
    with torch.no_grad():
        bundle.classifier.head.class_weights[0, 0] = torch.nan
    with pytest.raises(BundleError, match="no finite numbers"):
        _document(bundle, photos)


def test_a_model_of_other_channels_takes_no_files(tmp_path: Path, photos: Path) -> None:
    with pytest.raises(InputError, match="4 channels"):
        Predictions(read_bundle(make_bundle(tmp_path / "best", channels=4)), [photos])


# --- names from anybody -----------------------------------------------------------------------------------------------


def test_file_names_of_any_bytes_act_on_nothing(
    bundle: Bundle, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = (photos / "b" / "001.png").read_bytes()
    place = tmp_path / "odd"
    place.mkdir()
    names = [b"=HYPERLINK(1).png", b"@x.png", b"-1.png", b"\x1b]0;owned\x07.png", b'a,"b\n.png', b"\xff\xfe.png"]
    for name in names:
        (place / os.fsdecode(name)).write_bytes(good)
    monkeypatch.chdir(place)
    document = _document(bundle, *(Path(os.fsdecode(name)) for name in names))
    assert [os.fsencode(image["path"]) for image in document["images"]] == names, "lossless"
    for form in ("table", "csv", "json"):
        lines = list(lines_of(Predictions(bundle, [Path()]), form))
        assert all(map(is_printable, lines)), form
        assert len(lines) == len(names) + (2 if form == "json" else 1)
    lines = list(lines_of(Predictions(bundle, [Path(os.fsdecode(name)) for name in names]), "csv"))
    paths = [row["path"] for row in csv.DictReader(lines)]
    assert paths[:3] == ["./=HYPERLINK(1).png", "./@x.png", "./-1.png"], "the same files, and no formulas"
    assert all(os.path.exists(path) for path in paths[:3])


@settings(deadline=None)
@given(st.text(max_size=30), st.text(max_size=30))
def test_a_cell_of_any_text_is_one_cell_and_no_formula(first: str, second: str) -> None:
    cells = [csv_cell(text) for text in (first, second)]
    (row,) = csv.reader([predict._csv_line(cells)])
    assert row == cells
    assert all(is_printable(cell) and not cell.startswith(("=", "+", "-", "@")) for cell in row)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_says_nothing_but_the_document_on_standard_output(folder: Path, photos: Path) -> None:
    (photos / "b" / "007.png").write_bytes(b"")
    done = camri_tune("predict", folder, photos, "--format", "json", "--skip-corrupt")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["images"]) == BATCH + 8
    assert "007.png" in done.stderr
    assert "1 corrupt image file(s) were left out" in done.stderr
    assert "1 file(s) that are no images were passed over" in done.stderr
    assert "need not be the likeliest" in done.stderr
    done = camri_tune("predict", folder, photos / "a", photos / "b" / "007.png")
    assert_one_line_error(done, "007.png", "--skip-corrupt")
