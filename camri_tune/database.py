"""The database through which a study's processes meet: SQLite, a database server, or Optuna's gRPC proxy before one.

Optuna's storages do the work. Added here is what days on many machines ask for: transactions of SQLite that no other
process can come between, patience with a server that restarts, and messages without passwords.
"""

import functools
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import optuna
import sqlalchemy
from optuna.storages import GrpcStorageProxy, RDBStorage
from optuna.trial import TrialState as OptunaState

from camri_tune.errors import InputError, StorageError
from camri_tune.interrupts import held_back

STORAGE_VARIABLE = "CAMRI_STORAGE"  # a password in the URL must not stand on a command line
PATIENCE_SECONDS = 600.0  # what a server may take to come back
LONGEST_WAIT_SECONDS = 5.0  # between two tries
_LOG = logging.getLogger(__name__)
# What Optuna's storages offer that talks to the database, but for adding a trial: done again it would be one too many,
# and whoever adds one looks first whether it is there (StudyStore.enqueue).
_METHODS = (
    "create_new_study",
    "delete_study",
    "set_study_user_attr",
    "set_study_system_attr",
    "get_study_id_from_name",
    "get_study_name_from_id",
    "get_study_directions",
    "get_study_user_attrs",
    "get_study_system_attrs",
    "get_all_studies",
    "set_trial_param",
    "set_trial_state_values",
    "set_trial_intermediate_value",
    "set_trial_user_attr",
    "set_trial_system_attr",
    "get_trial_id_from_study_id_trial_number",
    "get_trial",
    "get_all_trials",
    "_get_trials",
    "_set_trial_param",
    "_get_best_trial_id",
)
Result = TypeVar("Result")
_Class = TypeVar("_Class", bound=type)


def masked(url: str) -> str:
    """The URL without passwords: none of its login, and nothing of what its query says, where drivers look for many."""
    if not url:
        return "''"
    try:
        parsed = sqlalchemy.engine.make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        return "(unreadable URL)"
    if _misread(parsed) or (parsed.host and "@" in str(parsed.query)):
        return "(unreadable URL)"
    query = dict.fromkeys(parsed.query, "...")
    return parsed.set(query=query).render_as_string(hide_password=True)


def _misread(url: sqlalchemy.URL) -> str | None:
    """The sign of its login that was taken for the end of another part, and how to write it; None: there is none."""
    if "@" in (url.host or ""):
        return "an @ in its password must be written as %40"
    if "@" in (url.database or "") and url.host:  # of a file it is part of the name
        return "a / in its login must be written as %2F"
    return None


def patiently(call: Callable[[], Result], url: str) -> Result:
    """What `call` returns, once the database at `url` answers again should it not do so now.

    Raises StorageError where it stays away for `PATIENCE_SECONDS`, or has no space left.
    """
    start, wait, told = time.monotonic(), 0.01, False
    while True:
        try:
            with held_back():
                return call()
        except Exception as error:
            trouble = _trouble(error, url)
            if trouble is None:
                raise
            temporary, reason = trouble
            if not temporary:
                raise StorageError(
                    f"storage {masked(url)} cannot be used ({reason}): mend that, free space perhaps, and give the "
                    f"same command, which resumes"
                ) from None
            if time.monotonic() - start > PATIENCE_SECONDS:
                raise StorageError(
                    f"storage {masked(url)} did not answer for {PATIENCE_SECONDS / 60:.0f} minutes ({reason}); the "
                    f"same command resumes"
                ) from None
            if not told and wait > 1:  # not for a lock of milliseconds
                told = True
                _LOG.warning("storage %s does not answer (%s); trying again", masked(url), reason)
        time.sleep(wait * random.uniform(0.5, 1.0))  # or those who collided would collide again
        wait = min(2 * wait, LONGEST_WAIT_SECONDS)


def _reason(error: Exception, url: str) -> str:
    """What a database's driver said, or whoever else complained, in a line without the password."""
    said = str(getattr(error, "orig", error)).splitlines()[0]
    return said.replace(url, masked(url)) if url else said


def _trouble(error: BaseException, url: str) -> tuple[bool, str] | None:
    """Whether trouble with the database may pass, and what it is; None where the error is another."""
    causes = [error]
    # Optuna goes on with a connection that has just broken, and then speaks of a transaction: hence the context, too.
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    for cause in causes:
        if isinstance(cause, sqlalchemy.exc.OperationalError | sqlalchemy.exc.InterfaceError):
            reason = _reason(cause, url)
            full = getattr(cause.orig, "sqlstate", None) == "53100"  # PostgreSQL: disk full
            sqlite = url.startswith("sqlite")
            return (not full and (not sqlite or "locked" in reason), reason)
        if isinstance(cause, sqlalchemy.exc.TimeoutError):  # all connections are in use
            return True, "no free connection"
        if type(cause).__module__.startswith("grpc") and hasattr(cause, "code"):
            name = getattr(cause.code(), "name", "")
            return (True, f"the proxy says {name}") if name in ("UNAVAILABLE", "UNKNOWN", "DEADLINE_EXCEEDED") else None
    return None


