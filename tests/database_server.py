"""A PostgreSQL server of our own, from Debian's packages, for tests and benchmarks: it can go away and come back."""

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy


class DatabaseServer:
    """Serves an empty database at `url`, which holds a password; `options` are the server's own."""

    def __init__(self, bin_folder: Path, folder: Path, options: Sequence[str] = ()) -> None:
        self._bin, self._folder, self._options = bin_folder, folder, options
        # PostgreSQL refuses to serve as root, and pytest's folders are closed to others: hence a folder of its own.
        self._user = "nobody" if os.geteuid() == 0 else getpass.getuser()
        password = secrets.token_hex(8)
        (folder / "password").write_text(password)
        for path in (folder, folder / "password"):
            shutil.chown(path, self._user)
        make = "--pgdata data --username tester --pwfile password --auth scram-sha-256 --encoding UTF8 --no-locale"
        initdb = [str(bin_folder / "initdb"), *make.split(), "--no-sync"]
        subprocess.run(initdb, user=self._user, cwd=folder, check=True, capture_output=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.url = f"postgresql+psycopg://tester:{password}@127.0.0.1:{self._port}/postgres"
        self.start()

    def start(self) -> None:
        """Serve, again at the same address."""
        self._process = subprocess.Popen(
            [str(self._bin / "postgres"), *f"-D data -p {self._port} -h 127.0.0.1 -k".split(), "", *self._options],
            user=self._user,
            cwd=self._folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        engine = sqlalchemy.create_engine(self.url)
        for _ in range(300):
            code = self._process.poll()
            assert code is None, f"the database server ended with exit code {code}"
            try:
                with engine.connect():
                    break
            except sqlalchemy.exc.OperationalError:
                time.sleep(0.1)
        else:
            raise TimeoutError("the database server did not answer within 30 s")
        engine.dispose()

    @property
    def pid(self) -> int:
        """Of its first process."""
        return self._process.pid

    def stop(self) -> None:
        """End it, without waiting for those who are connected."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(timeout=30)


def find_server() -> Path | None:
    """The folder of its programs; None where it is not installed."""
    server = shutil.which("postgres") or next(map(str, Path("/usr/lib/postgresql").glob("*/bin/postgres")), None)
    return None if server is None else Path(server).resolve().parent


@contextmanager
def database_server(bin_folder: Path, *options: str) -> Iterator[DatabaseServer]:
    """A server that runs meanwhile, its files deleted afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="camri-postgres-"))
    try:
        server = DatabaseServer(bin_folder, folder, options)
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)
