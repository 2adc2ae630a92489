"""The aggregator's container: ``fedsecure serve``, and after the run's end a process that says so until it is stopped.

Docker and Kubernetes start again whatever ends, and ``fedsecure serve`` after a run that is over begins a new one, at a
new charge for every site. So the end of a run is written down in ``ended`` beside the state folder. While that file
is there no run begins: ``/healthz`` answers 200, and ``/readyz`` 503 with the reason. Remove the file and start the
container again for the next run. Needs nothing but Python.

    aggregator.py [arguments of fedsecure serve]
    aggregator.py --healthy PORT
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HOME = Path(os.environ.get("FEDSECURE_HOME", "/var/lib/fedsecure"))
PORT = int(os.environ.get("FEDSECURE_HEALTH_PORT", "9464"))
# Exit statuses of `fedsecure serve`: the run is complete, or given up for good.
OVER = {0: "complete", 3: "given up or stopped"}
# With other statuses the run goes on in the next process.


def healthy(port: int) -> int:
    """0 where the aggregator answers, 1 otherwise."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as answer:
            return 0 if answer.status == 200 else 1
    except OSError:
        return 1


class Over(BaseHTTPRequestHandler):
    """Alive, and not ready: nothing is served any more."""

    timeout = 10

    def do_GET(self) -> None:
        alive = self.path == "/healthz"
        body = b"ok\n" if alive else f"{(HOME / 'ended').read_text()}\n".encode()
        self.send_response(200 if alive else 503 if self.path == "/readyz" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Probes leave no lines."""


def serve(arguments: list[str]) -> int:
    """``fedsecure serve`` to its end; signals are passed on."""
    with subprocess.Popen(["fedsecure", "serve", "--quiet", *arguments]) as child:
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, lambda number, _: child.send_signal(number))
        return child.wait()


def wait() -> None:
    """Say that the run is over, until somebody ends this process."""
    server = ThreadingHTTPServer(("", PORT), Over)
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: threading.Thread(target=server.shutdown, daemon=True).start())
    with server:
        server.serve_forever()


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--healthy"]:
        return healthy(int(arguments[1]))
    ended = HOME / "ended"
    if not ended.exists():
        status = serve(arguments)
        if status not in OVER:
            return status if status > 0 else 128 - status
        draft = ended.with_name(".ended.part")
        draft.write_text(f"the run is over ({OVER[status]}); remove {ended} and start again for the next one")
        draft.replace(ended)
    print(ended.read_text(), file=sys.stderr, flush=True)
    wait()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
