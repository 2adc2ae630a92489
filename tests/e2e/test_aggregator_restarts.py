"""The deployed aggregator killed with SIGKILL, again and again, over real sockets: the run ends as if not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e.processes import Deployment
from e2e.test_processes import rounds_of

from fedsecure.privacy.ledger import Ledger


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    made = Deployment(tmp_path / "d", sites=3, rounds=40)
    yield made
    made.stop()


def restart(deployment: Deployment) -> None:
    """The aggregator is killed and started again at the same address, as a supervisor would."""
    deployment.kill("aggregator")
    address = (deployment.state / "address").read_text()
    text = deployment.layout.federation.read_text()
    deployment.layout.federation.write_text(text.replace('listen = "127.0.0.1:0"', f'listen = "{address}"'))
    deployment.serve()


@pytest.mark.slow
def test_an_aggregator_killed_three_times_ends_its_run_with_the_same_sites(deployment: Deployment) -> None:
    deployment.serve()
    for name in deployment.world.names:
        deployment.join(name)
    run = ""
    for step in (2, 5, 9):
        deployment.until(lambda step=step: deployment.status()["step"] >= step, f"{step} rounds")
        run = run or deployment.status()["run"]
        restart(deployment)
    assert deployment.wait("aggregator") == 0, deployment.logs()
    assert all(deployment.wait(name) == 0 for name in deployment.world.names), deployment.logs()
    status = deployment.status()
    assert status["run"] == run, "one and the same run"
    assert status["outcome"]["complete"]
    assert status["outcome"]["rounds"] == 40
    records = rounds_of(deployment)
    summed = [(r["round"], r["stage"]) for r in records if "survivors" in r]
    assert [number for number, _ in summed] == list(range(42)), "every round once: 40, and evaluation before and after"
    assert len({r["context"] for r in records}) == len(records)
    for name in deployment.world.names:
        with Ledger(deployment.layout.sites[name].parent / "ledger.db") as ledger:
            ledger.verify()
            assert len(ledger.spent(f"{name}-train", "train")) >= 40


@pytest.mark.slow
def test_an_aggregator_told_to_stop_goes_on_when_it_is_started_again(deployment: Deployment) -> None:
    deployment.serve()
    for name in deployment.world.names:
        deployment.join(name)
    deployment.until(lambda: deployment.status()["step"] >= 2, "two rounds")
    run = deployment.status()["run"]
    deployment.children["aggregator"].terminate()
    assert deployment.wait("aggregator") == 1
    assert "FS-1712" in deployment.log("aggregator")
    address = (deployment.state / "address").read_text()
    text = deployment.layout.federation.read_text()
    deployment.layout.federation.write_text(text.replace('listen = "127.0.0.1:0"', f'listen = "{address}"'))
    deployment.serve()
    assert deployment.wait("aggregator") == 0, deployment.logs()
    assert deployment.status()["run"] == run
    assert all(deployment.wait(name) == 0 for name in deployment.world.names), deployment.logs()
