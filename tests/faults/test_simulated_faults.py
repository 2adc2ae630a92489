"""Hypothesis chooses what goes wrong, step by step, in a simulated federation; what must hold, holds throughout.

``pytest tests/faults --slow`` goes on for a million steps.
"""

from __future__ import annotations

from collections import Counter

import pytest
from faults.disk import When
from faults.invariants import check, check_everything, check_progress
from faults.network import Packet
from faults.service import WRITES
from faults.world import SimulatedWorld
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

SITES = tuple(f"site-{i}" for i in range(1, 5))
SITE_POINTS = (
    "",
    "commit ledger.db",
    "rename ledger.db.head",
    "rename latch.json",
    "rename usage.json",
    "append audit.log",
)
AGGREGATOR_POINTS = (
    "",
    "rename federation.json",
    "rename model.safetensors",
    "append audit.log",
    "commit aggregator.db",
    *(f"commit {name}" for name in WRITES if name not in ("move", "computed")),
    *(f"commit move {state}" for state in ("shares", "masked", "survivors", "unmask", "keys", "waiting")),
)
sites = st.sampled_from(SITES)
delays = st.sampled_from((0.0, 0.5, 3.0, 12.0, 40.0, 90.0))
numbers = st.integers(0, 200)
whens: st.SearchStrategy[When] = st.sampled_from(("before", "after"))
# How many steps follow without another fault; a round takes about a hundred.
then = st.sampled_from((0, 1, 7, 30, 120, 300))


class Tally:
    """What all worlds of a test did together."""

    def __init__(self) -> None:
        self.steps = 0
        self.worlds = 0
        self.sums = 0
        self.slowest = 0
        self.faults = Counter[str]()
        self.killed_at = Counter[tuple[str, str, str]]()
        self.endings = Counter[tuple[str, str]]()

    def __str__(self) -> str:
        lines = [f"{self.steps} steps in {self.worlds} worlds, {self.sums} sums"]
        lines.append(f"two more sums within {self.slowest} steps after faults stop")
        for what, counted in (("faults", self.faults), ("killed", self.killed_at), ("endings", self.endings)):
            lines += [f"{what}: {count} × {name}" for name, count in counted.most_common()]
        return "\n".join(lines)


TALLY = Tally()


