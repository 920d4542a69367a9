"""Usage and input errors through the installed command: one clear line, exit code 2, nothing written."""

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from PIL import Image

from camri_tune import cli
from camri_tune.config import StudyConfig, read_study_file
from camri_tune.errors import InputError
from tests.command import assert_one_line_error, camri_tune

REPOSITORY = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--dataset", "foo"], ["'foo'", "digits", "gtsrb", "cifar10", "mnist", "awa2", "folder"]),
        (["--important", "10"], ["'10'", "0 to 9", "worst1"]),
        (["--important", "nope"], ["'nope'", "0 to 9"]),
        (["--important", "worst11"], ["'worst11'", "worst10"]),
        (["--loss", "foo"], ["--loss", "'foo'", "camri"]),
        (["--model", "foo"], ["--model", "'foo'", "compact"]),
        (["--weights", "none.pt"], ["--weights", "none.pt'", "not a file", ".safetensors"]),
        (["--margin", "0.2", "--loss", "l2"], ["--margin", "--loss l2", "camri"]),
        (["--learning-rate", "1e-2..1e-4"], ["--learning-rate", "'1e-2..1e-4'", "LOW..HIGH log"]),
        (["--trainable", "last:40"], ["--trainable last:40", "last:1 to last:"]),
        (["--backbone-lr", "0"], ["--backbone-lr", "'0'", "number from 1e-06 to 10"]),
        (["--model", "torchvision:resnet19"], ["'resnet19'", "torchvision:NAME", "resnet18"]),
        (["--model", "timm:resnet19"], ["'resnet19'", "timm:NAME", "resnet18"]),
        (["--model", "torchvision:vit_b_16"], ["'torchvision:vit_b_16'", "8 pixels", "--image-size", "224"]),
        (["--device", "tpu"], ["--device", "'tpu'", "cpu"]),
        (["--device", "cuda:99"], ["--device cuda:99", "not on this machine", "cpu"]),
        (["--trials", "0"], ["--trials", "0", "greater than or equal to 1"]),
        (["--trials", "abc"], ["--trials", "integer", "'abc'"]),
        (["--trials", "50001"], ["--trials", "50001", "less than or equal to 50000"]),
        (["--tolerance", "-1"], ["--tolerance", "-1", "greater than or equal to 0"]),
        (["--tolerance", "nan"], ["--tolerance", "nan"]),
        (["--floor", "8"], ["--floor", "'8'", "'Stop>=0.9'"]),
        (["--floor", "8>=0.9", "--floor", "nope>=1"], ["--floor", "'nope'", "0 to 9", "worst1"]),
        (["--max-drop", "-1"], ["--max-drop", "-1", "greater than or equal to 0"]),
        (["--finalists", "6"], ["--finalists", "6", "less than or equal to 5"]),
        (["--folds", "6"], ["--folds", "'6'", "from 1 to 5", "auto"]),
        (["--folds", "many"], ["--folds", "'many'", "from 1 to 5", "auto"]),
        (["--workers", "-1"], ["--workers", "-1", "from 0", "auto"]),
        (["--workers", "1025"], ["--workers", "'1025'", "1,024", "auto"]),
        (["--workers", "many"], ["--workers", "'many'", "auto"]),
        (["--name", "../x"], ["--name", "'../x'", "letters"]),
        (["--limit", "5"], ["--limit 5", "at least 10"]),
        (["--group-by", "x"], ["--group-by", "images of your own", "digits"]),
        (["--group-by", "\x1b[2J"], ["--group-by", "'\\x1b[2J'", "control characters"]),
        (["--storage", "nonsense"], ["storage", "sqlite:///study.db"]),
        (["--storage", ""], ["--storage", "''", "at least 1 character"]),
        (["--bogus"], ["--bogus"]),
    ],
)
def test_bad_options_get_one_line(arguments: list[str], parts: list[str], tmp_path: Path) -> None:
    out = tmp_path / "runs"
    assert_one_line_error(camri_tune("run", "--out", out, *arguments), *parts)
    assert not list(out.rglob("best"))


