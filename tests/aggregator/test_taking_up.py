"""An aggregator that is killed and started again: the run goes on after its last sum, and no attempt is asked twice."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_world import World
from sqlalchemy import select

from fedsecure.aggregator.account import Account
from fedsecure.aggregator.database import RunRow, TransitionRow
from fedsecure.aggregator.happenings import Happening
from fedsecure.aggregator.program import serve
from fedsecure.aggregator.states import FOLLOWING, RunState
from fedsecure.aggregator.store import RunStore, begin, runs_of, unfinished, want
from fedsecure.config import FederationConfig
from fedsecure.errors import EnvironmentProblem, RunError
from fedsecure.identity import keys
from fedsecure.identity.provision import load_identity
from fedsecure.privacy.ledger import Ledger
from fedsecure.transport.memory import MemoryTransport
from fedsecure.wire import federation_pb2 as pb


class Dead(BaseException):
    """Stands for the aggregator's process ending."""


class Switch:
    """What stands between the sites and the aggregator's process of the moment."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.restarts = 0

    def restart(self) -> None:
        """The process is gone with all that it had in memory; another one is started on the same folder."""
        self.world.database.close()
        coordinator = self.world.coordinator
        del self.world.coordinator
        coordinator._store = None  # type: ignore[assignment]
        self.world.start()
        self.restarts += 1


class Line(MemoryTransport):
    """A site's line that finds the next process where the one before has died."""

    def __init__(self, switch: Switch, site: str) -> None:
        super().__init__(switch.world.coordinator, site, switch.world.gate)
        self._switch = switch

    def _now(self) -> None:
        failure = self._switch.world.coordinator.failure
        if failure is not None and not failure.final:
            self._switch.restart()
        self._core = self._switch.world.coordinator

    def _alive(self, call: Callable[[], Any]) -> Any:
        with self._gate:
            while True:
                self._now()
                try:
                    return call()
                except Dead:
                    self._switch.restart()

    def join(self, request: pb.JoinRequest) -> pb.JoinReply:
        return self._alive(lambda: super(Line, self).join(request))

    def send(self, message: pb.PhaseMessage) -> None:
        self._alive(lambda: super(Line, self).send(message))

    def upload(self, header: pb.UploadHeader, payload: memoryview) -> None:
        self._alive(lambda: super(Line, self).upload(header, payload))

    def fetch(self, request: pb.FetchRequest) -> bytes:
        return self._alive(lambda: super(Line, self).fetch(request))

    def beat(self, request: pb.BeatRequest) -> None:
        def beat() -> None:
            self._core.beat(self._site, request.session, time.monotonic(), request.leaving)
            self._wake()

        self._alive(beat)
        if not request.leaving:
            time.sleep(0.2)  # outside the gate, which the others need

    def next(self, request: pb.NextRequest) -> pb.Directive:
        with self._gate:
            self._now()
            try:
                self._core.tick(time.monotonic())
                found = self._core.poll(self._site, request.session, request.after, time.monotonic())
            except Dead:
                self._switch.restart()
                found = None
            if found is None:
                self._gate.wait(0.02)
                return pb.Directive(wait=pb.Wait(reason="wait"))
            return found


def dies(monkeypatch: pytest.MonkeyPatch, method: str, at: int, *, before: bool) -> None:
    """The process ends at the ``at``-th call of a method of the store, before or after it is on the disk."""
    original, calls = getattr(RunStore, method), {"n": 0}

    def fatal(self: RunStore, *arguments: Any, **named: Any) -> Any:
        calls["n"] += 1
        if calls["n"] == at and before:
            raise Dead
        result = original(self, *arguments, **named)
        if calls["n"] == at:
            raise Dead
        return result

    monkeypatch.setattr(RunStore, method, fatal)


def run_whole(world: World, switch: Switch) -> None:
    def take_part(name: str) -> Callable[[], None]:
        return world.take_part(name, transport=Line(switch, name))

    world.run(*(take_part(name) for name in world.names))