class Faults(RuleBasedStateMachine):
    """One world; each rule is a step without faults, or one fault."""

    world: SimulatedWorld

    @initialize(prepared=st.sampled_from((0, 3)), rounds=st.sampled_from((3, 6)))
    def start(self, prepared: int, rounds: int) -> None:
        self.world = SimulatedWorld(rounds=rounds, prepared=prepared)

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        try:
            check_everything(world)
            steps = check_progress(world)
            check_everything(world)
        finally:
            world.close()
        TALLY.steps += world.steps
        TALLY.worlds += 1
        TALLY.sums += len(world.absorbed_sums)
        TALLY.slowest = max(TALLY.slowest, steps)
        TALLY.killed_at.update((name.partition("-")[0], point, when) for name, point, when in world.disks.sprung)
        TALLY.endings.update((name.partition("-")[0], how) for name, how in world.endings)

    def fault(self, name: str) -> SimulatedWorld:
        TALLY.faults[name] += 1
        return self.world

    def go_on(self, steps: int) -> None:
        for _ in range(steps):
            self.world.step()
            if self.world.surprises:
                return

    def packet(self, number: int, *kinds: str) -> Packet | None:
        packets = [p for p in self.world.network.deliverable(self.world.stage.now) if p.what in kinds]
        return packets[number % len(packets)] if packets else None

    # --- time and the network -----------------------------------------------------------------------------------------

    @rule(seconds=delays, then=then)
    def time_passes(self, seconds: float, then: int) -> None:
        self.world.pass_time(seconds)
        self.go_on(then)

    @rule(number=numbers, then=then)
    def reorder(self, number: int, then: int) -> None:
        if packet := self.packet(number, "request", "body", "reply"):
            self.fault("reorder").deliver(packet)
        self.go_on(then)

    @rule(number=numbers, then=then)
    def drop_request(self, number: int, then: int) -> None:
        if packet := self.packet(number, "request", "body"):
            self.fault("drop request").lose(packet)
        self.go_on(then)

    @rule(number=numbers, then=then)
    def drop_response(self, number: int, then: int) -> None:
        if packet := self.packet(number, "reply"):
            self.fault("drop response").lose(packet)
        self.go_on(then)

    @rule(number=numbers, delay=delays, then=then)
    def duplicate(self, number: int, delay: float, then: int) -> None:
        if packet := self.packet(number, "request"):
            self.fault("duplicate").copy(packet, delay=delay)
        self.go_on(then)

    @rule(number=numbers, delay=delays, then=then)
    def delay(self, number: int, delay: float, then: int) -> None:
        if packet := self.packet(number, "request", "body", "reply"):
            self.fault("delay").hold(packet, delay=delay)
        self.go_on(then)

    # --- processes ----------------------------------------------------------------------------------------------------

    @rule(name=sites, noticed=st.booleans(), then=then)
    def kill_site(self, name: str, noticed: bool, then: int) -> None:
        self.fault("kill site").kill_site(name, noticed=noticed)
        self.go_on(then)

    @rule(name=sites, point=st.sampled_from(SITE_POINTS), when=whens, skip=st.integers(0, 3), then=then)
    def kill_site_at(self, name: str, point: str, when: When, skip: int, then: int) -> None:
        self.fault("kill site at").trap(name, point=point, when=when, skip=skip)
        self.go_on(then)

    @rule(then=then)
    def kill_aggregator(self, then: int) -> None:
        self.fault("kill aggregator").kill_aggregator()
        self.go_on(then)

    @rule(point=st.sampled_from(AGGREGATOR_POINTS), when=whens, skip=st.integers(0, 3), then=then)
    def kill_aggregator_at(self, point: str, when: When, skip: int, then: int) -> None:
        self.fault("kill aggregator at").trap("aggregator", point=point, when=when, skip=skip)
        self.go_on(then)

    # --- machines -----------------------------------------------------------------------------------------------------

    @rule(name=st.sampled_from((*SITES, "aggregator")), then=then)
    def disk_full(self, name: str, then: int) -> None:
        self.fault("disk full").fill_disk(name)
        self.go_on(then)
        self.world.free_disk(name)

    @rule(name=sites, hours=st.sampled_from((-30.0, -2.0, -0.5, 0.5, 2.0, 30.0)), then=then)
    def skew_clock(self, name: str, hours: float, then: int) -> None:
        self.fault("clock skew").skew_clock(name, hours)
        self.go_on(then)
        self.world.skew_clock(name, 0.0)

    @precondition(lambda self: not self.world.revoked)
    @rule(name=sites, then=then)
    def revoke(self, name: str, then: int) -> None:
        self.fault("revoke").revoke(name)
        self.go_on(then)

    # --- what holds ---------------------------------------------------------------------------------------------------

    @invariant()
    def holds(self) -> None:
        check(self.world)


def explore(*, steps: int, number: int) -> None:
    """Worlds for at least so many steps, others for each ``number``."""
    before = TALLY.steps
    while TALLY.steps - before < steps:

        class Seeded(Faults):
            """Hypothesis keeps its seed on the class."""

        run_state_machine_as_test(
            seed(number)(Seeded),
            settings=settings(
                max_examples=4,
                stateful_step_count=30,
                database=None,
                deadline=None,
                phases=(Phase.generate, Phase.shrink),
                suppress_health_check=list(HealthCheck),
                print_blob=False,
            ),
        )
        number += 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_must_hold_holds_whatever_goes_wrong() -> None:
    explore(steps=10_000, number=0)
    assert len(TALLY.faults) == 12, "every kind of fault happened"


@pytest.mark.timeout(0)
@pytest.mark.parametrize("part", range(20))
def test_a_million_steps(part: int, pytestconfig: pytest.Config) -> None:
    if not pytestconfig.getoption("--slow"):
        pytest.skip("takes 20 minutes of two cores: pytest tests/faults --slow")
    explore(steps=50_000, number=1_000_000 * (part + 1))
    print(TALLY)
