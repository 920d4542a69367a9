"""What several test modules share: a cache of their own, the real data sets, small image folders."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest
from filelock import FileLock
from PIL import Image

from camri_tune.config import StudyConfig
from camri_tune.database import open_storage
from camri_tune.datasets import Dataset, open_dataset
from tests.database_server import DatabaseServer, database_server, find_server

if TYPE_CHECKING:
    from playwright.sync_api import Browser

REPOSITORY = Path(__file__).parents[1]
UNPACK = REPOSITORY.parent / "shared" / "data" / "unpack"

MakeFolder = Callable[[Mapping[str, int]], Path]


@pytest.fixture(scope="session", autouse=True)
def _shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's image cache is not the tests' to fill, and what it holds must not decide them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAMRI_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def digits() -> Dataset:
    """The whole data set, to be read alone; some modules have a smaller one of this name."""
    return open_dataset(StudyConfig())


def _real_data(name: str, folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the data set `name` lies in `folder`: CAMRI_DATA, or unpacked from the shared archive."""
    named = os.environ.get("CAMRI_DATA")
    if named and (Path(named) / folder).is_dir():
        return Path(named)
    if not UNPACK.exists():
        _not_here(
            f"the real images of {name} are not here: set CAMRI_DATA to the folder that holds {folder!r} "
            f"(it is {named!r}), or put the archive's unpack script at ../shared/data/unpack"
        )
    # Parallel test processes have base folders of their own under one parent: they unpack once.
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with FileLock(shared / "unpack.lock"):
        subprocess.run([str(UNPACK), str(shared / "data"), name], check=True)
    return shared / "data"


def _not_here(reason: str) -> NoReturn:
    """What a test needs is missing: no reason to fail on somebody's laptop, but one where everything is installed."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def gtsrb_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds `gtsrb/`."""
    return _real_data("gtsrb", "gtsrb", tmp_path_factory)


@pytest.fixture(scope="session")
def mnist_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds `MNIST/`."""
    return _real_data("mnist", "MNIST", tmp_path_factory)


@pytest.fixture(scope="session")
def cifar10_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds `cifar10/`."""
    return _real_data("cifar10", "cifar10", tmp_path_factory)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with tables and no study. To make the tables takes longer than most tests that need one."""
    path = tmp_path_factory.mktemp("empty") / "study.db"
    open_storage(f"sqlite:///{path}").close()
    return path


@pytest.fixture(scope="session")
def browser() -> Iterator["Browser"]:
    """Debian's Chromium, headless."""
    executable = shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright  # noqa: PLC0415
    except ImportError:
        _not_here("no browser: pip install playwright")
    if executable is None:
        _not_here("no browser: apt-get install chromium")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    arguments += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[DatabaseServer]:
    """A PostgreSQL server of the tests' own. Whoever stops it starts it again."""
    programs = find_server()
    if programs is None:
        _not_here("no PostgreSQL server: apt-get install postgresql")
    with database_server(programs, "-c", "fsync=off") as server:
        yield server


@pytest.fixture(scope="session")
def postgres(postgres_server: DatabaseServer) -> str:
    """URL of a database, with a password, on that server."""
    return postgres_server.url


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        command = ["mount", "-t", "tmpfs", "-o", "size=1m", "camri-test", str(folder)]
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        _not_here(f"no small disk to fill: only root may mount one ({getattr(error, 'stderr', error)})")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty image cache for one test."""
    folder = tmp_path / "image-cache"
    monkeypatch.setenv("CAMRI_CACHE", str(folder))
    return folder


@pytest.fixture
def image_folder(tmp_path: Path, own_cache: Path) -> MakeFolder:
    """Make class folders: `image_folder({"train/cat": 3})`. Every image is 8x8, of one colour that no other has.

    The test gets a cache of its own, because such folders differ little in names and sizes.
    """
    folders = 0

    def make(counts: Mapping[str, int]) -> Path:
        nonlocal folders
        folders += 1
        root = tmp_path / f"images-{folders}"
        colour = 0
        for name, count in counts.items():
            (root / name).mkdir(parents=True)
            for index in range(count):
                colour += 1
                Image.new("RGB", (8, 8), (folders, *divmod(colour, 256))).save(root / name / f"{index:03}.png")
        return root

    return make
