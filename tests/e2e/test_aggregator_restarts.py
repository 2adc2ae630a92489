"""An aggregator told to stop, as by a supervisor or before an upgrade: the next process goes on with its run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e.processes import Deployment


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    made = Deployment(tmp_path / "d", sites=3, rounds=40)
    for site in made.layout.sites.values():
        # However long a loaded machine takes to start the next process.
        site.write_text(site.read_text().replace("connect_seconds = 10.0", "connect_seconds = 240.0"))
    yield made
    made.stop()


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
