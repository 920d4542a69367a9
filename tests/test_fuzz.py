"""Ten thousand inputs that nobody would write: each is understood, or refused in one line; no traceback, no hang."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from camri_tune import cli
from camri_tune.bundle import CONFIG, METRICS, WEIGHTS, BundleConfig, ModelSpec, read_bundle, save_weights, write_bundle
from camri_tune.config import MOST_STUDY_FILE, StudyConfig, is_printable, read_study_file
from camri_tune.datasets import open_dataset
from camri_tune.errors import BundleError, InputError
from camri_tune.losses import NormFaceLoss
from camri_tune.models import Classifier, build_body
from tests.patience import ending_within

# How many inputs each target gets.
STUDY_BYTES, STUDY_VALUES, FOLDERS, BUNDLE_BYTES, BUNDLE_VALUES, COMMANDS = 1_500, 3_000, 2_000, 1_000, 1_500, 2_000
PATIENCE = 20  # seconds for one input
MOST_OF_A_MESSAGE = 6_000  # characters; a path alone may have 4,096
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def test_there_are_ten_thousand_inputs() -> None:
    assert STUDY_BYTES + STUDY_VALUES + FOLDERS + BUNDLE_BYTES + BUNDLE_VALUES + COMMANDS >= 10_000


def _examine(count: int, inputs: st.SearchStrategy[Any], look: Callable[[Any], None]) -> None:
    """`look` at `count` inputs, none of which may take longer than PATIENCE."""
    seen = 0

    @settings(
        max_examples=count,
        deadline=None,  # the first input pays for imports, and other work on the machine is nobody's fault
        suppress_health_check=[HealthCheck.too_slow],  # a tree of files is drawn more slowly than a number
    )
    @given(inputs)
    def examine(value: Any) -> None:
        nonlocal seen
        seen += 1
        with ending_within(PATIENCE):
            look(value)

    examine()
    assert seen >= count


def _assert_one_line(error: InputError, part: str = "") -> None:
    message = str(error)
    assert message
    assert part in message
    assert is_printable(message), ascii(message)
    assert len(message) < MOST_OF_A_MESSAGE


# --- values that nobody would write -----------------------------------------------------------------------------------

WORDS = [
    "", "\0", "\n", "\x1b[2J", "\u202e", ".", "..", "/", "~", "-", "--", "auto", "worst1", "nan", "1e999", "0x1", "²"
]  # fmt: skip
TEXT = st.one_of(st.sampled_from(WORDS), st.text(max_size=20), st.integers(0, 400).map(lambda n: "x" * n))
NUMBERS = st.one_of(
    st.integers(-3, 20),
    st.integers(),
    st.sampled_from([2**31, 2**63 - 1, 2**63, 10**400]),
    st.floats(),
)
SCALARS = st.one_of(TEXT, NUMBERS, st.booleans())
VALUES = st.recursive(
    SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=3))
)


# --- study files ------------------------------------------------------------------------------------------------------


def _read_study(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        config = StudyConfig.build(read_study_file(path), source=f"study file {str(path)!r}")
    except InputError as error:
        _assert_one_line(error, str(path))
    else:
        assert SAFE_NAME.fullmatch(config.study_name)
        assert config.folder.parent == config.out
        assert config.absolute().study_name == config.study_name
        assert all(map(is_printable, (config.dataset, str(config.out), str(config.data_dir), *config.important)))
        assert all(map(is_printable, config.floor))
        assert StudyConfig.build({"floor": list(config.floor)}).floor == config.floor


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # nearly the same
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_toml(key)} = {_toml(item)}' for key, item in value.items())}}}"
    return str(value)


def _study_of(values: dict[str, Any]) -> bytes:
    return "".join(f"{_toml(key)} = {_toml(value)}\n" for key, value in values.items()).encode(errors="replace")


KEYS = list(StudyConfig.model_fields)
PLAUSIBLE = {
    "dataset": "digits",
    "important": [3, "stop"],
    "trials": 4,
    "tolerance": 0.5,
    "floor": ["stop>=0.9", "a>=b>=90%"],
    "max_drop": 2.5,
    "workers": "auto",
    "folds": 3,
    "group_by": "(?P<group>patient[0-9]+)_",
    "name": "mine",
    "out": "runs",
    "data_dir": "data",
    "storage": "sqlite:///study.db",
    "device": "cuda:1",
    "loss": "camri",
    "model": "timm:resnet18",
    "trainable": "last:2",
    "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
    "margin": "0.1..0.3",
    "batch_size": [64, 128],
}


def test_study_files_of_any_bytes(tmp_path: Path) -> None:
    marks = [
        "=",
        "\n",
        ".",
        '"',
        "'''",
        "[",
        "]",
        "[[",
        "{",
        "}",
        ",",
        "#",
        "1",
        "-",
        "true",
        "inf",
        "\\u",
        "2026-01-01",
    ]
    text = st.lists(st.one_of(st.sampled_from([*KEYS, *marks]), st.text(max_size=4)), max_size=30).map(
        lambda parts: "".join(parts).encode()
    )
    repeated = st.tuples(
        st.sampled_from(["[", "{a=", "a.", "[a.", "[[a]]\n", "9", "0x", "'", "\\"]), st.integers(1, 1_000)
    ).map(lambda both: f"trials = {both[0] * both[1]}".encode())
    damaged = st.tuples(st.integers(0, 200), st.binary(max_size=6)).map(
        lambda both: _study_of(PLAUSIBLE)[: both[0]] + both[1] + _study_of(PLAUSIBLE)[both[0] + len(both[1]) :]
    )
    inputs = st.one_of(st.binary(max_size=200), text, repeated, damaged)
    _examine(STUDY_BYTES, inputs, lambda content: _read_study(tmp_path / "study.toml", content))


def test_study_files_of_any_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    plausible = st.sampled_from(list(PLAUSIBLE.items()))
    hostile = st.tuples(st.one_of(st.sampled_from(KEYS), st.sampled_from(KEYS), TEXT), st.one_of(SCALARS, VALUES))
    inputs = st.lists(st.one_of(plausible, hostile), max_size=4).map(lambda pairs: _study_of(dict(pairs)))
    _examine(STUDY_VALUES, inputs, lambda content: _read_study(tmp_path / "study.toml", content))
    assert (tmp_path / "study.toml").stat().st_size < MOST_STUDY_FILE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loop", "study.toml"], "nothing was written"


# --- image folders ----------------------------------------------------------------------------------------------------

NAMES = st.one_of(
    st.sampled_from([b"a", b"b", b"train", b"test", b"val", b"photo.png", b"photo", b".hidden", b"__MACOSX", b"a\nb"]),
    st.binary(min_size=1, max_size=12).map(lambda name: name.replace(b"\0", b"0").replace(b"/", b"_")),
    st.sampled_from([b"\xff\xfe", b"\x1b[2J", b"x" * 255, "überholen".encode(), b"-rf", b"*", b" "]),
).filter(lambda name: name not in (b".", b".."))
KINDS = ["image", "empty", "garbage", "pipe", "link", "folder"]
TARGETS = [b".", b"..", b"../..", b"nothing", b"/dev/zero", b"/dev/stdin", b"a", b"../a", b"../b/000.png", b"photo.png"]
# A class folder of any name is mostly the end of it: below those of plain names there is more to see.
TOPS = st.one_of(*[st.sampled_from([b"a", b"b", b"train/a", b"train/b", b"test/a", b"val/b"])] * 4, NAMES)
ENTRIES = st.tuples(
    TOPS, st.lists(NAMES, max_size=3), st.sampled_from(KINDS), st.binary(max_size=40), st.sampled_from(TARGETS)
)


def _make(root: bytes, entry: tuple[bytes, list[bytes], str, bytes, bytes], image: bytes) -> None:
    """Make one thing in a tree, where its place allows that."""
    top, parts, kind, garbage, target = entry
    path = b"/".join([root, top, *parts])
    with contextlib.suppress(OSError):
        if not os.path.realpath(os.path.dirname(path)).startswith(root):
            return  # through a link that was made before
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if kind == "link":
            os.symlink(target, path)
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            os.mkdir(path)
        elif not os.path.lexists(path):
            content = {"image": image, "empty": b"", "garbage": garbage + image[len(garbage) :]}[kind]
            with open(path, "wb") as file:
                file.write(content)


def test_image_folders_of_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMRI_CACHE", str(tmp_path / "cache"))
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    image, root, opened = buffer.getvalue(), tmp_path / "photos", []

    def look(drawn: tuple[bool, bool, list[Any]]) -> None:
        plausible, skip_corrupt, entries = drawn
        for path in (root, tmp_path / "cache"):
            shutil.rmtree(path, ignore_errors=True)
        root.mkdir()
        for name in "ab" if plausible else "":
            (root / name).mkdir()
            for index in range(3):
                (root / name / f"{index:03}.png").write_bytes(image)
        for entry in entries:
            _make(os.fsencode(root), entry, image)
        try:
            config = StudyConfig.build({"dataset": str(root), "image_size": 8, "skip_corrupt": skip_corrupt})
            data = open_dataset(config)
        except InputError as error:
            _assert_one_line(error)
        else:
            assert all(map(is_printable, data.classes))
            assert len(data.test()) > 0
            opened.append(root)

    _examine(FOLDERS, st.tuples(st.booleans(), st.booleans(), st.lists(ENTRIES, max_size=5)), look)
    assert len(opened) > FOLDERS / 20, "some are data sets"


# --- bundles ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good bundle, on a data set that is nowhere."""
    folder = tmp_path_factory.mktemp("runs") / "best"
    torch.manual_seed(0)
    body = build_body("compact", channels=1, image_size=8)
    classifier = Classifier(body, NormFaceLoss(3, body.embedding_size, 12.5))
    save_weights(classifier.state_dict(), folder.parent / "weights")
    spec = ModelSpec(
        model="compact",
        channels=1,
        image_size=8,
        classes=("go", "stop", "yield"),
        head="cosine",
        scale=12.5,
        logit_bias={1: 0.5},
    )
    config = BundleConfig(
        schema=1,
        spec=spec,
        important=(1,),
        dataset=str(folder.parent / "nowhere"),
        dataset_fingerprint="0123456789abcdef",
        seed=7,
        skip_corrupt=False,
    )
    figures = {"accuracy": 0.9, "recall": None, "recall_per_class": [0.9, 1.0, None], "images": 12}
    metrics = {"verdict": "certified", "test": figures, "validation": figures, "study": {"seeds": 3, "notices": []}}
    write_bundle(folder, weights=folder.parent / "weights", config=config, metrics=metrics, card="")
    return folder