# Every way of writing, and enough calls of each to meet both stages and both kinds of keys.
POINTS = [
    *(("open_attempt", at) for at in (1, 2, 4)),
    *(("move", at) for at in (1, 2, 3, 4, 5, 7, 9)),
    ("begin_keys", 1),
    *(("sum_attempt", at) for at in (1, 2, 4)),
    ("end", 1),
]


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(("method", "at"), POINTS, ids=[f"{m}-{n}" for m, n in POINTS])
def test_a_process_killed_at_any_write_loses_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, at: int, before: bool
) -> None:
    world = World(tmp_path, rounds=2)
    world.start()
    run, switch = world.coordinator.run, Switch(world)
    dies(monkeypatch, method, at, before=before)
    run_whole(world, switch)
    assert not world.errors, world.errors
    assert switch.restarts == 1
    assert world.coordinator.run == run
    outcome = world.coordinator.outcome
    assert outcome is not None
    assert outcome["complete"]
    assert outcome["rounds"] == 2
    summed = [(a["round"], a["stage"]) for a in outcome["attempts"] if "survivors" in a]
    assert summed == [(0, "before"), (1, "training"), (2, "training"), (3, "after")], "each round is summed once"
    numbers = [(a["round"], a["attempt"]) for a in outcome["attempts"]]
    assert len(set(numbers)) == len(numbers), "no number of attempt is used twice"
    assert len({a["context"] for a in outcome["attempts"]}) == len(numbers)
    assert [h.kind for h in world.happened if h.kind.startswith("run-")] == ["run-started", "run-resumed", "run-ended"]
    assert told_of(world.happened) == set(numbers), "a listener hears of every attempt, whenever the process ends"
    for name in world.names:
        with Ledger(tmp_path / name / "ledger.db") as ledger:
            ledger.verify()
            assert len(ledger.spent(f"{name}-train", "train")) >= 2, "every training round is charged"


def told_of(happened: Iterable[Happening]) -> set[tuple[int, int]]:
    """Which attempts listeners were told the end of."""
    ends = [h.facts for h in happened if h.kind in ("attempt-summed", "attempt-aborted")]
    ends += [h.facts["last"] for h in happened if h.kind == "run-resumed" and h.facts["last"]]
    return {(end["round"], end["attempt"]) for end in ends}


def transitions(world: World) -> list[RunState]:
    with world.database.session() as session:
        rows = session.scalars(select(TransitionRow).order_by(TransitionRow.id))
        return [RunState(row.state) for row in rows]


def test_every_change_of_state_is_a_row_and_follows_the_rules(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=3)
    world.start()
    world.run(*(world.take_part(name) for name in world.names))
    assert not world.errors
    seen = transitions(world)
    # A new process begins at waiting, whatever was before.
    assert seen[:2] == [RunState.WAITING, RunState.WAITING]
    assert seen[-1] is RunState.OVER
    for now, then in itertools.pairwise(seen):
        assert then in FOLLOWING[now], (now, then)
    assert set(seen) == set(RunState) - {RunState.COMPUTING, RunState.PAUSED}


def test_a_state_that_cannot_follow_is_a_defect(tmp_path: Path) -> None:
    world = World(tmp_path)
    account: Account = world.start().engine.account
    with pytest.raises(AssertionError, match="cannot follow"):
        account.move(RunState.UNMASK)


def test_a_run_that_is_over_and_untold_is_told_by_the_next_process(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=1)
    world.start()
    world.run(*(world.take_part(name) for name in world.names))
    run, first = world.coordinator.run, world.coordinator.outcome
    tensors = dict(world.coordinator.engine.progress.state.tensors)
    Switch(world).restart()
    assert world.coordinator.run == run
    assert world.coordinator.outcome == first
    for name, value in world.coordinator.engine.progress.state.tensors.items():
        np.testing.assert_array_equal(value, tensors[name])
    request = pb.JoinRequest(protocol=1, session=bytes(16), roster_hash=world.coordinator._identity.roster.hash)
    world.coordinator.join("site-1", request, 0.0)
    directive = world.coordinator.poll("site-1", bytes(16), 0, 0.0)
    assert directive is not None
    assert directive.finished.complete
    assert set(directive.finished.outputs) == set(tensors)
    world.coordinator.close()
    assert unfinished(world.database, world.coordinator.config) is None, "once told, the next process begins a new run"


