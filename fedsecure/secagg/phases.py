"""The phases of a round at the aggregator, and the abort that ends each where too few messages came (secagg.md
§3.3, §3.6)."""

from __future__ import annotations

import enum


class Phase(enum.Enum):
    """What the server is collecting."""

    ADVERTISE = "advertise"
    SHARES = "shares"
    MASKED = "masked"
    SURVIVORS = "survivors"
    UNMASK = "unmask"
    DONE = "done"
    ABORTED = "aborted"


ORDER = list(Phase)
ABORTS = {
    Phase.ADVERTISE: "FS-1350",
    Phase.SHARES: "FS-1351",
    Phase.MASKED: "FS-1352",
    Phase.SURVIVORS: "FS-1353",
    Phase.UNMASK: "FS-1354",
}
