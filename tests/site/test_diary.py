"""A site's own audit log: the whole story of a run in order, and nothing about records."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from federation_world import World

from fedsecure.aggregator.openings import Openings
from fedsecure.audit_log import PURPOSE, AuditLog, Entry, entries, verify
from fedsecure.errors import EnvironmentProblem, FedsecureError, RunError
from fedsecure.identity import keys
from fedsecure.site import diary


def log_of(world: World, site: str) -> Path:
    return world.folder / site / "state" / "audit.log"


def told(world: World, site: str) -> list[Entry]:
    return list(entries(log_of(world, site)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("world"), rounds=2, public_evaluation=False)
    world.start()
    world.run(*(world.take_part(name) for name in world.names))
    assert not world.errors
    return world


def test_a_run_is_told_from_joining_to_its_end(finished: World) -> None:
    for site in finished.names:
        events = [entry.event for entry in told(finished, site)]
        answered = ["question-accepted", "charged", "contribution-sent", "sum-published"]
        assert events == ["run-joined", *answered * 4, "run-finished", "checkpoint"]
        first, *_, last, _ = told(finished, site)
        run = finished.coordinator.run.hex()
        assert first.facts["run"] == last.facts["run"] == run
        assert first.facts["settings"] == finished.coordinator.settings.digest().hex()
        assert first.facts["method"] == "linear"
        assert (last.facts["complete"], last.facts["code"]) == (True, "")


def test_it_agrees_with_the_ledger_and_with_the_aggregator(finished: World) -> None:
    contexts = {(a["round"], a["attempt"]): a["context"] for a in finished.coordinator.attempts}
    for site in finished.names:
        lines = told(finished, site)
        with finished_ledger(finished, site) as ledger:
            charged = {e.reservation: e for e in ledger.history(f"{site}-train", "train") if e.state == "RESERVED"}
            sent = {e.payload_sha256 for e in ledger.history(f"{site}-train", "train") if e.state == "COMMITTED"}
        mine = {line.facts["reservation"] for line in lines if line.event == "charged"}
        assert charged.keys() <= mine
        hashes = {line.facts["sha256"] for line in lines if line.event == "contribution-sent"}
        assert sent <= hashes
        assert len(sent) == 2
        for line in lines:
            if "context" in line.facts:
                assert line.facts["context"] == contexts[line.facts["round"], line.facts["attempt"]]


def finished_ledger(world: World, site: str) -> Any:
    from contextlib import closing

    from fedsecure.privacy.ledger import Ledger

    return closing(Ledger(world.folder / site / "ledger.db"))


def test_the_end_of_a_run_is_signed_by_the_site(finished: World) -> None:
    roster = finished.coordinator._identity.roster
    for site in finished.names:
        key = roster.find(site).identity_key
        found = verify(log_of(finished, site), check=lambda b, s, key=key: keys.verify(key, PURPOSE, b, s))  # type: ignore[misc]
        assert found.checkpoints == found.signed == 1


def test_it_holds_nothing_about_records(finished: World) -> None:
    allowed = {
        *("run", "federation", "aggregator", "method", "rounds", "role", "settings", "roster", "roster_version"),
        *("round", "attempt", "context", "reservation", "dataset", "population", "epsilon_so_far", "sha256"),
        *("complete", "code", "signature"),
    }
    for site in finished.names:
        assert {name for entry in told(finished, site) for name in entry.facts} <= allowed


def test_an_aborted_attempt_and_a_run_that_is_given_up(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=1, waits={"max_attempts": 1})
    world.start()

    def leave(name: str) -> Any:
        def act() -> None:
            with world.client(name) as client:
                next(client.queries())

        return act

    world.run(world.take_part("site-1"), world.take_part("site-2"), leave("site-3"))
    by_event = {entry.event: entry for entry in told(world, "site-1")}
    assert by_event["attempt-aborted"].facts["code"].startswith("FS-13")
    assert by_event["run-finished"].facts["complete"] is False
    assert by_event["run-finished"].facts["code"] == "FS-1702"
    assert [entry.event for entry in told(world, "site-3")][-2:] == ["left", "checkpoint"]
    assert told(world, "site-3")[-2].facts["code"] == ""


def test_a_question_that_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, rounds=1)
    world.start()
    original = world.coordinator.engine.openings.query

    def cheaper(ask: Any, **facts: Any) -> Any:
        from dataclasses import replace

        query = original(ask, **facts)
        return replace(query, version="2")

    monkeypatch.setattr(Openings, "query", lambda self, ask, **facts: cheaper(ask, **facts))
    world.run(*(world.take_part(name) for name in world.names))
    refused = [entry for entry in told(world, "site-1") if entry.event == "question-refused"]
    assert [entry.facts["code"] for entry in refused] == ["FS-1373"]
    assert "charged" not in {entry.event for entry in told(world, "site-1")}


def test_a_site_whose_budget_does_not_reach_says_so_by_its_code(tmp_path: Path) -> None:
    world = World(tmp_path, max_epsilon=0.1)
    world.start()
    with pytest.raises(FedsecureError, match="FS-1201"), world.client("site-1"):
        raise AssertionError
    line, _ = told(world, "site-1")
    assert (line.event, dict(line.facts)) == ("run-not-joined", {"code": "FS-1201"})


def test_what_fails_inside_is_a_name_and_no_words(tmp_path: Path) -> None:
    notes = diary.Diary(tmp_path, keys.generate())
    notes.left(ValueError("patient Zoe"))
    notes.left(None)
    assert "Zoe" not in (tmp_path / "audit.log").read_text()
    assert [e.facts["code"] for e in entries(tmp_path / "audit.log") if e.event == "left"] == ["ValueError", ""]


def test_nothing_leaves_that_cannot_be_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, rounds=1)
    world.start()
    original, uploads = AuditLog.append, list[str]()

    def full(self: AuditLog, event: str, *rest: Any, **options: Any) -> Entry:
        if event in ("contribution-sent", "answer-failed") and "site-1" in str(self.path):
            raise EnvironmentProblem("FS-1820", "full", expected="room", cure="free space")
        return original(self, event, *rest, **options)

    monkeypatch.setattr(AuditLog, "append", full)
    upload = world.coordinator.upload
    monkeypatch.setattr(world.coordinator, "upload", lambda site, *a: (uploads.append(site), upload(site, *a))[1])

    def stop_when_one_fails() -> None:
        while not world.errors:
            time.sleep(0.01)
        world.hurry()

    def first() -> None:
        with pytest.raises(EnvironmentProblem, match="FS-1820"):
            world.take_part("site-1")()
        raise RunError("FS-1709", "site-1 has stopped", expected="-", cure="-")

    world.run(first, world.take_part("site-2"), world.take_part("site-3"), stop_when_one_fails)
    assert "site-1" not in uploads
    assert uploads, "the others answered"
    assert json.loads(log_of(world, "site-1").read_text().splitlines()[0])["event"] == "run-joined"