def _look_at_bundle(folder: Path, name: str, content: bytes) -> bool:
    """Read the bundle with other content in one of its files. Whether it is still good."""
    path = folder / name
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        read = read_bundle(folder)
    except BundleError as error:
        _assert_one_line(error, str(folder))
        return False
    finally:
        path.write_bytes(before)
    assert name != WEIGHTS or content == before, "altered weights are refused"
    assert all(map(is_printable, (*read.classes, read.config.dataset)))
    json.dumps(read.metrics, allow_nan=False)
    json.dumps(read.config.model_dump(mode="json"), allow_nan=False)
    read.metrics.get("test", {}).get("accuracy")
    return True


def test_bundles_of_any_bytes(bundle: Path) -> None:
    files = {name: (bundle / name).read_bytes() for name in (WEIGHTS, CONFIG, METRICS)}
    changes = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=8)), max_size=4)
    keep = st.one_of(st.none(), st.floats(0, 1))

    def look(drawn: tuple[str, list[tuple[float, bytes]], float | None, bytes]) -> None:
        name, changes, keep, more = drawn
        content = bytearray(files[name])
        for place, piece in changes:
            start = int(place**4 * len(content))  # mostly near the beginning, where the structure is
            content[start : start + len(piece)] = piece
        kept = bytes(content[: len(content) if keep is None else int(keep**2 * len(content))])
        _look_at_bundle(bundle, name, kept + more)

    _examine(
        BUNDLE_BYTES, st.tuples(st.sampled_from(list(files)), changes, keep, st.sampled_from([b"", b"\0", b"}"])), look
    )
    assert read_bundle(bundle).classes == ("go", "stop", "yield"), "the bundle itself is as it was"


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in a JSON value something can be put."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*path, key))


