"""The coordinator under a clock of the test's own: sessions that break, come back, flood, leave or never answer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_world import World

from fedsecure.aggregator import sessions as module
from fedsecure.aggregator.coordinator import Coordinator
from fedsecure.errors import FedsecureError, RunError, TransportError
from fedsecure.identity.provision import load_identity
from fedsecure.secagg.client import SecAggClient
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.latch import MemoryLatch
from fedsecure.wire import federation_pb2 as pb


class Stage:
    """A coordinator and the sites' hands, without threads; time is a number."""

    def __init__(self, folder: Path, **options: Any) -> None:
        given = {"silence_seconds": 10.0, "start_seconds": 20.0, "phase_seconds": 20.0, "training_seconds": 60.0}
        self.world = World(folder, waits={**given, **options.pop("waits", {})}, **options)
        self.core: Coordinator = self.world.start()
        self.now = self.core.engine.waiting_since
        self.tokens: dict[str, bytes] = {}
        self.sites: dict[str, SecAggClient] = {}

    def join(self, name: str, token: bytes | None = None) -> None:
        self.tokens[name] = token or os.urandom(16)
        roster = self.core._identity.roster
        request = pb.JoinRequest(protocol=1, session=self.tokens[name], roster_hash=roster.hash)
        self.core.join(name, request, self.now)
        self.core.beat(name, self.tokens[name], self.now)

    def all_join(self) -> None:
        for name in self.world.names:
            self.join(name)
        self.core.tick(self.now)

    def poll(self, name: str, after: int = 0) -> pb.Directive | None:
        return self.core.poll(name, self.tokens[name], after, self.now)

    def advertise(self, name: str) -> None:
        directive = self.poll(name)
        assert directive is not None
        descriptor = RoundDescriptor.parse(directive.ask.descriptor)
        identity = load_identity(self.world.folder / "keys" / "sites" / name / "identity")
        self.sites[name] = SecAggClient(
            descriptor, site=name, signing_key=identity.signing_key, roster=identity.roster, latch=MemoryLatch()
        )
        payload = self.sites[name].advertise()
        message = pb.PhaseMessage(session=self.tokens[name], ctx=descriptor.ctx, payload=payload)
        self.core.send(name, message, self.now)

    @property
    def attempts(self) -> list[dict[str, Any]]:
        return self.core.engine.account.attempts


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_a_site_that_comes_back_as_a_new_process_does_not_hold_up_the_attempt(stage: Stage) -> None:
    stage.all_join()
    stage.advertise("site-1")
    stage.advertise("site-3")
    stage.core.gone("site-2", stage.tokens["site-2"], stage.now)
    stage.now += 3
    for name in ("site-1", "site-3"):
        stage.poll(name)
    stage.join("site-2")
    stage.core.tick(stage.now)
    assert len(stage.attempts) == 1
    assert "site-2" in stage.attempts[0]["aborted"]
    directive = stage.poll("site-2")
    assert directive is not None
    assert json.loads(directive.ask.query_json)["attempt"] == 1, "it takes part in the next attempt at once"


def test_a_site_that_has_joined_and_still_loads_its_encoder_is_not_asked_yet(stage: Stage) -> None:
    for name in ("site-1", "site-3"):
        stage.join(name)
    request = pb.JoinRequest(protocol=1, session=bytes(16), roster_hash=stage.core._identity.roster.hash)
    stage.core.join("site-2", request, stage.now)
    stage.core.tick(stage.now)
    assert stage.core.engine.attempt is None
    assert "site-2 last heard" in stage.core.reason(stage.now)
    stage.core.poll("site-2", bytes(16), 0, stage.now)
    stage.core.tick(stage.now)
    assert stage.core.engine.attempt is not None


def test_a_site_that_goes_on_is_waited_for(stage: Stage) -> None:
    # The control for the test above: the same process, heard again, still has its keys.
    stage.all_join()
    stage.advertise("site-1")
    stage.advertise("site-3")
    stage.core.gone("site-2", stage.tokens["site-2"], stage.now)
    stage.now += 1
    stage.core.beat("site-2", stage.tokens["site-2"], stage.now)
    stage.core.tick(stage.now)
    assert not stage.attempts
    stage.advertise("site-2")
    assert stage.core.engine.attempt is not None
    assert stage.core.engine.attempt.phase.name == "SHARES"


def test_a_site_that_joins_after_the_question_is_not_waited_for(tmp_path: Path) -> None:
    stage = Stage(tmp_path, sites=5, waits={"start_seconds": 5.0})
    for name in stage.world.names[:4]:
        stage.join(name)
    stage.now += 6
    for name in stage.world.names[:4]:
        stage.core.beat(name, stage.tokens[name], stage.now)
    stage.core.tick(stage.now)
    stage.join("site-5")
    for name in stage.world.names[:4]:
        stage.advertise(name)
    assert stage.core.engine.attempt is not None
    assert stage.core.engine.attempt.phase.name == "SHARES"


def test_an_old_connection_that_breaks_late_does_not_silence_the_new_process(stage: Stage) -> None:
    stage.all_join()
    old = stage.tokens["site-2"]
    stage.core.gone("site-2", old, stage.now)
    stage.now += 3
    stage.join("site-2")
    stage.core.gone("site-2", old, stage.now)
    stage.now += 3
    assert stage.core.sessions.alive("site-2", stage.now)
    stage.core.gone("site-2", stage.tokens["site-2"], stage.now)
    stage.now += 3
    assert not stage.core.sessions.alive("site-2", stage.now)


