"""Refused calls in the log: the first of its kind at once, the rest as a count, so that no caller can fill a disk.

A kind is a site and a code; both are bounded, by the roster and by this release. No clock: time comes in.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from fedsecure.errors import FedsecureError
from fedsecure.transport.status import printable

# How long the same refusal of the same site stays one line.
QUIET_SECONDS = 60.0
# What only says that the run is further on, or that a call may come again, is no sign of anything wrong.
_QUIET = ("FS-1325", "FS-1704", "FS-1705", "FS-1706")
log = logging.getLogger("fedsecure.aggregator")


@dataclass(slots=True)
class Kind:
    said: float
    since: int = 0


class Refusals:
    """One line for each kind of refusal and minute."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, str], Kind] = {}

    def note(self, site: str, error: FedsecureError, now: float) -> bool:
        """Log a refusal, or count it; ``site`` is empty where the caller is not in the roster.

        Returns:
            Whether it is worth telling those who listen to the run: the first of its kind in a minute, and a real one.
        """
        kind = self._kinds.get((site, error.code))
        if kind is not None and now - kind.said < QUIET_SECONDS:
            kind.since += 1
            return False
        more = f" ({kind.since} more like this since the last such line)" if kind is not None and kind.since else ""
        self._kinds[site, error.code] = Kind(now)
        level = logging.INFO if error.code in _QUIET else logging.WARNING
        log.log(level, "refused %s: %s: %s%s", site or "a stranger", error.code, printable(error.found), more)
        return level == logging.WARNING


__all__ = ["Refusals"]
