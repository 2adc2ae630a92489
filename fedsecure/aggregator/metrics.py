"""``/metrics`` for Prometheus: a run's progress and its sites' presence, on a port of its own.

What the operator's status says, and nothing more: no sum, no count of records, no loss. Needs ``fedsecure[metrics]``.
The values are set from the aggregator's loop; the server's thread only reads them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from fedsecure.errors import EnvironmentProblem
from fedsecure.extras import require


class Metrics:
    """Gauges and counters of one run, in a registry of their own.

    Args:
        run: the run's id, 32 hexadecimal digits.

    Raises:
        EnvironmentProblem: FS-1816 without ``prometheus_client``.
    """

    def __init__(self, run: str) -> None:
        require("prometheus_client")
        from prometheus_client import CollectorRegistry, Counter, Gauge, Info

        self.registry = registry = CollectorRegistry()
        self._run = Info("fedsecure_run", "The run that is served.", registry=registry)
        self._run.info({"run": run})
        self._done = Gauge("fedsecure_rounds_done", "Training rounds that gave a sum.", registry=registry)
        self._all = Gauge("fedsecure_rounds", "Training rounds of the run.", registry=registry)
        self._over = Gauge("fedsecure_run_over", "1 once the run has ended, well or not.", registry=registry)
        self._failed = Gauge("fedsecure_run_failed", "1 if the run was given up.", registry=registry)
        self._alive = Gauge("fedsecure_last_tick_seconds", "Unix time of the last look at the run.", registry=registry)
        self._there = Gauge("fedsecure_site_there", "1 for a site that is heard of.", ["site"], registry=registry)
        self._attempts = Counter(
            "fedsecure_attempts",
            "Attempts that ended, by what became of them.",
            ["stage", "outcome"],
            registry=registry,
        )
        self._seconds = Counter("fedsecure_attempt_seconds", "Seconds they took.", ["stage"], registry=registry)
        self._counted = 0

    def update(self, status: Mapping[str, Any], attempts: list[dict[str, Any]]) -> None:
        """The coordinator's status, and its account of all attempts so far."""
        outcome = status["outcome"]
        self._done.set(status["step"])
        self._all.set(status["steps"])
        self._over.set(outcome is not None)
        self._failed.set(outcome is not None and not outcome["complete"])
        self._alive.set(time.time())
        for site, there in status["sites"].items():
            self._there.labels(site).set(there)
        for attempt in attempts[self._counted :]:
            ended = "summed" if "survivors" in attempt else str(attempt.get("code") or "aborted")
            self._attempts.labels(attempt["stage"], ended).inc()
            self._seconds.labels(attempt["stage"]).inc(attempt["seconds"])
        self._counted = len(attempts)

    def serve(self, listen: str) -> Server:
        """Answer on ``host:port``; port 0 takes a free one.

        Raises:
            EnvironmentProblem: FS-1801 the address is in use or not this machine's.
        """
        from prometheus_client import start_http_server

        host, _, port = listen.rpartition(":")
        try:
            server, _ = start_http_server(int(port), host.removeprefix("[").removesuffix("]"), self.registry)
        except (OSError, ValueError, OverflowError) as error:
            raise EnvironmentProblem(
                "FS-1801",
                f"cannot listen on {listen} for metrics",
                expected="host:port, a free port of an address of this machine",
                cure="stop what uses it (`ss -ltnp`), or change `metrics`",
            ) from error
        return Server(server)


class Server:
    """The HTTP server of :meth:`Metrics.serve`."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self.port = int(server.server_port)

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
