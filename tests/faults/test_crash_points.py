"""Every write at which a process can be killed, one by one, before it and after it: whatever was going on, goes on."""

from __future__ import annotations

import pytest
from faults.disk import When
from faults.invariants import check_everything, check_progress
from faults.test_simulated_faults import AGGREGATOR_POINTS, SITE_POINTS
from faults.test_world import until
from faults.world import simulated

POINTS = [
    *(("aggregator", point) for point in AGGREGATOR_POINTS if point),
    *(("site-2", point) for point in SITE_POINTS if point),
]
# Those of a process that starts and begins a new run.
STARTING = ("rename federation.json", "commit aggregator.db", "commit take_up")


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("name", "point"), POINTS, ids=lambda value: value.replace(" ", "-"))
def test_a_process_killed_there_is_followed_by_one_that_goes_on(name: str, point: str, when: When) -> None:
    # Rounds that set up their own keys pass all phases; with keys set up ahead there are set-ups.
    prepared = 2 if point in ("commit begin_keys", "commit move keys", "commit move waiting") else 0
    with simulated(rounds=3, prepared=prepared) as world:
        until(world, lambda: len(world.absorbed_sums) == 1)
        if point in STARTING:
            until(world, lambda: world.core is None)
        world.trap(name, point=point, when=when, skip=0)
        if point == "commit abort_attempt":
            # Two of four are too few, and the rest of the round is aborted.
            world.kill_site("site-1")
            world.kill_site("site-2")
        until(world, lambda: world.disks.sprung)
        assert world.disks.sprung == [(name, point, when)]
        check_progress(world)
        check_everything(world)
