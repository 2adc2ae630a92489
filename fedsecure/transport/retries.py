"""When to try a call again: exponential back-off with full jitter, bounded by patience, and at the server's word.

Full jitter (each pause uniform between nothing and the back-off) spreads best what a restart of the aggregator makes
all sites do at once: Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015. No clock: time comes in.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

BASE_SECONDS = 0.2
MOST_SECONDS = 5.0
# Of a server that asks for more than that, nobody waits longer before the next try.
MOST_ASKED_SECONDS = 30.0
# When sites try again is no secret; the operating system's randomness makes two of them differ.
_DRAW = random.SystemRandom().random


@dataclass(slots=True)
class Retries:
    """The pauses of one call.

    Attributes:
        patience: seconds without progress after which the caller gives up.
        since: when the call last got on; ``None`` counts from the first failure, for calls that carry much.
    """

    patience: float
    since: float | None = None
    failures: int = 0

    def pause(self, now: float, *, asked: float = 0.0, draw: Callable[[], float] = _DRAW) -> float | None:
        """Seconds to wait after a failure, or None where patience is over.

        Args:
            now: the time.
            asked: what the other side asked to be left alone for; it comes first, jitter on top.
            draw: uniform in [0, 1).
        """
        self.since = now if self.since is None else self.since
        spread = min(MOST_SECONDS, BASE_SECONDS * 2.0 ** min(self.failures, 16))
        seconds = min(asked, MOST_ASKED_SECONDS) + spread * draw()
        self.failures += 1
        return None if now + seconds > self.since + self.patience else seconds

    def progressed(self) -> None:
        """Something new got through: patience and pauses begin anew."""
        self.since, self.failures = None, 0


__all__ = ["Retries"]
