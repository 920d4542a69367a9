"""Run the installed command as a user does, and what its results must look like."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

COMMAND = Path(sys.executable).parent / "camri-tune"


def camri_tune(*arguments: object, cwd: Path | None = None, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run `camri-tune` to its end."""
    return subprocess.run(
        [str(COMMAND), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
        check=False,
    )


def result_of(done: "subprocess.CompletedProcess[str]") -> dict[str, Any]:
    """The JSON result on standard output, which holds nothing else."""
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def assert_one_line_error(done: "subprocess.CompletedProcess[str]", *parts: str) -> None:
    """Exit code 2 and one line on standard error that holds every one of `parts`."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("camri-tune: ")
    for part in parts:
        assert part in done.stderr
