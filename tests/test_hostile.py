"""Files from anybody: bundles, study files and image folders that were made to run code, to escape, to fill or to hang.

What is refused is refused in one line that a terminal shows as it is; and what people rely on, such as class folders
and images that are links, works.
"""

import ast
import errno
import io
import json
import os
import shutil
import socket
import struct
import subprocess
import threading
import time
import tomllib
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from camri_tune import bundle as bundles
from camri_tune import cli, evaluation, images, overview
from camri_tune.bundle import (
    CARD,
    CONFIG,
    METRICS,
    MOST_HEADER,
    MOST_JSON,
    WEIGHTS,
    BundleConfig,
    ModelSpec,
    read_bundle,
    save_weights,
    write_bundle,
)
from camri_tune.config import MOST_STUDY_FILE, StudyConfig, is_printable, printable, read_study_file
from camri_tune.database import open_storage
from camri_tune.datasets import Unseen
from camri_tune.errors import BundleError, DataError, InputError
from camri_tune.evaluation import evaluate_bundle
from camri_tune.evidence import Evidence
from camri_tune.figures import write_figures
from camri_tune.images import MOST_BYTES, MOST_PIXELS, MOST_SCANS, Images, is_image_file, read_image
from camri_tune.losses import NormFaceLoss
from camri_tune.models import Classifier, build_body
from camri_tune.overview import find_study, read_overview
from camri_tune.sources import find_source
from tests.command import COMMAND, assert_one_line_error, camri_tune
from tests.conftest import MakeFolder
from tests.opening import SIDE, build_config, open_data
from tests.patience import ending_within

CLASSES = ("go", "stop", "überholen verboten")
ESCAPE = "\x1b]0;owned\x07\x1b[2J"  # sets a terminal's title and clears it
RIGHT_TO_LEFT = "\u202e"
HOSTILE_NAMES = [ESCAPE, "a\nb", "a\rb", "a\0b", "\x9b2J", RIGHT_TO_LEFT + "gnp.exe", "\u2028"]
PATIENCE = 60  # seconds


@pytest.fixture(autouse=True)
def _nothing_hangs() -> Iterator[None]:
    with ending_within(PATIENCE):
        yield


def _refusal(function: Callable[..., object], *arguments: object, error: type[InputError] = InputError) -> str:
    """The one line with which something is refused."""
    with pytest.raises(error) as raised:
        function(*arguments)
    message = str(raised.value)
    assert is_printable(message), ascii(message)
    assert len(message) < 2_000
    return message


# --- code -------------------------------------------------------------------------------------------------------------


def test_nothing_in_the_package_can_run_what_a_file_says() -> None:
    """Weights are safetensors, or read as weights only; the rest is JSON, TOML, images and a database: no eval."""
    for path in Path(cli.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called == "torch.load":
                assert isinstance(node, ast.Call)
                assert "weights_only=True" in map(ast.unparse, node.keywords), f"{path}: {called}"
            assert called not in ("eval", "exec", "compile", "np.load", "os.system"), f"{path}: {called}"
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {"pickle", "marshal", "shelve", "joblib", "yaml", "dill"} & set(names), f"{path}: {names}"


def test_the_dashboard_listens_to_this_machine_alone_unless_it_is_told_otherwise() -> None:
    assert signature(cli.dashboard).parameters["host"].default == "127.0.0.1"


@pytest.mark.parametrize("text", [*HOSTILE_NAMES, "\udcff"])
def test_foreign_text_in_a_message_cannot_act(text: str) -> None:
    assert not is_printable(text)
    assert is_printable(printable(text))
    assert printable("Überholen 禁止 עצור 🛑") == "Überholen 禁止 עצור 🛑"
    for long in ("x" * 10**7, "\x1b" * 10**7, "\u202e" * 10**7):
        assert len(printable(long)) < 400


# --- bundles ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "best"
    torch.manual_seed(3)
    body = build_body("compact", channels=1, image_size=SIDE)
    classifier = Classifier(body, NormFaceLoss(len(CLASSES), body.embedding_size, 12.5))
    save_weights(classifier.state_dict(), folder.parent / "weights")
    spec = ModelSpec(model="compact", channels=1, image_size=SIDE, classes=CLASSES, head="cosine", scale=12.5)
    config = BundleConfig(
        schema=1,
        spec=spec,
        important=(1,),
        dataset="digits",
        dataset_fingerprint="0123456789abcdef",
        seed=7,
        skip_corrupt=False,
    )
    metrics = {"verdict": "certified", "test": {"accuracy": 0.9}}
    write_bundle(folder, weights=folder.parent / "weights", config=config, metrics=metrics, card="# Card\n")
    return folder


@pytest.fixture
def bundle(good_bundle: Path, tmp_path: Path) -> Path:
    shutil.copytree(good_bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


def _refused(folder: Path) -> str:
    message = _refusal(read_bundle, folder, error=BundleError)
    assert str(folder) in message
    return message


def _change(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    change(values)
    (folder / CONFIG).write_text(json.dumps(values), encoding="utf-8")


@pytest.mark.parametrize("name", [CONFIG, METRICS])
def test_json_of_any_size_is_not_read(name: str, bundle: Path) -> None:
    os.truncate(bundle / name, MOST_JSON + 1)  # with zeros that take no place on the disk
    assert f"longer than {MOST_JSON:,} bytes" in _refused(bundle)


@pytest.mark.parametrize("name", [CONFIG, METRICS])
def test_deeply_nested_json_is_refused(name: str, bundle: Path) -> None:
    (bundle / name).write_text("[" * 10**6)
    assert name in _refused(bundle)
    (bundle / name).write_text('{"a":' * 10**5 + "1" + "}" * 10**5)
    assert name in _refused(bundle)


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "9" * 5_000, "1" + "0" * 400, "\ud800"])
def test_numbers_that_are_none_are_refused(value: str, bundle: Path) -> None:
    """A number that no float can hold would be found out when somebody calculates with it."""
    (bundle / METRICS).write_text(f'{{"test": {{"accuracy": {value}}}}}', errors="surrogatepass")
    assert METRICS in _refused(bundle)


@pytest.mark.parametrize("value", [[], "x", None, 3])
def test_figures_that_are_no_object_are_refused(value: object, bundle: Path) -> None:
    (bundle / METRICS).write_text(json.dumps({"test": value}))
    assert METRICS in _refused(bundle)


@pytest.mark.parametrize("name", [*HOSTILE_NAMES, "\ud800", "..", ".", "", "../stop", "/etc/passwd", "x" * 256])
def test_a_class_that_no_folder_can_be_called_is_refused(name: str, bundle: Path) -> None:
    """Class names are printed, written into reports, and compared with folders."""
    _change(bundle, lambda v: v["spec"].update(classes=["go", name, "stop"]))
    assert CONFIG in _refused(bundle)


def test_the_command_says_nothing_that_acts_on_a_terminal(bundle: Path) -> None:
    _change(bundle, lambda v: v["spec"].update(classes=["go", ESCAPE, "stop"]))
    done = camri_tune("evaluate", bundle)
    assert_one_line_error(done, str(bundle / CONFIG), "spec.classes")
    assert is_printable(done.stderr.rstrip("\n"))


def test_a_key_cannot_act_either(bundle: Path) -> None:
    _change(bundle, lambda v: v.update({ESCAPE: 1}))
    assert "\\x1b" in _refused(bundle)
    _change(bundle, lambda v: (v.pop(ESCAPE), v.update({"k" * 10**6: 1})))
    assert CONFIG in _refused(bundle)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda v: v.update(seed=2**31), "seed"),
        (lambda v: v.update(seed=-1), "seed"),
        (lambda v: v.update(dataset=""), "dataset"),
        (lambda v: v.update(dataset=ESCAPE), "dataset"),
        (lambda v: v.update(dataset="x" * 10**6), "dataset"),
        (lambda v: v.update(important=[]), "important"),
        (lambda v: v.update(important=[1] * 10**5), "important"),
        (lambda v: v["spec"].update(classes=["go", "go", "stop"]), "classes"),
    ],
)
def test_values_that_no_study_has_are_refused(
    change: Callable[[dict[str, Any]], object], part: str, bundle: Path
) -> None:
    _change(bundle, change)
    assert part in _refused(bundle)


