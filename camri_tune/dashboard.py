"""The Optuna dashboard on a study: served, and seen through a view that knows the constraint.

optuna-dashboard 0.21 reads constraints in Optuna's old format alone and takes the highest value for the best trial:
every trial of ours is drawn as feasible, and an infeasible one stands as the best. `DashboardStorage` mends both.
"""

import errno
import functools
import math
import os
import socket
import socketserver
import sys
import warnings
from collections.abc import Callable, Container, Iterator, Sequence
from ipaddress import ip_address
from typing import Any, BinaryIO
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.storages import _CachedStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from camri_tune.artifacts import open_artifacts
from camri_tune.config import StudyConfig
from camri_tune.database import SqlStorage, Storage, masked
from camri_tune.errors import InputError
from camri_tune.records import ACCURACY, RECALL_CURVE
from camri_tune.storage import StudyStore

OLD_CONSTRAINTS = "constraints"  # a list; the new format is one attribute for each, `constraints:KEY`
UNSHOWN = ("confusion", RECALL_CURVE)  # long tables on one line, which squeeze a trial's page
UNKNOWN_CONSTRAINT = 1.0  # shown of a trial that lacks it: all of accuracy below the floor


class DashboardStorage(_CachedStorage):
    """A storage as the dashboard should see it, on top of Optuna's own cache of finished trials. Writes pass through.

    Trials are handed out with the old list of constraints besides the new format. One that has ended in a study with
    constraints, but lacks its own, is handed out as infeasible. Raises InputError for a proxy.
    """

    def __init__(self, backend: Storage) -> None:
        if not isinstance(backend, SqlStorage):
            raise InputError(
                f"storage {masked(backend.url)} is a proxy: the dashboard needs the database itself, as --storage"
            )
        super().__init__(backend)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[OptunaState] | None = None
    ) -> list[FrozenTrial]:
        trials = super().get_all_trials(study_id, deepcopy=deepcopy)
        attributes = self.get_study_user_attrs(study_id)
        ours = "identity" in attributes
        constrained = ours or any(map(_constraints, trials))
        baseline = attributes.get("baseline", {}) if ours else {}
        asked = [constraint["name"] for constraint in baseline.get("constraints", ())]
        return [_shown(trial, constrained, asked) for trial in trials if states is None or trial.state in states]

    def get_trial(self, trial_id: int) -> FrozenTrial:
        return _shown(super().get_trial(trial_id), constrained=False)

    def get_best_trial(self, study_id: int) -> FrozenTrial:
        """The best feasible trial of a study with constraints; of equal values the more accurate, then the earlier.

        Where nothing is feasible, the best that is not: Optuna leaves it to the caller to look at the constraints.
        """
        trials = self.get_all_trials(study_id, deepcopy=False)
        directions = self.get_study_directions(study_id)
        complete = [trial for trial in trials if trial.state == OptunaState.COMPLETE]
        if len(directions) > 1 or not any(trial.constraints for trial in complete):
            return super().get_best_trial(study_id)
        sign = 1 if directions[0] == StudyDirection.MAXIMIZE else -1
        return max(
            [trial for trial in complete if _is_feasible(trial)] or complete,
            key=lambda t: (sign * (t.value or 0.0), t.user_attrs.get("accuracy", -math.inf), -t.number),
        )

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        # The dashboard renames a study by copying the trials that it was handed.
        if isinstance(template_trial, _ShownTrial):
            template_trial = template_trial.stored
        return super().create_new_trial(study_id, template_trial)


class _ShownTrial(FrozenTrial):
    """A trial as the dashboard should see it; `stored` is the one in the database."""

    stored: FrozenTrial

    @classmethod
    def of(cls, stored: FrozenTrial, constraints: Sequence[float]) -> "_ShownTrial":
        shown = cls.__new__(cls)
        shown.__dict__.update(stored.__dict__)
        shown.stored = stored
        shown.user_attrs = {key: value for key, value in stored.user_attrs.items() if key not in UNSHOWN}
        if constraints:
            # Optuna warns where a new constraint is called like an index of the old list.
            indices = {f"{OLD_CONSTRAINTS}:{index}" for index in range(len(constraints))}
            system = {key: value for key, value in stored.system_attrs.items() if key not in indices}
            # JSON, and with it the page, knows no infinity.
            limit = sys.float_info.max
            system[OLD_CONSTRAINTS] = [min(max(float(value), -limit), limit) for value in constraints]
            shown.system_attrs = system
        return shown


def _constraints(trial: FrozenTrial) -> dict[str, float]:
    """A trial's constraints in the new format, in the order of their names."""
    prefix = f"{OLD_CONSTRAINTS}:"
    return {
        key.removeprefix(prefix): value for key, value in sorted(trial.system_attrs.items()) if key.startswith(prefix)
    }


def _shown(trial: FrozenTrial, constrained: bool, asked: Sequence[str] = ()) -> FrozenTrial:
    """A trial of a study with constraints, perhaps, and with those that were `asked` beside accuracy's."""
    if OLD_CONSTRAINTS in trial.system_attrs:
        return _ShownTrial.of(trial, [])
    found = _constraints(trial)
    if constrained and trial.state in (OptunaState.COMPLETE, OptunaState.PRUNED):
        missing = [name for name in (asked if found else [ACCURACY, *asked]) if name not in found]
        found = dict(sorted({**found, **dict.fromkeys(missing, UNKNOWN_CONSTRAINT)}.items()))
    return _ShownTrial.of(trial, list(found.values()))


