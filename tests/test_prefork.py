"""Workers are forked from a process that has imported everything, and are as separate as if they had been started."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from camri_tune import prefork
from camri_tune.heartbeat import lives
from camri_tune.prefork import Forked, Forker, python_of
from tests.patience import wait_for

pytestmark = pytest.mark.skipif(not prefork.CAN_FORK, reason="workers are not forked on this system")


@pytest.fixture
def forker() -> Iterator[Forker]:
    forker = Forker("tests.forked")
    yield forker
    forker.close()


def _start(forker: Forker, log: Path, what: object, **environment: str) -> Forked:
    return forker.start([str(what)], {"PATH": os.environ["PATH"], **environment}, log)


def test_a_forked_process_is_one_of_its_own(forker: Forker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = tmp_path / "log"
    log.write_text("before\n")
    process = _start(forker, log, 3, MARK="ü = 1")
    assert process.wait(60) == 3
    assert process.poll() == 3
    before, imported_in, parent, own, group, folder, mark, _ = log.read_text().splitlines()
    assert before == "before"
    assert int(imported_in) == int(parent) == forker.pid
    assert int(own) == int(group) == process.pid != forker.pid
    assert Path(folder) == tmp_path
    assert mark == "ü = 1"


def test_no_file_of_the_current_folder_stands_in_for_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a folder may be a data set that somebody sent."""
    for name in ("tomllib", "csv", "queue", "random", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('this is not yours to run')\n")
    monkeypatch.chdir(tmp_path)
    forker = Forker("tests.forked")
    try:
        assert _start(forker, tmp_path / "log", 3).wait(60) == 3
    finally:
        forker.close()
    done = subprocess.run([*python_of(prefork.MODULE)], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_nothing_of_the_environment_is_left_over(
    forker: Forker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _start(forker, tmp_path / "first", 0, MARK="a").wait(60)
    monkeypatch.setenv("MARK", "of this process")
    _start(forker, tmp_path / "second", 0).wait(60)
    assert [(tmp_path / name).read_text().splitlines()[5] for name in ("first", "second")] == ["a", "None"]


def test_many_live_at_once_and_draw_different_numbers(forker: Forker, tmp_path: Path) -> None:
    logs = [tmp_path / str(number) for number in range(8)]
    processes = [_start(forker, log, code) for code, log in enumerate(logs)]
    assert [process.wait(60) for process in processes] == list(range(8))
    assert len({log.read_text().splitlines()[-1] for log in logs}) == 8


@pytest.mark.parametrize(
    ("what", "code", "said"), [("fail", 1, "LookupError: nothing to be found"), ("die", -signal.SIGKILL, "")]
)
def test_how_it_ended_is_told(what: str, code: int, said: str, forker: Forker, tmp_path: Path) -> None:
    assert _start(forker, tmp_path / "log", what).wait(60) == code
    assert said in (tmp_path / "log").read_text()


def test_it_is_signalled_and_waited_for_in_vain(forker: Forker, tmp_path: Path) -> None:
    process = _start(forker, tmp_path / "log", "wait")
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == -signal.SIGTERM
    process.send_signal(signal.SIGKILL)  # to nobody: its number may be another's by now
    assert process.wait(60) == -signal.SIGTERM


def test_a_log_that_cannot_be_written_ends_it_and_not_the_forker(forker: Forker, tmp_path: Path) -> None:
    assert _start(forker, tmp_path / "absent" / "log", 0).wait(60) == 1
    assert _start(forker, tmp_path / "log", 0).wait(60) == 0


def test_a_forker_that_is_killed_leaves_what_lives_and_says_so(forker: Forker, tmp_path: Path) -> None:
    process = _start(forker, tmp_path / "log", "wait")
    os.kill(forker.pid, signal.SIGKILL)
    wait_for(lambda: (process.poll() is None and forker.gone) or None, seconds=60)
    with pytest.raises(OSError, match="has ended"):
        _start(forker, tmp_path / "log", 0)
    assert process.poll() is None, "it lives"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == -signal.SIGKILL, "nobody knows how"


def test_a_module_that_cannot_be_imported_is_no_forker(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    forker = Forker("tests.no_such_module")
    with pytest.raises(OSError, match="has ended"):
        _start(forker, tmp_path / "log", 0)
    forker.close()
    assert "no_such_module" in capfd.readouterr().err


def test_it_ends_with_whoever_began_it(tmp_path: Path) -> None:
    code = (
        "from camri_tune.prefork import Forker; print(Forker('tests.forked').pid, flush=True); import os; os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    wait_for(lambda: not lives(int(done.stdout)) or None, seconds=60)


def test_one_is_at_hand_once_and_then_no_more() -> None:
    prefork.begin()
    first = prefork._forker
    assert first is not None
    with prefork.at_hand():
        assert prefork._forker is first, "the one that was begun early"
    wait_for(lambda: not lives(first.pid) or None, seconds=60)
    assert prefork._forker is None


def test_a_process_with_no_other_threads_is_forked() -> None:
    """Else one of them could hold a lock that nobody gives back in the forked process."""
    code = (
        f"import os, torch; from {prefork.MODULE} import import_sql; import_sql(); "
        "print(len(os.listdir('/proc/self/task')) + torch.cuda.is_initialized())"
    )
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) == 1


def test_it_imports_what_it_is_told_before_it_forks(forker: Forker, tmp_path: Path) -> None:
    """A library of networks takes seconds. One that is not there is no reason to end: the run says it."""
    forker.tell({"import": "no_such_module"})
    forker.tell({"import": "colorsys"})
    process = _start(forker, tmp_path / "log", "modules")
    assert process.wait(60) == 0
    assert "colorsys" in (tmp_path / "log").read_text().split()