def _patient(storage: _Class) -> _Class:
    """Let every method of a storage wait for its database."""

    def waiting(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(self: Any, *arguments: Any, **options: Any) -> Any:
            return patiently(lambda: method(self, *arguments, **options), self.url)

        return call

    for name in _METHODS:
        if hasattr(storage, name):
            setattr(storage, name, waiting(getattr(storage, name)))
    return storage


@_patient
class SqlStorage(RDBStorage):
    """A database that SQLAlchemy reaches. `url` is its address, which may hold a password."""

    def waiting(self, study_ids: list[int]) -> list[tuple[int, int]]:
        """Study and id of trials that wait, in the order in which they were queued: one small query for all studies."""
        query = sqlalchemy.text(
            "SELECT study_id, trial_id FROM trials WHERE state = :state AND study_id IN :studies ORDER BY trial_id"
        ).bindparams(sqlalchemy.bindparam("studies", expanding=True))

        def ask() -> list[tuple[int, int]]:
            with self.engine.connect() as connection:
                rows = connection.execute(query, {"state": OptunaState.WAITING.name, "studies": study_ids})
                return [(study, trial) for study, trial in rows]

        return patiently(ask, self.url)

    def close(self) -> None:
        """Let go of its connections."""
        self.remove_session()
        self.engine.dispose()


@_patient
class ProxyStorage(GrpcStorageProxy):
    """Optuna's gRPC proxy, which should have a database server behind it. Nothing on its way is encrypted."""

    def __init__(self, url: str) -> None:
        parsed = _understood(url)
        assert parsed.host is not None
        assert parsed.port is not None
        self.url = url
        super().__init__(host=parsed.host, port=parsed.port)
        self.wait_server_ready(timeout=10)

    def waiting(self, study_ids: list[int]) -> list[tuple[int, int]]:
        """As of `SqlStorage`."""
        return [
            (study, trial._trial_id)
            for study in study_ids
            for trial in self.get_all_trials(study, deepcopy=False, states=(OptunaState.WAITING,))
        ]


Storage = SqlStorage | ProxyStorage


def open_storage(url: str, *, existing: bool = False) -> Storage:
    """Connect to the database at `url`, creating tables as needed. Raises InputError with the password masked.

    Of a server each process takes one connection, at times two or three, and looks whether they still live. Where
    an `existing` one is asked for, no file is made.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with _one_line_for(url):
        parsed = _understood(url)
        if url.startswith("grpc:"):
            return ProxyStorage(url)
        path = parsed.database or ""
        if existing and url.startswith("sqlite") and not (path.startswith("file:") or os.path.exists(path)):
            raise ValueError("there is no such file")
        try:
            return _open_sql(url)
        except sqlalchemy.exc.DBAPIError as error:
            if not isinstance(error, sqlalchemy.exc.IntegrityError) and "already exists" not in str(error.orig):
                raise
            time.sleep(random.uniform(1.0, 2.0))  # another process is making the tables at this very moment
            return _open_sql(url)


def import_sql() -> None:
    """Import what opening a database in a file imports, half a second's work: processes forked afterwards have it."""
    with suppress(ImportError):  # without SQLite a server's may do
        SqlStorage("sqlite://").close()


def require_sense(url: str) -> None:
    """Raise InputError where no database can be at `url`, however long one waits for it."""
    with _one_line_for(url):
        _understood(url)


@contextmanager
def _one_line_for(url: str) -> Iterator[None]:
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, ImportError, RuntimeError, ValueError, OSError, StorageError) as error:
        raise InputError(
            f"storage {masked(url)} cannot be opened ({_reason(error, url)}); give a SQLAlchemy URL such as sqlite:///study.db"
        ) from None


def _understood(url: str) -> sqlalchemy.URL:
    """The parts of a URL that leads somewhere, with a driver that is installed here."""
    parsed = sqlalchemy.engine.make_url(url)
    if advice := _misread(parsed):
        raise ValueError(advice)
    if url.startswith("grpc:"):
        if not parsed.host or not parsed.port or parsed.username or parsed.password or parsed.database:
            raise ValueError("it must be grpc://HOST:PORT and no more")
        return parsed
    parsed.get_dialect().import_dbapi()
    if url.startswith("sqlite") and parsed.database in (None, "", ":memory:"):
        raise ValueError("a database in memory cannot be shared with worker processes")
    return parsed


def _open_sql(url: str) -> SqlStorage:
    if not url.startswith("sqlite"):
        return SqlStorage(url, engine_kwargs={"pool_size": 1, "max_overflow": 2, "pool_pre_ping": True})
    # Workers of one study write at the same time: they wait for each other instead of failing.
    storage = SqlStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})
    sqlalchemy.event.listen(storage.engine, "connect", _tune_sqlite)
    # Optuna reads and then writes: within one transaction, which fails (and is tried again) where another process wrote
    # in between. Python's driver by itself begins a transaction at the first writing only.
    sqlalchemy.event.listen(storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    storage.engine.dispose()  # connections made so far lack the settings
    with storage.engine.connect():
        pass
    return storage


def _tune_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions are begun by the listener above
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()