def test_a_run_is_not_taken_up_with_other_settings(tmp_path: Path) -> None:
    world = World(tmp_path)
    core = world.start()
    other = core.config.model_copy(update={"name": core.config.name, "classes": ("a", "b", "d")})
    with pytest.raises(RunError, match="FS-1732"):
        unfinished(world.database, other)
    want(world.database, core.run.hex()[:6], "stop", core.settings)
    assert unfinished(world.database, other) is None, "what was stopped is in nobody's way"
    (row,) = runs_of(world.database)
    assert (row.state, row.closed, row.outcome["code"]) == ("over", True, "FS-1734")  # type: ignore[index]


@pytest.mark.parametrize("harm", [pytest.param("gone", marks=pytest.mark.slow), "altered"])
def test_a_model_that_is_not_what_was_written_is_not_taken_up(tmp_path: Path, harm: str) -> None:
    world = World(tmp_path, rounds=2)
    world.start()
    world.run(*(world.take_part(name) for name in world.names))
    (file,) = tmp_path.glob("aggregator/runs/*/model-*.safetensors")
    if harm == "gone":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    with pytest.raises(RunError, match="FS-1731"):
        Switch(world).restart()


def test_a_full_disk_ends_the_process_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, rounds=2)
    world.start()
    original, calls = RunStore.sum_attempt, {"n": 0}

    def full(self: RunStore, *arguments: Any, **named: Any) -> None:
        calls["n"] += 1
        if calls["n"] == 2:
            raise EnvironmentProblem("FS-1802", "no space left", expected="space", cure="free some")
        original(self, *arguments, **named)

    monkeypatch.setattr(RunStore, "sum_attempt", full)
    switch = Switch(world)
    run_whole(world, switch)
    assert not world.errors, "no site ends with it"
    assert switch.restarts == 1
    ends = [h.facts for h in world.happened if h.kind == "run-ended"]
    assert [(end.get("code"), end.get("final")) for end in ends] == [("FS-1716", False), (None, None)]
    outcome = world.coordinator.outcome
    assert outcome is not None
    assert outcome["complete"]
    assert [a.get("code") for a in outcome["attempts"]] == [None, "FS-1730", None, None, None]


@pytest.mark.slow
def test_sites_that_did_not_come_are_waited_for_by_the_next_process(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=1)
    world.start()
    run = world.coordinator.run
    world.hurry()
    assert world.coordinator.failure is not None
    assert world.coordinator.failure.code == "FS-1701"
    assert not world.coordinator.failure.final
    Switch(world).restart()
    assert world.coordinator.run == run
    assert world.coordinator.outcome is None
    world.run(*(world.take_part(name) for name in world.names))
    assert not world.errors
    assert world.coordinator.outcome is not None


def take_out(config: FederationConfig, site: str, authority: Path) -> bytes:
    """Bring a roster without ``site`` to the aggregator; its hash."""
    old = load_identity(config.identity).roster
    new = replace(old, version=old.version + 1, entries=tuple(e for e in old.entries if e.site != site))
    draft = authority / "next.json"
    new.save(draft, keys.load_private_key(authority / "coordinator.key"))
    draft.replace(config.identity / "roster.json")
    return new.hash


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_run_goes_on_with_its_own_roster_after_a_member_was_taken_out(tmp_path: Path) -> None:
    world = World(tmp_path, sites=4, waits={"start_seconds": 0.5})
    config = world.start().config.model_copy(update={"listen": "127.0.0.1:0", "enrolment": "127.0.0.1:0"})
    world.coordinator.close()
    world.database.close()
    runs: list[bytes] = []

    def serve_in_vain() -> None:
        with pytest.raises(RunError, match="FS-1701"):
            serve([config], announce=lambda address, run: runs.append(run), watch=lambda status: None)

    serve_in_vain()
    began_with = load_identity(config.identity).roster.hash
    assert take_out(config, "site-4", tmp_path / "keys" / "ca") != began_with
    serve_in_vain()
    assert runs[0] == runs[1]
    (kept,) = tmp_path.glob("aggregator/runs/*/roster.json")
    assert kept.read_bytes() != (config.identity / "roster.json").read_bytes()


