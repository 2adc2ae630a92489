"""A certificate that ends during a run is spoken of during the run, by ``serve`` and by the site."""

from __future__ import annotations

import datetime as dt
import logging
from pathlib import Path

import pytest
from federation_world import World

from fedsecure.aggregator import program
from fedsecure.errors import RunError
from fedsecure.identity import certificates


@pytest.fixture
def days_fly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every certificate ends soon, and each look is on another day."""
    monkeypatch.setattr(certificates, "NOTICE", dt.timedelta(days=10_000))
    monkeypatch.setattr(certificates, "_DAY", dt.timedelta())
    monkeypatch.setattr(program, "_WARN_SECONDS", 0.05)


def warnings(caplog: pytest.LogCaptureFixture, logger: str) -> int:
    return sum("this member's certificate ends on" in r.message for r in caplog.records if r.name == logger)


@pytest.mark.usefixtures("days_fly")
def test_the_aggregator_says_so_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    world = World(tmp_path, waits={"start_seconds": 0.2})
    config = world.start().config.model_copy(update={"listen": "127.0.0.1:0"})
    world.database.close()
    with caplog.at_level(logging.WARNING), pytest.raises(RunError, match="FS-1701"):
        program.serve([config], announce=lambda *_: None, watch=lambda _: None)
    assert warnings(caplog, "fedsecure.aggregator") > 1


@pytest.mark.usefixtures("days_fly")
def test_a_site_says_so_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    world = World(tmp_path, rounds=1)
    world.start()
    with caplog.at_level(logging.WARNING):
        world.run(*(world.take_part(name) for name in world.names))
    assert not world.errors, world.errors
    assert warnings(caplog, "fedsecure.client") > len(world.names)
