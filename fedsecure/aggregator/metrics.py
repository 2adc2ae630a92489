"""``/metrics`` for Prometheus: a run's progress, its sites' presence and what an operator is woken for.

What the operator's status says, and nothing more: no sum, no count of records, no loss. Needs ``fedsecure[metrics]``.
The values are set from the aggregator's loop; the server's threads only read them. docs/observability.md lists them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from fedsecure.aggregator.happenings import Happening
from fedsecure.aggregator.operations import Readiness, Server, operations, serve
from fedsecure.extras import require

# Seconds: from a prototype round on features to hours of local training.
DURATIONS = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400)


class Metrics:
    """Gauges and counters of one run, in a registry of their own: a listener, and a look now and then.

    Args:
        run: the run's id, 32 hexadecimal digits.
        clock: unix time in seconds.

    Raises:
        EnvironmentProblem: FS-1816 without ``prometheus_client``.
    """

    def __init__(self, run: str, *, clock: Callable[[], float] = time.time) -> None:
        require("prometheus_client")
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

        self.registry = registry = CollectorRegistry()
        self.readiness = Readiness()
        self._clock = clock

        def gauge(name: str, what: str, *labels: str) -> Gauge:
            return Gauge(f"fedsecure_{name}", what, labels, registry=registry)

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"fedsecure_{name}", what, labels, registry=registry)

        self._run = Info("fedsecure_run", "The run that is served.", registry=registry)
        self._run.info({"run": run})
        self._done = gauge("rounds_done", "Training rounds that gave a sum.")
        self._all = gauge("rounds", "Training rounds of the run.")
        self._over = gauge("run_over", "1 once the run has ended, well or not.")
        self._failed = gauge("run_failed", "1 if the run was given up.")
        self._paused = gauge("run_paused", "1 while the operator has paused the run.")
        self._alive = gauge("last_tick_seconds", "Unix time of the last look at the run.")
        self._saved = gauge("last_round_seconds", "Unix time at which a round's state was last saved; 0 before.")
        self._there = gauge("site_there", "1 for a site that is heard of.", "site")
        self._seen = gauge("site_last_there_seconds", "Unix time of the last look at which a site was there.", "site")
        self._expires = gauge("certificate_expiry_seconds", "Unix time at which a certificate expires.", "member")
        self._attempts = counter("attempts", "Attempts that ended, by what became of them.", "stage", "outcome")
        self._seconds = counter("attempt_seconds", "Seconds they took.", "stage")
        self._took = Histogram(
            "fedsecure_attempt_duration_seconds",
            "How long attempts took, summed ones and aborted ones.",
            ["stage", "outcome"],
            buckets=DURATIONS,
            registry=registry,
        )
        self._survivors = gauge("last_survivors", "Sites in the last sum.")
        self._cohort = gauge("last_cohort", "Sites that were asked for it.")
        self._bytes = counter("bytes", "Bytes of messages and vectors, received and sent.", "direction")
        self._refusals = counter("refusals", "Calls that broke a rule, by error code.", "code")
        self._joins = counter("site_joins", "Sessions that sites opened.", "site")
        self._departures = counter("site_departures", "Sites that said why they leave, by error code.", "code")
        self._alarms = counter("alarms", "What is odd although the run goes on, by error code.", "code")
        self._resumes = counter("resumes", "Times that a new process took the run up again.")
        self._counted = 0
        self._last_cohort = 0

    def __call__(self, happening: Happening) -> None:
        """A happening of this run."""
        facts, kind = happening.facts, happening.kind
        if kind == "attempt-opened":
            self._last_cohort = len(facts.get("cohort", ()))
        elif kind in ("attempt-summed", "attempt-aborted"):
            outcome = "summed" if kind == "attempt-summed" else "aborted"
            self._took.labels(facts["stage"], outcome).observe(facts["seconds"])
            if outcome == "summed":
                self._survivors.set(len(facts["survivors"]))
                self._cohort.set(self._last_cohort)
            for direction in ("up", "down"):
                self._bytes.labels(direction).inc(facts.get(f"bytes_{direction}", 0))
        elif kind == "round-saved":
            self._saved.set(happening.at)
        elif kind == "site-joined":
            self._joins.labels(facts["site"]).inc()
            if "certificate_expires" in facts:
                self.certificate(facts["site"], facts["certificate_expires"])
        elif kind == "site-left":
            self._departures.labels(facts.get("code") or "none").inc()
        elif kind == "site-refused":
            self._refusals.labels(facts["code"]).inc()
        elif kind == "alarm":
            self._alarms.labels(facts["code"]).inc()
        elif kind == "run-resumed":
            self._resumes.inc()
        elif kind in ("run-paused", "run-continued"):
            self._paused.set(kind == "run-paused")

    def update(self, status: Mapping[str, Any], attempts: list[dict[str, Any]]) -> None:
        """The coordinator's status, and its account of all attempts so far."""
        outcome, now = status["outcome"], self._clock()
        self._done.set(status["step"])
        self._all.set(status["steps"])
        self._over.set(outcome is not None)
        self._failed.set(outcome is not None and not outcome["complete"])
        self._alive.set(now)
        for site, there in status["sites"].items():
            self._there.labels(site).set(there)
            if there:
                self._seen.labels(site).set(now)
        for attempt in attempts[self._counted :]:
            ended = "summed" if "survivors" in attempt else str(attempt.get("code") or "aborted")
            self._attempts.labels(attempt["stage"], ended).inc()
            self._seconds.labels(attempt["stage"]).inc(attempt["seconds"])
        self._counted = len(attempts)

    def certificate(self, member: str, expires: float) -> None:
        """Unix time at which a member's certificate expires: the aggregator's own, and each site's as it joins."""
        self._expires.labels(member).set(expires)

    def serve(self, listen: str) -> Server:
        """Answer on ``host:port``, with ``/healthz`` and ``/readyz`` beside ``/metrics``; port 0 takes a free one.

        Raises:
            EnvironmentProblem: FS-1801 the address is in use or not this machine's.
        """
        from prometheus_client import make_wsgi_app

        return serve(listen, operations(make_wsgi_app(self.registry), self.readiness))


__all__ = ["Metrics", "Server"]
