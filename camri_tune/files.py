"""Files written whole or not at all, and known by their digest."""

import functools
import hashlib
import os
from importlib.metadata import version
from pathlib import Path


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def own_path(path: str | Path) -> Path:
    """A file's absolute path, of a link its own: what that leads to may have another ending, as in a hub's cache.

    Links among the folders are followed, for `..` means the parent of what they lead to.
    """
    path = Path(path)
    whole = path.name in ("", "..")
    # Not by Path.resolve, to which a circle of links is an error.
    return Path(os.path.realpath(path)) if whole else Path(os.path.realpath(path.parent)) / path.name


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def is_writable_folder(folder: Path) -> bool:
    """Make `folder` and try a file in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError:
        return False
    return True


@functools.cache
def code_version() -> str:
    """Version of this package and a digest of its source, so that two checkouts of one version are told apart."""
    source = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        source.update(path.read_bytes())
    return f"{version('camri-tune')} ({source.hexdigest()[:8]})"
