"""The simulated world itself: it repeats, it does what it says, and its checks fail where the code is broken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from faults import invariants
from faults.invariants import check_everything, check_progress, recorded
from faults.world import SimulatedWorld, simulated

from fedsecure.aggregator.answers import Answers
from fedsecure.aggregator.sessions import Sessions
from fedsecure.aggregator.store import RunStore
from fedsecure.errors import RunError
from fedsecure.privacy.ledger import Ledger, Reservation
from fedsecure.secagg.inbox import Inbox


def until(world: SimulatedWorld, condition: Callable[[], object], *, steps: int = 3000) -> None:
    """Nothing goes wrong until something is so."""
    for _ in range(steps):
        if condition():
            return
        world.step()
    raise AssertionError(f"in vain: {world.waiting()}")


def go_on(world: SimulatedWorld, steps: int) -> None:
    """Step by step, with every check after each."""
    for _ in range(steps):
        world.step()
        check_everything(world)


def eventful(world: SimulatedWorld) -> list[str]:
    """A little of everything, always the same."""
    for number in range(12):
        for _ in range(40 + number):
            world.step()
        packets = world.network.deliverable(world.stage.now)
        if number % 4 == 0 and packets:
            world.lose(packets[number % len(packets)])
        elif number % 4 == 1 and packets and packets[0].what == "request":
            world.copy(packets[0], delay=3.0)
        elif number % 4 == 2:
            world.kill_site(world.names[number % 4])
        else:
            world.trap("aggregator", point="commit sum_attempt", when="after", skip=0)
    return world.log


def test_the_same_decisions_give_the_same_run() -> None:
    logs = []
    for _ in range(2):
        with simulated(prepared=3) as world:
            logs.append(eventful(world))
    assert logs[0] == logs[1]
    assert len(logs[0]) > 400
    assert "the aggregator is gone" in logs[0]


def test_without_faults_runs_follow_each_other_and_every_site_is_in_every_sum() -> None:
    with simulated(rounds=3) as world:
        until(world, lambda: len(world.runs) == 3)
        check_everything(world)
        for _, records in list(recorded(world).values())[:2]:
            assert [record["outcome"]["survivors"] for record in records] == [world.names] * 3
        assert {how for _, how in world.endings} == {"complete"}


def test_a_certificate_revoked_between_an_upload_and_its_end_is_in_no_sum() -> None:
    with simulated() as world:
        until(world, lambda: len([p for p in world.network.packets if p.what == "body"]) == 4)
        world.revoke("site-2")
        until(world, lambda: len(world.absorbed_sums) == 2)
        check_everything(world)
        (attempts,) = [attempts for _, attempts in recorded(world).values()]
        assert [record["outcome"]["survivors"] for record in attempts[:2]] == [["site-1", "site-3", "site-4"]] * 2
        assert world.processes["site-2"].ended == "FS-1460"


# --- controls: with the code broken on purpose, a check fails ---------------------------------------------------------


def test_a_charge_that_is_not_on_disk_before_the_answer_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Ledger.reserve

    def forgetful(self: Ledger, **charge: Any) -> Reservation:
        reservation = real(self, **charge)
        self.void(reservation, "given back for convenience")
        return reservation

    monkeypatch.setattr(Ledger, "reserve", forgetful)
    monkeypatch.setattr(Ledger, "commit", lambda *arguments: None)
    with simulated() as world:
        until(world, lambda: world.surprises)
        with pytest.raises(AssertionError, match="without a charge"):
            check_everything(world)


@pytest.mark.slow
def test_an_upload_that_is_counted_twice_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two things count a repeat once: the answers kept by request, and the messages kept by sender.
    monkeypatch.setattr(Answers, "find", lambda *arguments: None)
    monkeypatch.setattr(Inbox, "is_repeat", lambda *arguments: False)
    with simulated() as world:
        until(world, lambda: len([p for p in world.network.packets if p.call.kind == "upload"]) == 4)
        first, other = [p for p in world.network.packets if p.call.kind == "upload"][:2]
        world.copy(first, delay=0.5)
        world.hold(other, delay=2.0)
        with pytest.raises(AssertionError):
            go_on(world, 600)


@pytest.mark.slow
def test_a_model_that_is_saved_apart_from_its_record_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = RunStore.sum_attempt

    def apart(self: RunStore, record: Any, outcome: Any, progress: Any, **rest: Any) -> None:
        with self._database.session() as session:
            self._over(session, record, outcome, **rest)
        real(self, record, outcome, progress, **rest)

    monkeypatch.setattr(RunStore, "sum_attempt", apart)
    with simulated() as world:
        world.trap("aggregator", point="commit sum_attempt", when="after", skip=4)
        with pytest.raises(AssertionError, match="model"):
            go_on(world, 1200)


def test_a_site_that_answers_an_attempt_again_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated() as world:
        until(world, lambda: len(world.answers) >= 8)
        monkeypatch.setitem(world.answers, 0, world.answers[1])
        with pytest.raises(AssertionError, match="twice"):
            check_everything(world)


def test_a_run_that_cannot_go_on_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Sessions, site: str, token: bytes, now: float) -> bool:
        raise RunError("FS-1703", "no room", expected="room", cure="none")

    monkeypatch.setattr(Sessions, "open", full)
    monkeypatch.setattr(invariants, "PROGRESS_STEPS", 300)
    with simulated() as world, pytest.raises(AssertionError, match="no progress"):
        check_progress(world)