def _put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = _put(copy[path[0]], path[1:], new)
    return copy


def test_bundles_of_any_values(bundle: Path) -> None:
    files = {name: json.loads((bundle / name).read_bytes()) for name in (CONFIG, METRICS)}
    places = st.sampled_from([(name, path) for name, value in files.items() for path in _places(value)])
    good = []

    def look(drawn: tuple[tuple[str, tuple[Any, ...]], Any, str, bool]) -> None:
        (name, path), new, key, insert = drawn
        if insert:  # beside what is there
            path = path[:-1]
            there = files[name]
            for part in path:
                there = there[part]
            new = {**there, key: new} if isinstance(there, dict) else [*there, new]
        changed = _put(files[name], path, new)
        text = json.dumps(changed, ensure_ascii=len(key) % 2 == 0)
        good.append(_look_at_bundle(bundle, name, text.encode(errors="surrogatepass")))

    values = st.one_of(VALUES, st.none(), st.text(st.characters(categories=["Cs", "Cc", "Cf"]), max_size=3))
    _examine(BUNDLE_VALUES, st.tuples(places, values, TEXT, st.booleans()), look)
    assert 0 < sum(good) < len(good)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with things in it that are none of those that a command takes; nothing can be trained."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    for name in ("CAMRI_STORAGE", "CAMRI_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    (tmp_path / "study.toml").write_text('dataset = "nowhere"\n')
    (tmp_path / "bad.toml").write_bytes(b"\xff = [")
    (tmp_path / "bundle").symlink_to(bundle)
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# No path that leads out of the folder, no data set that is there, and no zero byte, which no argument can hold.
THINGS = [
    "loop", "loop/x", "folder", "study.toml", "bad.toml", "bundle", "bundle/config.json", "pipe", "nowhere", "x" * 400
]  # fmt: skip
ODD = [
    "", "-", ",", "a,b", "\n", "\x1b[2J", "\udcff", "9" * 400, "-1", "0", "nan", "inf", "1e999", "²", "auto", "cuda:9"
]  # fmt: skip
ARGUMENTS = st.one_of(
    st.sampled_from(THINGS),
    st.sampled_from(ODD),
    st.text(st.characters(exclude_characters="\0/."), max_size=8),
    st.integers(-5, 500).map(str),
)
URLS = [
    "", "nonsense", "sqlite://", "sqlite:///:memory:", "a://b", "mysql+nodriver://u:p@h/d", "sqlite:///loop/x", "sqlite:////"
]  # fmt: skip
# The last of an option's values wins: with these at the end, no command gets as far as to do something.
STOPS = {
    "run": ["--dataset=nowhere"] * 2,
    "compare": ["--dataset=nowhere"] * 2,
    "figures": ["--which=4"] * 2,
    "evaluate": ["--data=nowhere"] * 2,
    "predict": ["nowhere"] * 2,
    "export": ["--data=nowhere"] * 2,
    "worker": ["--storage=nonsense"] * 2,
    "dashboard": ["--host=no.such.host.invalid"] * 2,
}
# Each command's arguments, and whether they take a value. What asks a worker to wait is no hang.
OPTIONS = {
    name: [(p.opts[0], not getattr(p, "is_flag", False)) for p in command.params if "--wait" not in p.opts]
    for name, command in typer.main.get_command(cli.app).commands.items()  # type: ignore[attr-defined]
}