@pytest.mark.parametrize("command", [["run"], ["compare", "--important", "0"]])
def test_a_data_set_that_is_not_there_is_refused_before_a_folder_is_made(command: list[str], tmp_path: Path) -> None:
    """Which could be the one that is missing."""
    done = camri_tune(*command, "--out", "nowhere", "--dataset", "nowhere", cwd=tmp_path)
    assert_one_line_error(done, "unknown data set", "'nowhere'")
    assert not list(tmp_path.iterdir())


def test_a_password_in_a_storage_url_is_not_shown(tmp_path: Path) -> None:
    url = "postgresql+nodriver://user:hunter2@127.0.0.1:1/db"
    done = camri_tune("run", "--out", tmp_path, "--storage", url)
    assert_one_line_error(done, "storage")
    assert "hunter2" not in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]


@pytest.mark.parametrize(
    ("command", "login"),
    [
        (["run"], "me:hunter2@host/db"),
        (["dashboard"], "me:hun/ter2@ter2@host/db"),
        (["export"], "host/db?password=hunter2"),
        (["status", "s"], "me:hunter2@host/db?password=hunter2"),
    ],
)
def test_a_password_in_a_url_without_its_option_is_not_shown(command: list[str], login: str, tmp_path: Path) -> None:
    done = camri_tune(*command, f"postgresql+psycopg://{login}", cwd=tmp_path)
    assert_one_line_error(done, "--storage")
    assert "ter2" not in done.stderr


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("'pg://me:a@b/c@host:1/db' is", "'pg://me:***@host:1/db' is"),
        ("(pg:/me:hunter2@host/db): no", "(pg:/me:***@host/db): no"),
        ("pg://me@azure:hunter2@host/db", "pg://me@azure:***@host/db"),
        ("pg://dom/me:hunter2@host/db", "pg://dom/me:***@host/db"),
        ("pg://:hunter2@host/db", "pg://:***@host/db"),
        ("pg://h/db?a=1&sslpassword=x'y'; mend", "pg://h/db?a=...&sslpassword=...'; mend"),
        ("pg://me:***@h/db?password=..., so", "pg://me:***@h/db?password=..., so"),
        ("s3://bucket/a=b and sqlite:///x:y@z.db?", "s3://bucket/a=b and sqlite:///x:y@z.db?"),
        ("is a?b=c of me:you@there", "is a?b=c of me:you@there"),
    ],
)
def test_what_of_a_message_is_a_password(said: str, shown: str) -> None:
    assert cli._without_passwords(said) == shown


def test_data_folders_that_are_none_get_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "one" / "a").mkdir(parents=True)
    for name in "ab":
        (tmp_path / "empty" / name).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "empty" / "a" / "1.png")
    for dataset, parts in {
        "file": ["is a file"],
        "one": ["1 class folder", "at least 2"],
        "empty": ["no images"],
    }.items():
        path = tmp_path / dataset
        assert_one_line_error(camri_tune("run", "--out", tmp_path / "runs", "--dataset", path), str(path), *parts)


def test_folds_of_a_data_set_with_its_own_validation_part_get_one_line(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for index, name in enumerate(("train/a", "train/b", "val/a", "val/b")):
        (root / name).mkdir(parents=True)
        for place in range(3):
            Image.new("RGB", (8, 8), (index, place, 0)).save(root / name / f"{place}.png")
    done = camri_tune("run", "--out", tmp_path / "runs", "--dataset", root, "--folds", "2", "--quiet")
    assert_one_line_error(done, "--folds 2", "'photos'", "validation")


def test_a_run_folder_that_cannot_be_written_gets_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert_one_line_error(camri_tune("run", "--out", tmp_path / "file"), str(tmp_path / "file"), "--out")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("trails = 3", ["unknown key 'trails'", "trials"]),
        ('trials = "x"', ["trials", "'x'", "integer"]),
        ("trials = ", ["TOML"]),
    ],
)
def test_errors_in_a_study_file_name_key_and_file(text: str, parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(text)
    assert_one_line_error(camri_tune("run", path), str(path), *parts)


def test_a_study_file_that_is_not_there_gets_one_line(tmp_path: Path) -> None:
    assert_one_line_error(camri_tune("run", tmp_path / "none.toml"), "none.toml", "does not exist")


def test_something_that_is_no_bundle_gets_one_line(tmp_path: Path) -> None:
    assert_one_line_error(camri_tune("evaluate", tmp_path), str(tmp_path), "model.safetensors")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["predict", "nowhere", "x.png"], ["'nowhere'", "not an exported model"]),
        (["predict", "nowhere", "x.png", "--format", "xml"], ["--format", "'xml'", "table", "csv", "json"]),
        (["export", "nowhere"], ["'nowhere'", "no studies"]),
        (["export", "nowhere", "--format", "keras"], ["--format", "'keras'", "bundle", "onnx", "torchscript"]),
        (["export", "--data", "digits"], ["--data", "--format onnx"]),
    ],
)
def test_what_uses_a_model_names_what_is_wrong(arguments: list[str], parts: list[str], tmp_path: Path) -> None:
    assert_one_line_error(camri_tune(*arguments, cwd=tmp_path), *parts)
    assert list(tmp_path.iterdir()) == []


