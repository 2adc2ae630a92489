"""Ctrl-C and SIGTERM: a site that is told to stop says so in one line, and what it has charged stays charged."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e.processes import Deployment

from fedsecure.privacy.ledger import Ledger


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    made = Deployment(tmp_path / "d", rounds=400)
    yield made
    made.stop()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_site_told_to_stop_leaves_cleanly(deployment: Deployment, number: signal.Signals, status: int) -> None:
    deployment.serve()
    for name in deployment.world.names:
        deployment.join(name)
    deployment.until(lambda: deployment.status()["step"] >= 1, "a round")
    deployment.children["site-1"].send_signal(number)
    assert deployment.wait("site-1") == status, deployment.logs()
    assert "Traceback" not in deployment.log("site-1")
    assert "stopped" in deployment.log("site-1")
    assert "stays charged" in deployment.log("site-1")
    with Ledger(deployment.layout.sites["site-1"].parent / "ledger.db") as ledger:
        ledger.verify()
        assert ledger.spent("site-1-train", "train")
    deployment.join("site-1")
    before = deployment.status()["step"]
    deployment.until(lambda: deployment.status()["step"] >= before + 2, "the run goes on with the site's next process")
