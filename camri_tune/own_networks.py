"""Networks of the user's own, called `package.module:factory`.

To import a module executes it. That is only done to what somebody has named to this very process: with `--model`, or in
Python. A name in a study file, a storage or an exported model, which may come from anybody, opens nothing.
"""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from camri_tune.config import Model, is_own_model, printable, require_model_name
from camri_tune.errors import InputError
from camri_tune.files import sha256

# By which a run tells its workers which one it was given, and the folder that it was imported from.
MODEL_VARIABLE, FOLDER_VARIABLE = "CAMRI_TUNE_MODEL", "CAMRI_TUNE_MODEL_FOLDER"
_allowed: set[Model] = set()
# Files of modules: the spec that a module was imported by, which importlib.reload replaces, and the SHA-256 then.
_imported: dict[str, tuple[object, str]] = {}


def allow(name: Model | None, *, folder: str | None = None) -> None:
    """Let this process import the user's own network `name`; names of other networks and None need no leave.

    Its module is also looked for in `folder`, by default the current one. Raises InputError for what is no name.
    """
    if name is None:
        return
    try:
        require_model_name(name)
    except ValueError as error:
        raise InputError(f"--model is {printable(repr(name))}, but {error}") from None
    if is_own_model(name):
        _allowed.add(name)
        if (place := folder or os.getcwd()) not in sys.path:
            sys.path.append(place)  # last, so that nothing there stands in for what is installed


def allowed(name: Model) -> Model | None:
    """The name itself where it is one that this process may import, for processes that it starts."""
    return name if name in _allowed else None


def factory_of(name: Model) -> Callable[[], Any]:
    """Import the user's own network `name`. Raises InputError where nobody allowed that, or where it is not there."""
    if name not in _allowed:
        raise InputError(
            f"network {name!r} is code, which is not executed because a file or a storage names it: give --model "
            f"{name} if you trust it"
        )
    place, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(place)
    except (Exception, SystemExit) as error:  # whatever a module of somebody's may raise
        raise InputError(
            f"network {name!r}: module {place!r} cannot be imported ({reason_of(error)}); start where it lies, or "
            f"install it"
        ) from None
    factory: Any = getattr(module, attribute, None)
    if not callable(factory):
        raise InputError(
            f"network {name!r}: module {place!r} has no function {attribute!r}, which is called without arguments and "
            f"returns a module; name one that it has"
        )
    for file, spec in _files_of(name, factory).items():
        if file not in _imported or _imported[file][0] is not spec:
            _imported[file] = spec, sha256(Path(file))
    return factory  # type: ignore[no-any-return]


def _files_of(name: Model, factory: Callable[[], Any]) -> dict[str, object]:
    """The file of the module that is named, and of the one that the function is from; none that they import.

    Each with the spec that its module was imported by.
    """
    names = dict.fromkeys([name.partition(":")[0], getattr(factory, "__module__", None)])
    modules = [sys.modules.get(module or "") for module in names]
    found = {getattr(module, "__file__", None): getattr(module, "__spec__", None) for module in modules}
    return {file: spec for file, spec in found.items() if file and os.path.isfile(file)}


def identified(name: Model) -> str:
    """A network's name, for one of the user's own with the SHA-256 of its code: altered, it is another network.

    Raises InputError where it was altered since this process imported it, which goes on with what it was.
    """
    if not is_own_model(name):
        return name
    digests = {file: sha256(Path(file)) for file in _files_of(name, factory_of(name))}
    for file, digest in digests.items():
        if digest != _imported[file][1]:
            raise InputError(
                f"network {name!r}: {file!r} has changed since this process imported it; reload the module, or "
                f"start the process (the notebook's kernel) again"
            )
    return f"{name} ({', '.join(digests.values())})"


def folder_of(name: Model) -> str:
    """The folder that a network of the user's own is imported from, for processes elsewhere on this machine."""
    factory_of(name)
    module = sys.modules[name.partition(":")[0].partition(".")[0]]
    file, inner = getattr(module, "__file__", None), list(getattr(module, "__path__", []))
    place = inner[0] if inner else file
    return os.path.dirname(os.path.abspath(place)) if place else os.getcwd()


def reason_of(error: BaseException) -> str:
    """What went wrong in code of somebody's, in a line."""
    return printable(" ".join(f"{type(error).__name__}: {error}".split()), 160)
