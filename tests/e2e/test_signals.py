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
def test_a_site_told_to_stop_leaves_cleanly_and_may_come_back(deployment: Deployment) -> None:
    deployment.serve()
    for name in deployment.world.names:
        deployment.join(name)
    for name, number, status in (("site-1", signal.SIGINT, 130), ("site-2", signal.SIGTERM, 143)):
        before = deployment.status()["step"]
        deployment.until(lambda before=before: deployment.status()["step"] >= before + 2, "the run goes on")
        deployment.children[name].send_signal(number)
        assert deployment.wait(name) == status, deployment.logs()
        assert "Traceback" not in deployment.log(name)
        assert "stopped" in deployment.log(name)
        assert "stays charged" in deployment.log(name)
        with Ledger(deployment.layout.sites[name].parent / "ledger.db") as ledger:
            ledger.verify()
            assert ledger.spent(f"{name}-train", "train")
        deployment.join(name)
    before = deployment.status()["step"]
    deployment.until(lambda: deployment.status()["step"] >= before + 2, "the run goes on with their next processes")
