"""Whole runs over lines that repeat, lose and delay: nobody dies of it, and every charge has its one release."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from federation_world import World

from fedsecure.client import Client, Receipt
from fedsecure.errors import BudgetExceeded, RunError, TransportError
from fedsecure.privacy.ledger import Ledger
from fedsecure.secagg.server import Phase
from fedsecure.transport.memory import MemoryTransport
from fedsecure.wire import federation_pb2 as pb


class Repeating(MemoryTransport):
    """Every reply to a message is lost once, so every message comes twice, as a retry sends it."""

    def join(self, request: pb.JoinRequest) -> pb.JoinReply:
        super().join(request)
        return super().join(request)

    def send(self, message: pb.PhaseMessage) -> None:
        super().send(message)
        super().send(message)

    def upload(self, header: pb.UploadHeader, payload: memoryview) -> None:
        super().upload(header, payload)
        super().upload(header, payload)


class Late(MemoryTransport):
    """Uploads only after the phase has closed without it, once."""

    world: World
    done = False

    def upload(self, header: pb.UploadHeader, payload: memoryview) -> None:
        core = self._core
        while not self.done:
            self.world.pass_over(self._site)
            with self._gate:
                attempt = core.engine.attempt  # type: ignore[attr-defined]
                self.done = attempt is None or attempt.phase is not Phase.MASKED
            time.sleep(0.01)
        super().upload(header, payload)


def receipts_of(client: Client) -> list[Receipt]:
    return [client.answer(query) for query in client.queries()]


def test_a_call_made_twice_counts_once(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=2)
    world.start()
    receipts: dict[str, list[Receipt]] = {}

    def take_part(name: str) -> None:
        with world.client(name, transport=Repeating(world.coordinator, name, world.gate)) as client:
            receipts[name] = receipts_of(client)

    world.run(*(lambda name=name: take_part(name) for name in world.names))
    assert not world.errors
    outcome = world.coordinator.outcome
    assert outcome is not None
    assert outcome["complete"]
    assert not [a for a in outcome["attempts"] if "aborted" in a]
    for name in world.names:
        assert [r.released for r in receipts[name]] == [True] * 4, "the last message's repeat comes after the sum"
        with Ledger(tmp_path / name / "ledger.db") as ledger:
            assert len(ledger.spent(f"{name}-train", "train")) == world.rounds


def test_a_site_that_is_too_late_loses_the_round_and_goes_on(tmp_path: Path) -> None:
    world = World(tmp_path, sites=5, rounds=2)
    world.start()
    receipts: list[Receipt] = []
    late = Late(world.coordinator, "site-5", world.gate)
    late.world = world

    def slow() -> None:
        with world.client("site-5", transport=late) as client:
            receipts.extend(receipts_of(client))

    world.run(slow, *(world.take_part(name) for name in world.names[:4]))
    assert not world.errors
    outcome = world.coordinator.outcome
    assert outcome is not None
    assert outcome["complete"]
    assert [len(a["survivors"]) for a in outcome["attempts"]] == [4, 5, 5, 5]
    assert [r.released for r in receipts] == [False, True, True, True]


def test_a_tensor_that_is_broadcast_no_more_is_an_aborted_attempt(tmp_path: Path) -> None:
    world = World(tmp_path, sites=5, rounds=2)
    world.start()
    receipts: list[Receipt] = []

    class Slow(MemoryTransport):
        waited = False

        def fetch(self, request: pb.FetchRequest) -> bytes:
            while not self.waited:
                world.pass_over("site-5")
                with self._gate:
                    self.waited = request.digest not in self._core.engine.broadcast.blobs  # type: ignore[attr-defined]
                time.sleep(0.01)
            return super().fetch(request)

    def slow() -> None:
        with world.client("site-5", transport=Slow(world.coordinator, "site-5", world.gate)) as client:
            receipts.extend(receipts_of(client))

    world.run(slow, *(world.take_part(name) for name in world.names[:4]))
    assert not world.errors
    assert world.coordinator.outcome is not None
    assert world.coordinator.outcome["complete"]
    assert not receipts[0].released


def test_a_site_that_cannot_pay_any_more_says_so_to_the_others(tmp_path: Path) -> None:
    # Aborted attempts are charged too, so a site may run out although the plan had fitted.
    world = World(tmp_path, rounds=3)
    world.start()

    def poor() -> None:
        with world.client("site-2") as client:
            for query in client.queries():
                if query.round == 2:
                    limits = client.config.policy.model_copy(update={"max_epsilon": 0.5})
                    poorer = client.config.model_copy(update={"policy": limits})
                    client._sources.member = replace(client._sources.member, config=poorer)
                try:
                    client.answer(query)
                except BudgetExceeded:
                    world.hurry()
                    raise

    world.run(poor, *(world.take_part(name) for name in ("site-1", "site-3")))
    kinds = sorted(type(error).__name__ for error in world.errors.values())
    assert kinds == ["BudgetExceeded", "TransportError", "TransportError"]
    assert "site-2 left with FS-1201" in str(world.coordinator.failure)


def test_a_budget_too_small_from_the_start_is_told_too(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.start()
    config = world.site_config("site-2")
    changes = {"policy": config.policy.model_copy(update={"max_epsilon": 0.5})}

    def poor() -> None:
        with pytest.raises(BudgetExceeded), world.client("site-2", changes=changes):
            pass
        world.hurry()

    world.run(poor, *(world.take_part(name) for name in ("site-1", "site-3")))
    assert "site-2 left with FS-1201" in str(world.coordinator.failure)
    assert {error.code for error in world.errors.values() if isinstance(error, TransportError)} == {"FS-1501"}


def test_a_refused_second_process_does_not_silence_the_first(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.start()
    with world.client("site-1"):
        session = world.coordinator.sessions.find("site-1")
        assert session is not None
        with pytest.raises(RunError, match="FS-1703"), world.client("site-1"):
            pass
        assert world.coordinator.sessions.find("site-1") is session
        MemoryTransport(world.coordinator, "site-1", threading.Condition()).close()
        assert world.coordinator.sessions.alive("site-1", session.heard)
