"""Other formats hold the model that the bundle holds, say what goes in and comes out, and overwrite nobody's files."""

import importlib.util
import json
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

import camri_tune
from camri_tune import export as exporting
from camri_tune.answers import Answering
from camri_tune.bundle import read_bundle
from camri_tune.config import StudyConfig
from camri_tune.errors import BundleError, CamriTuneError, DataError, InputError
from camri_tune.evidence import Evidence
from camri_tune.export import BATCH, MOST_COMPARED, RESIZE, Exported, Format, _FixedMaxPool, export, withdraw
from camri_tune.files import sha256
from camri_tune.images import read_image
from camri_tune.sources import find_source
from tests.conftest import MakeFolder
from tests.exported import CLASSES, make_bundle

BIAS, TEMPERATURE = {1: 1.4}, 1.7


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "best", temperature=TEMPERATURE, logit_bias=BIAS)


def _export(what: Path, form: Format, **options: Any) -> Exported:
    usual: dict[str, Any] = {"to": None, "data": None, "out": what.parent, "storage": None, "data_dir": what.parent}
    return export(str(what), form, **{**usual, **options})


def _run(path: Path, form: Format, images: Tensor) -> list[Tensor]:
    """The answers of a file, by nothing but its runtime."""
    if form == "onnx":
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return [torch.from_numpy(a) for a in session.run(None, {"images": images.numpy()})]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is deprecated
        if form == "torchscript":
            return list(torch.jit.load(str(path))(images))  # type: ignore[no-untyped-call]
        return list(torch.export.load(path).module()(images))


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "side"), [("onnx", 40), ("torchscript", 8), ("torch-export", 9)])
def test_a_file_answers_as_the_plain_module_does(form: Format, side: int, tmp_path: Path) -> None:
    """At side 40 the last pool's windows differ, which ONNX has no operator for."""
    folder = make_bundle(tmp_path / "best", side=side, temperature=TEMPERATURE, logit_bias=BIAS)
    done = _export(folder, form)
    assert done.path == tmp_path / f"best{exporting.SUFFIXES[form]}"
    model = camri_tune.load(folder)
    for count in (1, 2, 7):
        images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)
        decided, logits, probabilities = _run(done.path, form, images)
        with torch.no_grad():
            expected = model(images)
        assert torch.allclose(logits, expected, atol=1e-4)
        assert torch.equal(decided, logits.argmax(dim=1))
        expected[:, 1] -= BIAS[1]
        assert torch.allclose(probabilities, (expected / TEMPERATURE).softmax(dim=1), atol=1e-5)
    parity = done.parity
    assert parity is not None
    assert parity.max_difference_of_logits < 1e-4
    assert parity.batch_sizes[0] == 1
    assert parity.batch_sizes[-1] == BATCH
    assert not parity.real
    assert "made-up" in str(parity)
    assert "--data" in str(parity)
    note = json.loads(Path(f"{done.path}.json").read_text())
    assert note["sha256"] == sha256(done.path)
    assert note["weights_sha256"] == sha256(folder / "model.safetensors")
    assert note["input"]["shape"] == ["batch", 3, side, side]
    assert note["input"]["resize"] == RESIZE
    assert [*note["outputs"]] == ["class_index", "logits", "probabilities"]
    assert (note["classes"], note["important"], note["temperature"]) == ([*CLASSES], [1], TEMPERATURE)
    assert note["parity"]["max_difference_of_logits"] == parity.max_difference_of_logits
    assert {p.name for p in tmp_path.iterdir()} == {"best", done.path.name, f"{done.path.name}.json"}
    if form == "onnx":
        session = onnxruntime.InferenceSession(str(done.path), providers=["CPUExecutionProvider"])
        assert [i.name for i in session.get_inputs()] == ["images"]
        assert b".py" not in done.path.read_bytes(), "nor where the code lies"
        assert [o.name for o in session.get_outputs()] == [*note["outputs"]]


def test_the_resize_is_described_as_it_is_done(tmp_path: Path) -> None:
    path = tmp_path / "wide.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (31, 57, 3), np.uint8)).save(path)
    assert "Image.resize((side, side), Image.Resampling.BILINEAR)" in RESIZE
    with Image.open(path) as image:
        done = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.array_equal(done, read_image(path, 16))