def test_joining_needs_a_storage_and_a_study(tmp_path: Path) -> None:
    assert_one_line_error(camri_tune("worker", "--study", "x", CAMRI_STORAGE=""), "--storage")
    url = f"sqlite:///{tmp_path / 'study.db'}"
    assert_one_line_error(camri_tune("worker", "--study", "x", "--storage", url), "'x'", "no studies")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--storage", "nonsense"], ["storage", "sqlite:///study.db"]),
        (["--storage", "sqlite://"], ["sqlite://", "in memory"]),
        (["--storage", "postgresql+nodriver://u:hunter2@127.0.0.1:1/d"], ["nodriver"]),
        (["--storage", "grpc://somewhere"], ["grpc://HOST:PORT"]),
        (["--study", ""], ["--study is ''", "letters", "its run"]),
        (["--study", "a\nb"], ["--study is 'a\\nb'", "letters"]),
        (["--device", "tpu"], ["--device is 'tpu'", "cpu"]),
        (["--weights", "x" * 300], ["--weights", "File name too long"]),
        (["--threads", "1025"], ["--threads", "1025", "less than or equal to 1024"]),
        (["--data-dir", "x" * 300], ["--data-dir", "File name too long"]),
        (["--wait", "nan"], ["--wait", "'nan'", "greater than or equal to 0"]),
        (["--wait", "-1"], ["--wait", "'-1'", "greater than or equal to 0"]),
    ],
)
def test_a_worker_waits_for_nothing_that_cannot_come(arguments: list[str], parts: list[str], tmp_path: Path) -> None:
    """Of an option that is given twice the last one counts."""
    usual = ["--study", "x", "--storage", f"sqlite:///{tmp_path}/study.db", "--wait", "inf"]
    done = camri_tune("worker", *usual, *arguments)
    assert_one_line_error(done, *parts)
    assert "hunter2" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a command would do its work with: storage and data folder, as `STORAGE in FOLDER`."""

    def tell(config: StudyConfig, *_: object, **__: object) -> NoReturn:
        raise InputError(f"{config.storage} in {config.data_dir}")

    monkeypatch.setattr("camri_tune.pipeline.run", tell)
    monkeypatch.setattr("camri_tune.comparison.compare", tell)
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def asked(*arguments: object, **environment: str) -> str:
        with monkeypatch.context() as patch:
            for name in ("CAMRI_STORAGE", "CAMRI_DATA"):
                patch.delenv(name, raising=False)
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["camri-tune", *map(str, arguments)])
            with pytest.raises(SystemExit):
                cli.main()
        return capsys.readouterr().err.removeprefix("camri-tune: ").rstrip("\n")

    return asked


def test_an_option_wins_over_the_study_file_and_the_file_over_the_environment(
    asked: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "study.toml"
    path.write_text('storage = "sqlite:///file.db"\ndata_dir = "file"\n')
    around = {"CAMRI_STORAGE": "sqlite:///env.db", "CAMRI_DATA": "env"}
    options = ["--storage", "sqlite:///option.db", "--data-dir", "option"]
    for command in ("run", "compare"):
        assert asked(command) == "None in data"
        assert asked(command, **around) == "sqlite:///env.db in env"
        assert asked(command, *options, **around) == "sqlite:///option.db in option"
    assert asked("run", path, **around) == "sqlite:///file.db in file"
    assert asked("run", path, *options, **around) == "sqlite:///option.db in option"
    same = ["--storage", "sqlite:///env.db", "--data-dir", "env"]
    assert asked("run", path, *same, **around) == "sqlite:///env.db in env", "also where it says what is around"
    assert asked("run", CAMRI_STORAGE="", CAMRI_DATA="") == "None in data", "empty is not set"
    assert "$CAMRI_DATA: data_dir is 'xxx" in asked("run", CAMRI_DATA="x" * 300)


@pytest.mark.parametrize("command", ["run", "compare", "status", "report", "dashboard", "worker"])
def test_help_names_the_variable_of_the_storage_and_not_what_is_in_it(command: str) -> None:
    done = camri_tune(command, "--help", CAMRI_STORAGE="postgresql://somebody:hunter2@host/database")
    assert done.returncode == 0
    assert "[env var: CAMRI_STORAGE]" in " ".join(done.stdout.split())
    assert not {"somebody", "hunter2"} & set(re.findall("[a-z0-9]+", done.stdout))


@pytest.mark.parametrize("command", ["status", "report", "dashboard"])
def test_a_study_that_no_folder_can_be_called_gets_one_line(command: str, tmp_path: Path) -> None:
    long = "x" * 300
    done = camri_tune(command, long, "--out", tmp_path)
    assert_one_line_error(done, long[:200], "File name too long", str(tmp_path), "no studies")
    assert_one_line_error(camri_tune(command, "--out", tmp_path / long), "--out", "File name too long")


def test_to_look_for_a_study_makes_no_database(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/none.db"
    assert_one_line_error(camri_tune("status", "x", "--storage", url), url, "no such file")
    assert_one_line_error(camri_tune("status", "x", "--storage", ""), "storage ''", "sqlite:///study.db")
    assert list(tmp_path.iterdir()) == []


def test_a_password_with_an_at_sign_is_explained_and_not_shown(tmp_path: Path) -> None:
    done = camri_tune("status", "x", "--storage", "postgresql+psycopg://user:hun@ter2@127.0.0.1:1/db")
    assert_one_line_error(done, "%40")
    assert "ter2" not in done.stderr


def test_the_checkout_has_the_same_command() -> None:
    here = subprocess.run(
        [sys.executable, "cli.py", "run", "--help"], capture_output=True, text=True, cwd=REPOSITORY, check=True
    )
    installed = camri_tune("run", "--help")
    assert "--important" in here.stdout
    assert here.stdout.split("Options")[1:] == installed.stdout.split("Options")[1:]


def test_every_command_has_help_and_a_bare_call_shows_it() -> None:
    for command in ("run", "worker", "evaluate", "predict", "export", "datasets", "doctor"):
        assert camri_tune(command, "--help").returncode == 0
        assert command in camri_tune("--help").stdout


def test_doctor_and_datasets_say_what_is_there() -> None:
    doctor = camri_tune("doctor")
    assert doctor.returncode == 0
    assert "torch" in doctor.stdout
    assert "trains in" in doctor.stdout
    assert "storage      SQLite 3." in doctor.stdout
    elsewhere = camri_tune("doctor", CAMRI_STORAGE="postgresql+psycopg://me:hunter2@host/db").stdout
    assert "storage      postgresql+psycopg://me:***@host/db" in elsewhere
    datasets = camri_tune("datasets").stdout
    for part in ("digits", "PATH/CLASS/*", "PATH.csv", "path,label", "PATH.npz", "--group-by '(?P<group>"):
        assert part in datasets


def test_study_files_of_the_house_are_valid() -> None:
    files = list((REPOSITORY / "studies").glob("*.toml"))
    assert files
    for path in files:
        StudyConfig.build(read_study_file(path), source=str(path))
