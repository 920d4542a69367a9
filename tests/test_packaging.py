"""What is handed out: a wheel and an sdist that hold what they must, and a command that works from the wheel alone."""

import email
import os
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from tests.command import camri_tune

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built from what git would hand out."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    names: list[str] = ["camri_tune", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "MANIFEST.in", "cli.py"]
    source.mkdir()
    for name in names:
        subprocess.run(["cp", "-r", REPOSITORY / name, source], check=True)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_wheel_holds_the_package_its_types_its_data_and_its_licence(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (about,) = [email.message_from_bytes(archive.read(n)) for n in names if n.endswith("dist-info/METADATA")]
    modules = {f"camri_tune/{path.name}" for path in (REPOSITORY / "camri_tune").glob("*.py")}
    assert modules | {"camri_tune/py.typed", "camri_tune/paper_table1.csv"} <= names
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"camri_tune"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert about["Version"] == metadata.version("camri-tune")
    assert about["License-Expression"] == "MIT"
    assert about["Requires-Python"] == ">=3.11"
    assert {"ray", "postgres", "s3"} <= set(about.get_all("Provides-Extra", []))


def test_the_sdist_can_be_built_from_again(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "camri_tune/py.typed"} <= names


def test_the_command_runs_from_the_wheel_alone(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    place = tmp_path / "installed"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(place),
        str(wheel),
    ]
    subprocess.run(pip, check=True)
    inside = "import camri_tune; print(camri_tune.__file__); from camri_tune.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", inside, "--version"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(place)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [
        str(place / "camri_tune" / "__init__.py"),
        f"camri-tune {metadata.version('camri-tune')}",
    ]


def test_every_version_is_in_the_changelog() -> None:
    assert f"## {metadata.version('camri-tune')}" in (REPOSITORY / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_can_be_shown_for_a_shell(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_CAMRI_TUNE_COMPLETE", f"source_{shell}")
    done = camri_tune()
    assert done.returncode == 0, done.stderr
    assert "camri-tune" in done.stdout


def test_completion_is_installed_where_bash_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    done = camri_tune("--install-completion", "bash")
    assert done.returncode == 0, done.stderr
    assert "camri-tune" in (tmp_path / ".bashrc").read_text()
