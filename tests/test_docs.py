"""What the README and docs/ tell people to type is typed here, and their links lead somewhere."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer.core
import typer.main

import camri_tune as package
from camri_tune.cli import app
from tests.command import camri_tune

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "deploy" / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
# So small that a study takes seconds; whether it finds anything is not what is asked here.
SMALL = ["--epochs", "1", "--trials", "1", "--seeds", "1", "--limit", "200", "--tolerance", "100", "--quiet"]
SMALL += ["--learning-rate", "0.004"]  # instead of a search for the baseline's
# Of these only the options are read: they wait for a browser or other workers, need servers or hours of data, or are
# patterns with a NAME to be filled in.
_SHOWN = re.compile(r"…|\b[A-Z]{4,}\b|path/to|labels.csv|scans.npz|gtsrb|cifar10|mnist|awa2|dashboard|worker|figures")


def _blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def _commands(page: Path) -> list[list[str]]:
    """The arguments of every `camri-tune …` in a page's shell blocks, in order."""
    found = []
    for block in _blocks(page, "sh"):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            for part in re.sub(r"\s#.*", "", line).split(";"):
                words = shlex.split(part, comments=True)
                while words and "=" in words[0]:  # variables of the environment
                    words.pop(0)
                if words and words[0] == "camri-tune":
                    found.append(words[1:])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_options_of_every_command_exist(page: Path) -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    for words in _commands(page):
        group.commands[words[0]].make_context(words[0], words[1:])


@pytest.mark.parametrize("page", [page for page in PAGES if _commands(page)], ids=lambda page: page.stem)
def test_every_command_that_can_run_here_does(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the page's order, in one folder, after its Python, which makes files of data."""
    _run_python(page, tmp_path)
    shutil.copytree(REPOSITORY / "studies", tmp_path / "studies")
    monkeypatch.chdir(tmp_path)
    for words in _commands(page):
        if _SHOWN.search(shlex.join(words)):
            continue
        done = camri_tune(*words, *(SMALL if words[0] in ("run", "compare") else []))
        assert done.returncode == 0, (words, done.stderr)


@pytest.mark.parametrize("page", [page for page in PAGES if _blocks(page, "python")], ids=lambda page: page.stem)
def test_every_piece_of_python_runs(page: Path, tmp_path: Path) -> None:
    """One after the other, as in a notebook; whole studies, which stand behind `__main__`, are only read."""
    _run_python(page, tmp_path)


def _run_python(page: Path, folder: Path) -> None:
    setting = "import torch\nembeddings, labels = torch.randn(8, 256), torch.arange(8)\n__name__ = 'docs'\n"
    code = setting + "\n".join(_blocks(page, "python"))
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target:
            assert (page.parent / target.split("#")[0]).exists(), target


def test_every_page_can_be_found_from_the_readme() -> None:
    text = (REPOSITORY / "README.md").read_text()
    assert all(f"docs/{page.name}" in text for page in (REPOSITORY / "docs").glob("*.md"))


def test_the_reference_is_built_from_docstrings(tmp_path: Path) -> None:
    """By the command that the page names: every public name has an entry that says something."""
    text = (REPOSITORY / "docs" / "python.md").read_text()
    (modules,) = re.findall(r"^pdoc (.+)$", text, flags=re.MULTILINE)
    built = [sys.executable, "-m", "pdoc", *modules.split(), "-o", tmp_path]
    done = subprocess.run(built, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warn" not in done.stderr, done.stderr
    pages = {module: (tmp_path / f"{module.replace('.', '/')}.html").read_text() for module in modules.split()}
    for name in package.__all__:
        (page,) = [page for page in pages.values() if f'<section id="{name}">' in page]
        entry = page.partition(f'<section id="{name}">')[2].partition("<section")[0]
        said = " ".join(re.sub(r"<[^>]*>", " ", entry.partition('class="docstring"')[2]).split())
        assert len(said) > 50, name