@st.composite
def _commands(draw: st.DrawFn) -> list[str]:
    command = draw(st.sampled_from([*OPTIONS, "run", "run", "run", "compare", "compare", "evaluate", "", "nonsense"]))
    arguments = [command] if command else []
    for _ in range(draw(st.integers(0, 4))):
        form = draw(st.sampled_from(["right", "right", "right", "right", "value", "bare", "noise"]))
        name, takes_value = draw(st.sampled_from(OPTIONS.get(command) or [("--json", False)]))
        value = draw(st.sampled_from(URLS) if name == "--storage" else ARGUMENTS)
        if form == "noise":
            arguments.append(draw(st.sampled_from(["--help", "--bogus", "-x", "--", "-", "--json=1", f"--={value}"])))
        elif form == "value" or not name.startswith("--"):
            arguments.append(value)
        else:
            arguments.append(f"{name}={value}" if takes_value and form == "right" else name)
    return arguments + STOPS.get(command, [])


def _run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[object, str]:
    """The command in this process: its exit code, and what it says on standard error."""
    errors = io.StringIO()
    with monkeypatch.context() as patch, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        patch.setattr(sys, "argv", ["camri-tune", *arguments])
        patch.setattr(signal, "signal", lambda *_: None)
        with pytest.raises(SystemExit) as left:
            cli.main()
    return left.value.code, errors.getvalue()


def test_commands_of_any_arguments(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = set()

    def look(arguments: list[str]) -> None:
        code, said = _run(arguments, monkeypatch)
        assert code in (0, 1, 2, 3, 130), said
        assert "Traceback" not in said
        if code == 2:
            assert said.startswith("camri-tune: ")
            assert said.endswith("\n")
            assert said.count("\n") == 1, said
        codes.add(code)

    _examine(COMMANDS, _commands(), look)
    assert codes >= {0, 2}
    assert not list(place.rglob("study.db"))
