"""What Prometheus gets: the figures of the operator's status, from a run that went through and one that did not."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from federation_world import World
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from fedsecure.aggregator import operations
from fedsecure.aggregator.happenings import Happening, Kind
from fedsecure.aggregator.metrics import Metrics
from fedsecure.aggregator.program import serve
from fedsecure.errors import EnvironmentProblem, RunError


def samples(text: str) -> dict[tuple[str, ...], float]:
    """(name, label values …) → value."""
    found = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {(sample.name, *sample.labels.values()): sample.value for sample in found}


def updated(world: World, metrics: Metrics) -> dict[tuple[str, ...], float]:
    metrics.update(world.coordinator.status(time.monotonic()), world.coordinator.attempts)
    return samples(generate_latest(metrics.registry).decode())


def test_a_run_from_its_start_to_its_end(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=2)
    metrics = Metrics(world.start().run.hex())
    before = updated(world, metrics)
    assert before["fedsecure_rounds",] == 2
    assert before["fedsecure_rounds_done",] == before["fedsecure_run_over",] == 0
    assert {before["fedsecure_site_there", name] for name in world.names} == {0}
    world.run(*(world.take_part(name) for name in world.names))
    updated(world, metrics)
    after = updated(world, metrics)  # nothing counts twice
    assert after["fedsecure_rounds_done",] == 2
    assert (after["fedsecure_run_over",], after["fedsecure_run_failed",]) == (1, 0)
    assert after["fedsecure_attempts_total", "summed", "training"] == 2
    assert after["fedsecure_attempts_total", "summed", "after"] == 1
    assert after["fedsecure_attempt_seconds_total", "training"] > 0
    assert {after["fedsecure_site_there", name] for name in world.names} == {1}
    assert ("fedsecure_run_info", world.coordinator.run.hex()) in after


def test_a_run_that_is_given_up(tmp_path: Path) -> None:
    world = World(tmp_path)
    metrics = Metrics(world.start().run.hex())
    world.hurry()
    found = updated(world, metrics)
    assert (found["fedsecure_run_over",], found["fedsecure_run_failed",]) == (1, 1)


def test_it_answers_on_a_port_of_its_own(tmp_path: Path) -> None:
    world = World(tmp_path)
    metrics = Metrics(world.start().run.hex())
    updated(world, metrics)
    server = metrics.serve("127.0.0.1:0")
    try:
        with urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=60) as answer:
            assert samples(answer.read().decode())["fedsecure_rounds",] == 4
        with pytest.raises(EnvironmentProblem, match="FS-1801"):
            metrics.serve(f"127.0.0.1:{server.port}")
    finally:
        server.close()
    for wrong in ("127.0.0.1:none", "127.0.0.1:70000", "nowhere.invalid:0"):
        with pytest.raises(EnvironmentProblem, match="FS-1801"):
            metrics.serve(wrong)


@pytest.mark.slow
def test_the_program_serves_them_and_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, waits={"start_seconds": 2.0})
    config = world.start().config.model_copy(update={"metrics": "127.0.0.1:0", "listen": "127.0.0.1:0"})
    original, servers, seen = Metrics.serve, list[Any](), list[str]()

    def kept(self: Metrics, listen: str) -> Any:
        servers.append(original(self, listen))
        return servers[-1]

    monkeypatch.setattr(Metrics, "serve", kept)

    def watch(status: object) -> None:
        if not seen:
            with urlopen(f"http://127.0.0.1:{servers[0].port}/metrics", timeout=60) as answer:
                seen.append(answer.read().decode())

    with pytest.raises(RunError, match="FS-1701"):
        serve([config], announce=lambda address, run: None, watch=watch)
    assert "fedsecure_rounds 0.0" in seen[0], "asked before the first look"
    with pytest.raises(OSError, match="refused"):
        urlopen(f"http://127.0.0.1:{servers[0].port}/metrics", timeout=60)


def told(metrics: Metrics, kind: Any, at: float = 1000.0, **facts: Any) -> None:
    metrics(Happening(kind, "ab" * 16, at, facts))


def test_what_an_operator_is_woken_for() -> None:
    metrics = Metrics("ab" * 16)
    told(metrics, "attempt-opened", round=1, attempt=0, stage="training", cohort=["a", "b", "c"], context="00")
    told(metrics, "attempt-aborted", round=1, attempt=0, stage="training", code="FS-1350", reason="x", seconds=50.0)
    told(metrics, "attempt-opened", round=1, attempt=1, stage="training", cohort=["a", "b", "c"], context="01")
    told(metrics, "attempt-summed", round=1, attempt=1, stage="training", survivors=["a", "b"], seconds=2.0,
         bytes_up=700, bytes_down=90)  # fmt: skip
    told(metrics, "round-saved", at=1234.5, round=1, stage="training", step=1)
    told(metrics, "site-joined", site="a", certificate_expires=1.5e9)
    told(metrics, "site-joined", site="a")
    told(metrics, "site-left", site="a", code="FS-1201")
    told(metrics, "site-left", site="b", code="")
    told(metrics, "site-refused", site="c", code="FS-1510")
    told(metrics, "alarm", code="FS-1730", reason="x")
    told(metrics, "run-resumed", round=1, attempt=1)
    told(metrics, "run-paused")
    metrics.certificate("aggregator", 2e9)
    found = samples(generate_latest(metrics.registry).decode())
    took = "fedsecure_attempt_duration_seconds"
    assert found[f"{took}_count", "summed", "training"] == found[f"{took}_count", "aborted", "training"] == 1
    assert found[f"{took}_bucket", "30.0", "aborted", "training"] == 0
    assert found[f"{took}_bucket", "60.0", "aborted", "training"] == 1
    assert (found["fedsecure_last_survivors",], found["fedsecure_last_cohort",]) == (2, 3)
    assert found["fedsecure_last_round_seconds",] == 1234.5
    assert (found["fedsecure_bytes_total", "up"], found["fedsecure_bytes_total", "down"]) == (700, 90)
    assert found["fedsecure_site_joins_total", "a"] == 2
    assert found["fedsecure_site_departures_total", "FS-1201"] == found["fedsecure_site_departures_total", "none"] == 1
    assert found["fedsecure_refusals_total", "FS-1510"] == found["fedsecure_alarms_total", "FS-1730"] == 1
    assert found["fedsecure_resumes_total",] == found["fedsecure_run_paused",] == 1
    assert found["fedsecure_certificate_expiry_seconds", "aggregator"] == 2e9
    assert found["fedsecure_certificate_expiry_seconds", "a"] == 1.5e9, "a joining that does not say leaves it"
    told(metrics, "run-continued")
    assert samples(generate_latest(metrics.registry).decode())["fedsecure_run_paused",] == 0


def test_every_kind_of_happening_is_heard_without_a_failure() -> None:
    metrics = Metrics("ab" * 16)
    facts = {"stage": "training", "seconds": 1.0, "survivors": [], "site": "a", "code": "FS-1350", "cohort": []}
    for kind in get_args(Kind):
        told(metrics, kind, **facts)


def test_a_site_that_is_gone_keeps_the_time_it_was_there_last(tmp_path: Path) -> None:
    world = World(tmp_path)
    now = [100.0]
    metrics = Metrics(world.start().run.hex(), clock=lambda: now[0])
    with world.client("site-1"):
        assert updated(world, metrics)["fedsecure_site_last_there_seconds", "site-1"] == 100
        now[0] = 200.0
        found = updated(world, metrics)
    assert found["fedsecure_site_last_there_seconds", "site-1"] == 200
    assert ("fedsecure_site_last_there_seconds", "site-2") not in found


# --- the operator's port ----------------------------------------------------------------------------------------------


def asked(port: int, path: str, **options: Any) -> tuple[int, str]:
    request = Request(f"http://127.0.0.1:{port}{path}", **options)
    try:
        with urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        with error:
            return error.code, error.read().decode()


@pytest.fixture
def served() -> Iterator[tuple[Metrics, int]]:
    metrics = Metrics("ab" * 16)
    server = metrics.serve("127.0.0.1:0")
    yield metrics, server.port
    server.close()


def test_alive_at_once_and_ready_when_told(served: tuple[Metrics, int]) -> None:
    metrics, port = served
    assert asked(port, "/healthz") == (200, "alive\n")
    assert asked(port, "/readyz") == (503, "the aggregator is starting\n")
    metrics.readiness.ready()
    assert asked(port, "/readyz") == (200, "ready\n")
    metrics.readiness.not_ready("stopping")
    assert asked(port, "/readyz") == (503, "stopping\n")
    assert asked(port, "/healthz")[0] == 200


def test_nothing_else_is_answered(served: tuple[Metrics, int]) -> None:
    _, port = served
    assert asked(port, "/")[0] == asked(port, "/metrics/../x")[0] == 404
    for method in ("POST", "PUT", "DELETE"):
        assert asked(port, "/metrics", data=b"x", method=method)[0] == 405
    assert asked(port, "/healthz", method="HEAD") == (200, "")


@pytest.mark.slow
def test_callers_that_say_nothing_do_not_keep_others_out(
    served: tuple[Metrics, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, port = served
    assert operations._Handler.timeout == operations.CALL_SECONDS
    monkeypatch.setattr(operations._Handler, "timeout", 0.2)
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(3 * operations.MAX_CALLERS)]
    try:
        # Those above the limit are closed, the others after their time.
        for connection in silent:
            connection.settimeout(60)
            assert connection.recv(1) == b""
        assert asked(port, "/healthz")[0] == 200
    finally:
        for connection in silent:
            connection.close()


def test_over_ipv6() -> None:
    metrics = Metrics("ab" * 16)
    try:
        server = metrics.serve("[::1]:0")
    except EnvironmentProblem:
        pytest.skip("this machine has no IPv6")
    try:
        with urlopen(f"http://[::1]:{server.port}/healthz", timeout=60) as answer:
            assert answer.status == 200
    finally:
        server.close()
