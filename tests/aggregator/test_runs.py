"""Whole runs in one process: what survives, what is charged, what is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_world import World

from fedsecure.errors import BudgetExceeded, PrivacyError, ProtocolError, RunError, TransportError
from fedsecure.learning.artefact import load_adapter
from fedsecure.privacy.ledger import Ledger
from fedsecure.site.sources import Sources
from fedsecure.transport.memory import MemoryTransport
from fedsecure.wire import federation_pb2 as pb


class Killed(BaseException):
    """Stands for a process that dies: nothing catches it."""


class Mortal(MemoryTransport):
    """Dies when ``fatal`` says so."""

    fatal: Callable[[str, Any], bool]

    def send(self, message: pb.PhaseMessage) -> None:
        self._maybe("send", message)
        super().send(message)

    def upload(self, header: pb.UploadHeader, payload: memoryview) -> None:
        self._maybe("upload", header)
        super().upload(header, payload)

    def _maybe(self, call: str, message: Any) -> None:
        if self.fatal(call, message):
            raise Killed


def mortal(world: World, name: str, fatal: Callable[[str, Any], bool]) -> Mortal:
    transport = Mortal(world.coordinator, name, world.gate)
    transport.fatal = fatal
    return transport


class Countdown:
    """True at the n-th call of that kind, and ever after."""

    def __init__(self, call: str, number: int) -> None:
        self.call, self.left = call, number

    def __call__(self, call: str, message: Any) -> bool:
        self.left -= call == self.call
        return call == self.call and self.left <= 0


@pytest.mark.parametrize(
    ("adapter", "noise", "local_steps"),
    [
        ("linear", "distributed", 1),
        pytest.param("linear", "local", 3, marks=pytest.mark.slow),
        pytest.param("facmic", "distributed", 1, marks=pytest.mark.slow),
    ],
)
def test_a_run_trains_charges_and_reports(tmp_path: Path, adapter: str, noise: str, local_steps: int) -> None:
    world = World(tmp_path, adapter=adapter, noise=noise, local_steps=local_steps)
    world.start()
    world.run(*(world.take_part(name) for name in world.names))
    assert not world.errors
    outcome = world.coordinator.outcome
    assert outcome is not None
    assert outcome["complete"]
    assert outcome["rounds"] == world.rounds
    assert all(a["survivors"] == world.names for a in outcome["attempts"])
    told = [(h.facts["step"], h.facts["epsilon"]) for h in world.happened if h.kind == "round-saved"]
    assert dict(told).keys() == set(range(world.rounds + 1))
    assert [epsilon for _, epsilon in told] == sorted(epsilon for _, epsilon in told)
    assert told[0] == (0, 0.0)
    assert all(told[-1][1] == pytest.approx(world.reports[name]["epsilon"]) for name in world.names)
    before, after = (outcome["evaluations"][stage]["accuracy"] for stage in ("before", "after"))
    assert after > before or adapter == "facmic"
    for name in world.names:
        report = world.reports[name]
        assert 0 < report["epsilon"] <= world.epsilon
        with Ledger(tmp_path / name / "ledger.db") as ledger:
            assert len(ledger.spent(f"{name}-train", "train")) == world.rounds
            assert not ledger.spent(f"{name}-test", "evaluation"), "a public set is not charged"
            ledger.verify()
    files = list(tmp_path.glob("site-*/state/runs/*/adapter.safetensors"))
    assert len(files) == 3
    adapters = [load_adapter(file) for file in files]
    for other in adapters[1:]:
        for tensor, value in adapters[0].tensors.items():
            np.testing.assert_array_equal(value, other.tensors[tensor])


def test_private_evaluation_is_noised_and_charged_to_its_own_units(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=1, public_evaluation=False)
    world.start()
    world.run(*(world.take_part(name) for name in world.names))
    assert not world.errors
    outcome = world.coordinator.outcome
    assert outcome is not None
    totals = outcome["evaluations"]["before"]["totals"]
    assert any(abs(total - round(total)) > 1e-9 or total != 30 for total in totals), "exact counts would be a leak"
    with Ledger(tmp_path / "site-1" / "ledger.db") as ledger:
        events = ledger.spent("site-1-test", "evaluation")
        assert len(events) == 2
        assert {event.population for event in events} == {"evaluation"}


@pytest.mark.slow
def test_a_site_that_dies_while_training_does_not_lose_the_round(tmp_path: Path) -> None:
    world = World(tmp_path, sites=5)
    world.start()
    dying = world.take_part("site-3", transport=mortal(world, "site-3", Countdown("upload", 3)))
    world.run(dying, *(world.take_part(name) for name in world.names if name != "site-3"))
    assert [type(error) for error in world.errors.values()] == [Killed]
    outcome = world.coordinator.outcome
    assert outcome is not None
    assert outcome["complete"]
    assert not [a for a in outcome["attempts"] if "aborted" in a]
    counts = [len(a["survivors"]) for a in outcome["attempts"]]
    assert counts == [5, 5, 4, 4, 4, 4]


@pytest.mark.slow
@pytest.mark.parametrize("call", ["send", "upload"])
def test_below_the_threshold_the_attempt_is_aborted_and_the_next_is_charged_anew(tmp_path: Path, call: str) -> None:
    world = World(tmp_path, sites=3, rounds=2)
    world.start()
    # Four sends for the evaluation, then two to set up keys: the sixth comes before anything is charged.
    number = 3 if call == "upload" else 6
    killed = world.take_part("site-2", transport=mortal(world, "site-2", Countdown(call, number)))

    def dies_and_returns() -> None:
        with pytest.raises(Killed):
            killed()
        time.sleep(3.0)
        world.take_part("site-2")()

    world.run(dies_and_returns, *(world.take_part(name) for name in ("site-1", "site-3")))
    assert not world.errors
    outcome = world.coordinator.outcome
    assert outcome is not None
    assert outcome["complete"]
    attempts = outcome["attempts"]
    aborted = [a for a in attempts if "aborted" in a]
    assert len(aborted) == 1
    assert "site-2" in aborted[0]["aborted"]
    again = next(a for a in attempts if a["round"] == aborted[0]["round"] and a["attempt"] == 1)
    assert again["context"] != aborted[0]["context"], "new context, hence new keys"
    assert len({a["context"] for a in attempts}) == len(attempts)
    with Ledger(tmp_path / "site-1" / "ledger.db") as ledger:
        expected = world.rounds + (1 if call == "upload" else 0)
        assert len(ledger.spent("site-1-train", "train")) == expected


def test_without_enough_sites_the_run_ends_with_the_reason(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.start()

    def loses_patience() -> None:
        while not all(world.coordinator.sessions.find(name) for name in world.names[:2]):
            time.sleep(0.01)
        world.hurry()

    world.run(loses_patience, *(world.take_part(name) for name in world.names[:2]))
    assert {error.code for error in world.errors.values() if isinstance(error, TransportError)} == {"FS-1501"}
    assert len(world.errors) == 2
    text = str(world.coordinator.failure)
    assert "FS-1701" in text
    assert "site-3 not seen yet" in text


def test_a_second_process_with_the_same_identity_is_refused(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.start()
    with world.client("site-1"), pytest.raises(RunError, match="FS-1703"), world.client("site-1"):
        pass


def test_a_budget_too_small_refuses_before_anything_is_charged(tmp_path: Path) -> None:
    world = World(tmp_path, max_epsilon=1.0)
    world.start()
    with pytest.raises(BudgetExceeded, match="FS-1201"), world.client("site-1"):
        pass
    with Ledger(tmp_path / "site-1" / "ledger.db") as ledger:
        assert not ledger.history()


def test_the_budget_survives_into_the_next_run(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=2)
    world.start()
    world.run(*(world.take_part(name) for name in world.names))
    assert not world.errors
    world.start()
    with pytest.raises(BudgetExceeded, match="spent so far") as caught, world.client("site-1"):
        pass
    assert f"{world.reports['site-1']['epsilon']:.3f}"[:4] in str(caught.value)


class Forged(MemoryTransport):
    """An aggregator that tells one site something else."""

    def fetch(self, request: pb.FetchRequest) -> bytes:
        blob = bytearray(super().fetch(request))
        blob[-1] ^= 1
        return bytes(blob)


class Lowered(MemoryTransport):
    """An aggregator that asks with less noise than its public settings say."""

    def next(self, request: pb.NextRequest) -> pb.Directive:
        directive = super().next(request)
        if directive.WhichOneof("kind") == "ask" and "linear" in directive.ask.query_json:
            query = json.loads(directive.ask.query_json)
            for segment in query["segments"]:
                segment["noise_variance"] = ["1", "1"]
            changed = pb.Directive()
            changed.CopyFrom(directive)
            changed.ask.query_json = json.dumps(query, sort_keys=True, separators=(",", ":"))
            return changed
        return directive


class OtherContext(MemoryTransport):
    """An aggregator that asks what it should, in a context of its own."""

    def next(self, request: pb.NextRequest) -> pb.Directive:
        changed = pb.Directive()
        changed.CopyFrom(super().next(request))
        if changed.WhichOneof("kind") == "ask":
            raw = bytearray(changed.ask.descriptor)
            raw[40] ^= 1  # in the roster's hash: well formed, and another context
            changed.ask.descriptor = bytes(raw)
        return changed


class LoweredAlike(Lowered):
    """Less noise again, with a descriptor that fits the altered query."""

    world: World

    def next(self, request: pb.NextRequest) -> pb.Directive:
        from fedsecure.identity.provision import load_identity
        from fedsecure.messages import Query
        from fedsecure.secagg.descriptor import RoundDescriptor

        directive = super().next(request)
        if directive.WhichOneof("kind") == "ask" and "linear" in directive.ask.query_json:
            settings = self.world.settings
            directive.ask.descriptor = RoundDescriptor.from_query(
                Query.from_json(directive.ask.query_json),
                roster=load_identity(self.world.folder / "keys" / "aggregator" / "identity").roster,
                config_hash=settings.digest(),
                base_hash=bytes.fromhex(settings.encoder.fingerprint),
                colluders=1,
                min_survivors=3,
            ).canonical()
        return directive


@pytest.mark.parametrize(
    ("attacker", "code"),
    [(Forged, "FS-1370"), (Lowered, "FS-1373"), (LoweredAlike, "FS-1373"), (OtherContext, "FS-1372")],
)
def test_a_site_refuses_what_it_can_recompute(tmp_path: Path, attacker: type[MemoryTransport], code: str) -> None:
    world = World(tmp_path, rounds=1)
    world.start()
    transport = attacker(world.coordinator, "site-1", world.gate)
    if isinstance(transport, LoweredAlike):
        transport.world = world
    attacked = world.take_part("site-1", transport=transport)

    def ends() -> None:
        try:
            attacked()
        finally:
            world.hurry()

    world.run(ends, *(world.take_part(n) for n in world.names[1:]))
    mine = [e for e in world.errors.values() if isinstance(e, ProtocolError) and e.code == code]
    assert mine, world.errors
    with Ledger(tmp_path / "site-1" / "ledger.db") as ledger:
        assert not ledger.spent("site-1-train", "train"), "refused before anything was read or charged"


def test_nothing_is_read_before_the_charge_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, rounds=1)
    world.start()
    seen: list[int] = []
    original = Sources._loader

    def spying(self: Any, population: Any, section: Any, given: Any) -> Any:
        read = original(self, population, section, given)

        def checked() -> Any:
            if population == "train":
                seen.append(len(self.ledger.spent(section.name, "train")))
            return read()

        return checked

    monkeypatch.setattr("fedsecure.site.sources.Sources._loader", spying)
    world.run(*(world.take_part(name) for name in world.names))
    assert not world.errors
    assert len(seen) == 3
    assert all(count == 1 for count in seen)


def test_settings_that_cannot_work_are_refused_at_the_start(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.settings = replace_privacy(world, delta=0.5)
    with pytest.raises(PrivacyError, match="FS-1203"):
        world.start()


def replace_privacy(world: World, **changes: Any) -> Any:
    raw = world.settings.model_dump()
    raw["privacy"] |= changes
    return type(world.settings).model_validate(raw)
