"""What Prometheus gets: the figures of the operator's status, from a run that went through and one that did not."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from federation_world import World
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

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
