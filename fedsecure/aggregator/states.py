"""The round engine's states, and which may follow which: each change is a row in the database before it is told.

A run waits for sites, sets up keys, asks one attempt after the other through the phases of secure aggregation, computes
where its method has something to compute, and is over. Whatever state a process is killed in, the next one begins at
WAITING: an attempt in progress is lost with its keys, and the round's next attempt is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class RunState(StrEnum):
    """What a run is doing."""

    WAITING = "waiting"  # for sites, between two attempts
    KEYS = "keys"  # keys for the next rounds are being set up
    ADVERTISE = "advertise"
    SHARES = "shares"
    MASKED = "masked"
    SURVIVORS = "survivors"
    UNMASK = "unmask"
    COMPUTING = "computing"  # the method's own work between two questions
    PAUSED = "paused"  # by the operator
    OVER = "over"


_S = RunState
FOLLOWING: Mapping[RunState, frozenset[RunState]] = {
    _S.WAITING: frozenset({_S.WAITING, _S.KEYS, _S.ADVERTISE, _S.MASKED, _S.COMPUTING, _S.PAUSED, _S.OVER}),
    _S.KEYS: frozenset({_S.KEYS, _S.WAITING, _S.OVER}),
    _S.ADVERTISE: frozenset({_S.SHARES, _S.WAITING, _S.OVER}),
    _S.SHARES: frozenset({_S.MASKED, _S.WAITING, _S.OVER}),
    _S.MASKED: frozenset({_S.SURVIVORS, _S.WAITING, _S.OVER}),
    _S.SURVIVORS: frozenset({_S.UNMASK, _S.WAITING, _S.OVER}),
    _S.UNMASK: frozenset({_S.WAITING, _S.OVER}),
    _S.COMPUTING: frozenset({_S.WAITING, _S.OVER}),
    _S.PAUSED: frozenset({_S.WAITING, _S.OVER}),
    _S.OVER: frozenset(),
}

__all__ = ["FOLLOWING", "RunState"]