@pytest.mark.parametrize("dataset", ["x" * 1_000, "loop", "loop/x", "a/../../b"])
def test_a_data_set_of_any_name_gets_one_line(
    dataset: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    _change(bundle, lambda v: v.update(dataset=dataset))
    assert "unknown data set" in _refusal(lambda: evaluate_bundle(bundle, None, data_dir=tmp_path), error=DataError)


def test_no_data_set_is_not_the_current_folder(bundle: Path, tmp_path: Path) -> None:
    """As in `--data "$PHOTOS"` where that is not set."""
    assert "--data is ''" in _refusal(lambda: evaluate_bundle(bundle, "", data_dir=tmp_path))


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, METRICS])
def test_a_link_that_leads_out_of_the_bundle_is_not_followed(name: str, bundle: Path, tmp_path: Path) -> None:
    (bundle / name).rename(tmp_path / name)
    for target in (tmp_path / name, Path("..") / name):
        (bundle / name).symlink_to(target)
        assert "leads out" in _refused(bundle)
        (bundle / name).unlink()
    (bundle / "sub").symlink_to(tmp_path)
    (bundle / name).symlink_to(Path("sub") / name)
    assert "leads out" in _refused(bundle)


def test_links_within_a_bundle_and_to_it_are_followed(bundle: Path, tmp_path: Path) -> None:
    (bundle / CONFIG).rename(bundle / "config-1.json")
    (bundle / CONFIG).symlink_to("config-1.json")
    (tmp_path / "link").symlink_to(bundle)
    assert read_bundle(tmp_path / "link").classes == CLASSES


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, METRICS])
@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "loop", "zero", "stdin"])
def test_what_is_no_file_is_not_read(name: str, kind: str, bundle: Path) -> None:
    path = bundle / name
    path.unlink()
    _put(path, kind)
    assert name in _refused(bundle)


def _put(path: Path, kind: str) -> None:
    """Something at `path` that is no file, and that it would be unwise to read."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        before = Path.cwd()
        os.chdir(path.parent)  # the name of a socket may be 107 bytes long
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
        os.chdir(before)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"loop": path.name, "zero": "/dev/zero", "stdin": "/dev/stdin", "broken": "nothing"}[kind])


def test_a_list_of_tensors_of_any_length_is_not_read(bundle: Path) -> None:
    content = (bundle / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    spaces = b" " * (MOST_HEADER + 8 - length)  # which the format allows
    header = struct.pack("<Q", length + len(spaces)) + content[8 : 8 + length] + spaces
    (bundle / WEIGHTS).write_bytes(header + content[8 + length :])
    assert f"{MOST_HEADER:,}" in _refused(bundle)


def test_no_model_is_built_for_more_classes_than_there_are_weights(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A million classes would take 2 GB before they were found to be none."""
    devices = []

    class Watched(NormFaceLoss):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            devices.append(next(self.parameters()).device.type)

    monkeypatch.setattr(bundles, "NormFaceLoss", Watched)
    _change(bundle, lambda v: v["spec"].update(classes=[str(c) for c in range(10**6)], model="paper-cnn"))
    message = _refused(bundle)
    assert WEIGHTS in message
    assert devices == ["meta"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.bool])
def test_weights_of_another_type_are_refused(dtype: torch.dtype, bundle: Path) -> None:
    weights = load_file(bundle / WEIGHTS)
    save_file({name: tensor.to(dtype) for name, tensor in weights.items()}, bundle / WEIGHTS)
    assert "F32" in _refused(bundle)


@pytest.mark.parametrize("name", [ESCAPE, RIGHT_TO_LEFT, "x" * 10**5])
def test_a_tensor_of_any_name_is_refused(name: str, bundle: Path) -> None:
    save_file({**load_file(bundle / WEIGHTS), name: torch.zeros(1)}, bundle / WEIGHTS)
    assert "the model has no" in _refused(bundle)


