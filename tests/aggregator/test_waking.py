"""Who is woken by news: the site that is told something, once, and nobody else; with many sites, waits stay short."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from federation_world import World

from fedsecure.aggregator.sessions import Sessions
from fedsecure.errors import RunError
from fedsecure.wire import federation_pb2 as pb

SITES = ("site-1", "site-2", "site-3")


class Room:
    """Three sessions, each of which polls and notes how often it is woken."""

    def __init__(self) -> None:
        self.sessions = Sessions(silence_seconds=30.0)
        self.tokens = {site: os.urandom(16) for site in SITES}
        self.woken: list[str] = []
        for site in SITES:
            self.sessions.open(site, self.tokens[site], 0.0)

    def poll(self, site: str, after: int = 0) -> pb.Directive | None:
        return self.sessions.poll(site, self.tokens[site], after, 0.0, lambda: self.woken.append(site))


def test_only_who_is_told_something_is_woken_and_once() -> None:
    room = Room()
    assert [room.poll(site) for site in SITES] == [None, None, None]
    room.sessions.tell("site-2", wait=pb.Wait(reason="one"))
    room.sessions.tell("site-2", wait=pb.Wait(reason="two"))
    assert room.woken == ["site-2"]
    first = room.poll("site-2")
    assert first is not None
    assert (first.sequence, first.wait.reason) == (1, "one")
    second = room.poll("site-2", after=1)
    assert second is not None
    assert (second.sequence, second.wait.reason) == (2, "two")
    assert room.poll("site-2", after=2) is None
    room.sessions.tell_all(finished=pb.Finished())
    assert room.woken == ["site-2", "site-1", "site-2", "site-3"]


def test_a_poll_of_a_session_that_a_new_process_ends_is_woken() -> None:
    room = Room()
    room.poll("site-1")
    room.sessions.gone("site-1", room.tokens["site-1"], 0.0)
    assert room.sessions.open("site-1", os.urandom(16), 40.0)
    assert room.woken == ["site-1"]
    with pytest.raises(RunError, match="FS-1705"):
        room.poll("site-1")


def test_what_is_told_to_all_is_kept_once_and_each_gets_its_own_number() -> None:
    room = Room()
    room.sessions.tell("site-1", wait=pb.Wait(reason="before"))
    room.sessions.relay(b"ctx", "shares", dict.fromkeys(SITES, b"for everybody" * 1000))
    kept = [room.sessions.find(site).outbox[-1][1]["relay"] for site in SITES]  # type: ignore[union-attr]
    assert kept[0] is kept[1] is kept[2]
    for site, sequence in (("site-1", 2), ("site-2", 1), ("site-3", 1)):
        directive = room.poll(site, after=sequence - 1)
        assert directive is not None
        assert directive.sequence == sequence
        assert directive.relay.payload == b"for everybody" * 1000
    room.sessions.relay(b"ctx", "masked", {site: site.encode() for site in SITES})
    told = [room.sessions.find(site).outbox[-1][1]["relay"].payload for site in SITES]  # type: ignore[union-attr]
    assert told == [site.encode() for site in SITES]


def test_a_wait_for_many_sites_names_some_and_counts_the_rest(tmp_path: Path) -> None:
    core = World(tmp_path, sites=24).start()
    reason = core.reason(time.monotonic())
    assert "waiting for 24 of 24 sites" in reason
    assert reason.count("not seen yet") == 20
    assert reason.endswith("and 4 more")
