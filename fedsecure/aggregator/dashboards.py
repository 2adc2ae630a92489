"""A run's curves for people who watch training: event files of TensorBoard, or a run of MLflow.

Both get what the aggregator has released, and nothing else: evaluations, rounds, survivors, seconds, ε where it is
told. Neither needs torch. MLflow's own telemetry is switched off before it is imported; a tracking server that is slow
or gone never holds up a round, since what it is sent waits in a queue of its own.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedsecure.aggregator.happenings import Happening, Listener
from fedsecure.extras import require

log = logging.getLogger("fedsecure.aggregator")
QUEUE = 10_000
# Facts that are about time or order, and no curve.
_NO_CURVES = {"round", "attempt", "stage", "step", "rounds", "epoch"}


class TensorBoard:
    """A listener that writes event files into ``folder/<run>``. Needs ``fedsecure[tensorboard]``.

    Raises:
        EnvironmentProblem: FS-1816 without ``tensorboard``.
    """

    def __init__(self, folder: Path, run: str) -> None:
        require("tensorboard")
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        path = folder / run
        path.mkdir(parents=True, exist_ok=True)
        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(path), flush_secs=30)
        self._curves = _Curves()

    def __call__(self, happening: Happening) -> None:
        """Write what a happening adds to the curves."""
        for name, step, value in self._curves.points(happening):
            summary = self._summary(value=[self._summary.Value(tag=name, simple_value=value)])
            self._writer.add_event(self._event(wall_time=happening.at, step=step, summary=summary))
        if happening.kind in ("evaluated", "run-ended"):
            self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class MLflow:
    """A listener that logs a run's curves to MLflow, from a thread of its own. Needs ``fedsecure[mlflow]``.

    Args:
        uri: of the tracking server or database, such as ``sqlite:////srv/mlflow.db``.
        experiment: its name; the federation's.

    Raises:
        EnvironmentProblem: FS-1816 without ``mlflow``.
    """

    def __init__(self, uri: str, experiment: str) -> None:
        require("mlflow")
        self._uri, self._experiment = uri, experiment
        self._curves = _Curves()
        self._client: Any = None
        self._own = ""
        self._background = Background(self._send, name="mlflow")

    def __call__(self, happening: Happening) -> None:
        """Queue it; nothing waits for the server."""
        self._background(happening)

    def close(self, *, seconds: float = 30.0) -> None:
        """Wait for what is queued, so long at most."""
        self._background.close(seconds=seconds)

    def _send(self, happening: Happening) -> None:
        client = self._connected()
        if not self._own:
            self._own = self._run_of(client, happening)
        at = int(happening.at * 1000)
        for name, step, value in self._curves.points(happening):
            client.log_metric(self._own, name, value, timestamp=at, step=step)
        if happening.kind == "run-ended":
            status = "FINISHED" if happening.facts.get("complete") else "FAILED"
            if code := happening.facts.get("code"):
                client.set_tag(self._own, "fedsecure.code", str(code))
            client.set_terminated(self._own, status, end_time=at)

    def _connected(self) -> Any:
        if self._client is None:
            # Read when it is imported: what is run here is nobody else's business.
            os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true")
            from mlflow.tracking import MlflowClient

            self._client = MlflowClient(tracking_uri=self._uri)
        return self._client

    def _run_of(self, client: Any, happening: Happening) -> str:
        """The MLflow run of this run: the one an earlier process began, or a new one."""
        found = client.get_experiment_by_name(self._experiment)
        experiment = found.experiment_id if found is not None else client.create_experiment(self._experiment)
        earlier = client.search_runs([experiment], f"tags.`fedsecure.run` = '{happening.run}'", max_results=1)
        if earlier:
            client.update_run(earlier[0].info.run_id, status="RUNNING")
            return str(earlier[0].info.run_id)
        run = client.create_run(
            experiment,
            start_time=int(happening.at * 1000),
            run_name=happening.run[:8],
            tags={"fedsecure.run": happening.run},
        )
        for name in ("method", "rounds"):
            if name in happening.facts:
                client.log_param(run.info.run_id, name, happening.facts[name])
        return str(run.info.run_id)


class Background:
    """A listener that hands happenings to another one in a thread, in order.

    A failure is logged once and does not end it; past ``QUEUE`` waiting, happenings are left out, which is logged too.
    """

    def __init__(self, listener: Listener, *, name: str) -> None:
        self._listener, self._name = listener, name
        self._queue: queue.Queue[Happening | None] = queue.Queue(QUEUE)
        self._said: set[str] = set()
        self._thread = threading.Thread(target=self._work, name=f"fedsecure-{name}", daemon=True)
        self._thread.start()

    def __call__(self, happening: Happening) -> None:
        try:
            self._queue.put_nowait(happening)
        except queue.Full:
            self._say("full", lambda: log.warning("%s does not keep up; what it misses is left out", self._name))

    def close(self, *, seconds: float) -> None:
        """Wait for what is queued, so long at most."""
        try:
            self._queue.put(None, timeout=seconds)
        except queue.Full:
            return
        self._thread.join(seconds)
        if self._thread.is_alive():
            log.warning("%s was left with %d lines unsent", self._name, self._queue.qsize())

    def _work(self) -> None:
        while (happening := self._queue.get()) is not None:
            try:
                self._listener(happening)
            except Exception as error:
                kind = type(error).__name__
                self._say(kind, lambda: log.warning("%s fails; the run goes on", self._name, exc_info=True))

    def _say(self, what: str, say: Callable[[], None]) -> None:
        if what not in self._said:
            self._said.add(what)
            say()


class _Curves:
    """Happenings as (name, step, value): the step is the number of training rounds done, as the saved state has it."""

    def __init__(self) -> None:
        self._step = 0
        self._summed: dict[str, Any] = {}

    def points(self, happening: Happening) -> Iterator[tuple[str, int, float]]:
        facts, kind = happening.facts, happening.kind
        if kind == "attempt-summed":
            counted = {"survivors": len(facts["survivors"]), "seconds": facts["seconds"]}
            self._summed = {**counted, "attempts": facts["attempt"] + 1} if facts["stage"] == "training" else {}
        elif kind == "round-saved":
            self._step = int(facts["step"])
            yield from _numbers("round", self._step, self._summed)
            if "epsilon" in facts:
                yield from _numbers("privacy", self._step, {"epsilon": facts["epsilon"]})
            self._summed = {}
        elif kind == "evaluated":
            yield from _numbers("evaluation", 0 if facts["stage"] == "before" else self._step, facts)


def _numbers(group: str, step: int, facts: Mapping[str, Any]) -> Iterator[tuple[str, int, float]]:
    for name, value in facts.items():
        if type(value) in (int, float) and math.isfinite(value) and name not in _NO_CURVES:
            yield f"{group}/{name}", step, float(value)


__all__ = ["Background", "MLflow", "TensorBoard"]
