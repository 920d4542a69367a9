"""camri-tune: raise the recall of the class that must not be missed, keep accuracy, and prove both."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from camri_tune.bundle import load
    from camri_tune.config import StudyConfig
    from camri_tune.pipeline import run
    from camri_tune.result import Result

__all__ = ["Result", "StudyConfig", "load", "run"]


def __getattr__(name: str) -> object:
    # Importing the package must not cost the seconds that torch takes: the command's help does not need it.
    if name == "run":
        from camri_tune.pipeline import run  # noqa: PLC0415

        return run
    if name == "load":
        from camri_tune.bundle import load  # noqa: PLC0415

        return load
    if name == "StudyConfig":
        from camri_tune.config import StudyConfig  # noqa: PLC0415

        return StudyConfig
    if name == "Result":
        from camri_tune.result import Result  # noqa: PLC0415

        return Result
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
