"""The sites' processes as the aggregator sees them: who has joined, who is still there, and what each is told.

No clock: time comes in as an argument. A site that has not been heard of for ``silence_seconds`` counts as gone until
it is heard again; directives wait in its outbox, in order, until it has taken them.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from hmac import compare_digest
from typing import Any

from fedsecure.errors import RunError
from fedsecure.wire import federation_pb2 as pb

# A site never has so many directives ahead of it unless it does not listen.
OUTBOX = 64
# After a broken connection.
GRACE_SECONDS = 2.0
_CODE = re.compile(r"FS-1\d{3}")
log = logging.getLogger("fedsecure.aggregator")


@dataclass(slots=True)
class Session:
    """One process of one site.

    ``asked`` is the context of the question it got last: a process that joined later has no keys of an attempt in
    progress. ``leaving`` is the code it gave for going. ``ready``: it has asked for something to do; between joining
    and that a site loads its encoder and checks its budget. ``outbox`` holds what each directive says, one message
    perhaps for many sites; ``wake`` is called with the next one.
    """

    token: bytes
    heard: float
    sent: int = 0
    outbox: deque[tuple[int, Mapping[str, Any]]] = field(default_factory=lambda: deque(maxlen=OUTBOX))
    wake: Callable[[], None] | None = None
    asked: bytes = b""
    left: bool = False
    leaving: str = ""
    ready: bool = False


class Sessions:
    """At most one session a site."""

    def __init__(self, *, silence_seconds: float) -> None:
        self._silence = silence_seconds
        self._sessions: dict[str, Session] = {}

    # --- calls of the sites -----------------------------------------------------------------------------------------

    def open(self, site: str, token: bytes, now: float) -> bool:
        """Whether a new session was opened; not where ``token`` has the site's session already.

        Raises:
            RunError: FS-1703 another process has a live session.
        """
        old = self._sessions.get(site)
        known = old is not None and compare_digest(old.token, token)
        if not known and self.alive(site, now):
            raise RunError(
                "FS-1703",
                f"site {site!r} has already joined from another process",
                expected="one process per identity",
                cure=f"stop the other process, or wait {self._silence:g} s after it died",
            )
        if not known:
            self._sessions[site] = Session(token=bytes(token), heard=now)
            _wake(old)
            log.info("joined", extra={"site": site})
        self._sessions[site].heard = now
        return not known

    def hear(self, site: str, token: bytes, now: float) -> Session:
        """The session of that token, which is heard of now; RunError FS-1705 where there is none."""
        session = self._sessions.get(site)
        if session is None or not compare_digest(session.token, token):
            raise RunError(
                "FS-1705",
                f"site {site!r} has no session of that token",
                expected="a call after a successful join",
                cure="join again",
            )
        session.heard = now
        return session

    def poll(
        self, site: str, token: bytes, after: int, now: float, wake: Callable[[], None] | None = None
    ) -> pb.Directive | None:
        """The first directive after number ``after``, or None if there is nothing yet: then ``wake`` is called once,
        when there is, or when the session has ended."""
        session = self.hear(site, token, now)
        session.ready = True
        while session.outbox and session.outbox[0][0] <= after:
            _, done = session.outbox.popleft()
            session.left = session.left or "finished" in done
        if session.left:
            return pb.Directive(wait=pb.Wait(reason="the run is over"))
        if session.outbox:
            sequence, kind = session.outbox[0]
            return pb.Directive(sequence=sequence, **kind)
        session.wake = wake
        return None

    def beat(self, site: str, token: bytes, now: float, leaving: str) -> None:
        """The site is there; or it is leaving, for the reason with that code."""
        session = self.hear(site, token, now)
        session.ready = True
        if _CODE.fullmatch(leaving):
            session.leaving = leaving
            log.warning("%s leaves: %s", site, leaving)

    def gone(self, site: str, token: bytes, now: float) -> None:
        """The session's connection broke: some grace, then it counts as silent until it is heard again."""
        session = self._sessions.get(site)
        if session is not None and compare_digest(session.token, token):
            session.heard = min(session.heard, now - self._silence + GRACE_SECONDS)

    def close(self, site: str) -> None:
        """The site has no session any more."""
        _wake(self._sessions.pop(site, None))

    # --- who is there -----------------------------------------------------------------------------------------------

    def find(self, site: str) -> Session | None:
        """The site's session, if it ever joined."""
        return self._sessions.get(site)

    def alive(self, site: str, now: float) -> bool:
        """Whether the site has joined, has not left, and was heard of lately."""
        session = self._sessions.get(site)
        return session is not None and not session.leaving and now - session.heard <= self._silence

    def ready(self, site: str, now: float) -> bool:
        """Whether the site is there and can be asked."""
        return self.alive(site, now) and self._sessions[site].ready

    def leaving(self, site: str) -> str:
        """The code with which the site left, if it has."""
        session = self._sessions.get(site)
        return session.leaving if session is not None else ""

    def takes_part(self, site: str, ctx: bytes, now: float) -> bool:
        """Whether the site is there with the keys of ``ctx``: not one that came, or came back, after its start."""
        return self.alive(site, now) and self._sessions[site].asked == ctx

    def tokens(self, sites: Iterable[str]) -> dict[str, bytes]:
        """site → session, of sites that have joined."""
        return {site: self._sessions[site].token for site in sites}

    def all_heard_the_end(self, now: float) -> bool:
        """Every site that is still there has taken the run's last directive."""
        return all(session.left or not self.alive(site, now) for site, session in self._sessions.items())

    def departures(self) -> list[str]:
        """Who left, and with which code, in words."""
        return [f"{site} left with {s.leaving}" for site, s in sorted(self._sessions.items()) if s.leaving]

    def last_seen(self, site: str, now: float) -> str:
        """When a site was heard of, in words."""
        return f"{site} {self.presence(site, now)}"

    def presence(self, site: str, now: float) -> str:
        """The same without the site's name."""
        session = self._sessions.get(site)
        if session is None:
            return "not seen yet"
        if session.leaving:
            return f"left with {session.leaving}"
        return f"last heard {span(now - session.heard)} ago"

    # --- what they are told -----------------------------------------------------------------------------------------

    def tell(self, site: str, **kind: Any) -> None:
        """Append a directive to the site's outbox, if it has joined."""
        session = self._sessions.get(site)
        if session is not None:
            session.sent += 1
            session.outbox.append((session.sent, kind))
            _wake(session)

    def tell_all(self, **kind: Any) -> None:
        """The same to every site that has joined."""
        for site in self._sessions:
            self.tell(site, **kind)

    def ask(self, sites: Iterable[str], ctx: bytes, **kind: Any) -> None:
        """Ask sites that have joined to take part in what ``ctx`` names."""
        for site in sites:
            self._sessions[site].asked = ctx
            self.tell(site, **kind)

    def relay(self, ctx: bytes, phase: str, relays: Mapping[str, bytes]) -> None:
        """Each site's broadcast of a phase; what is the same for all is kept once."""
        last, relay = None, pb.Relay()
        for site, payload in relays.items():
            if payload is not last:
                last, relay = payload, pb.Relay(ctx=ctx, phase=phase, payload=payload)
            self.tell(site, relay=relay)

    def tell_asked(self, sites: Iterable[str], ctx: bytes, *, code: str, reason: str) -> None:
        """What became of an attempt, to the processes that were asked to take part in it."""
        for site in sorted(sites):
            session = self._sessions.get(site)
            if session is not None and session.asked == ctx:
                self.tell(site, abort=pb.Abort(ctx=ctx, code=code, reason=reason))


def span(seconds: float) -> str:
    """A time in the unit that people would use: ``12 s``, ``4 min``, ``3 h``, ``2 days``."""
    for unit, length, below in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48)):
        if round(seconds / length) < below:
            return f"{max(0.0, seconds) / length:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"


def _wake(session: Session | None) -> None:
    if session is not None and session.wake is not None:
        wake, session.wake = session.wake, None
        wake()


__all__ = ["Session", "Sessions", "span"]
