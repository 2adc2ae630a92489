"""What happens in a run, told to whoever listens: the audit log, JSON logs, metrics, traces, and dashboards.

A listener learns what the operator's status shows and nothing more: no tensor, no key, no count of records.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

log = logging.getLogger("fedsecure.aggregator")

Kind = Literal[
    "run-started",  # sites, method, rounds
    "run-resumed",  # round, attempt: a new process took the run up again; last: the attempt that ended last, and how
    "run-paused",
    "run-continued",
    "run-ended",  # complete; code and reason where it was given up or stopped
    "site-joined",  # site, certificate_expires: Unix time
    "site-left",  # site, code
    "site-refused",  # site, code: a call that broke a rule
    "keys-prepared",  # epoch, holders
    "attempt-opened",  # round, attempt, stage, cohort, context
    "phase-closed",  # round, attempt, phase: the one that begins
    "attempt-summed",  # round, attempt, stage, survivors, seconds, bytes_up, bytes_down; suspects where somebody lied
    "attempt-aborted",  # round, attempt, stage, code, reason, seconds, bytes_up, bytes_down
    "round-saved",  # round, stage, step: the state after a sum is on disk; epsilon: planned so far, at full batch
    "evaluated",  # stage, and the evaluation's released figures
    "alarm",  # code, reason: something is odd, and the run goes on
]


@dataclass(frozen=True, slots=True)
class Happening:
    """One thing that happened.

    Attributes:
        kind: what.
        run: the run's id, 32 hexadecimal digits.
        at: unix time in seconds.
        facts: JSON values, by the names that stand beside each kind.
    """

    kind: Kind
    run: str
    at: float
    facts: Mapping[str, Any]


Listener = Callable[[Happening], None]


def tell_all(listeners: Iterable[Listener]) -> Listener:
    """One listener for many. One that fails is logged and does not keep the others, or the run, from going on."""
    those = tuple(listeners)

    def tell(happening: Happening) -> None:
        for listener in those:
            try:
                listener(happening)
            except Exception:
                log.exception("a listener failed on %s", happening.kind)

    return tell


__all__ = ["Happening", "Kind", "Listener", "tell_all"]