def test_a_type_of_any_name_is_refused(bundle: Path) -> None:
    header = json.dumps({"x": {"dtype": ESCAPE, "shape": [1], "data_offsets": [0, 4]}}).encode()
    (bundle / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert WEIGHTS in _refused(bundle)


@pytest.mark.parametrize("shape", [[2**63], [2**32, 2**32], [0], [-1], []])
def test_a_shape_that_is_not_the_models_is_refused(shape: list[int], bundle: Path) -> None:
    header = json.dumps({"head.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode()
    (bundle / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert WEIGHTS in _refused(bundle)


@pytest.mark.parametrize("stored", ["nan", "inf", "5", None, [], {}, True, float("inf"), float("nan")])
def test_a_design_effect_that_is_no_number_counts_as_the_worst(stored: object) -> None:
    effect = {"hidden_groups": {"design_effect": stored}}
    metrics = {"study": {"best": {"exported": {"test": {"accuracy": effect, "recall": {"1": effect}}}}}}
    nothing = torch.zeros(0, dtype=torch.int64)
    unseen = Unseen(Images(nothing, nothing, nothing), "", 30, own=True)
    for c in (None, 1):
        assert evaluation._hidden(unseen, metrics, c) == (30, 30.0)
    studies: list[Any] = ["x", [], {"best": "x"}, {"best": {"exported": []}}]
    for study in studies:
        assert evaluation._hidden(unseen, {"study": study}, None) == (30, 30.0)
    for number, expected in ((5, 5.0), (0.1, 1.0), (-3, 1.0), (10**19, 30.0)):
        effect["hidden_groups"]["design_effect"] = number
        assert evaluation._hidden(unseen, metrics, None) == (30, expected)


# --- writing a bundle -------------------------------------------------------------------------------------------------


def _write_again(bundle: Path, folder: Path) -> None:
    read = read_bundle(bundle)
    write_bundle(folder, weights=bundle / WEIGHTS, config=read.config, metrics=read.metrics, card="")


@pytest.mark.parametrize("target", ["project", "nothing", "file"])
def test_a_link_in_the_place_of_a_bundle_is_replaced_and_not_followed(
    target: str, bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / CONFIG).write_text("mine")
    (tmp_path / "file").write_text("mine")
    folder = tmp_path / "runs" / "best"
    folder.parent.mkdir()
    folder.symlink_to(tmp_path / target)
    _write_again(bundle, folder)
    assert not folder.is_symlink()
    assert read_bundle(folder).classes == CLASSES
    assert [path.read_text() for path in (tmp_path / "file", tmp_path / "project" / CONFIG)] == ["mine", "mine"]
    assert list((tmp_path / "project").iterdir()) == [tmp_path / "project" / CONFIG]
    assert not (tmp_path / "nothing").exists()
    assert list(folder.parent.iterdir()) == [folder], "nothing half-written stays"


@pytest.mark.parametrize("lost", [(WEIGHTS,), (METRICS, CARD), (CONFIG,), (WEIGHTS, CONFIG, CARD)])
def test_a_bundle_that_lost_files_is_replaced(lost: tuple[str, ...], bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "home" / "best"
    _write_again(bundle, folder)
    for name in lost:
        (folder / name).unlink()
    _write_again(bundle, folder)
    assert read_bundle(folder).classes == CLASSES


@pytest.mark.parametrize("kind", ["folder", "file", "empty", "of another library", "a list"])
def test_what_is_no_bundle_is_not_replaced(kind: str, bundle: Path, tmp_path: Path) -> None:
    """A study file can say where its study's folder is: `best` in it may be somebody's photographs."""
    folder = tmp_path / "home" / "best"
    folder.parent.mkdir()
    if kind == "file":
        folder.write_text("mine")
    else:
        folder.mkdir()
    if kind == "folder":
        (folder / "photo.jpg").write_text("mine")
        (folder / CONFIG).write_text("{}")  # many things have one
    elif kind == "a list":
        (folder / CONFIG).write_text('["weights_sha256"]')
    elif kind == "of another library":
        (folder / WEIGHTS).write_bytes(b"mine")
        (folder / CONFIG).write_text('{"architectures": ["BertModel"]}')
        (folder / CARD).write_text("mine")
    before = sorted(folder.parent.rglob("*"))
    assert "move it elsewhere" in _refusal(_write_again, bundle, folder, error=BundleError)
    assert sorted(folder.parent.rglob("*")) == before


# --- what a report is made from ---------------------------------------------------------------------------------------


def _evidence() -> Evidence:
    angles = np.full((2, 5), 45, np.float32)
    labels = np.array([0, 1, 1, 0, 1])
    pixels = np.zeros((2, 1, 8, 8), np.uint8)
    return Evidence(labels, np.stack([labels, labels]), angles, angles, np.array([0, 3]), pixels)


@pytest.mark.parametrize(
    "changes",
    [
        *({field.name: np.zeros((), np.float32)} for field in fields(Evidence)),
        {"labels": np.array([0.5, 1, 1, 0, 1])},
        {"rows": np.array([0.0, 3.0])},
        {"pixels": np.zeros((2, 1, 8, 8), np.float64)},
        {"pixels": np.zeros((2, 2, 8, 8), np.uint8)},  # no colours
        {"to_other": np.full((2, 5), np.nan, np.float32)},
    ],
)
def test_evidence_of_another_kind_is_none(changes: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "evidence.safetensors"
    _evidence().save(path)
    assert Evidence.load(path, 2) is not None
    changed = replace(_evidence(), **changes)
    save_arrays({field.name: getattr(changed, field.name) for field in fields(Evidence)}, path)
    assert Evidence.load(path, 2) is None


def test_evidence_of_types_that_numpy_lacks_is_none(tmp_path: Path) -> None:
    path = tmp_path / "evidence.safetensors"
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        save_file({field.name: torch.zeros(1, dtype=dtype) for field in fields(Evidence)}, path)
        assert Evidence.load(path, 2) is None


@pytest.mark.parametrize("kind", ["pipe", "zero", "folder"])
def test_what_is_no_file_is_no_evidence(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "evidence.safetensors"
    _put(path, kind)
    assert Evidence.load(path, 2) is None


# --- study files ------------------------------------------------------------------------------------------------------


def _study(tmp_path: Path, text: str) -> str:
    """What is said of a study file."""
    path = tmp_path / "study.toml"
    path.write_text(text, encoding="utf-8")
    message = _refusal(lambda: StudyConfig.build(read_study_file(path), source=f"study file {str(path)!r}"))
    assert str(path) in message
    return message


def test_a_study_file_of_any_size_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text("trials = 3 #".ljust(MOST_STUDY_FILE, "x"))
    assert read_study_file(path) == {"trials": 3}
    os.truncate(path, MOST_STUDY_FILE + 1)
    assert f"{MOST_STUDY_FILE:,}" in _refusal(read_study_file, path)


@pytest.mark.parametrize("kind", ["pipe", "socket", "zero", "loop"])
def test_a_study_file_that_is_no_file_is_not_read(kind: str, tmp_path: Path) -> None:
    _put(tmp_path / "study.toml", kind)
    _refusal(read_study_file, tmp_path / "study.toml")


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 10_000,
        "a = " + "{a = " * 2_000,
        "a" + ".a" * 8_000 + " = 1",
        "trials" + ".a" * 8_000 + " = 1",
        "[" + "a." * 8_000 + "a]",
    ],
)
def test_a_deeply_nested_study_file_is_refused_and_at_once(text: str, tmp_path: Path) -> None:
    start = time.monotonic()
    assert _study(tmp_path, text)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("value", ["9" * 5_000, "0x" + "f" * 5_000, str(2**63), str(-(2**63) - 1)])
@pytest.mark.parametrize("key", ["trials", "tolerance", "floor", "max_drop", "important", "folds", "unknown"])
def test_a_number_of_any_length_is_refused(key: str, value: str, tmp_path: Path) -> None:
    assert _study(tmp_path, f"{key} = {value}")


@pytest.mark.parametrize("key", ["dataset", "data_dir", "important", "floor", "name", "out", "storage", "artifacts"])
@pytest.mark.parametrize("text", HOSTILE_NAMES)
def test_text_that_acts_on_a_terminal_is_refused(key: str, text: str, tmp_path: Path) -> None:
    quoted = '"' + "".join(f"\\U{ord(c):08x}" for c in text) + '"'
    assert tomllib.loads(f"x = {quoted}") == {"x": text}
    assert key in _study(tmp_path, f"{key} = {quoted}")
    assert key in _study(tmp_path, f"{key} = ['a', {quoted}]")
    assert "unknown" in _study(tmp_path, f"{quoted} = 1")


def test_a_study_file_cannot_name_a_ray_cluster(tmp_path: Path) -> None:
    """Ray unpickles what the other side sends: whoever owns the address could run code here."""
    message = _study(tmp_path, 'launcher = "ray"\nray_address = "ray://example.org:10001"\n')
    assert "ray_address" in message
    assert "--ray-address" in message


@pytest.mark.parametrize("name", ["..", ".", "../x", "/etc", "a/b", "a\\\\b", "~", "$HOME", "-rf", "x" * 101, ""])
def test_a_study_cannot_be_called_so_that_it_leaves_its_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(f'name = "{name}"\nout = "{tmp_path}/runs"\n')
    done = camri_tune("run", tmp_path / "study.toml", cwd=tmp_path)
    assert_one_line_error(done, "name", "letters")
    assert [path.name for path in tmp_path.iterdir()] == ["study.toml"]


@pytest.mark.parametrize("key", ["dataset", "data_dir", "out", "artifacts", "weights"])
def test_a_path_that_leads_nowhere_at_all_is_refused(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would go wrong deep inside, in a traceback: links in a circle, and names longer than names can be."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    option = f"--{key.replace('_', '-')}"
    for path in ("loop", "loop/x", "x" * 300, "x/" * 5_000, "\0", "\udcff"):
        assert option in _refusal(StudyConfig.build, {key: path})
    assert key in _study(tmp_path, f'{key} = "{"x" * 10_000}"')
    for path in ("not/there", "x" * 200, "überholen"):
        assert str(getattr(StudyConfig.build({key: path}), key)) == path


def test_a_data_set_that_is_a_circle_of_links_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison's data sets are listed in one option, each checked when it is opened."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    config = StudyConfig(dataset="loop").absolute()
    assert config.study_name == "loop-camri-worst1"
    assert "unknown data set" in _refusal(find_source, config, error=DataError)


def test_the_command_refuses_such_a_path_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for option in ("--dataset", "--data-dir", "--out"):
        done = camri_tune("run", "--dataset", "nowhere", option, tmp_path / "loop", cwd=tmp_path)
        assert_one_line_error(done, option, "loop")
    assert_one_line_error(camri_tune("compare", "--dataset", "x" * 300, cwd=tmp_path), "unknown data set")


@pytest.mark.parametrize("device", ["cuda:٣", "cuda:" + "9" * 30, "cpu:0", "CPU", "cuda:-1", "cuda:1\n"])
def test_a_device_that_pytorch_cannot_read_is_refused(device: str) -> None:
    assert "--device" in _refusal(StudyConfig.build, {"device": device})


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["run", "--\x1b[31mx"], "--\\x1b[31mx"),
        (["\x1b]0;owned\x07"], "'\\x1b]0;owned\\x07'"),
        (["run", "--trials", "\x1b[2J"], "'\\x1b[2J'"),
        (["status", "\x1b[2J"], "'\\x1b[2J'"),
        (["status", "\u202egnp"], "'\\u202egnp'"),
        (["status", "x" * 10_000], "File name too long"),
        (["status", "--storage", "\x1b[2J", "x"], "storage"),
        (["dashboard", "--port", "9" * 5_000], "'999"),
    ],
)
def test_an_argument_cannot_act_on_a_terminal(arguments: list[str], part: str, tmp_path: Path) -> None:
    done = camri_tune(*arguments, cwd=tmp_path)
    assert_one_line_error(done, part)
    assert is_printable(done.stderr.rstrip("\n")), ascii(done.stderr)
    assert len(done.stderr) < 5_000


def _run(arguments: list[bytes], cwd: bytes, **environment: bytes) -> "subprocess.CompletedProcess[str]":
    """The installed command with bytes that may be no text."""
    around = {**os.environb, **{os.fsencode(name): value for name, value in environment.items()}}
    line = [os.fsencode(COMMAND), *arguments]
    return subprocess.run(line, cwd=cwd, env=around, capture_output=True, text=True, check=False)


def test_bytes_that_are_no_text_get_one_line_wherever_they_stand(tmp_path: Path) -> None:
    here = os.fsencode(tmp_path)
    for arguments in ([b"status", b"\xff"], [b"worker", b"--study", b"\xff"], [b"run", b"--trials=\xff"], [b"\xff"]):
        assert_one_line_error(_run(arguments, here), "argument", "\\udcff", "UTF-8")
    for name in ("CAMRI_STORAGE", "CAMRI_DATA", "CAMRI_CACHE"):
        done = _run([b"status", b"x"], here, **{name: b"postgresql://user:hunter2@host/\xff"})
        assert_one_line_error(done, f"${name}", "\\udcff", "UTF-8")
        assert "hunter2" not in done.stderr
    os.mkdir(here + b"/\xff")
    assert_one_line_error(_run([b"run"], here + b"/\xff"), "current folder", "\\udcff", "rename it")


@pytest.mark.parametrize("config", [3, "x", [], None, {}, {"name": ESCAPE}, {"trials": 10**9}, {"out": "x" * 300}])
def test_a_database_with_anything_in_it_gets_one_line(config: object, empty_database: Path, tmp_path: Path) -> None:
    """Also one that a run had only begun to fill when it ended."""
    (tmp_path / "s").mkdir()
    shutil.copy(empty_database, tmp_path / "s" / "study.db")
    storage = open_storage(f"sqlite:///{tmp_path}/s/study.db")
    optuna.create_study(storage=storage, study_name="s").set_user_attr("config", config)
    storage.close()
    assert "'s'" in _refusal(lambda: read_overview(find_study("s", out=tmp_path, storage=None)))


@pytest.mark.parametrize(
    "changes",
    [
        {"verdict": 3},
        {"verdict": "perhaps"},
        {"sentence": [ESCAPE]},
        {"best": "x"},
        {"threshold": "x"},
        {"baseline": []},
        {"finalists": {"a": 1}},
        {"images": None},
        {"notices": 3},
        {"accuracy_difference": "x"},
    ],
)
def test_a_result_of_other_kinds_is_none(changes: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    right: dict[str, Any] = {
        "verdict": "none",
        "sentence": "x",
        "best": None,
        "baseline": {},
        "images": {},
        "accuracy_difference": None,
    }
    right |= {"finalists": [], "notices": [], "provenance": []}
    path.write_text(json.dumps(right))
    assert overview._read_result(path) == right
    for text in (json.dumps(right | changes), "[" * 10**6):
        path.write_text(text)
        assert str(path) in _refusal(overview._read_result, path)


@pytest.mark.parametrize("storage", [None, "sqlite:///study.db"])
def test_a_folder_of_studies_that_is_a_circle_of_links_gets_one_line(storage: str | None, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert "--out" in _refusal(lambda: find_study("x", out=tmp_path / "loop", storage=storage))
    assert "'loop'" in _refusal(lambda: find_study("loop", out=tmp_path, storage=None))
    assert "--name is 'loop'" in _refusal(StudyConfig.build, {"out": tmp_path, "name": "loop"})


def test_a_folder_that_is_gone_gets_one_line(tmp_path: Path) -> None:
    line = f"mkdir gone && cd gone && rmdir ../gone && {COMMAND} figures --which 2"
    done = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert_one_line_error(done, "current folder is gone")


def test_output_that_goes_nowhere_or_lacks_letters_is_no_trouble(tmp_path: Path) -> None:
    for redirected, code in ((">&-", 0), (">&- 2>&-", 0), (">/dev/full", 1)):
        line = f"{COMMAND} datasets {redirected}"
        done = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == code
        assert done.stderr.count("\n") == code, done.stderr
    (tmp_path / "überholen").mkdir()
    done = camri_tune("figures", "--which", "2", "--out", tmp_path / "überholen", PYTHONIOENCODING="ascii")
    assert done.stdout == f"{tmp_path}/\\xfcberholen/figure2.html\n"


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("which", value) for value in (["nonsense"], ["2", ""], [""], [ESCAPE], ["2", "3", "x" * 10_000])),
        *(("margin", value) for value in (float("nan"), float("inf"), -0.4, 0.0, 3.2, 1e308)),
        *(("scale", value) for value in (float("nan"), float("inf"), -16.0, 0.0, 1e308)),
        *(("seed", value) for value in (-1, 2**31, 2**32, 2**64)),
        *(("device", value) for value in ("tpu", "", "cuda:x", "cuda:999", ESCAPE)),
        *(("epochs", value) for value in (0, 10**9)),
        *(("limit", value) for value in (0, 2**64)),
        *(("out", value) for value in ("file", "file/x", "loop", "x" * 300, "/proc/x", "/dev/null/x")),
        ("data_dir", "x" * 300),
    ],
)
def test_figures_of_any_values_are_refused_before_anything_is_drawn(
    option: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    usual = {"margin": 0.4, "scale": 16.0, "epochs": 1, "seed": 0, "device": "cpu", "data_dir": Path("d")}
    given: dict[str, Any] = {"which": ["2"], "out": Path("figures"), **usual}
    given[option] = Path(str(value)) if option in ("out", "data_dir") else value
    message = _refusal(lambda: write_figures(given.pop("which"), **given))
    assert f"--{option.replace('_', '-')}" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def test_a_figure_that_cannot_be_written_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "figure2.html").write_text("mine")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    usual = {"margin": 0.4, "scale": 16.0, "epochs": 1, "seed": 0, "device": "cpu"}
    with pytest.raises(OSError, match="No space"):
        write_figures(["2"], out=tmp_path, data_dir=tmp_path, **usual)  # type: ignore[arg-type]
    assert (tmp_path / "figure2.html").read_text() == "mine"


# --- images -----------------------------------------------------------------------------------------------------------


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png(width: int, height: int, *more: bytes, body: bytes | None = None) -> bytes:
    """Greyscale; `more` chunks come before the pixels."""
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    rows = zlib.compress(bytes((width + 1) * height)) if body is None else body
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")


def _tiff(width: int, height: int, tile: tuple[int, int] | None = None, body: bytes = b"\0" * 64) -> bytes:
    where = (
        {273: 0, 278: height, 279: len(body)} if tile is None else {322: tile[0], 323: tile[1], 324: 0, 325: len(body)}
    )
    tags = {256: width, 257: height, 258: 8, 259: 1 if tile is None else 8, 262: 1, 277: 1} | where
    start = 8 + 2 + 12 * len(tags) + 4
    tags[273 if tile is None else 324] = start
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + body


def _claiming(format: str, place: int | bytes, size: bytes, **options: Any) -> bytes:
    """An image of 8x8 pixels that says it has another size: `size` at `place`, or after the bytes `place`."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format, **options)
    content = bytearray(buffer.getvalue())
    start = content.index(place) + len(place) if isinstance(place, bytes) else place
    content[start : start + len(size)] = size
    return bytes(content)


def _bombs() -> dict[str, bytes]:
    wide = struct.pack("<HH", 60_000, 60_000)
    two_frames = {"save_all": True, "append_images": [Image.new("RGB", (8, 8), "red")]}
    return {
        "wide.png": _png(60_000, 60_000, body=zlib.compress(bytes(100))),
        "just.png": _png(MOST_PIXELS + 1, 1, body=zlib.compress(bytes(100))),
        "wide.gif": _claiming("GIF", 6, wide),
        "wide.bmp": _claiming("BMP", 18, struct.pack("<ii", 60_000, 60_000)),
        "wide.tif": _tiff(60_000, 60_000),
        "tile.tif": _tiff(8, 8, tile=(32_768, 32_768), body=zlib.compress(bytes(10**6))),
        "wide.jp2": _claiming("JPEG2000", b"\xff\x51\0\x2f\0\0", struct.pack(">II", 60_000, 60_000), no_jp2=True),
        "wide.ppm": b"P6 60000 60000 255\n",
        "wide.tga": _claiming("TGA", 12, wide),
        "wide.pcx": _claiming("PCX", 8, struct.pack("<HH", 59_999, 59_999)),
        "wide.sgi": _claiming("SGI", 6, struct.pack(">HH", 60_000, 60_000)),
        "wide.webp": _claiming("WEBP", b"VP8X\n\0\0\0\2\0\0\0", b"\xfe\x3f\0" * 2, **two_frames),
    }


BOMBS = _bombs()


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_by_its_head_whatever_pillows_limit_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*_: object) -> None:
        raise AssertionError("it is decoded")

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(ImageOps, "exif_transpose", decode)
    path = tmp_path / name
    path.write_bytes(BOMBS[name])
    with Image.open(path) as opened:
        assert opened.width * opened.height > MOST_PIXELS or name == "tile.tif", "Pillow itself would have it"
    assert "decompression bomb" in _refusal(read_image, path, SIDE, error=DataError)


def test_pixels_up_to_the_limit_are_read(tmp_path: Path) -> None:
    """Nobody's photographs are refused: 89 megapixels, and of a file 134 MB."""
    assert MOST_PIXELS >= 89_000_000
    path = tmp_path / "long.png"
    Image.new("1", (2**16, 2**10)).save(path)
    assert read_image(path, SIDE).shape == (3, SIDE, SIDE)


def test_a_file_of_any_size_is_not_read(tmp_path: Path) -> None:
    for name in ("photo.png", "photo"):
        path = tmp_path / name
        path.write_bytes(_png(8, 8))
        assert is_image_file(path)
        os.truncate(path, MOST_BYTES + 1)
        assert f"{MOST_BYTES:,}" in _refusal(read_image, path, SIDE, error=DataError)
        assert is_image_file(path) == (path.suffix == ".png")  # nor to see whether it is an image


def _jpeg(scans: int) -> bytes:
    """Progressive, with its last pass over the image again and again: 36 bytes for each."""
    buffer = io.BytesIO()
    Image.new("L", (64, 64)).save(buffer, "JPEG", progressive=True)
    content = buffer.getvalue()
    last = content.rindex(b"\xff\xda")
    last = content.rindex(b"\xff\xc4", 0, last)
    return content[:-2] + content[last:-2] * scans + content[-2:]


def test_a_jpeg_of_any_number_of_scans_is_refused(tmp_path: Path) -> None:
    """Each takes as long as the image is large, and a file of 1 MB could hold 30,000."""
    path = tmp_path / "photo.jpg"
    path.write_bytes(_jpeg(50))
    assert read_image(path, SIDE).shape == (3, SIDE, SIDE)
    path.write_bytes(_jpeg(MOST_SCANS))
    assert "scans" in _refusal(read_image, path, SIDE, error=DataError)


def test_what_lies_behind_a_jpeg_or_in_its_thumbnail_counts_for_nothing(tmp_path: Path) -> None:
    """A motion photo has a film at its end; a thumbnail has an end of its own, which is not the image's."""
    path, film = tmp_path / "photo.jpg", b"\0\xff\xda" * 2 * MOST_SCANS
    thumbnail = _jpeg(5)
    segment = b"\xff\xe1" + (2 + len(thumbnail)).to_bytes(2) + thumbnail
    for scans in (50, MOST_SCANS):
        content = _jpeg(scans)
        path.write_bytes(content[:2] + segment + content[2:] + film)
        if scans == 50:
            assert read_image(path, SIDE).shape == (3, SIDE, SIDE)
    assert "scans" in _refusal(read_image, path, SIDE, error=DataError)


@pytest.mark.parametrize("between", [b"\xff\xd0", b"\xff\x02\xff\xff", b"\xff\0", b"\xff", b"\xff\xd8\xff\xff", b"\0"])
def test_nothing_between_two_scans_hides_those_that_follow(between: bytes) -> None:
    """Bytes that a decoder passes over have no length, whatever comes behind them."""
    content = _jpeg(MOST_SCANS + 1)
    first = content.index(b"\xff\xda")
    last = content.index(b"\xff\xc4", first)
    assert images._has_many_scans(content[:last] + between + content[last:])
    assert not images._has_many_scans(content[:last] + between + b"\xff\xd9" + content[last:])


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt"])
def test_text_in_an_image_is_bounded(kind: bytes, tmp_path: Path) -> None:
    """100 KB of file for 100 MB of text."""
    text = zlib.compress(bytes(10**6 - 10))
    body = b"k\0\0" + text if kind == b"zTXt" else b"k\0\1\0\0\0" + text
    path = tmp_path / "photo.png"
    path.write_bytes(_png(8, 8, *[_chunk(kind, body)] * 100))
    assert "text" in _refusal(read_image, path, SIDE, error=DataError)


def _icon(inside: bytes) -> bytes:
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 8, 8, 0, 0, 1, 32, len(inside), 22) + inside


def _mac_icon(inside: bytes) -> bytes:
    return b"icns" + struct.pack(">I", 16 + len(inside)) + b"ic08" + struct.pack(">I", 8 + len(inside)) + inside


def _dds() -> bytes:
    """128 bytes that Pillow turns into minutes of Python: what is missing of 89 million pixels is taken for black."""
    head = struct.pack("<7I44x", 124, 0x1007, 9_000, 9_000, 0, 0, 0)
    return (
        b"DDS " + head + struct.pack("<8I", 32, 0x40, 0, 32, 0xFF, 0xFF00, 0xFF0000, 0) + struct.pack("<5I", *[0] * 5)
    )


@pytest.mark.filterwarnings("ignore:Image was not the expected size")
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("small.ico", _icon(_png(8_000, 8_000))),
        ("small.icns", _mac_icon(_png(8_000, 8_000))),
        ("small.dds", _dds()),
        ("page.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(ls) run\n%%EOF\n"),
    ],
)
def test_formats_that_cannot_be_bounded_are_no_images(name: str, content: bytes, tmp_path: Path) -> None:
    """Icons hold an image of any size inside, and PostScript is a program."""
    path = tmp_path / name
    path.write_bytes(content)
    assert not is_image_file(path)
    start = time.monotonic()
    assert "not an image" in _refusal(read_image, path, SIDE, error=DataError)
    assert time.monotonic() - start < 5
    with Image.open(path) as opened:  # Pillow itself takes it for one
        assert opened.format == path.suffix[1:].upper()


