"""Sites of one process that wait for news sleep until there is some, instead of waking each other without end."""

from __future__ import annotations

import threading
from typing import Any, cast

from fedsecure.transport.memory import Core, MemoryTransport
from fedsecure.wire import federation_pb2 as pb


class Quiet:
    """A coordinator that has nothing to say, and counts how often it is looked after."""

    def __init__(self) -> None:
        self.ticks = 0
        self.news: pb.Directive | None = None

    def tick(self, now: float) -> None:
        self.ticks += 1

    def poll(self, site: str, token: bytes, after: int, now: float) -> pb.Directive | None:
        return self.news

    def send(self, site: str, message: Any, now: float) -> None:
        self.news = pb.Directive(wait=pb.Wait(reason="news"))

    def wait(self, token: bytes, now: float) -> pb.Directive:
        return pb.Directive(wait=pb.Wait(reason="nothing"))


def ends(core: Quiet, count: int) -> list[MemoryTransport]:
    gate = threading.Condition()
    return [MemoryTransport(cast(Core, core), f"site-{index}", gate) for index in range(count)]


def wait_together(transports: list[MemoryTransport], *, until: str) -> list[str]:
    heard: list[str] = []

    def ask(transport: MemoryTransport) -> None:
        while (reason := transport.next(pb.NextRequest()).wait.reason) != until:
            pass
        heard.append(reason)

    threads = [threading.Thread(target=ask, args=(transport,)) for transport in transports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return heard


def test_waiting_sites_do_not_wake_each_other() -> None:
    core = Quiet()
    assert wait_together(ends(core, 4), until="nothing") == ["nothing"] * 4
    # A second of sleeps of 0.05 s is 20 for each, one more to begin with, and each of the four may wake the others when
    # it comes. A slower machine sleeps longer and ticks less; sites that wake each other tick many thousand times.
    assert core.ticks <= 4 * (20 + 1 + 1 + 4)


def test_what_one_site_sends_is_heard_by_those_that_wait() -> None:
    core = Quiet()
    sender, *others = ends(core, 4)
    timer = threading.Timer(0.05, lambda: sender.send(pb.PhaseMessage()))
    timer.start()
    heard = wait_together(others, until="news")
    timer.join()
    assert heard == ["news"] * 3
