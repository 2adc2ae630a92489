"""Who listens to a run: always the audit log and the log lines; others only if they are asked for."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from aggregator.made_up_run import RUN, run
from aggregator.test_dashboards import curves_in
from federation_world import World
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from fedsecure import extras
from fedsecure.aggregator.audit_trail import AuditTrail
from fedsecure.aggregator.dashboards import MLflow, TensorBoard
from fedsecure.aggregator.happenings import Happening
from fedsecure.aggregator.listening import listening
from fedsecure.aggregator.log_lines import LogLines
from fedsecure.aggregator.metrics import Metrics
from fedsecure.aggregator.tracing import Traces
from fedsecure.audit_log import PURPOSE, AuditLog, entries, verify
from fedsecure.config import TelemetryConfig
from fedsecure.errors import ConfigError, EnvironmentProblem
from fedsecure.identity import keys
from fedsecure.identity.provision import load_identity


def parts(folder: Path, **telemetry: Any) -> tuple[Any, Any]:
    world = World(folder)
    config = world.start().config.model_copy(update={"telemetry": TelemetryConfig(**telemetry)})
    return config, load_identity(config.identity)


def test_by_default_nothing_is_sent_and_everything_is_audited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("socket.socket.connect", None)
    config, identity = parts(tmp_path)
    told = listening(config, identity, run=RUN, metrics=None)
    with caplog.at_level(logging.INFO, logger="fedsecure.run"):
        for happening in run():
            told(happening)
    told.close()
    public = keys.public_bytes(identity.signing_key)
    found = verify(config.state / "audit.log", check=lambda body, s: keys.verify(public, PURPOSE, body, s))
    assert found.head.lines == len(run()) + 1
    assert found.signed == 1
    lines = [record for record in caplog.records if record.name == "fedsecure.run"]
    assert [record.event for record in lines] == [h.kind for h in run()]  # type: ignore[attr-defined]
    assert found.events["attempt-aborted"] == 1


def test_those_that_are_asked_for_hear_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Happening] = []
    monkeypatch.setattr(MLflow, "_send", lambda self, happening: heard.append(happening))
    config, identity = parts(tmp_path, tensorboard=tmp_path / "boards", mlflow="sqlite://", otel=True)
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    metrics = Metrics(RUN)
    told = listening(config, identity, run=RUN, metrics=metrics)
    for happening in run():
        told(happening)
    told.close()
    assert [happening.kind for happening in heard] == [happening.kind for happening in run()]
    assert list((tmp_path / "boards" / RUN).glob("events.out.tfevents.*"))
    assert metrics.registry.get_sample_value("fedsecure_last_survivors") == 3


def test_what_is_asked_for_and_is_not_there_is_said_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, identity = parts(tmp_path, otel=True)
    for name in ("OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="FS-1041"):
        listening(config, identity, run=RUN, metrics=None)
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    for name, wanted in (("tensorboard", {"tensorboard": tmp_path}), ("mlflow", {"mlflow": "sqlite://"})):
        asked = config.model_copy(update={"telemetry": TelemetryConfig(**wanted)})
        with pytest.raises(EnvironmentProblem, match="FS-1816") as caught:
            listening(asked, identity, run=RUN, metrics=None)
        assert caught.value.cure == f"pip install 'fedsecure[{name}]'"
    (config.state / "audit.log").write_bytes(b"no log\n")
    with pytest.raises(EnvironmentProblem, match="FS-1821"):
        listening(config, identity, run=RUN, metrics=None)


def test_a_real_run_is_heard_by_all_of_them(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=2)
    config = world.start().config
    world.run(*(world.take_part(name) for name in world.names))
    assert world.happened[-1].kind == "run-ended"
    exporter = InMemorySpanExporter()
    run_id, metrics = world.coordinator.run.hex(), Metrics(world.coordinator.run.hex())
    board, traces = TensorBoard(tmp_path / "boards", run_id), Traces(SimpleSpanProcessor(exporter))
    trail = AuditTrail(AuditLog(config.state / "audit.log"))
    for happening in world.happened:
        for listener in (trail, LogLines(), metrics, board, traces):
            listener(happening)
    board.close()
    traces.close()
    assert [entry.event for entry in entries(config.state / "audit.log")] == [h.kind for h in world.happened]
    spans = exporter.get_finished_spans()
    names = [span.name for span in spans]
    assert (names.count("run"), names.count("round"), names.count("attempt")) == (1, 4, 4)
    # Two evaluations in five phases each, two rounds with prepared keys in three.
    assert sum(name.startswith("phase ") for name in names) == 2 * 5 + 2 * 3
    assert "phase first" not in names
    assert all(span.status.is_ok or span.status.status_code.name == "UNSET" for span in spans)
    curves = curves_in(tmp_path / "boards" / run_id)
    assert {step for step, _ in curves["round/survivors"]} == {1, 2}
    assert [step for step, _ in curves["evaluation/accuracy"]] == [0, 2]
    assert metrics.registry.get_sample_value("fedsecure_last_cohort") == 3
    assert metrics.registry.get_sample_value("fedsecure_last_round_seconds") == pytest.approx(time.time(), abs=300)


LIGHT = """
import sys
from fedsecure.aggregator import audit_trail, dashboards, health, listening, log_lines, metrics, operations, tracing
heavy = {"torch", "tensorflow", "mlflow", "tensorboard", "opentelemetry", "prometheus_client", "pandas"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""


def test_an_aggregator_loads_none_of_them_unasked() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