@settings(deadline=None)
@given(st.integers(4, 40), st.integers(1, 7), st.integers(0, 10**6))
def test_fixed_windows_are_those_of_adaptive_pooling(side: int, size: int, seed: int) -> None:
    maps = torch.randn((2, 3, side, side + 3), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(_FixedMaxPool(size)(maps), nn.AdaptiveMaxPool2d(size)(maps))


def test_scores_are_called_scores(tmp_path: Path) -> None:
    done = _export(make_bundle(tmp_path / "best"), "torchscript")
    note = json.loads(Path(f"{done.path}.json").read_text())
    assert [*note["outputs"]] == ["class_index", "logits", "scores"]
    assert note["temperature"] is None


def test_the_docstring_of_load_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import doctest  # noqa: PLC0415

    make_bundle(tmp_path / "runs/digits-camri-worst1/best", channels=1, classes=[str(c) for c in range(10)])
    monkeypatch.chdir(tmp_path)
    (example,) = doctest.DocTestFinder().find(camri_tune.load, "load")
    assert len(example.examples) == 4
    assert doctest.DocTestRunner().run(example).failed == 0
    model = camri_tune.load("runs/digits-camri-worst1/best")
    assert isinstance(model, nn.Module)
    assert not model.training


# --- what it is compared on -------------------------------------------------------------------------------------------


def test_real_images_are_compared_where_there_are_any(tmp_path: Path, image_folder: MakeFolder) -> None:
    folder = make_bundle(tmp_path / "best", classes=("cat", "dog"))
    photos = image_folder({"cat": 5, "dog": 4})
    parity = _export(folder, "torchscript", data=str(photos)).parity
    assert parity is not None
    assert (parity.images, parity.real) == (9, True)
    assert str(photos) in parity.data
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 3, 8, 8)).astype(np.uint8)
    angle = np.zeros((2, 4), np.float32)
    Evidence(np.zeros(4, np.int64), np.zeros((2, 4), np.int64), angle, angle, np.arange(3), pixels).save(
        tmp_path / "evidence.safetensors"
    )
    parity = _export(folder, "torchscript").parity
    assert parity is not None
    assert (parity.images, parity.real) == (3, True)
    assert "report" in parity.data


def test_the_studys_own_test_part_is_taken_where_it_is_here(tmp_path: Path) -> None:
    source = find_source(StudyConfig(image_size=8))
    digits = make_bundle(
        tmp_path / "best", channels=1, classes=source.classes, dataset="digits", fingerprint=source.fingerprint()
    )
    parity = _export(digits, "torchscript").parity
    assert parity is not None
    assert parity.real
    assert 300 < parity.images <= MOST_COMPARED
    assert "test part of digits" in parity.data


def test_images_that_are_named_and_not_there_are_an_error(folder: Path, tmp_path: Path) -> None:
    before = _files(tmp_path)
    for data in ("nowhere", "", str(tmp_path / "none")):
        with pytest.raises((DataError, InputError)):
            _export(folder, "torchscript", data=data)
    assert _files(tmp_path) == before


# --- a model that answers otherwise -----------------------------------------------------------------------------------


class _Spoilt(Answering):
    """What a faulty exporter could leave of a model."""

    fault = ""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        decided, logits, numbers = super().forward(images)
        if self.fault == "class":
            decided = logits.argmin(dim=1)
        elif self.fault == "probabilities":
            numbers = logits.softmax(dim=1)
        elif self.fault == "noise":
            logits = logits + 1e-6
        else:
            logits = logits + float(self.fault)
        return decided, logits, numbers


@pytest.mark.parametrize("fault", ["class", "probabilities", "0.05", "nan", "inf", "noise"])
def test_a_model_that_answers_otherwise_is_not_written(
    fault: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(answering: Answering, path: Path, outputs: list[str]) -> tuple[str, Callable[[Tensor], Any]]:
        other = _Spoilt(read_bundle(folder))
        other.fault = fault
        return exporting._write_torchscript(other, path, outputs)

    monkeypatch.setitem(exporting._WRITERS, "torchscript", spoil)
    if fault == "noise":
        assert _export(folder, "torchscript").path.exists()
        return
    before = _files(tmp_path)
    with pytest.raises(CamriTuneError, match="answers otherwise") as raised:
        _export(folder, "torchscript")
    assert raised.value.exit_code == 1
    assert "\n" not in str(raised.value)
    assert _files(tmp_path) == before


def test_a_model_that_gives_no_numbers_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_bundle(tmp_path / "best")
    bundle = read_bundle(folder)
    with torch.no_grad():
        bundle.classifier.head.class_weights[0, 0] = torch.nan
    monkeypatch.setattr(exporting, "read_bundle", lambda _: bundle)
    with pytest.raises(CamriTuneError, match="answers otherwise"):
        _export(folder, "torchscript")


def test_what_onnx_lacks_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_bundle(tmp_path / "best", side=40)
    monkeypatch.setattr(exporting, "_with_fixed_windows", lambda answering: answering)
    before = _files(tmp_path)
    with pytest.raises(CamriTuneError, match="cannot be written as onnx") as raised:
        _export(folder, "onnx")
    assert "\n" not in str(raised.value)
    assert _files(tmp_path) == before


def test_missing_packages_are_named_with_the_way_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else real(name))
    with pytest.raises(InputError, match=r"onnxruntime.*pip install 'camri-tune\[onnx\]'"):
        _export(folder, "onnx")


