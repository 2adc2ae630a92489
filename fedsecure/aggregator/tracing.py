"""A run as an OpenTelemetry trace: a span for the run, and within it for each round, attempt and phase.

Off unless ``[telemetry] otel`` is set, and then sent where the standard ``OTEL_*`` variables say; without one of them
nothing has anywhere to go, which is an error and no default. A run's id is its trace id, so that the spans of an
aggregator that was started again join the same trace. Needs ``fedsecure[otel]``; spans leave from a thread of the
exporter's own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from fedsecure.aggregator.happenings import Happening
from fedsecure.errors import ConfigError
from fedsecure.extras import require

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import Span, SpanProcessor, TracerProvider

# The phase that ends where one begins (secagg.md §3.3).
_BEFORE = {"shares": "advertise", "masked": "shares", "survivors": "masked", "unmask": "survivors"}
_NAME = "fedsecure-aggregator"
_FACTS = ("round", "attempt", "stage", "step", "method", "rounds", "code", "epoch", "site")


class Traces:
    """A listener that makes spans of happenings.

    Args:
        processors: take finished spans to exporters; :func:`from_environment` makes them.
    """

    def __init__(self, *processors: SpanProcessor) -> None:
        require("opentelemetry")
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider

        self._ids = _ids()
        resource = Resource.create() if "OTEL_SERVICE_NAME" in os.environ else Resource.create({"service.name": _NAME})
        # Spans are closed here, at the run's end; nothing is left to a hook at the interpreter's.
        self._provider: TracerProvider = TracerProvider(
            resource=resource, id_generator=self._ids, shutdown_on_exit=False
        )
        for processor in processors:
            self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("fedsecure")
        self._run: Span | None = None
        self._round: tuple[int, Span] | None = None
        self._attempt: Span | None = None
        self._phase: tuple[str, float] = ("", 0.0)

    def __call__(self, happening: Happening) -> None:
        """A happening of the run."""
        facts, at, kind = happening.facts, happening.at, happening.kind
        if kind in ("run-started", "run-resumed") or self._run is None:
            self._close_all(at)
            self._ids.trace = int(happening.run, 16)
            self._run = self._begin("run", at, None, {"run": happening.run, **facts})
        if kind == "attempt-opened":
            self._open_attempt(facts, at)
        elif kind == "phase-closed":
            self._close_phase(str(facts["phase"]), at)
        elif kind in ("attempt-summed", "attempt-aborted"):
            self._close_attempt(kind, facts, at)
        elif kind == "round-saved":
            self._close_round(at)
        elif kind == "run-ended":
            self._close_round(at)
            self._finish(self._run, at, facts, failed=not facts.get("complete"))
            self._run = None
        elif kind not in ("run-started", "run-resumed"):
            self._run.add_event(kind, _attributes(facts), _ns(at))

    def close(self) -> None:
        """Send what is left and let go; what is still open is not sent."""
        self._provider.shutdown()

    # --- inside -----------------------------------------------------------------------------------------------------

    def _open_attempt(self, facts: Mapping[str, Any], at: float) -> None:
        if self._round is None or self._round[0] != facts["round"]:
            self._close_round(at)
            self._round = facts["round"], self._begin("round", at, self._run, facts)
        self._attempt = self._begin("attempt", at, self._round[1], facts)
        self._phase = "", at

    def _close_phase(self, begins: str, at: float) -> None:
        name, since = self._phase
        # Rounds whose keys are prepared begin with the masked vectors: what begins says what ended.
        self._span("phase " + (name or _BEFORE.get(begins, "first")), since, at)
        self._phase = begins, at

    def _close_attempt(self, kind: str, facts: Mapping[str, Any], at: float) -> None:
        if self._attempt is None:
            return
        name, since = self._phase
        self._span("phase " + (name or "first"), since, at)
        self._finish(self._attempt, at, facts, failed=kind == "attempt-aborted")
        self._attempt = None

    def _close_round(self, at: float) -> None:
        if self._round is not None:
            self._round[1].end(_ns(at))
            self._round = None

    def _close_all(self, at: float) -> None:
        """A run that another takes the place of, in a process that serves one after the other."""
        if self._run is not None:
            for span in (self._attempt, self._round and self._round[1], self._run):
                if span is not None:
                    span.end(_ns(at))
        self._run = self._round = self._attempt = None

    def _begin(self, name: str, at: float, parent: Span | None, facts: Mapping[str, Any]) -> Any:
        from opentelemetry.trace import set_span_in_context

        context = set_span_in_context(parent) if parent is not None else None
        return self._tracer.start_span(name, context, attributes=_attributes(facts), start_time=_ns(at))

    def _span(self, name: str, since: float, until: float) -> None:
        if self._attempt is not None:
            self._begin(name, since, self._attempt, {}).end(_ns(until))

    def _finish(self, span: Span, at: float, facts: Mapping[str, Any], *, failed: bool) -> None:
        from opentelemetry.trace import Status, StatusCode

        span.set_attributes(_attributes(facts))
        if failed:
            span.set_status(Status(StatusCode.ERROR, str(facts.get("reason") or facts.get("code") or "")[:1000]))
        span.end(_ns(at))


def _ids() -> Any:
    """Span ids from the operating system; the trace id is the run's."""
    from opentelemetry.sdk.trace.id_generator import IdGenerator

    class Ids(IdGenerator):
        trace = 0

        def generate_span_id(self) -> int:
            return int.from_bytes(os.urandom(8)) or 1

        def generate_trace_id(self) -> int:
            return self.trace or 1

    return Ids()


