"""Run the installed command as a user does, and what its results must look like."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def started(*arguments: object) -> "Iterator[subprocess.Popen[str]]":
    """The command at work, killed at the latest when the block is left."""
    # As from a terminal: where the tests run as a background job, interrupts are ignored, and that is inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(
        [str(COMMAND), *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()