@pytest.mark.parametrize(
    "error", [MemoryError("no memory"), ZeroDivisionError("by zero"), ValueError(ESCAPE), RecursionError()]
)
def test_whatever_a_decoder_raises_names_the_file(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    path = tmp_path / "photo"
    path.write_bytes(_png(8, 8))
    for part, name in ((ImageOps, "exif_transpose"), (Image, "open")):
        monkeypatch.setattr(part, name, fail)
        assert repr(str(path)) in _refusal(read_image, path, SIDE, error=DataError)
    assert not is_image_file(path)


@pytest.mark.parametrize("limit", ["_PIXELS", "_BYTES"])
def test_all_threads_together_keep_within_a_limit(limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 threads that decode one large image each would take 64 times the memory."""
    sides = [8, 16, 24, 32] * 6
    amounts = {side: side * side if limit == "_PIXELS" else len(_png(side, side)) for side in sides}
    for index, side in enumerate(sides):
        (tmp_path / f"{index}.png").write_bytes(_png(side, side))
    lock, now, seen = threading.Lock(), list[int](), list[list[int]]()

    def watched(image: Image.Image, name: str | None) -> Image.Image:
        with lock:
            now.append(image.width)
            seen.append([amounts[side] for side in now])
        time.sleep(0.01)
        with lock:
            now.remove(image.width)
        return image.convert("RGB")

    most = 2 * max(amounts.values())
    monkeypatch.setattr(images, "to_rgb", watched)
    monkeypatch.setattr(images, limit, images._Budget(most))
    with ThreadPoolExecutor(8) as pool:
        shapes = list(pool.map(lambda index: read_image(tmp_path / f"{index}.png", SIDE).shape, range(len(sides))))
    assert shapes == [(3, SIDE, SIDE)] * len(sides)
    assert max(map(sum, seen)) <= most
    assert max(map(len, seen)) > 1, "some were decoded at the same time"


def test_a_decoder_that_fails_gives_back_what_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_PIXELS", images._Budget(64))
    monkeypatch.setattr(images, "_BYTES", images._Budget(1_000))
    path = tmp_path / "photo.png"
    for _ in range(3):
        path.write_bytes(_png(8, 8)[:-30])
        _refusal(read_image, path, SIDE, error=DataError)
        path.write_bytes(_png(8, 8))
        assert read_image(path, SIDE).shape == (3, SIDE, SIDE)


# --- image folders ----------------------------------------------------------------------------------------------------


def _listed(root: Path) -> list[str]:
    source = find_source(build_config(root))
    return [str(Path(item.path).relative_to(root)) for items in source.parts.values() for item in items]


def test_links_in_circles_end_and_are_passed_over(image_folder: MakeFolder) -> None:
    root = image_folder({"a": 6, "b": 6})
    before = _listed(root)
    links: dict[str, str | Path] = {
        "up": "..",
        "here": ".",
        "self": "self",
        "top": root,
        "all": "/",
        "image.png": "image.png",
    }
    for name, target in links.items():
        (root / "a" / name).symlink_to(target)
    assert _listed(root) == before
    assert find_source(build_config(root)).ignored == len(links)


@pytest.mark.parametrize("target", [".", "..", "/"])
def test_a_class_that_is_a_link_to_all_of_them_is_refused(target: str, image_folder: MakeFolder) -> None:
    root = image_folder({"a": 6, "b": 6})
    (root / "every").symlink_to(target)
    assert "'every'" in _refusal(open_data, root, error=DataError).replace(f"{root}/", "")


def test_class_folders_and_images_that_are_links_are_read(image_folder: MakeFolder, tmp_path: Path) -> None:
    """Folders of links are how people make subsets of a large data set."""
    store = image_folder({"cats": 6, "dogs": 6})
    root = tmp_path / "subset"
    for part in ("train", "test"):
        (root / part / "dog").mkdir(parents=True)
        (root / part / "cat").symlink_to(store / "cats")
        for path in (store / "dogs").iterdir():
            (root / part / "dog" / path.name).symlink_to(path)
    (tmp_path / "link").symlink_to(root)
    data = open_data(tmp_path / "link")
    assert data.classes == ("cat", "dog")
    assert len(data.train) + len(data.validation) == len(data.test()) == 12


@pytest.mark.parametrize("kind", ["pipe", "socket", "zero", "broken", "loop"])
@pytest.mark.parametrize("name", ["photo.png", "photo"])
def test_what_is_no_file_is_passed_over(kind: str, name: str, image_folder: MakeFolder) -> None:
    root = image_folder({"a": 6, "b": 6})
    _put(root / "a" / name, kind)
    data = open_data(root)
    assert len(data.train) + len(data.validation) + len(data.test()) == 12
    assert data.ignored_files == 1


def test_a_folder_that_may_not_be_read_is_named(image_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left out without a word, its images would be missing from the class."""
    root = image_folder({"a": 6, "b/deep": 6})
    scan = os.scandir

    def refuse(path: str | Path) -> Any:
        if Path(path) == root / "b" / "deep":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    message = _refusal(open_data, root, error=DataError)
    assert "Permission denied" in message
    assert str(root / "b" / "deep") in message


def _remove(folder: Path) -> None:
    subprocess.run(["rm", "-rf", str(folder)], check=True)  # Python's own call themselves for each level


def test_folders_in_each_other_are_read_as_deep_as_paths_go(image_folder: MakeFolder) -> None:
    root = image_folder({"a": 6, "b": 6})
    deep = root / "a" / "/".join("d" * 1_800)
    subprocess.run(["mkdir", "-p", str(deep)], check=True)
    try:
        shutil.move(root / "a" / "000.png", deep / "000.png")
        assert len(_listed(root)) == 12
    finally:
        _remove(root / "a" / "d")


def test_folders_deeper_than_a_path_can_name_get_one_line(image_folder: MakeFolder) -> None:
    root = image_folder({"a": 6, "b": 6})
    place = os.open(root / "a", os.O_RDONLY)
    try:
        for _ in range(3_000):
            os.mkdir("d", dir_fd=place)
            inner = os.open("d", os.O_RDONLY, dir_fd=place)
            os.close(place)
            place = inner
        with pytest.raises(DataError, match="too long"):
            find_source(build_config(root))
    finally:
        os.close(place)
        _remove(root / "a" / "d")


def test_files_may_have_any_name(image_folder: MakeFolder) -> None:
    """Names that are not UTF-8 come with archives from elsewhere; a file's name is shown only where it is broken."""
    root = image_folder({"a": 6, "b": 6})
    for index, name in enumerate((b"\xff\xfe.png", b"a\nb.png", os.fsencode(ESCAPE) + b".png", b"-rf.png")):
        Image.new("RGB", (SIDE, SIDE), (9, 9, index)).save(os.fsencode(root / "a") + b"/" + name, "PNG")
    data = open_data(root)
    assert len(data.train) + len(data.validation) + len(data.test()) == 16
    assert open_data(root).fingerprint == data.fingerprint
    for path in (root / "a").iterdir():
        path.write_bytes(b"")
    _refusal(open_data, root, error=DataError)


@pytest.mark.parametrize("name", [*(os.fsencode(n) for n in HOSTILE_NAMES if "\0" not in n), b"\xff\xfe", b"caf\xe9"])
def test_a_class_folder_whose_name_cannot_be_shown_is_refused(name: bytes, image_folder: MakeFolder) -> None:
    """Before anything is trained: the report, which is UTF-8, could not be written after it."""
    root = image_folder({"a": 6, "b": 6})
    os.rename(root / "b", os.fsencode(root) + b"/" + name)
    message = _refusal(open_data, root, error=DataError)
    assert "rename it" in message
    assert repr(os.fsdecode(name))[1:-1] in message


def test_a_data_set_whose_path_cannot_be_shown_is_refused(image_folder: MakeFolder, tmp_path: Path) -> None:
    root = image_folder({"a": 6, "b": 6})
    for name in (b"a\nb", b"\xff", os.fsencode(ESCAPE)):
        renamed = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
        root.rename(renamed)
        (tmp_path / "link").symlink_to(renamed)
        for path in (renamed, tmp_path / "link"):
            config = StudyConfig().model_copy(update={"dataset": str(path)})
            assert "rename it" in _refusal(find_source, config, error=DataError)
        (tmp_path / "link").unlink()
        renamed.rename(root)


@pytest.mark.parametrize("name", ["../outside", "/etc", "..", ESCAPE.split("]", maxsplit=1)[0], "\udcff", "x" * 300])
def test_a_list_of_classes_names_no_other_folders(name: str, tmp_path: Path) -> None:
    """Animals with Attributes has its classes in a file; the images are those beside it."""
    root = tmp_path / "awa2" / "Animals_with_Attributes2"
    for folder in ("JPEGImages/cat", "outside"):
        (root / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / folder / "1.jpg")
    (root / "classes.txt").write_bytes(os.fsencode(f"1\tcat\n2\t{name}\n"))
    message = _refusal(find_source, StudyConfig(dataset="awa2", data_dir=tmp_path), error=DataError)
    assert "no folder's name" in message


@pytest.mark.parametrize("name", ["Training/00042/00000_00000.ppm", "Final_Test/Images/00000.ppm"])
def test_a_pipe_among_the_traffic_signs_is_not_read(name: str, tmp_path: Path) -> None:
    base = tmp_path / "gtsrb" / "GTSRB"
    for c in range(43):
        (base / "Training" / f"{c:05d}").mkdir(parents=True)
        (base / "Training" / f"{c:05d}" / "00000_00000.ppm").write_bytes(b"P6 1 1 255\n\0\0\0")
    (base / "Final_Test" / "Images").mkdir(parents=True)
    (base / "Final_Test" / "Images" / "00000.ppm").write_bytes(b"P6 1 1 255\n\0\0\0")
    (tmp_path / "gtsrb" / "GT-final_test.csv").write_text("Filename;ClassId\n00000.ppm;3\n")
    config = StudyConfig(dataset="gtsrb", data_dir=tmp_path)
    assert len(find_source(config).parts["train"]) == 43
    (base / name).unlink()
    os.mkfifo(base / name)
    assert name in _refusal(find_source, config, error=DataError)
