"""Real processes over real sockets, killed with SIGKILL in every phase of a round: the run goes on to its end."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from e2e.processes import Deployment

from fedsecure.privacy.ledger import Ledger

PHASES = ("advertise", "shares", "masked", "survivors", "unmask")


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    # Every lost attempt is charged, so the plan has to leave room for them.
    made = Deployment(
        tmp_path / "d",
        rounds=40,
        waits={"prepared_rounds": 0, "silence_seconds": 10.0},
        privacy={"spare_attempts": 20},
    )
    yield made
    made.stop()


def asked(deployment: Deployment, query: str) -> list[tuple[Any, ...]]:
    """What stands in the aggregator's database, read beside it."""
    with closing(sqlite3.connect(f"file:{deployment.state / 'aggregator.db'}?mode=ro", uri=True, timeout=20)) as open_:
        return open_.execute(query).fetchall()


def state_of(deployment: Deployment) -> tuple[str, int]:
    ((state, step),) = asked(deployment, "SELECT state, step FROM runs")
    return state, step


def catch(deployment: Deployment, phase: str) -> None:
    """Wait until a round later than this one is in a phase, which it is for milliseconds."""
    _, before = state_of(deployment)
    give_up = time.monotonic() + 120
    while True:
        state, step = state_of(deployment)
        if step > before and state == phase:
            return
        assert time.monotonic() < give_up, f"never in {phase}\n{deployment.logs()}"
        time.sleep(0.001)


def keep_port(deployment: Deployment, address: str) -> None:
    """The next process listens where this one does, and the sites try for as long as it takes to come up."""
    file = deployment.layout.federation
    file.write_text(file.read_text().replace("127.0.0.1:0", f"127.0.0.1:{address.rpartition(':')[2]}"))
    for site in deployment.layout.sites.values():
        site.write_text(site.read_text().replace("connect_seconds = 10.0", "connect_seconds = 240.0"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_ends_although_its_aggregator_is_killed_in_every_phase_and_a_site_beside(deployment: Deployment) -> None:
    keep_port(deployment, deployment.serve())
    for name in deployment.world.names:
        deployment.join(name)
    pids = {name: deployment.children[name].pid for name in ("site-1", "site-3")}
    killed_in = []
    for number, phase in enumerate(PHASES):
        catch(deployment, phase)
        deployment.kill("aggregator")
        killed_in.append(state_of(deployment)[0])
        if number == 2:
            deployment.kill("site-2")
            deployment.join("site-2")
        deployment.serve()
    assert deployment.wait("aggregator") == 0, deployment.logs()
    assert all(deployment.wait(name) == 0 for name in deployment.world.names), deployment.logs()
    assert {name: deployment.children[name].pid for name in pids} == pids, "nobody started the sites again"

    ((outcome, closed),) = asked(deployment, "SELECT outcome, closed FROM runs")
    assert json.loads(outcome)["complete"]
    assert closed
    attempts = [
        (round, attempt, context, json.loads(end))
        for round, attempt, context, end in asked(deployment, "SELECT round, attempt, context, outcome FROM attempts")
    ]
    summed = [round for round, _, _, end in attempts if "survivors" in end]
    assert summed == list(range(len(summed))), "every round has one sum, in order"
    assert len({context for _, _, context, _ in attempts}) == len(attempts), "no attempt was asked twice"
    lost = [end for _, _, _, end in attempts if end.get("code") == "FS-1730"]
    assert len(lost) >= 3, killed_in
    for name, file in deployment.layout.sites.items():
        with Ledger(file.parent / "ledger.db") as ledger:
            ledger.verify()
            assert len(ledger.spent(f"{name}-train", "train")) >= deployment.world.rounds


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_aggregator_killed_while_it_starts_is_started_again(deployment: Deployment) -> None:
    keep_port(deployment, deployment.serve())
    deployment.kill("aggregator")
    for name in deployment.world.names:
        deployment.join(name)
    for number in range(6):
        deployment._spawn("aggregator", "serve", deployment.layout.federation)
        time.sleep(0.3 * number)
        deployment.kill("aggregator")
    deployment.serve()
    assert deployment.wait("aggregator") == 0, deployment.logs()
    assert all(deployment.wait(name) == 0 for name in deployment.world.names), deployment.logs()
    assert asked(deployment, "SELECT count(*) FROM runs") == [(1,)]
