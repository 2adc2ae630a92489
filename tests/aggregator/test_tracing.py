"""A run as a trace: every span at its place and time, and nothing sent anywhere unless somebody said where."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from aggregator.made_up_run import RUN, run
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from fedsecure.aggregator.happenings import Happening
from fedsecure.aggregator.tracing import Traces, from_environment
from fedsecure.errors import ConfigError


def traced(*happenings: Happening) -> list[ReadableSpan]:
    exporter = InMemorySpanExporter()
    traces = Traces(SimpleSpanProcessor(exporter))
    for happening in happenings:
        traces(happening)
    traces.close()
    return list(exporter.get_finished_spans())


def below(spans: list[ReadableSpan], parent: ReadableSpan | None) -> list[ReadableSpan]:
    wanted = parent.context.span_id if parent else None
    found = [span for span in spans if (span.parent.span_id if span.parent else None) == wanted]
    return sorted(found, key=lambda span: span.start_time or 0)


def fact(span: ReadableSpan, name: str) -> Any:
    return (span.attributes or {}).get(f"fedsecure.{name}")


def test_a_run_is_one_trace_of_rounds_attempts_and_phases() -> None:
    spans = traced(*run())
    assert {span.context.trace_id for span in spans} == {int(RUN, 16)}
    (whole,) = below(spans, None)
    assert (whole.name, fact(whole, "method"), fact(whole, "run")) == ("run", "linear", RUN)
    assert whole.status.is_ok or whole.status.status_code.name == "UNSET"
    joined = ["site-joined"] * 3
    assert [event.name for event in whole.events] == [*joined, "evaluated", "keys-prepared", "alarm", "evaluated"]
    rounds = below(spans, whole)
    assert [(span.name, fact(span, "round")) for span in rounds] == [("round", 0), ("round", 1), ("round", 2)]
    attempts = [below(spans, each) for each in rounds]
    assert [[fact(a, "attempt") for a in each] for each in attempts] == [[0], [0, 1], [0]]
    aborted, summed = attempts[1]
    assert (aborted.status.status_code.name, aborted.status.description) == ("ERROR", "1 of 3 vectors came")
    assert fact(aborted, "code") == "FS-1352"
    assert (fact(summed, "cohort"), fact(summed, "survivors")) == (3, 2)
    phases = [[span.name for span in below(spans, attempt)] for each in attempts for attempt in each]
    assert phases == [
        ["phase advertise", "phase shares", "phase masked", "phase survivors", "phase unmask"],
        ["phase first"],
        ["phase masked", "phase survivors", "phase unmask"],
        ["phase masked", "phase survivors", "phase unmask"],
    ]


def test_times_are_those_of_the_happenings_and_nest() -> None:
    spans = traced(*run())
    told = run()
    (whole,) = below(spans, None)
    assert (whole.start_time, whole.end_time) == (int(told[0].at * 1e9), int(told[-1].at * 1e9))
    for span in spans:
        for inner in below(spans, span):
            assert span.start_time <= inner.start_time <= inner.end_time <= span.end_time  # type: ignore[operator]


def test_a_run_that_was_given_up_is_an_error() -> None:
    (whole,) = below(spans := traced(*run(complete=False)), None)
    assert (whole.status.status_code.name, whole.status.description) == ("ERROR", "failed too often")
    assert len(spans) == len(traced(*run()))


def test_a_process_that_takes_a_run_up_again_joins_its_trace() -> None:
    told = run()
    later = [Happening("run-resumed", RUN, 2000.0, {"round": 1, "attempt": 1}), *told[15:]]
    assert (later[1].kind, later[1].facts["attempt"]) == ("attempt-opened", 1)
    spans = traced(*told[:10]) + traced(*later)
    assert {span.context.trace_id for span in spans} == {int(RUN, 16)}
    assert len({span.context.span_id for span in spans}) == len(spans)
    assert [span.name for span in below(spans, None)] == ["run"], "what the first process left open is not sent"


def test_no_list_of_names_and_no_tensor_is_in_a_span() -> None:
    for span in traced(*run()):
        for value in (span.attributes or {}).values():
            assert isinstance(value, str | int | float | bool)
        assert "site-1" not in str(dict(span.attributes or {}))


# --- where spans go ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("environ", [{}, {"OTEL_TRACES_EXPORTER": ""}, {"OTEL_TRACES_EXPORTER": "zipkin9"},
                                     {"OTEL_SERVICE_NAME": "x"}])  # fmt: skip
def test_without_a_named_exporter_nothing_is_guessed(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="FS-1041"):
        from_environment(environ)


def test_an_endpoint_asks_for_otlp_which_is_installed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def none(*, group: str, name: str) -> list[Any]:
        asked.append(name)
        return []

    monkeypatch.setattr("fedsecure.aggregator.tracing.entry_points", none)
    for environ in (
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4317"},
        {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"},
        {"OTEL_TRACES_EXPORTER": "mine"},
    ):
        with pytest.raises(ConfigError, match="FS-1041"):
            from_environment(environ)
    assert asked == ["otlp_proto_grpc", "otlp_proto_http", "mine"]


@pytest.mark.parametrize("environ", [{"OTEL_TRACES_EXPORTER": "none"}, {"OTEL_SDK_DISABLED": "true"}])
def test_told_not_to_it_does_not(environ: dict[str, str]) -> None:
    assert from_environment(environ) is None


SILENT = """
import json, socket, sys
def refuse(*a, **k): raise AssertionError("a connection was opened")
socket.socket.connect = socket.create_connection = refuse
sys.path.insert(0, {tests!r})
from aggregator.made_up_run import run
from fedsecure.aggregator.tracing import from_environment
traces = from_environment({{"OTEL_TRACES_EXPORTER": "console"}})
for happening in run():
    traces(happening)
traces.close()
assert not {{"torch", "tensorflow"}} & set(sys.modules)
"""


def test_the_console_exporter_in_a_process_of_its_own() -> None:
    from pathlib import Path

    code = SILENT.format(tests=str(Path(__file__).resolve().parents[1]))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    decoder, text, spans = json.JSONDecoder(), done.stdout.lstrip(), []
    while text:
        span, end = decoder.raw_decode(text)
        spans.append(span)
        text = text[end:].lstrip()
    assert {span["context"]["trace_id"] for span in spans} == {"0x" + RUN}
    assert {span["resource"]["attributes"]["service.name"] for span in spans} == {"fedsecure-aggregator"}