def test_a_site_that_leaves_says_why_and_the_others_are_told(stage: Stage) -> None:
    stage.all_join()
    stage.advertise("site-1")
    stage.advertise("site-3")
    stage.core.beat("site-2", stage.tokens["site-2"], stage.now, "\x1b[2J not a code")
    stage.core.tick(stage.now)
    assert not stage.attempts, "what is no code is no reason"
    stage.core.beat("site-2", stage.tokens["site-2"], stage.now, "FS-1201")
    stage.core.tick(stage.now)
    assert "site-2 left with FS-1201" in stage.attempts[0]["aborted"]
    directive = stage.poll("site-1", after=1)
    assert directive is not None
    assert "site-2 left with FS-1201" in directive.abort.reason
    assert "site-2 left with FS-1201" in stage.core.reason(stage.now)
    stage.join("site-2")
    assert "left with" not in stage.core.reason(stage.now)


def test_a_site_that_never_listens_does_not_fill_the_memory(stage: Stage) -> None:
    stage.all_join()
    for _ in range(10_000):
        stage.core.sessions.tell("site-1", wait=pb.Wait(reason="x"))
    session = stage.core.sessions.find("site-1")
    assert session is not None
    assert len(session.outbox) == module.OUTBOX
    latest = stage.poll("site-1", after=session.sent - 1)
    assert latest is not None
    assert latest.sequence == session.sent


@pytest.mark.parametrize("size", [0, 15, 17, 1 << 20])
def test_a_session_has_one_size(stage: Stage, size: int) -> None:
    roster = stage.core._identity.roster
    request = pb.JoinRequest(protocol=1, session=bytes(size), roster_hash=roster.hash)
    with pytest.raises(TransportError, match="FS-1509"):
        stage.core.join("site-1", request, stage.now)


def test_joining_again_and_again_keeps_one_session_a_site(stage: Stage) -> None:
    token = os.urandom(16)
    for _ in range(1000):
        stage.join("site-1", token)
    assert len(stage.core.sessions._sessions) == 1
    with pytest.raises(RunError, match="FS-1703"):
        stage.join("site-1")


def test_a_site_that_joins_after_the_end_hears_so(stage: Stage) -> None:
    for name in ("site-1", "site-2"):
        stage.join(name)
    stage.core.obey("stop", stage.now)
    assert stage.core.outcome is not None
    stage.join("site-3")
    directive = stage.poll("site-3")
    assert directive is not None
    assert directive.WhichOneof("kind") == "finished"
    assert not directive.finished.complete


def test_a_site_that_beats_and_never_listens_does_not_keep_the_aggregator(stage: Stage) -> None:
    stage.join("site-1")
    stage.now += 21
    stage.core.tick(stage.now)
    waits = stage.world.settings.rounds
    for seconds, over in ((1.0, False), (waits.phase_seconds, True)):
        stage.now += seconds
        stage.core.beat("site-1", stage.tokens["site-1"], stage.now)
        assert stage.core.finished(stage.now) == over


def test_a_rule_broken_while_a_phase_closes_ends_the_attempt_and_nothing_else(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedsecure.secagg.party import broken

    stage.all_join()
    attempt = stage.core.engine.attempt
    assert attempt is not None

    def fails(*_: Any) -> None:
        raise broken("FS-1320", "closing phase done", "an open phase")

    monkeypatch.setattr(attempt, "advance", fails)
    stage.core.tick(stage.now)
    assert stage.core.outcome is None
    assert "FS-1320" in stage.attempts[0]["aborted"]
    assert stage.core.engine.attempt is not attempt


@pytest.mark.parametrize("where", ["ask", "absorb"])
def test_a_method_that_fails_ends_the_run_with_a_reason_for_the_sites(
    stage: Stage, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise ZeroDivisionError("/a/path of the aggregator")

    if where == "ask":
        monkeypatch.setattr(type(stage.core.engine.schedule), "ask", fails)
        stage.all_join()
    else:
        stage.all_join()
        attempt = stage.core.engine.attempt
        monkeypatch.setattr(attempt, "advance", fails)
        stage.core.tick(stage.now)
    assert stage.core.failure is not None
    assert stage.core.failure.code == "FS-1716"
    directive = stage.poll("site-1", after=0 if where == "ask" else 1)
    assert directive is not None
    said = json.loads(directive.finished.summary_json)
    assert "ZeroDivisionError" in said["error"]
    assert "/a/path" not in directive.finished.summary_json
    with pytest.raises(FedsecureError, match="FS-1706"):
        stage.core.engine.current(bytes(32))


def test_a_model_that_is_ruined_ends_the_run_at_the_aggregator(stage: Stage) -> None:
    stage.all_join()
    tensors = stage.core.engine.progress.state.tensors
    stage.core.engine.account._check_finite(stage.core.engine.progress)
    next(iter(tensors.values()))[0, 0] = np.nan
    with pytest.raises(RunError, match="FS-1717"):
        stage.core.engine.account._check_finite(stage.core.engine.progress)


def test_an_upload_is_checked_before_a_byte_is_kept(stage: Stage) -> None:
    stage.all_join()
    assert stage.core.engine.attempt is not None
    header = pb.UploadHeader(session=stage.tokens["site-1"], ctx=stage.core.engine.attempt.ctx, header=b"junk")
    header.size = 1 << 40
    with pytest.raises(TransportError, match="FS-1504"):
        stage.core.expect_upload("site-1", header, stage.now)
    header.size = 4 * stage.core.engine.attempt.query.length
    with pytest.raises(FedsecureError, match="FS-1321"):
        stage.core.expect_upload("site-1", header, stage.now)
    assert not list(stage.world.folder.glob("aggregator/runs/*/spool/*"))