def _ns(at: float) -> int:
    return int(at * 1e9)


def _attributes(facts: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """Facts by name, and cohorts and survivors as their sizes."""
    found: dict[str, str | int | float | bool] = {
        f"fedsecure.{name}": facts[name]
        for name in ("run", *_FACTS)
        if isinstance(facts.get(name), str | int | float | bool)
    }
    for name in ("cohort", "survivors", "holders"):
        if isinstance(facts.get(name), list | tuple):
            found[f"fedsecure.{name}"] = len(facts[name])
    return found


def from_environment(environ: Mapping[str, str] = os.environ) -> Traces | None:
    """Traces to the exporters that ``OTEL_TRACES_EXPORTER`` names (``otlp``, ``console``, ``none``, or others that
    are installed; several with commas); ``otlp`` where only ``OTEL_EXPORTER_OTLP_ENDPOINT`` is set.

    Returns:
        None for ``none``, and where ``OTEL_SDK_DISABLED`` is true.

    Raises:
        ConfigError: FS-1041 no exporter is named, or one that is not installed.
        EnvironmentProblem: FS-1816 without ``opentelemetry-sdk``.
    """
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    endpoint = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    named = environ.get("OTEL_TRACES_EXPORTER", "otlp" if endpoint else "")
    names = [name.strip() for name in named.split(",") if name.strip()]
    if not names:
        raise _no_exporter("telemetry.otel without an exporter", "OTEL_TRACES_EXPORTER, or OTEL_EXPORTER_OTLP_ENDPOINT")
    if names == ["none"]:
        return None
    require("opentelemetry")
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    kinds = {"otlp": "otlp_proto_http" if protocol.startswith("http") else "otlp_proto_grpc"}
    processors: list[SpanProcessor] = []
    for name in names:
        found = list(entry_points(group="opentelemetry_traces_exporter", name=kinds.get(name, name)))
        if not found:
            raise _no_exporter(f"no exporter {name!r} is installed", "an exporter that is installed")
        processors.append(BatchSpanProcessor(found[0].load()()))
    return Traces(*processors)


def _no_exporter(found: str, expected: str) -> ConfigError:
    return ConfigError(
        "FS-1041",
        found,
        expected=expected,
        cure="set it, with `pip install opentelemetry-exporter-otlp` for otlp; or take `otel` out of [telemetry]",
    )


__all__ = ["Traces", "from_environment"]
