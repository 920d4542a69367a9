"""camri-tune: raise the recall of the class that must not be missed, keep accuracy, and prove both."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from camri_tune.bundle import load
    from camri_tune.config import StudyConfig
    from camri_tune.objective import ConstrainedObjective
    from camri_tune.pipeline import run
    from camri_tune.result import Result

__all__ = ["ConstrainedObjective", "Result", "StudyConfig", "load", "run"]

_HOMES = {
    "ConstrainedObjective": "objective",
    "Result": "result",
    "StudyConfig": "config",
    "load": "bundle",
    "run": "pipeline",
}


def __getattr__(name: str) -> object:
    # Importing the package must not cost the seconds that torch takes: the command's help does not need it.
    if name in _HOMES:
        return getattr(import_module(f"camri_tune.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