# --- what is in the way -----------------------------------------------------------------------------------------------


def test_a_file_of_ours_is_replaced(folder: Path, tmp_path: Path) -> None:
    to = tmp_path / "models" / "m.pt"
    assert _export(folder, "torchscript", to=to).path == to
    assert _export(folder, "torchscript", to=to).path == to
    assert sorted(p.name for p in to.parent.iterdir()) == ["m.pt", "m.pt.json"]
    assert to.stat().st_mode & 0o444 == 0o444


@pytest.mark.parametrize("kind", ["file", "altered", "folder", "pipe", "note", "deep", "link"])
def test_what_is_not_ours_is_not_replaced(kind: str, folder: Path, tmp_path: Path) -> None:
    to, note = tmp_path / "m.pt", tmp_path / "m.pt.json"
    if kind == "file":
        to.write_text("mine")
    elif kind == "altered":
        _export(folder, "torchscript", to=to)
        to.write_bytes(to.read_bytes() + b"more")
    elif kind == "folder":
        to.mkdir()
    elif kind == "pipe":
        os.mkfifo(to)
    elif kind == "note":
        note.write_text('{"name": "m"}')
    elif kind == "deep":
        note.write_text("[" * 10**5)
    else:
        (tmp_path / "mine").write_text("mine")
        to.symlink_to("mine")
    before = _files(tmp_path)
    with pytest.raises(InputError, match="in the way") as raised:
        _export(folder, "torchscript", to=to)
    assert "--to" in str(raised.value)
    assert _files(tmp_path) == before


def test_what_is_of_another_model_than_best_is_so_no_more(folder: Path, tmp_path: Path) -> None:
    bundle = read_bundle(folder).config
    _export(folder, "torchscript")
    (tmp_path / "best.onnx").write_text("mine")
    before = _files(tmp_path)
    withdraw(tmp_path, bundle.spec, bundle.weights_sha256)
    assert _files(tmp_path) == before
    other = bundle.spec.model_copy(update={"logit_bias": {1: 1.5}})
    withdraw(tmp_path, other, bundle.weights_sha256)
    left = {p.name for p in tmp_path.iterdir()}
    assert {"best", "best.onnx"} < left
    assert {re.sub(r"\d+", "0", name) for name in left - {"best", "best.onnx"} if not name.startswith("weights")} == {
        "withdrawn-0-best.pt", "withdrawn-0-best.pt.json",
    }  # fmt: skip
    _export(folder, "torchscript")
    withdraw(tmp_path, None, None)
    assert not (tmp_path / "best.pt").exists()


# --- bundles ----------------------------------------------------------------------------------------------------------


def test_a_bundle_is_copied_whole_and_only_if_it_verifies(folder: Path, tmp_path: Path) -> None:
    to = tmp_path / "copies" / "one"
    assert _export(folder, "bundle", to=to).path == to
    assert _files(to) == _files(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(BundleError, match="altered"):
        _export(folder, "bundle", to=tmp_path / "copies" / "two")
    assert [p.name for p in to.parent.iterdir()] == ["one"]


def test_a_card_that_leads_out_of_the_bundle_is_not_copied(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(tmp_path / "secret")
    _export(folder, "bundle", to=tmp_path / "copy")
    assert (tmp_path / "copy" / "README.md").read_text() == ""


def test_a_bundle_alone_needs_a_place_for_its_copy(folder: Path) -> None:
    with pytest.raises(InputError, match="--to"):
        _export(folder, "bundle")
    with pytest.raises(InputError, match="--data"):
        _export(folder, "bundle", data="digits")
    with pytest.raises(InputError, match="--to"):
        _export(folder, "onnx", to=Path("x" * 300))
    for form in ("bundle", "onnx"):
        with pytest.raises(InputError, match="--to"):
            _export(folder, form, to=Path())
