"""The operator's HTTP port: ``/metrics``, ``/healthz`` and ``/readyz``, nothing else, and only to be asked.

Plain HTTP without a name or password, so it belongs on a network of the operator's own. It tells no more than
``fedsecure status`` does, changes nothing, and bounds callers, requests and waits.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from fedsecure.errors import EnvironmentProblem

MAX_CALLERS = 16
CALL_SECONDS = 10.0
Start = Callable[[str, list[tuple[str, str]]], Any]
App = Callable[[dict[str, Any], Start], Iterable[bytes]]


class Readiness:
    """Whether the run is loaded and the port listens. Set from the loop, read from the server's threads."""

    def __init__(self, reason: str = "the aggregator is starting") -> None:
        self._reason = reason

    def ready(self) -> None:
        """Sites can come."""
        self._reason = ""

    def not_ready(self, reason: str) -> None:
        """They cannot, for this reason, which everybody on the port may read."""
        self._reason = reason

    @property
    def reason(self) -> str:
        """Why not; empty where it is ready."""
        return self._reason


def operations(metrics: App, readiness: Readiness) -> App:
    """The three pages as one WSGI application; GET and HEAD only."""

    def app(environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _say(start, "405 Method Not Allowed", "only GET")
        path = environ.get("PATH_INFO", "")
        if path == "/metrics":
            return metrics(environ, start)
        if path == "/healthz":
            return _say(start, "200 OK", "alive")
        if path == "/readyz":
            reason = readiness.reason
            return _say(start, "503 Service Unavailable", reason) if reason else _say(start, "200 OK", "ready")
        return _say(start, "404 Not Found", "/metrics, /healthz or /readyz")

    return app


def _say(start: Start, status: str, text: str) -> Iterable[bytes]:
    body = text.encode() + b"\n"
    start(status, [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))])
    return [body]


class _Handler(WSGIRequestHandler):
    timeout = CALL_SECONDS

    def log_message(self, format: str, *args: Any) -> None:
        pass  # a probe every few seconds says nothing

    def get_stderr(self) -> Any:
        return _Nowhere()

    def address_string(self) -> str:
        return str(self.client_address[0])


class _Nowhere:
    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None: ...


class _Threads(ThreadingMixIn, WSGIServer):
    """A thread for each caller, ``MAX_CALLERS`` at a time; one more is closed at once."""

    daemon_threads = True

    def __init__(self, *arguments: Any) -> None:
        self._room = threading.BoundedSemaphore(MAX_CALLERS)
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a caller that hung up

    def server_bind(self) -> None:
        # Without the look-up of this host's name that http.server does.
        socket_name = self.server_address
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(socket_name)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()


class _Threads6(_Threads):
    address_family = socket.AF_INET6


class Server:
    """The HTTP server, answering from threads of its own until :meth:`close`."""

    def __init__(self, server: WSGIServer) -> None:
        self._server = server
        self.port = int(server.server_port)
        threading.Thread(target=server.serve_forever, name="fedsecure-operations", daemon=True).start()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()


def serve(listen: str, app: App) -> Server:
    """Answer on ``host:port``; port 0 takes a free one.

    Raises:
        EnvironmentProblem: FS-1801 the address is in use or not this machine's.
    """
    host, _, port = listen.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    try:
        server = make_server(
            bare, int(port), app, server_class=_Threads6 if ":" in bare else _Threads, handler_class=_Handler
        )
    except (OSError, ValueError, OverflowError) as error:
        raise EnvironmentProblem(
            "FS-1801",
            f"cannot listen on {listen} for metrics",
            expected="host:port, a free port of an address of this machine",
            cure="stop what uses it (`ss -ltnp`), or change `metrics`",
        ) from error
    return Server(server)


__all__ = ["Readiness", "Server", "operations", "serve"]
