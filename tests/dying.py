"""A worker of a study that ends itself at a chosen place, by a real signal: what nobody can time from outside.

`python -m tests.dying PLACE STUDY STORAGE`. It trains the study's first trial whole, and dies in the second.
"""

import math
import os
import shutil
import signal
import sys
from collections.abc import Callable
from typing import IO, Any

from optuna.study import Study
from optuna.trial import Trial

from camri_tune import cli, heartbeat, trials

DOOMED = 1  # the number of the trial in which it dies


def _kill(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def _replace(owner: object, name: str, by: Callable[..., Any]) -> None:
    setattr(owner, name, by)


def after_the_claim() -> None:
    """Before it said who works on the trial."""
    enter = heartbeat.Heart.__enter__

    def dying(heart: heartbeat.Heart) -> heartbeat.Heart:
        storage: Any = heart._storage
        if storage.get_trial(heart._trial_id).number == DOOMED:
            _kill()
        return enter(heart)

    _replace(heartbeat.Heart, "__enter__", dying)


def in_an_epoch(number: int = signal.SIGKILL) -> None:
    """In the middle of the third, two being saved."""
    on_step, steps = trials._Run._on_step, 0

    def dying(run: trials._Run) -> None:
        nonlocal steps
        if run.trial.number == DOOMED and run.trial.user_attrs.get("resume", {}).get("epochs") == 2:
            steps += 1
            if steps == 3:
                _kill(number)
        on_step(run)

    _replace(trials._Run, "_on_step", dying)


def in_a_file(is_it: Callable[[str], bool]) -> None:
    """With half of it written, in a trial that had already saved its second epoch."""
    copy, save, doomed = shutil.copyfileobj, trials._Run._save_state, False

    def marking(run: trials._Run) -> None:
        nonlocal doomed
        doomed = run.trial.number == DOOMED and run.state is not None and run.state.epoch >= 2
        save(run)

    def dying(source: IO[bytes], target: IO[bytes], length: int = 0) -> None:
        if doomed and is_it(target.name):
            content = source.read()
            target.write(content[: len(content) // 2])
            target.flush()
            _kill()
        copy(source, target)

    _replace(trials._Run, "_save_state", marking)
    _replace(shutil, "copyfileobj", dying)


def between_constraint_and_result() -> None:
    tell = Study.tell

    def dying(study: Study, trial: Trial, *arguments: Any, **options: Any) -> Any:
        if trial.number == DOOMED:
            _kill()
        return tell(study, trial, *arguments, **options)

    _replace(Study, "tell", dying)


PLACES: dict[str, Callable[[], None]] = {
    "after the claim": after_the_claim,
    "in an epoch": in_an_epoch,
    "in a state's write": lambda: in_a_file(lambda name: "resume-" in name),
    "in a checkpoint's write": lambda: in_a_file(lambda name: "resume-" not in name),
    "between constraint and result": between_constraint_and_result,
    "SIGTERM": lambda: in_an_epoch(signal.SIGTERM),
    "SIGINT": lambda: in_an_epoch(signal.SIGINT),
}

if __name__ == "__main__":
    place, study, storage = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits that it is ignored
    trials.SAVE_SECONDS, trials.SAVE_SHARE = 0.0, math.inf  # after each epoch
    PLACES[place]()
    sys.argv[1:] = ["worker", "--study", study, "--storage", storage, "--threads", "1"]
    cli.main()
