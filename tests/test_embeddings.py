"""Embeddings in the place of images: read as they are, tuned by the head alone, and used as any other model."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor

import camri_tune
from camri_tune import arrays
from camri_tune.arrays import array_source, embeddings_in
from camri_tune.bundle import ModelSpec, read_bundle
from camri_tune.config import HEAD, StudyConfig, is_printable
from camri_tune.datasets import Dataset, open_dataset
from camri_tune.errors import DataError, InputError
from camri_tune.export import export
from camri_tune.models import Standardised
from camri_tune.predict import Predictions, lines_of
from camri_tune.sources import find_source
from tests.command import assert_one_line_error, result_of
from tests.command import camri_tune as command
from tests.exported import CLASSES, make_bundle
from tests.opening import message_of

Array = NDArray[Any]
SIZE = 5


def _embeddings(count: int = 24, size: int = SIZE, seed: int = 0) -> Array:
    """(N, D) of noise, the number of each in its first place."""
    numbers = np.random.default_rng(seed).normal(size=(count, size)).astype(np.float32)
    numbers[:, 0] = np.arange(count)
    return numbers


def _labels(count: int = 24) -> Array:
    return np.arange(count) % 3


def _save(folder: Path, **values: Array) -> Path:
    write: Any = np.savez
    write(folder / "scans.npz", **values)
    return folder / "scans.npz"


def _open(path: Path, **values: object) -> Dataset:
    return open_dataset(StudyConfig.build({"dataset": str(path), "model": HEAD, **values}))


# --- reading them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "f2", "f8"])
def test_embeddings_of_every_type_are_read_as_they_are(
    dtype: str, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "PIECE_BYTES", 200)  # in several pieces
    numbers = _embeddings().astype(dtype)
    split = np.array(
        ["train", "train", "train", "val", "val", "val", "test", "test", "test", "train", "train", "train"]
    )
    path = _save(tmp_path, embeddings=numbers, labels=_labels(), split=np.tile(split, 2))
    for attempt in ("decoded", "cached"):
        data = _open(path)
        assert (data.channels, data.image_size, data.classes) == (SIZE, 1, ("0", "1", "2")), attempt
        for part, name in ((data.train, "train"), (data.validation, "val"), (data.test(), "test")):
            rows = np.flatnonzero(np.tile(split, 2) == name)
            pixels = part.pixels
            assert (part.are_embeddings, pixels.dtype, pixels.shape) == (True, torch.float32, (len(rows), SIZE, 1, 1))
            assert np.array_equal(np.sort(pixels[:, 0, 0, 0].numpy()), rows)
            expected = numbers.astype(np.float32)[pixels[:, 0, 0, 0].long().numpy()]
            assert np.array_equal(pixels.flatten(1).numpy(), expected)
    source = find_source(StudyConfig.build({"dataset": str(path), "model": HEAD}))
    assert source.name_of("test", 0) == "embedding 6 of 'scans.npz'"
    path = _save(tmp_path, embeddings=numbers, labels=_labels(), groups=np.arange(24) // 3)
    data = _open(path)
    found = [set((part.pixels[:, 0, 0, 0].long() // 3).tolist()) for part in (data.train, data.validation, data.test())]
    assert sum(map(len, found)) == 8, "no group is in two parts"


def test_parts_may_lie_apart(tmp_path: Path, own_cache: Path) -> None:
    parts = {"train": _embeddings(seed=1), "test": _embeddings(seed=2)}
    path = _save(
        tmp_path,
        **{f"{part}_embeddings": numbers for part, numbers in parts.items()},
        **{f"{part}_labels": _labels() for part in parts},
    )
    assert np.array_equal(_open(path).test().pixels.flatten(1).numpy(), parts["test"])


GOOD = {"embeddings": _embeddings(), "labels": _labels()}
SPOILT = {name: _embeddings() for name in ("nan", "infinite")}
SPOILT["nan"][7, 3], SPOILT["infinite"][9, 1] = np.nan, -np.inf
LARGE = _embeddings().astype(np.float64)
LARGE[11, 2] = 1e300
APART = {f"{part}_{name}": values for part in ("train", "test") for name, values in GOOD.items()}
IMAGES = np.zeros((24, 8, 8), np.uint8)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({**GOOD, "embeddings": _embeddings().astype(int)}, ["embeddings is of type int64", ".astype('float32')"]),
        ({**GOOD, "embeddings": _embeddings().astype(np.complex64)}, ["is of type complex64"]),
        ({**GOOD, "embeddings": _embeddings()[:, :, None]}, ["the shape (24, 5, 1)", "(N, D)"]),
        ({**GOOD, "embeddings": _embeddings(size=1)}, ["the shape (24, 1)", "2 to 65,536"]),
        ({**GOOD, "embeddings": _embeddings(20)}, ["20 embeddings, but 24 labels"]),
        ({**GOOD, "embeddings": SPOILT["nan"]}, ["embedding 7 of 'scans.npz' holds NaN"]),
        ({**GOOD, "embeddings": SPOILT["infinite"]}, ["embedding 9 of 'scans.npz' holds NaN, infinity"]),
        ({**GOOD, "embeddings": LARGE}, ["embedding 11 of", "float32 cannot hold"]),
        ({**GOOD, "embeddings": np.array([object()] * 24)}, ["Python objects"]),
        ({**GOOD, "images": IMAGES}, ["both images and embeddings"]),
        ({"embeddings": _embeddings()}, ["no array 'labels'"]),
        ({**APART, "test_embeddings": _embeddings(size=7)}, ["embeddings of 5 numbers in one part and of 7"]),
        (
            {n: v for n, v in APART.items() if n != "test_embeddings"} | {"test_images": IMAGES},
            ["images in one part and embeddings in another"],
        ),
    ],
)
def test_embeddings_that_do_not_fit_get_one_line(
    values: dict[str, Array], parts: list[str], tmp_path: Path, own_cache: Path
) -> None:
    path = _save(tmp_path, **values)
    with pytest.raises(DataError) as raised:
        _open(path)
    for part in parts:
        assert part in message_of(raised)
    assert not list(own_cache.rglob("*.partial"))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_damaged_file_is_read_as_it_was_or_refused(changes: list[tuple[float, int]], tmp_path: Path) -> None:
    path = _save(tmp_path, **GOOD)
    content = bytearray(path.read_bytes())
    for place, value in changes:
        content[int(place * (len(content) - 1))] = value
    path.write_bytes(content)
    refusals = []
    for read in (_training_part, embeddings_in):
        try:
            found = torch.cat(list(read(path)))
        except InputError as error:
            refusals.append(str(error))
        else:
            assert np.array_equal(found.flatten(1).numpy(), GOOD["embeddings"]), "for its checksum says so"
    assert all(map(is_printable, refusals))


def _training_part(path: Path) -> Iterator[Tensor]:
    return iter(array_source(path).packed["train"].pieces().pixels)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"model": "compact"}, "has embeddings, but --model compact takes images; give --model head"),
        ({"dataset": "digits"}, "--model head is for embeddings .* 'digits' has images"),
        ({"weights": "a.pt"}, "--weights .* left out with --model head"),
        ({"trainable": "head"}, "--trainable .* left out with --model head"),
        ({"image_size": 32}, "--image-size .* left out with --model head"),
        ({"augmentation": 0.5}, "--augmentation .* left out with --model head"),
        ({"backbone_lr": 0.1}, "--backbone-lr .* left out with --model head"),
    ],
)
def test_a_network_and_a_data_set_that_do_not_go_together(
    values: dict[str, object], reason: str, tmp_path: Path, own_cache: Path
) -> None:
    with pytest.raises(InputError, match=reason):
        find_source(StudyConfig.build({"dataset": str(_save(tmp_path, **GOOD)), "model": HEAD, **values}))


def test_a_rate_for_a_network_that_does_not_learn_is_refused() -> None:
    with pytest.raises(InputError, match=r"--backbone-lr .* left out with --trainable head"):
        StudyConfig.build({"trainable": "head", "backbone_lr": "0.01..1 log"})
    StudyConfig.build({"trainable": "last:1", "backbone_lr": "0.01..1 log"})
    StudyConfig.build({"trainable": "head", "backbone_lr": 1})


# --- the model of them ------------------------------------------------------------------------------------------------


def test_each_number_is_centred_and_scaled_over_all_of_training() -> None:
    """By the mean over batches, whatever the scale that a network has its numbers in; a constant stays finite."""
    numbers = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1e3, 0]) + 5
    body = Standardised(3, 1).train()
    for batch in numbers.view(4, 16, 3):
        body(batch)
    found = body.eval()(numbers)
    assert found.mean(dim=0).abs().max() < 1e-2
    assert found.std(dim=0)[:2] == pytest.approx(torch.ones(2), abs=0.1)
    assert torch.equal(found, body(numbers[:, :, None, None]))
    assert found.isfinite().all()


@pytest.mark.parametrize("constant", [0.0, 0.3, 0.7, 2.2, 5.0, -3e4])
@pytest.mark.parametrize("batch", [21, 128, 1024])
def test_a_number_that_never_varied_in_training_decides_nothing(constant: float, batch: int) -> None:
    """As one of a sparse embedding: by its own deviation of nothing, any value would outweigh all others.

    Its variance is nothing but rounding, which grows with the batch.
    """
    numbers = torch.randn(3 * batch, 3, generator=torch.Generator().manual_seed(0))
    numbers[:, 1] = constant
    body = Standardised(3, 1).train()
    for some in numbers.view(3, batch, 3):
        assert body(some)[:, 1].abs().max() < 0.1
    found = body.eval()(numbers)
    changed = numbers.clone()
    changed[:, 1] += 2.0
    assert torch.equal(body(changed), found)
    assert not found[:, 1].any()
    assert found[:, 0].any()


@pytest.mark.parametrize(
    ("model", "channels", "side"),
    [(HEAD, 16, 8), ("compact", 3, 1), ("compact", 65, 8), (HEAD, 0, 1), (HEAD, 2**16 + 1, 1)],
)
def test_a_file_that_says_it_is_of_both_is_refused(model: str, channels: int, side: int) -> None:
    with pytest.raises(ValueError, match=r"image_size|channels"):
        ModelSpec(model=model, channels=channels, image_size=side, classes=("a", "b"), head="cosine", scale=8.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    return make_bundle(out / "best", model=HEAD, channels=SIZE, temperature=1.7, logit_bias={1: 1.4})


def test_predictions_go_by_file_and_row(folder: Path, tmp_path: Path) -> None:
    """Labels are not needed: what is to be predicted has none."""
    one, two = tmp_path / "one.npz", tmp_path / "two.npz"
    np.savez(one, embeddings=_embeddings(300))
    np.savez_compressed(two, embeddings=_embeddings(2, seed=1).astype(np.float64))
    bundle = read_bundle(folder)
    document = json.loads("\n".join(lines_of(Predictions(bundle, [one, two]), "json")))
    assert [row["path"] for row in document["images"]] == [
        *(f"{one}[{n}]" for n in range(300)),
        *(f"{two}[{n}]" for n in range(2)),
    ]
    everything = torch.from_numpy(np.concatenate([_embeddings(300), _embeddings(2, seed=1)]))
    with torch.no_grad():
        logits = camri_tune.load(folder)(everything)
    assert [row["class"] for row in document["images"]] == logits.argmax(dim=1).tolist()
    logits[:, 1] -= 1.4
    chances = np.array([row["by_class"] for row in document["images"]])
    assert chances == pytest.approx((logits / 1.7).softmax(dim=1).numpy(), abs=1e-5)
    rows = list(csv.DictReader(io.StringIO("\n".join(lines_of(Predictions(bundle, [one]), "csv")))))
    assert [row["path"] for row in rows] == [f"{one}[{n}]" for n in range(300)]


def test_what_is_no_file_of_such_embeddings_gets_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    np.savez(tmp_path / "images.npz", images=IMAGES)
    np.savez(tmp_path / "others.npz", embeddings=_embeddings(size=6))
    (tmp_path / "torn.npz").write_bytes((tmp_path / "others.npz").read_bytes()[:100])
    for name, parts in {
        "a.png": ["no .npz file", "embeddings=…"],
        "absent.npz": ["no .npz file"],
        "": ["no .npz file"],
        "images.npz": ["no array 'embeddings'"],
        "others.npz": ["embeddings of 6 numbers", "takes 5", "another network"],
        "torn.npz": ["torn.npz"],
    }.items():
        assert_one_line_error(command("predict", folder, tmp_path / name), *parts)
    assert_one_line_error(command("evaluate", folder, "--data", _save(tmp_path, images=IMAGES, labels=_labels())), HEAD)
    others = _save(tmp_path, embeddings=_embeddings(size=6), labels=np.array(CLASSES)[_labels()])
    assert_one_line_error(command("evaluate", folder, "--data", others), "embeddings of 6 numbers", "takes 5")


@pytest.mark.parametrize("form", ["onnx", "torchscript", "torch-export"])
def test_other_formats_take_embeddings(form: Any, folder: Path, tmp_path: Path) -> None:
    data = _save(tmp_path, embeddings=_embeddings(), labels=np.array(CLASSES)[_labels()])
    done = export(
        str(folder), form, to=tmp_path / "model", data=str(data), out=tmp_path, storage=None, data_dir=tmp_path
    )
    assert done.parity is not None
    assert (done.parity.real, done.parity.max_difference_of_logits < 1e-4) == (True, True)
    note = json.loads(Path(f"{done.path}.json").read_text())
    assert {key: note["input"][key] for key in ("name", "type", "shape")} == {
        "name": "embeddings",
        "type": "float32",
        "shape": ["batch", SIZE],
    }
    assert "resize" not in note["input"]
    if form == "onnx":
        session = onnxruntime.InferenceSession(str(done.path), providers=["CPUExecutionProvider"])
        decided, logits, _ = session.run(None, {"embeddings": _embeddings()})
        with torch.no_grad():
            expected = camri_tune.load(folder)(torch.from_numpy(_embeddings())).numpy()
        assert logits == pytest.approx(expected, abs=1e-4)
        assert np.array_equal(decided, expected.argmax(axis=1))


# --- from embeddings to a model, as a user does it --------------------------------------------------------------------


def test_from_embeddings_to_a_model(tmp_path: Path) -> None:
    digits = load_digits()
    data = _save(tmp_path, embeddings=digits.data.astype(np.float32) * 100 - 3, labels=digits.target)
    options = ["--dataset", data, "--important", "8", "--out", tmp_path / "runs", "--epochs", "8", "--trials", "3"]
    options += ["--seeds", "2", "--finalists", "1", "--tolerance", "100"]
    assert_one_line_error(command("run", *options, "--quiet"), "has embeddings", "--model head")
    done = command("run", *options, "--model", HEAD, "--json")
    assert done.returncode == 0, done.stderr
    result = result_of(done)
    assert sum(result["images"][part] for part in ("train", "validation", "test")) == len(digits.data)
    assert result["baseline"]["test"]["accuracy"]["mean"] > 0.9
    study = tmp_path / "runs" / "scans-camri-8"
    card = (study / "best" / "README.md").read_text()
    assert "embeddings of 64 numbers" in card
    assert "float32 (N, 64)" in card
    assert "images of" not in card

    again = json.loads(command("evaluate", study / "best", "--json").stdout)
    assert again["matches_stored"]
    unseen = tmp_path / "unseen.npz"
    np.savez(unseen, embeddings=digits.data[:50].astype(np.float32) * 100 - 3)
    rows = list(csv.DictReader(io.StringIO(command("predict", study / "best", unseen, "--format", "csv").stdout)))
    assert np.mean([row["class_name"] == str(label) for row, label in zip(rows, digits.target, strict=False)]) > 0.9
    exported = command("export", study / "best", "--format", "onnx")
    assert exported.returncode == 0, exported.stderr
    assert "<img" not in (study / "report.html").read_text()
