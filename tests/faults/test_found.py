"""What the simulated world has found, each as a test of its own, with the fewest steps that show it."""

from __future__ import annotations

from typing import Any

import pytest
from faults.invariants import check_everything, check_progress, recorded
from faults.network import Packet
from faults.test_world import until
from faults.world import SimulatedWorld, simulated

from fedsecure.secagg.spool import FileSpool


def polls(world: SimulatedWorld, name: str) -> list[Packet]:
    """The site's long polls on their way to the aggregator, of the session that this aggregator knows."""
    session = world.core.sessions.find(name) if world.core is not None else None
    return [
        packet
        for packet in world.network.packets
        if packet.what == "request" and packet.call.kind == "next" and packet.call.site == name
        if session is not None and packet.call.request.session == session.token
    ]


def test_a_call_survives_two_restarts_of_the_aggregator_while_it_is_on_its_way() -> None:
    """A site joined again, once, and its repeated call then met the aggregator after next: it gave up with FS-1705."""
    with simulated() as world:
        site = world.processes["site-3"]
        until(world, lambda: len(world.absorbed_sums) == 1)
        world.kill_aggregator()
        until(world, lambda: polls(world, "site-3"))
        world.hold(polls(world, "site-3")[0], delay=9.0)
        world.kill_aggregator()
        check_progress(world)
        check_everything(world)
        assert world.processes["site-3"] is site
        assert not site.dead


def test_a_full_disk_at_the_aggregator_is_no_reason_for_a_site_to_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """The spool's FS-1349 went to the site that uploaded, which took it for its own disk's and ended."""
    create, asked = FileSpool.create, []

    def full_once(self: FileSpool, size: int) -> Any:
        asked.append(size)
        if len(asked) == 1:
            raise self._full(size, "No space left on device")
        return create(self, size)

    with simulated() as world:
        until(world, lambda: len([p for p in world.network.packets if p.call.kind == "upload"]) == 4)
        monkeypatch.setattr(FileSpool, "create", full_once)
        check_progress(world)
        check_everything(world)
        assert asked
        assert not world.endings
        (attempts,) = [attempts for _, attempts in recorded(world).values()]
        assert "No space left on device" in attempts[0]["outcome"]["aborted"]


def test_a_site_that_joins_while_the_aggregators_disk_is_full_waits_for_it() -> None:
    """The audit log's FS-1820 went to the site that joined, which took it for its own and ended."""
    with simulated() as world:
        world.fill_disk("aggregator")
        until(world, lambda: "the aggregator cannot: FS-1820" in world.log)
        for _ in range(30):
            world.step()
        world.free_disk("aggregator")
        check_progress(world)
        check_everything(world)
        assert not world.endings
