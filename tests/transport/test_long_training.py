"""A site that trains for longer than ``silence_seconds`` stays a member as long as its process lives; others do not.

The sites are processes of their own: a computation that holds Python's lock in bursts must not be heard as silence, and
this one would hold up a server in the same process too.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from served_world import Served

from fedsecure.wire import federation_pb2 as pb

SILENCE = 4.0
# As a site in a long step: joins, beats or not, and computes for three times the silence, holding the lock for half a
# second at a time.
TRAINS = """
import ctypes, sys, time
from pathlib import Path
from fedsecure.identity.provision import load_identity
from fedsecure.site.line import Line
from fedsecure.transport.channel import GrpcTransport

folder, address, beats = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "beats"
identity = load_identity(folder)
line = Line(GrpcTransport(address, identity, connect_seconds=60.0), wait_seconds=60.0, progress=lambda moment: None)
line.join(identity.roster.hash)
if beats:
    line.start_pulse()
print("joined", flush=True)
sys.stdin.readline()
holding = ctypes.PyDLL(None)
until = time.monotonic() + 3 * float(sys.argv[4])
while time.monotonic() < until:
    holding.usleep(500_000)
print("trained", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    service = Served(tmp_path, silence_seconds=SILENCE)
    yield service
    service.stop()


def trains(served: Served, name: str, how: str) -> subprocess.Popen[str]:
    folder = served.world.folder / "keys" / "sites" / name / "identity"
    arguments = [str(folder), f"localhost:{served.port}", how, str(SILENCE)]
    return subprocess.Popen(
        [sys.executable, "-c", TRAINS, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def says(child: subprocess.Popen[str], word: str) -> None:
    assert child.stdout is not None
    assert child.stdout.readline().strip() == word


def answer(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    child.stdin.write("\n")
    child.stdin.flush()


@pytest.mark.slow
def test_who_beats_is_there_and_who_does_not_is_missed(served: Served) -> None:
    children = [trains(served, "site-1", "beats"), trains(served, "site-2", "is silent")]
    try:
        for child in children:
            says(child, "joined")
        for child in children:
            answer(child)
        for child in children:
            says(child, "trained")
        sessions = served.core.sessions
        alive = {
            name: served.within(lambda name=name: sessions.alive(name, time.monotonic()))
            for name in ("site-1", "site-2")
        }
        assert alive == {"site-1": True, "site-2": False}
        told = served.within(lambda: served.core.reason(time.monotonic()))
        assert "site-2 last heard" in told
        children[0].kill()
        give_up = time.monotonic() + 60
        while served.within(lambda: sessions.alive("site-1", time.monotonic())):
            assert time.monotonic() < give_up, "a process that is gone is missed"
            time.sleep(0.05)
    finally:
        for child in children:
            child.kill()
            child.communicate()


def test_the_reason_of_a_wait_reaches_site_and_operator(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsecure.aggregator.service.POLL_SECONDS", 0.1)
    line = served.joined("site-1")
    served.joined("site-2")

    def quiet() -> None:
        found = served.core.sessions.find("site-2")
        assert found is not None
        found.heard -= 240.0

    served.within(quiet)
    told = line.next(pb.NextRequest(session=served.tokens["site-1"])).wait.reason
    assert told.startswith("joining: waiting for 2 of 3 sites: site-2 last heard 4 min ago, site-3 not seen yet")
    assert served.within(lambda: served.core.status(time.monotonic()))["waiting"] == told
    assert line.greet(pb.GreetRequest()).waiting == told
