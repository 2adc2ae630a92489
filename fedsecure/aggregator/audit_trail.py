"""The aggregator's side of the audit log: every happening of its runs as a line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedsecure.aggregator.happenings import Happening
from fedsecure.audit_log import AuditLog, Fact


class AuditTrail:
    """A listener that appends each happening to an audit log, on disk when it returns.

    Args:
        log: with ``sign``, the end of each run is signed.
    """

    def __init__(self, log: AuditLog) -> None:
        self._log = log

    def __call__(self, happening: Happening) -> None:
        """Raises EnvironmentProblem as :meth:`~fedsecure.audit_log.AuditLog.append`."""
        facts: dict[str, Fact] = {}
        for name, value in happening.facts.items():
            facts |= _flat(name, value)
        self._log.append(happening.kind, {**facts, "run": happening.run}, at=happening.at)
        if happening.kind == "run-ended":
            self._log.checkpoint()


def _flat(name: str, value: Any) -> dict[str, Fact]:
    """One fact as scalars and lists of words; what is neither, such as counts by class, stands as null."""
    if value is None or type(value) in (str, int, bool):
        return {name: value}
    if type(value) is float:
        return {name: value if math.isfinite(value) else None}
    if isinstance(value, Mapping):
        found: dict[str, Fact] = {}
        for inner, part in value.items():
            found |= _flat(f"{name}.{inner}", part)
        return found
    if isinstance(value, list | tuple):
        words = ["+".join(map(str, part)) if isinstance(part, list | tuple) else part for part in value]
        if all(isinstance(word, str) for word in words):
            return {name: words}
    return {name: None}


__all__ = ["AuditTrail"]