def test_nobody_waits_for_a_member_that_was_taken_out(tmp_path: Path) -> None:
    world = World(tmp_path, sites=4, rounds=1, waits={"start_seconds": 3600.0})
    world.gone = frozenset({"site-4"})
    world.start()
    world.run(*(world.take_part(name) for name in world.names[:3]))
    assert not world.errors, world.errors
    assert world.coordinator.outcome is not None
    assert world.coordinator.outcome["complete"]


def test_a_run_can_be_paused_and_goes_on(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=3)
    core = world.start()
    core.obey("pause", time.monotonic())
    assert core.engine.account.state is RunState.PAUSED
    threading.Thread(target=lambda: resume_when(world, lambda: all_there(world)), daemon=True).start()
    world.run(*(world.take_part(name) for name in world.names))
    assert not world.errors
    assert core.outcome is not None
    assert core.outcome["complete"]
    kinds = [h.kind for h in world.happened]
    assert kinds.index("run-paused") < kinds.index("run-continued") < kinds.index("attempt-opened")
    assert world.happened[-1].kind == "run-ended"


def all_there(world: World) -> bool:
    with world.gate:
        now = time.monotonic()
        there = all(world.coordinator.sessions.alive(name, now) for name in world.names)
        if there:
            # Whoever waits hears why; no patience runs out meanwhile.
            world.coordinator.tick(now + 1e6)
            assert world.coordinator.reason(now) == "the operator has paused the run"
            assert world.coordinator.outcome is None
    return there


def resume_when(world: World, ready: Callable[[], bool]) -> None:
    while not ready():
        time.sleep(0.01)
    with world.gate:
        world.coordinator.obey("run", time.monotonic())
        world.gate.notify_all()


@pytest.mark.slow
def test_a_run_that_is_stopped_tells_its_sites_and_stays_over(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=50)
    core = world.start()

    def stop_after_a_round() -> None:
        while core.engine.account.round < 3:
            time.sleep(0.01)
        with world.gate:
            core.obey("stop", time.monotonic())
            world.gate.notify_all()

    world.run(stop_after_a_round, *(world.take_part(name) for name in world.names))
    assert {e.code for e in world.errors.values() if isinstance(e, RunError)} == {"FS-1709"}
    assert all("FS-1734" in str(e) for e in world.errors.values())
    assert core.failure is not None
    assert core.failure.code == "FS-1734"
    assert core.failure.final
    core.close()
    assert unfinished(world.database, core.config) is None


def test_another_run_at_the_same_aggregator_is_no_session_to_go_on_with(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=50)
    world.start()
    switch = Switch(world)

    def another_run() -> None:
        while world.coordinator.engine.account.round < 2:
            time.sleep(0.01)
        with world.gate:
            want(world.database, "", "stop", world.settings)
            switch.restart()
            world.gate.notify_all()

    world.run(another_run, *(world.take_part(name, transport=Line(switch, name)) for name in world.names))
    assert {e.code for e in world.errors.values() if isinstance(e, RunError)} == {"FS-1737"}, world.errors


def test_two_databases_rows_do_not_mix(tmp_path: Path) -> None:
    world = World(tmp_path)
    core = world.start()
    second = begin(world.database, core.config.model_copy(update={"name": "other"}), bytes(16))
    second.move(RunState.PAUSED, round=7, attempt=3)
    with world.database.session() as session:
        row = session.get_one(RunRow, core.run.hex())
        assert (row.round, row.state) == (0, "waiting")
    assert [r.federation for r in runs_of(world.database)] == ["other", "world"]
