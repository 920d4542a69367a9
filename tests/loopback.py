"""A web server of the tests' own, on the loopback: downloads run through the real code and never leave the machine."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Server(ThreadingHTTPServer):
    """Remembers what it was `asked` for."""

    asked: list[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def files_asked(self) -> set[str]:
        return {path.rpartition("/")[2] for path in self.asked}


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing on standard error."""

    def send_head(self) -> Any:
        assert isinstance(self.server, Server)
        self.server.asked.append(self.path)
        return super().send_head()


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A server of the files in `folder`."""
    with Server(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def refusing_url() -> str:
    """An address where nobody listens: its port was free a moment ago."""
    with Server(("127.0.0.1", 0), _Quiet) as server:
        return server.url
