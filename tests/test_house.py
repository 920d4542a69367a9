"""The house rules: style, types, and imports that only point down."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "camri_tune"
# Top to bottom; a module may import only from lines below its own.
FLOORS = [
    {"cli"},
    {"pipeline", "comparison"},
    {"export", "predict"},
    {"report", "stages", "figures"},
    {"study_page", "study_note", "console", "dashboard", "ray_workers"},
    {"ray_foreman"},
    {"evaluation", "worker", "workers", "tables", "pages", "charts", "error_charts"},
    {"overview", "trials"},
    {"objective"},
    {"search", "selection", "claims", "table1"},
    {"constraint_claims"},
    {"storage", "baseline"},
    {"answers"},
    {"bundle", "plane"},
    {"training", "pretrained"},
    {"models", "datasets"},
    {"sources", "torch_data"},
    {"arrays", "muon", "checkpoint"},
    {"listed", "optimizers"},
    {"folders"},
    {"progress"},
    {"result"},
    {"counts", "duplicates"},
    {"constraints"},
    {"augmentation", "backbones", "grouping", "images", "losses", "splits", "records", "differences", "recording"},
    {"evidence", "chart_style", "prefork", "own_networks"},
    {
        "metrics",
        "calibration",
        "stats",
        "posthoc",
        "config",
        "database",
        "artifacts",
        "heartbeat",
        "memory",
    },
    {"errors", "files", "ranges", "interrupts"},
]


@pytest.mark.parametrize("arguments", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]])
def test_style_and_types(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("camri_tune."):
            names.add(node.module.removeprefix("camri_tune."))
    return names


def test_imports_only_point_down() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert modules == set().union(*FLOORS), "every module has its floor"
    for height, floor in enumerate(FLOORS):
        below = set().union(*FLOORS[height + 1 :])
        for module in floor:
            wrong = _imports(PACKAGE / f"{module}.py") - below - {module}
            assert not wrong, f"{module} imports {wrong}, which is not below it"


def test_few_rooms_know_optuna() -> None:
    knowing = {path.stem for path in PACKAGE.glob("*.py") if "import optuna" in path.read_text()}
    assert knowing <= {"search", "trials", "storage", "database", "dashboard", "objective"}


def test_the_readme_has_the_command_that_ci_runs() -> None:
    lines = (REPOSITORY / "README.md").read_text().splitlines()
    commands = [line for line in lines if line.startswith("python3 -m venv ")]
    assert len(commands) == 2
    assert commands[0].endswith("camri-tune run")
    assert "/pytest" in commands[1]
