"""What one site may take of the aggregator at a time, so that no site starves the others. No clock: time comes in.

Before a caller is known only TLS and the operating system bound anything (:mod:`fedsecure.transport.tls`); these bounds
hold for each site that its certificate has named, and for all together whose certificate names none.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fedsecure.errors import TransportError

# A site needs three calls at a time: the long poll, the beat, and one that carries something.
MAX_CALLS = 16
# Each holds one chunk of 1 MiB and gRPC's window; a site fetches one tensor after the other.
MAX_FETCHES = 2
# A fast round takes a site some fifteen calls.
CALLS_A_SECOND = 100.0
BURST = 500.0
# Refusals held back at a time, for each site: who floods waits for his answers.
MAX_HELD = 32
# Who shares one bucket because no roster names him; a site's name is never empty.
STRANGERS = ""
# As many connections as one machine can keep half open within a handshake's time, and more than any federation has.
MAX_FILES = 65_536


@dataclass(slots=True)
class Bucket:
    """A token bucket: ``burst`` calls at once, ``rate`` a second from then on."""

    rate: float
    burst: float
    tokens: float
    filled: float

    @staticmethod
    def full(now: float, *, rate: float = CALLS_A_SECOND, burst: float = BURST) -> Bucket:
        return Bucket(rate, burst, burst, now)

    def take(self, now: float) -> bool:
        """Whether one more call may come now."""
        self.tokens = min(self.burst, self.tokens + self.rate * max(0.0, now - self.filled))
        self.filled = now
        if self.tokens < 1.0:
            return False
        self.tokens -= 1.0
        return True


@dataclass(slots=True)
class Share:
    """What one site uses of the aggregator right now."""

    bucket: Bucket
    calls: int = 0
    fetches: int = 0
    held: int = 0


class Limits:
    """The shares of all sites; one entry for each site of the roster that has ever called, and one for all others."""

    def __init__(self) -> None:
        self._shares: dict[str, Share] = {}

    def calls(self, site: str) -> int:
        """Calls of the site that are being answered."""
        share = self._shares.get(site)
        return share.calls if share else 0

    def enter(self, site: str, now: float) -> None:
        """Begin a call; :meth:`leave` ends it.

        Raises:
            TransportError: FS-1510 too many at a time, FS-1530 too many in a time.
        """
        share = self._shares.setdefault(site, Share(Bucket.full(now)))
        if share.calls >= MAX_CALLS:
            raise TransportError(
                "FS-1510",
                f"more than {MAX_CALLS} calls of {site!r} at a time",
                expected="one process that polls, beats and sends",
                cure="stop what else uses this site's identity",
            )
        if not share.bucket.take(now):
            raise TransportError(
                "FS-1530",
                f"more than {CALLS_A_SECOND:g} calls a second of {site!r}",
                expected=f"at most that, after a burst of {BURST:g}",
                cure="none needed for a site that waits; stop what else uses this site's identity",
            )
        share.calls += 1

    def leave(self, site: str) -> None:
        self._shares[site].calls -= 1

    def turn_away(self, now: float) -> bool:
        """Whether a call of who is no member, or none any more, is one too many in a time.

        All of them together have the rate of one site: each will be refused, and certificates are cheap to collect.
        """
        return not self._shares.setdefault(STRANGERS, Share(Bucket.full(now))).bucket.take(now)

    @contextmanager
    def fetching(self, site: str) -> Iterator[None]:
        """One of few downloads at a time; TransportError FS-1510."""
        share = self._shares[site]
        if share.fetches >= MAX_FETCHES:
            raise TransportError(
                "FS-1510",
                f"more than {MAX_FETCHES} downloads of {site!r} at a time",
                expected="one tensor after the other",
                cure="stop what else uses this site's identity",
            )
        share.fetches += 1
        try:
            yield
        finally:
            share.fetches -= 1

    @contextmanager
    def holding(self, site: str) -> Iterator[bool]:
        """Whether this site's refusal may be held back for a moment: not where many are already."""
        share = self._shares.get(site)
        if share is None or share.held >= MAX_HELD:
            yield False
            return
        share.held += 1
        try:
            yield True
        finally:
            share.held -= 1


def allow_connections(most: int = MAX_FILES) -> int:
    """Let this process have as many connections as the system allows it, ``most`` at the most; returns how many.

    The limit that a shell or systemd sets by default (1024) is for programs that use ``select``; strangers who open
    connections and say nothing would use it up before a handshake's time is over.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most if hard == resource.RLIM_INFINITY else min(most, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):
            return soft
        return wanted
    return most if soft == resource.RLIM_INFINITY else soft


__all__ = ["STRANGERS", "Bucket", "Limits", "allow_connections"]