def _is_feasible(shown: FrozenTrial) -> bool:
    """Every constraint met; Optuna itself takes a missing one for a met one."""
    return all(value <= 0 for value in shown.system_attrs.get(OLD_CONSTRAINTS, [UNKNOWN_CONSTRAINT]))


class StudyArtifacts:
    """Artifacts of a study, and of the others in its storage as far as this machine reaches them. To be read only.

    A trial that has ended keeps what it says of its checkpoint: to delete that file would break its export.
    """

    def __init__(self, store: StudyStore) -> None:
        self._store = store
        self._open = functools.cache(open_artifacts)  # a page asks for several, and a client of S3 takes its time

    def open_reader(self, artifact_id: str) -> BinaryIO:
        for url in self._urls():
            try:
                return self._open(url).open_reader(artifact_id)
            except (ArtifactNotFound, OSError, InputError):  # a place that is not ours to read is as good as none
                continue
        raise ArtifactNotFound(f"{artifact_id} is in no place of artifacts that this machine reaches")

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        self._refuse()

    def remove(self, artifact_id: str) -> None:
        self._refuse()

    def _urls(self) -> Iterator[str]:
        yield self._store.artifacts_url
        for study in self._store.storage.get_all_studies():
            try:
                yield StudyConfig.build(study.user_attrs["config"]).artifacts_url
            except (KeyError, TypeError, InputError):  # a study of somebody else's
                continue

    def _refuse(self) -> None:
        import bottle  # noqa: PLC0415

        raise bottle.HTTPError(403, "artifacts are read only in camri-tune dashboard")


def application(store: StudyStore) -> Any:
    """optuna-dashboard's WSGI application on the storage of `store`, with what it gets wrong mended."""
    import optuna_dashboard  # noqa: PLC0415

    app = optuna_dashboard.wsgi(DashboardStorage(store.storage), artifact_store=StudyArtifacts(store))
    app.install(_mend)
    return app


def _mend(view: Callable[..., Any]) -> Callable[..., Any]:
    """Around each view of the dashboard: an infeasible trial is no best trial, a missing file is not found."""
    import bottle  # noqa: PLC0415

    def mended(*arguments: Any, **options: Any) -> Any:
        try:
            answer = view(*arguments, **options)
        except ArtifactNotFound as error:
            return bottle.HTTPError(404, str(error))
        if isinstance(answer, dict) and "best_trials" in answer:
            best = [trial for trial in answer["best_trials"] if all(value <= 0 for value in trial["constraints"])]
            # Out of the dashboard they come in another order with each start.
            figures = sorted(answer["plotly_graph_objects"], key=lambda figure: str(figure["id"]))
            return {**answer, "best_trials": best, "plotly_graph_objects": figures}
        return answer

    return mended


def serve(store: StudyStore, *, host: str, port: int) -> None:
    """Serve the dashboard until Ctrl-C, its URL on standard output. Port 0 is any free one.

    Raises InputError where it cannot listen there.
    """
    # The page asks for importances again and again, and few trials are nothing to warn of.
    warnings.filterwarnings("ignore", message="Some regimes for parameter")
    app = application(store)
    with _listen(host, port) as server:
        address, port = server.socket.getsockname()[:2]
        local = ip_address(address).is_loopback
        server.set_app(_for_this_machine(app) if local else app)
        if not local:
            _say(
                f"warning: --host {host} lets other machines in, and there is no login: anyone who can reach port "
                f"{port} can read and delete the studies in this storage"
            )
        if ip_address(address).is_unspecified:
            address = "::1" if ":" in address else "127.0.0.1"
        place = f"[{address}]" if ":" in address else address
        _say(f"dashboard of study {store.name!r} in {masked(store.storage.url)}; Ctrl-C ends it")
        study_id = store.storage.get_study_id_from_name(store.name)
        print(f"http://{place}:{port}/dashboard/studies/{study_id}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            _say("dashboard ended")


def _for_this_machine(app: Any) -> Any:
    """Refuse requests to any other name: a web page whose name was made to lead here could delete studies."""

    def guarded(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        if urlsplit(f"//{environ.get('HTTP_HOST', '')}").hostname in ("localhost", "127.0.0.1", "::1"):
            return app(environ, start_response)
        start_response("403 Forbidden", [("Content-Type", "text/plain")])
        return [b"camri-tune dashboard answers to localhost and 127.0.0.1 only, unless --host says otherwise\n"]

    return guarded


def _say(text: str) -> None:
    print(f"camri-tune: {text}", file=sys.stderr, flush=True)


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    """A page asks for several things at once, and a slow answer must not hold up the others."""

    daemon_threads = True

    def server_bind(self) -> None:
        # The base class asks the name service who we are, which can take seconds, and nobody needs to know.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a browser that left
            super().handle_error(request, client_address)


class _ServerOfIPv6(_Server):
    address_family = socket.AF_INET6


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """No line for each request: what goes wrong is logged by the application."""


def _listen(host: str, port: int) -> _Server:
    if not host:  # which the system takes for every address there is
        raise InputError("--host is '', but must be an address; give 127.0.0.1 for this machine alone")
    try:
        return (_ServerOfIPv6 if ":" in host else _Server)((host, port), _QuietHandler)
    except (OSError, UnicodeError) as error:  # the latter from a name that no machine can have
        code = error.errno if isinstance(error, OSError) and not isinstance(error, socket.gaierror) else None
        if code in (None, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            raise InputError(
                f"--host {host!r} is not an address of this machine; give 127.0.0.1 for this machine alone"
            ) from None
        reason = "is in use" if code == errno.EADDRINUSE else f"cannot be listened on ({os.strerror(code)})"
        raise InputError(f"--port {port} {reason} on {host}; give another --port, or 0 for any free one") from None
